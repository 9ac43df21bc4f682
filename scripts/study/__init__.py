"""What the studies share: methods at equal density, the oracle, methods on some heads only."""
