"""Without a GPU, Triton kernels run in Triton's interpreter.

Triton looks whether it should when it is imported, and Transformers imports it: so this comes
first. It looks again when kernels run, so the variable stays.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    # Exact attention where sparse may be expected: tests that mean it assert it. (In pyproject.toml
    # this would import sparse_patch, and so Triton, before anything here.)
    config.addinivalue_line("filterwarnings", "ignore::sparse_patch.routing.SparsePatchWarning")
