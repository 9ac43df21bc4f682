"""Imports go one way, and nothing of ours stands in Hugging Face's way."""

import ast
import subprocess
import sys
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
