"""What the studies share: methods at equal density, prompts that are read twice, the oracle."""
