"""Evaluation and command line of sparse-patch: uses only the public API of `sparse_patch`."""
