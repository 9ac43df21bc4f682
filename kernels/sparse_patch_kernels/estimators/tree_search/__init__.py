"""A beam search down a binary tree of key leaves."""

from .plain import search_leaves
from .tree import Tree

__all__ = ["Tree", "search_leaves"]
