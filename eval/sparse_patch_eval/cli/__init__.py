"""The `sparse-patch` command."""
