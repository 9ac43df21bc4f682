"""Rankings of blocks by score, and what a ranking loses on rows that it was not made from."""

from .plain import add_losses, rank, rank_and_test

__all__ = ["add_losses", "rank", "rank_and_test"]
