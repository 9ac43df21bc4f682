"""Index lists of what a mask marks."""

from .plain import compact, lists_at_once

__all__ = ["compact", "lists_at_once"]
