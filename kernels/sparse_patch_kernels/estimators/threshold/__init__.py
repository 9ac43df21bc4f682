"""The largest entries whose sum stays within a limit."""

from .plain import largest_within

__all__ = ["largest_within"]
