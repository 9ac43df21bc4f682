"""What the Triton kernels compile to, without a GPU; see `scripts/compile_kernels.py`."""
