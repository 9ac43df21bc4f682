"""The plug-in that vLLM loads in each of its processes (entry-point group `vllm.general_plugins`).

It puts our backends in the place of vLLM's own of the same names, which they derive from and are
wherever no sparse_patch is asked for; and it has every configuration checked when it is made, in
the process that starts the engine, so that what cannot run is said before anything is loaded.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from ..profiles import shape_of
from ..targets import NATIVE_SPARSE
from .settings import KEY, VARIABLE, Settings

# vLLM's interfaces move: versions whose tests passed.
TESTED = ("0.32",)
BACKENDS = {
    "CPU_ATTN": "sparse_patch.serving.vllm_cpu.SparseCPUBackend",
    "FLASH_ATTN": "sparse_patch.serving.vllm_flash.SparseFlashBackend",
}
EXTENSION = "sparse_patch.serving.vllm_worker.SparseWorker"


def register() -> None:
    """What vLLM calls, maybe more than once."""
    from vllm.config import VllmConfig

    made = VllmConfig.__post_init__
    if hasattr(made, "checks_sparse_patch"):
        return

    @functools.wraps(made)
    def checked(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        configure(self)

    checked.checks_sparse_patch = True  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = checked
    if is_tested():
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        for name, path in BACKENDS.items():
            register_backend(AttentionBackendEnum[name], path)


def is_tested() -> bool:
    """Is this vLLM one that the plug-in was tested with?"""
    import vllm

    here: str = vllm.__version__
    return here.startswith(tuple(f"{version}." for version in TESTED))


def configure(config: Any) -> None:
    """Check vLLM's configuration, if it asks for sparse_patch, and write down what that means.

    Args:
        config: a `VllmConfig`, whose `additional_config` is completed, for other processes.

    Raises:
        ValueError: what is asked for does not exist, or cannot run on this engine; says why.
    """
    asked = asked_of(config)
    model = config.model_config
    if asked is None or model is None or getattr(model, "is_submodel_config", False):
        return
    if model.runner_type == "draft":
        return
    settings = Settings.read(asked)
    refuse_engine(config)
    settings.choose(shape_of(model.hf_text_config), config.parallel_config.tensor_parallel_size)
    config.additional_config = {**config.additional_config, KEY: settings.to_dict()}
    if not config.parallel_config.worker_extension_cls:
        config.parallel_config.worker_extension_cls = EXTENSION


def asked_of(config: Any) -> Any:
    """The settings in a configuration or the environment, unread; None: there are none."""
    extra = config.additional_config
    asked = extra.get(KEY) if isinstance(extra, dict) else None
    return asked if asked is not None else os.environ.get(VARIABLE)


def refuse_engine(config: Any) -> None:
    """Raise a ValueError where this engine, or what it is to do, is not among what is known."""
    import vllm
    from vllm.platforms import current_platform

    model, parallel = config.model_config, config.parallel_config
    if not is_tested():
        raise ValueError(
            f"sparse_patch: tested with vLLM {', '.join(TESTED)}, and this is {vllm.__version__}. "
            "Install a version that was tested, or leave sparse_patch out of the configuration"
        )
    if not isinstance(config.additional_config, dict):
        raise ValueError("sparse_patch: additional_config must be a dictionary here")
    kind = model.hf_text_config.model_type
    selects = kind in NATIVE_SPARSE or model.hf_config.model_type in NATIVE_SPARSE
    if model.use_mla or selects or hasattr(model.hf_text_config, "index_topk"):
        raise ValueError(
            f"sparse_patch: {kind} keeps its keys compressed (MLA) or "
            "selects keys itself; it runs with vLLM's own attention only"
        )
    if model.is_attention_free:
        raise ValueError(f"sparse_patch: {kind} has no attention layer to make sparse")
    if model.runner_type != "generate":
        raise ValueError("sparse_patch: made for generation; this model is to pool or embed")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ValueError(f"sparse_patch: {name} splits sequences, which is not supported")
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise ValueError(
            f"sparse_patch: made for vLLM on a CPU and on CUDA, not {current_platform.device_type}"
        )
    if current_platform.is_cuda():
        _choose_flash(config.attention_config)


def _choose_flash(attention: Any) -> None:
    """Have FlashAttention's backend chosen, in whose place ours stands."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    wanted = AttentionBackendEnum.FLASH_ATTN
    if attention.backend not in (None, wanted):
        raise ValueError(
            f"sparse_patch: --attention-backend {attention.backend.name} is not supported, only "
            "FLASH_ATTN"
        )
    attention.backend = wanted
