"""The Triton kernels. Importing this package needs no Triton; importing a module of it does."""
