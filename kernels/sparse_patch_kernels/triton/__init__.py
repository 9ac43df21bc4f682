"""The Triton kernel of the op, and what all Triton kernels share. Its modules need Triton."""
