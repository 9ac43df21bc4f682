"""One file a method; importing this package registers them all."""

from . import a_shape, dense, flexprefill

__all__ = ["a_shape", "dense", "flexprefill"]
