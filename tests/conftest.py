"""Before anything imports Triton: its kernels run in its interpreter, on the CPU, in all tests.

Triton asks for this once, when functions are decorated. Tests of the compiler use a process of
their own.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
