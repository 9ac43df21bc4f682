"""What one package takes from another is public: in a module's `__all__`, or a registered method.

A module that has neither is private to its package. Tests may look into everything.
"""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "sparse_patch": "sparse_patch",
    "sparse_patch_kernels": "kernels/sparse_patch_kernels",
    "sparse_patch_eval": "eval/sparse_patch_eval",
}
USERS = [*PACKAGES.values(), "scripts", "docs", ".ci", "README.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


@functools.cache
def file_of(module, root=ROOT):
    """The file of a dotted name, or None where it is no module of ours."""
    package, *rest = module.split(".")
    if package not in PACKAGES:
        return None
    path = root.joinpath(PACKAGES[package], *rest)
    files = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)


@functools.cache
def public_names(module, root=ROOT):
    """What a module's `__all__` lists, and its classes under `@register`; none: it is private."""
    names = set()
    for node in ast.parse(file_of(module, root).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names |= {one.value for one in ast.walk(node.value) if isinstance(one, ast.Constant)}
        decorators = getattr(node, "decorator_list", [])
        if any(ast.unparse(one).startswith("register(") for one in decorators):
            names.add(node.name)
    return names


def is_public(name, root=ROOT):
    """Does a dotted name stand for something that a module publishes, or for such a module?"""
    source, _, last = name.rpartition(".")
    if file_of(source, root) and last in public_names(source, root):
        return True
    return file_of(name, root) is not None and bool(public_names(name, root))


def names_used(code, root=ROOT):
    """Dotted names that a text imports, loads by `import_module`, or reads off a module."""
    known = {}  # name in the text -> the module that it stands for
    nodes = list(ast.walk(ast.parse(code)))
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                known[alias.asname or first] = alias.name if alias.asname else first
                yield alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (one.value for one in node.args if isinstance(one, ast.Constant))
    for node in nodes:
        if isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", ast.unparse(node)):
            first, _, rest = ast.unparse(node).partition(".")
            yield f"{known.get(first, first)}.{rest}"


def private_uses(code, own="", root=ROOT):
    """The names of our packages that a text uses and that are not public; those of `own` may be."""
    for name in sorted(set(names_used(code, root))):
        ours = file_of(name, root) or file_of(name.rpartition(".")[0], root)
        if ours and name.split(".")[0] != own and not is_public(name, root):
            yield name


def texts(place):
    """The code in a folder or page, with its path: modules, and what pages show."""
    files = [place] if place.is_file() else sorted(place.rglob("*"))
    for path in files:
        if path.suffix == ".py":
            yield path, path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            yield from ((path, code) for code in BLOCK.findall(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("user", USERS)
def test_a_package_takes_public_names_of_others_only(user):
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, code in texts(ROOT / user)
        for name in private_uses(code, own=Path(user).name)
    ]
    assert found == []


@pytest.fixture
def tree(tmp_path):
    """A package with a public module, a private one, and a method."""
    package = tmp_path / "sparse_patch"
    (package / "methods").mkdir(parents=True)
    for name, text in {
        "__init__": '__all__ = ["patch"]',
        "files": '__all__ = ["read"]\ndef read(): ...\ndef helper(): ...',
        "inner": "def read(): ...",
        "methods/__init__": "",
        "methods/one": '@register("one")\n@dataclass\nclass One: ...\nclass Other: ...',
    }.items():
        (package / f"{name}.py").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "code",
    [
        "import sparse_patch\nsparse_patch.patch(model).anything",
        "import sparse_patch.files\nsparse_patch.files.read()",
        "from sparse_patch import files, patch\nfiles.read()",
        "from sparse_patch.files import read",
        "from sparse_patch.methods.one import One",
        "import_module('sparse_patch.files')",
        "import inner, numpy.inner\nother.sparse_patch.inner",
    ],
)
def test_public_names_may_be_used(tree, code):
    assert list(private_uses(code, root=tree)) == []


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import sparse_patch\nsparse_patch.inner", "inner"),
        ("import sparse_patch.inner", "inner"),
        ("import sparse_patch.inner as i", "inner"),
        ("import sparse_patch.files\nsparse_patch.files.helper()", "files.helper"),
        ("import sparse_patch.files as f\nf.helper()", "files.helper"),
        ("from sparse_patch import inner", "inner"),
        ("from sparse_patch import files as f\nf.helper()", "files.helper"),
        ("from sparse_patch.files import helper", "files.helper"),
        ("from sparse_patch.files import *", "files.*"),
        ("from sparse_patch.inner import read", "inner.read"),
        ("from sparse_patch.methods.one import Other", "methods.one.Other"),
        ("def late():\n    from sparse_patch.inner import read", "inner.read"),
        ("importlib.import_module('sparse_patch.inner')", "inner"),
    ],
)
def test_private_names_are_found_wherever_they_stand(tree, code, name):
    assert f"sparse_patch.{name}" in list(private_uses(code, root=tree))
    assert list(private_uses(code, own="sparse_patch", root=tree)) == []


def modules_of(package):
    """The dotted names of a package's modules."""
    for path in sorted((ROOT / PACKAGES[package]).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGES[package]).with_suffix("").parts
        yield ".".join([package, *parts]).removesuffix(".__init__")


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_public_has_no_underscore(package):
    names = {name for module in modules_of(package) for name in public_names(module)}
    assert [name for name in names if name.startswith("_")] in ([], ["__version__"])


@pytest.mark.parametrize("package", ["sparse_patch", "sparse_patch_kernels"])
def test_a_package_says_which_of_its_modules_are_public(package):
    text = ast.get_docstring(ast.parse(file_of(package).read_text(encoding="utf-8")))
    said = set(re.findall(r"^    ([\w.*]+)  ", text, re.M))
    public = {
        name.removeprefix(f"{package}.") for name in modules_of(package) if public_names(name)
    }
    # A folder's modules of one kind are said in one line, with a star.
    public -= {package}
    kinds = {re.sub(r"(?<=^methods\.)\w+|(?<=^estimators\.)\w+", "*", name) for name in public}
    assert said == kinds
