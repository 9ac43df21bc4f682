"""Means and sums of blocks."""

from .plain import grouped_scores, pool_mean, pool_sum

__all__ = ["grouped_scores", "pool_mean", "pool_sum"]
