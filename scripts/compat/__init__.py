"""Every family of Transformers, tiny, patched and compared with itself unpatched."""
