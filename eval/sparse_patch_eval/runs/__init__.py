"""Evaluations of several methods on many samples: asking, storing and reading them."""
