"""Before anything imports Triton: its kernels run in its interpreter, on the CPU, in all tests.

Triton asks for this once, when functions are decorated. Tests of the compiler use a process of
their own. Workers of `pytest -n` leave the cores to one another: a thread each.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_report_header():
    from sparse_patch_kernels.cpu import native

    return f"sparse_patch: the CPU kernel multiplies bfloat16 by {native.products()}"
