"""What a few queries give to each key."""

from .plain import key_scores, probe_lines, probe_mass

__all__ = ["key_scores", "probe_lines", "probe_mass"]
