"""Binary scans through chunks of keys."""

from .plain import scan_chunks

__all__ = ["scan_chunks"]
