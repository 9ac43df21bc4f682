"""Imports go one way, and nothing of ours stands in Hugging Face's way."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code, cwd=ROOT):
    path = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]
    script = f"import sys; sys.path[:0] = {path!r}\n{code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize(
    ("package", "banned"),
    [
        ("sparse_patch_kernels", ["transformers", "sparse_patch", "sparse_patch_eval", "triton"]),
        ("sparse_patch", ["sparse_patch_eval", "matplotlib", "lm_eval"]),
    ],
)
def test_a_package_loads_nothing_above_it(package, banned):
    done = run(f"import {package}; print([m for m in {banned!r} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_our_source_folders_are_no_packages():
    """A package named `kernels` would shadow the one of Hugging Face that Transformers imports."""
    for folder in ("kernels", "eval", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()
    done = run("from transformers import LlamaForCausalLM; print('fine')")
    assert done.stdout.strip() == "fine", done.stderr


def imports_of(package):
    """Which modules of a package each of them imports, wherever in its text: `{module: {module}}`.

    What is loaded by name at run time counts too. That a module has its packages loaded before it
    does not: none would be without a circle.
    """
    paths = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to((ROOT / package).parent).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for module, path in paths.items():
        base = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                above = base.split(".")[: len(base.split(".")) + 1 - node.level]
                source = ".".join([*(above if node.level else []), *filter(None, [node.module])])
                inner = (f"{source}.{alias.name}" for alias in node.names)
                names.update(name if name in paths else source for name in inner)
        if path.name == "plain.py":
            names.update(f"{base}.{name}" for name in ("kernel", "native"))
        if module == "sparse_patch_kernels.ops":
            names.update(
                f"{base}.{name}" for name in ("cpu.forward", "triton.forward", "reference")
            )
        graph[module] = (names & paths.keys()) - {module}
    return graph


@pytest.mark.parametrize("package", ["kernels/sparse_patch_kernels", "sparse_patch"])
def test_modules_import_one_another_without_a_circle(package):
    graph = imports_of(package)
    order = list(TopologicalSorter(graph).static_order())  # raises where there is a circle
    assert set(order) == graph.keys()


def test_imports_are_found_wherever_they_stand():
    graph = imports_of("kernels/sparse_patch_kernels")
    assert graph["sparse_patch_kernels.plan"] == {
        f"sparse_patch_kernels.{name}" for name in ("counting", "plan_layout", "runs")
    }
    search = "sparse_patch_kernels.estimators.tree_search"
    assert {f"{search}.kernel", f"{search}.native"} < graph[f"{search}.plain"]


# Each room of sparse_patch_eval imports from itself and from rooms before it, so none goes round.
ORDER = "base inputs tasks tasks.hub ask runs report tuning lm_eval_model cli".split()  # noqa: SIM905
EVAL = ROOT / "eval" / "sparse_patch_eval"


def room_of(module):
    """The room of a dotted name below sparse_patch_eval: the longest that it begins with."""
    return max((room for room in ORDER if f"{module}.".startswith(f"{room}.")), key=len)


def imported(path):
    """The modules of sparse_patch_eval that a file names in its imports, wherever they stand."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.startswith("sparse_patch_eval."))


def test_rooms_of_the_evaluation_have_one_order():
    up = []
    for path in sorted(EVAL.glob("*/**/*.py")):
        place = path.relative_to(EVAL).with_suffix("")
        own = room_of(".".join(place.parts))
        for name in imported(path):
            room = room_of(name.removeprefix("sparse_patch_eval."))
            if ORDER.index(room) > ORDER.index(own):
                up.append(f"{place} imports {name}")
    assert up == []


def test_every_module_of_the_evaluation_is_in_a_room():
    assert [path.name for path in EVAL.glob("*.py")] == ["__init__.py"]
    folders = {path.parent.relative_to(EVAL).as_posix() for path in EVAL.glob("*/**/*.py")}
    assert folders == {room.replace(".", "/") for room in ORDER}
