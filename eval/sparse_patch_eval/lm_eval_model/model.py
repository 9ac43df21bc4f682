"""lm-eval's model `sparse_patch`: a Hugging Face model whose prefill runs a sparse method.

    python -m sparse_patch_eval.lm_eval_model run --model sparse_patch \\
        --model_args "pretrained=smollm2,method=flexprefill:gamma=0.95;min_budget=512" --tasks ...

    simple_evaluate(SparsePatchLM("smollm2", method="flexprefill:gamma=0.95"), tasks=[...])

It is lm-eval's own `HFLM` (all of its arguments pass through), patched after loading. lm-eval cuts
arguments at commas, so on its command line the parameters of a method are separated by `;`.

A likelihood is that of decoding: the context is prefilled once with the method, and every candidate
answer continues from its KV cache (`continuation="decode"`). HFLM instead prefills context and
answer together; `continuation="prefill"` does that, in batches whose padding no method sees.
Rolling likelihoods (perplexity) have no context and always use "prefill".
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

import sparse_patch
from sparse_patch import Method
from sparse_patch_eval.ask.answer import likelihood
from sparse_patch_eval.ask.prefill import prefill
from sparse_patch_eval.base.machine import machine
from sparse_patch_eval.inputs.models import code_help
from sparse_patch_eval.lm_eval_model.options import (
    CONTINUATIONS,
    PatchOptions,
    choose_device,
    parameters,
    read_method,
    source_of,
)
from sparse_patch_eval.lm_eval_model.scoring import Score, Scored, groups_of, score_batch
from sparse_patch_eval.lm_eval_model.tally import Sums, Tally

try:
    import lm_eval
    from accelerate import Accelerator, InitProcessGroupKwargs
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f'{error}; lm-eval comes with pip install "sparse-patch[eval]"') from error

_logger = logging.getLogger(__name__)


@register_model("sparse_patch")
class SparsePatchLM(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """HFLM with a sparse prefill.

    Args:
        pretrained: what HFLM takes (hub id, folder, a loaded model with its `tokenizer`), the alias
            "smollm2", or the path of a .gguf file.
        method: "NAME" or "NAME:key=value;key=value" (`preset=NAME` among them), a mapping with
            "name" and parameters, or a method object. "dense" leaves the model unpatched.
        method_args: further parameters, as a mapping, for values with commas, such as tuples (in
            lm-eval's JSON form of --model_args).
        patch_layers: `layers` of `sparse_patch.patch`; also "0;5;-1", or "::3".
        dense_layers, min_length, min_queries, measure_recall: of `sparse_patch.patch`; None is its
            default.
        patch_backend: its `backend`.
        continuation: "decode" scores an answer from the KV cache of its context, "prefill" context
            and answer in one forward, `batch_size` of them at a time.
        device: default: the GPU if there is one, else the CPU.
        device_map: as Transformers takes it; HFLM's `parallelize=True` is implied.
        options: all other arguments of HFLM. `softmax_dtype` must be float32, in which likelihoods
            are computed.

    A loaded model stays patched until `unpatch`.

    Raises:
        ValueError: an argument is wrong; the method's are checked before any weight is loaded.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        method: str | Mapping[str, Any] | Method = "dense",
        method_args: Mapping[str, Any] | None = None,
        patch_layers: Any = None,
        dense_layers: Any = None,
        min_length: int | None = None,
        min_queries: int | None = None,
        patch_backend: str | None = None,
        measure_recall: bool | int | None = None,
        continuation: str = "decode",
        device: str | None = None,
        **options: Any,
    ) -> None:
        self.method_name, self.method = read_method(method, method_args)
        self.patch_options = PatchOptions.read(
            patch_layers, dense_layers, min_length, min_queries, patch_backend, measure_recall
        )
        if continuation not in CONTINUATIONS:
            raise ValueError(f"continuation={continuation!r} must be one of {CONTINUATIONS}")
        if options.get("softmax_dtype") not in (None, "float32", torch.float32):
            raise ValueError("softmax_dtype: likelihoods are always computed in float32; drop it")
        if not isinstance(
            options.get("trust_remote_code", False), bool
        ):  # any text would count as true
            raise ValueError(
                f"trust_remote_code={options['trust_remote_code']!r} must be True or False"
            )
        self.continuation = continuation
        device = choose_device(device)
        if options.get("device_map") is not None:
            options["parallelize"] = True  # without it, HFLM drops the map
        pretrained, options = source_of(pretrained, device, options)
        split = options.get("tp_plan") is not None or (getattr(pretrained, "tp_size", 0) or 1) > 1
        self._start_processes(device, options.get("batch_size"), one_model=split)
        with code_help(pretrained):
            super().__init__(pretrained, device=device, **options)
        self._share_data()
        self.patch: sparse_patch.Patch | None = None
        self._tally: Tally | None = None
        if self.method is not None:
            chosen = self.patch_options.of(self._model)
            self.patch = sparse_patch.patch(self._model, self.method, **chosen)
            self._tally = Tally(self.patch)
        self._gathered: list[Sums] | None = None

    def _start_processes(self, device: str, batch_size: Any, one_model: bool) -> None:
        """Join the processes that were launched with this one, on all nodes.

        HFLM alone needs several GPUs on one node, and counts processes per node. It later finds
        what is set up here.
        """
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.tensor_parallel = several and one_model
        if several and not one_model:
            if str(batch_size).startswith("auto:"):
                # Each process would search its sizes at other places, and wait there for the
                # others.
                raise ValueError(f"batch_size={batch_size} needs one process; use auto or a number")
            forever = InitProcessGroupKwargs(timeout=timedelta(weeks=52))
            # Without `cpu`, the Accelerator takes a CPU machine for one process.
            self.accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[forever])

    def _share_data(self) -> None:
        """Give every process its share of the requests, unless all hold one model together."""
        if hasattr(self, "accelerator"):
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes

    def unpatch(self) -> None:
        """Restore the model; the report stays available."""
        if self.patch is not None and self._tally is not None:
            self._tally.remove()
            self.patch.remove()

    # --- several processes -----------------------------------------------------------------------

    @property
    def is_writer(self) -> bool:
        """True in exactly one of the processes that work on this evaluation."""
        return not dist.is_initialized() or dist.get_rank() == 0

    def share(self, rows: list[Any]) -> list[Any] | None:
        """The rows of all data-parallel processes, by process, in the writer; None elsewhere.

        Every process must call it. Tensor-parallel processes have equal rows: the writer's are
        used.
        """
        if self.world_size == 1:
            return rows if self.is_writer else None
        parts = self.gather_object(rows)
        return None if parts is None else [row for part in parts for row in part]

    def barrier(self) -> None:
        """Called by lm-eval in all processes after each type of request."""
        super().barrier()
        if self.world_size > 1:
            self._gather_sums()

    def _gather_sums(self) -> None:
        sums = Sums() if self._tally is None else self._tally.sums()
        parts: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(sums, parts if self.is_writer else None, dst=0)
        self._gathered = parts if self.is_writer else None

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Around the answers to one type of request.

        lm-eval takes tensor-parallel processes for one and never calls `barrier` there.
        """
        yield
        if self.tensor_parallel:
            self._gather_sums()

    # --- requests --------------------------------------------------------------------------------

    def encode_context(self, text: str) -> list[int]:
        """Tokens of a prompt, as `generate_until` and `loglikelihood` see it."""
        return self.tok_encode(text) or [self.prefix_token_id]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a prompt and of its continuation, as `loglikelihood` sees them.

        Spaces at the end of the prompt move to the continuation.
        """
        if context:
            prompt, rest = self._encode_pair(context, continuation)
            return list(prompt), list(rest)
        rest = self.tok_encode(continuation, add_special_tokens=False)
        if rest[:1] == [self.prefix_token_id]:
            return rest[:1], rest[1:]
        return [self.prefix_token_id], rest

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Score]:
        with self._answering():
            scores: list[Score] = super().loglikelihood(requests, self._silent(disable_tqdm))
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        with self._answering():
            scores: list[float] = super().loglikelihood_rolling(
                requests, self._silent(disable_tqdm)
            )
        return scores

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        with self._answering():
            texts: list[str] = super().generate_until(requests, self._silent(disable_tqdm))
        return texts

    def _silent(self, disable_tqdm: bool) -> bool:
        return disable_tqdm or not self.is_writer

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Score]:
        if self.backend != "causal":
            other_scores: list[Score] = super()._loglikelihood_tokens(
                requests, disable_tqdm, override_bs
            )
            return other_scores
        asked = [self._fit(Scored(*request)) for request in requests]
        together = self.continuation == "prefill" or override_bs is not None
        scores = self._by_prefill(asked, override_bs) if together else self._by_decode(asked)
        result: dict[int, Score] = {}
        with tqdm(
            total=len(asked), disable=self._silent(disable_tqdm), desc="loglikelihood requests"
        ) as bar:
            for number, score in scores:
                result[number] = score
                if asked[number].request is not None:  # rolling windows are cached as a whole
                    self.cache_hook.add_partial("loglikelihood", asked[number].request, score)
                bar.update(1)
        return [result[number] for number in range(len(asked))]

    def _fit(self, asked: Scored) -> Scored:
        """Cut the context as HFLM does: from the left, so that a forward has at most
        `max_length`."""
        room = self.max_length + 1 - len(asked.continuation)
        if not asked.context or not 0 < len(asked.continuation) <= self.max_length:
            raise ValueError(
                f"a context of at least one token and a continuation of 1 to {self.max_length} "
                f"(max_length) are needed, not {len(asked.context)} and "
                f"{len(asked.continuation)}: {str(asked.request)[-200:]}"
            )
        if len(asked.context) > room:
            _logger.warning(
                "a context of %d tokens is cut by its first %d: max_length is %d",
                len(asked.context), len(asked.context) - room, self.max_length,
            )  # fmt: skip
        return asked._replace(context=asked.context[-room:])

    def _by_decode(self, asked: Sequence[Scored]) -> Iterator[tuple[int, Score]]:
        """One prefill per context, from which its answers continue. The longest comes first."""
        for members in groups_of(asked, lambda item: item.context):
            yield from zip(members, self._go_on([asked[n] for n in members]), strict=True)

    def _go_on(self, asked: Sequence[Scored]) -> list[Score]:
        """Scores of one context's continuations. Its cache is freed before the next context."""
        ids = torch.tensor([asked[0].context], device=self.device)
        with self._autocast():
            start = prefill(self.model, ids)
            return [likelihood(self.model, start, item.continuation) for item in asked]

    def _by_prefill(self, asked: Sequence[Scored], size: int | None) -> Iterator[tuple[int, Score]]:
        """Context and answer in one forward, a batch at a time; equal inputs run once."""
        groups = groups_of(asked, lambda item: item.input)
        for batch in self._batches(asked, groups, size):
            continuations = [[asked[n].continuation for n in members] for members in batch]
            inputs = [asked[members[0]].input for members in batch]
            with self._autocast():
                batch_scores = score_batch(self.model, inputs, continuations, self.device)
            for members, scores in zip(batch, batch_scores, strict=True):
                yield from zip(members, scores, strict=True)

    def _batches(
        self, asked: Sequence[Scored], groups: list[list[int]], size: int | None
    ) -> Iterator[list[list[int]]]:
        """Groups in batches of `size` or as `batch_size` says; "auto:N" finds the size N times."""
        self.batch_sizes: dict[int, int] = {}  # HFLM puts those of the last call into the results
        position = 0
        while position < len(groups):
            count = size or self.batch_size
            if count == "auto":
                part = int(position * self.batch_schedule / len(groups))
                if part not in self.batch_sizes:
                    heads = [asked[members[0]] for members in groups]
                    self.batch_sizes[part] = self._detect_batch_size(heads, position)
                count = self.batch_sizes[part]
            yield groups[position : position + count]
            position += count

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        with contextlib.nullcontext() if self._tally is None else self._tally.paused():
            return int(super()._detect_batch_size(requests, pos))

    def _autocast(self) -> torch.autocast:
        kind = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=kind, enabled=kind is not None)

    # --- results ---------------------------------------------------------------------------------

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's, and under "sparse_patch" what the method did: see `sparse_patch_info`."""
        return {**super().get_model_info(), "sparse_patch": self.sparse_patch_info()}

    def sparse_patch_info(self) -> dict[str, Any]:
        """The method, its parameters, and its prefills so far, JSON-ready.

        `prefill` (None when dense) has calls, density over all of them (kept / causal, an exact
        call counts 1), density of the sparse calls, recall if measured, exact calls by reason, and
        the same by layer. A call is one sequence in one forward of one layer. After lm-eval's
        requests it covers all processes (in a tensor-parallel model each counts the calls for its
        own heads), and with data parallelism also the requests that lm-eval repeats to keep
        processes in step.
        """
        prefills: Sums | None = None
        if self._tally is not None:
            prefills = Sums.together(self._gathered or [self._tally.sums()])
        return {
            "method": self.method_name,
            "params": {} if self.method is None else parameters(self.method),
            "patch": {} if self.method is None else self.patch_options.given(),
            "continuation": self.continuation,
            "processes": len(self._gathered or [None]),
            "density": 1.0 if prefills is None else prefills.to_dict()["density"],
            "prefill": None if prefills is None else prefills.to_dict(),
            "machine": {**machine(), "lm_eval": lm_eval.__version__},
        }
