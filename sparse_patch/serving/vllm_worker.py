"""What the workers of an engine answer, beside what vLLM has them do."""

from __future__ import annotations

from typing import Any

from .vllm_layers import account_of


class SparseWorker:
    """vLLM adds it to its worker class (`worker_extension_cls`)."""

    vllm_config: Any

    def sparse_patch_report(self) -> dict[str, Any]:
        """This worker's `Report.to_dict()`."""
        return account_of(self.vllm_config).report().to_dict()
