"""What the benchmarks share: one grid, one table, and what is timed on it."""
