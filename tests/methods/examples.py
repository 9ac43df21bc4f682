"""Parameters for the tests over all methods, from the methods themselves: `Method.examples`."""

import sparse_patch

_ALL = {name: sparse_patch.describe(name).examples for name in sparse_patch.list_methods()}

SPARSE = {name: examples["sparse"] for name, examples in _ALL.items()}
"""Sparse from about 100 tokens on (`dense` keeps all, by its nature)."""

KEEP_ALL = {name: examples["everything"] for name, examples in _ALL.items()}
"""Parameters that ask for everything: the plan is None, or shows every causal key."""

LONG = {name: examples["long"] for name, examples in _ALL.items() if "long" in examples}
"""Where a method's defaults keep all of 16k tokens: parameters under which it has to choose."""
