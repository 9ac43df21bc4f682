"""Benchmarks of the Hugging Face hub, by lm-eval's definitions, with our changes."""
