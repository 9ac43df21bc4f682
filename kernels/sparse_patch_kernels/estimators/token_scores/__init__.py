"""Attention mass of block pairs."""

from .plain import antidiagonal_scores, by_block, pooled_rows, sampled_rows, token_scores

__all__ = ["antidiagonal_scores", "by_block", "pooled_rows", "sampled_rows", "token_scores"]
