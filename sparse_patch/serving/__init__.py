"""Sparse prefill inside engines that batch and page. vLLM: a plug-in, which it loads by itself.

    vllm serve MODEL --additional-config '{"sparse_patch": {"method": "strided:preset=fine"}}'

An adapter splits an engine's batch into sequences (`batch`), reads the keys and values that lie in
the engine's cache (`pages`), asks the same code as `sparse_patch.patch` whether a sequence runs
sparse, runs it (`layer`), and hands all others back to the engine. Nothing here imports an engine
before one runs.
"""

from .account import report

__all__ = ["report"]
