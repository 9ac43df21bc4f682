"""The model `sparse_patch` of lm-eval, and lm-eval's command line with it."""
