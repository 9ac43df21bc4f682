"""Imports go one way, and nothing of ours stands in Hugging Face's way."""

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
