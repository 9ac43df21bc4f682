"""Seconds of attention on this CPU: exact, or sparse at some density.

`patch(..., min_length="auto")` uses them before and after planning. A cost model is measured once
per dtype, in a few seconds, and kept in the cache folder (`$SPARSE_PATCH_CACHE`, else
`~/.cache/sparse-patch`) for this CPU, number of threads and these versions. `measure()` returns one
to store elsewhere and to pass to `patch(..., costs=...)`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from sparse_patch_kernels import BlockPlan, block_sparse_attention
from sparse_patch_kernels.cpu.building import cache_folder, only_ours, private_folder
from sparse_patch_kernels.cpu.native import compiled
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .strict_json import read_json
from .version import __version__

# Query rows per block of the plan that keeps all.
_BLOCK = 128
# Tokens and heads of the timed calls; block sizes and density of the sparse ones.
_TINY, _NEAR, _FAR = 32, 1024, 4096
_HEADS, _KV_HEADS, _DIM = 2, 1, 64
_BLOCKS, _DENSITY = (64, 128), 0.3
# Bounds on the number of rounds and on their seconds together; seconds that a round repeats a call.
_LEAST_ROUNDS, _MOST_ROUNDS, _SECONDS = 2, 6, 2.0
_REPEAT_SECONDS = 0.02


@dataclass(frozen=True)
class Work:
    """The size of one causal attention call, whose queries are the last of its keys.

    Attributes:
        heads, kv_heads: of q, and of k and v.
        q_len, kv_len: tokens.
        dims: dimensions of q and of v together, the operations of a (query, key) pair.
        plain: neither soft cap nor sinks, so SDPA can do it.
    """

    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dims: int
    plain: bool = True

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, *, plain: bool = True) -> Work:
        """The work of q `[heads, q_len, dim]`, k `[kv_heads, kv_len, dim]` and v."""
        dims = q.shape[2] + v.shape[2]
        return cls(q.shape[0], k.shape[0], q.shape[1], k.shape[1], dims, plain)

    @property
    def pairs(self) -> float:
        """(query, key) pairs of one head that causal attention looks at."""
        return self.q_len * (self.kv_len - (self.q_len - 1) / 2)


@dataclass(frozen=True)
class Rate:
    """Seconds of a call: `call + heads * dims * (row * rows + pair * pairs)`."""

    call: float
    row: float
    pair: float

    def seconds(self, work: Work, rows: float, pairs: float) -> float:
        return self.call + work.heads * work.dims * (self.row * rows + self.pair * pairs)


@dataclass(frozen=True)
class CostModel:
    """Seconds of attention on one machine, for one dtype.

    Attributes:
        sdpa: PyTorch's SDPA; rows are rows of q.
        dense: the sparse op with a plan that keeps all; rows are rows of q.
        sparse: the sparse op with any plan; rows are keys that some query block reads.

    Raises:
        ValueError: a number is not finite and at least 0, or a rate is 0 altogether.
    """

    sdpa: Rate
    dense: Rate
    sparse: Rate

    def __post_init__(self) -> None:
        for field in fields(self):
            rate = asdict(getattr(self, field.name))
            numbers = rate.values()
            if not all(math.isfinite(x) and x >= 0 for x in numbers) or not any(numbers):
                raise ValueError(
                    f"CostModel: {field.name}={rate} must be finite numbers of seconds from 0, and "
                    "not all 0"
                )

    @classmethod
    def from_dict(cls, numbers: Mapping[str, Mapping[str, float]]) -> CostModel:
        """The inverse of `to_dict`.

        Raises:
            ValueError: `numbers` are not a cost model's.
        """
        try:
            rates = {
                field.name: Rate(**{key: float(x) for key, x in numbers[field.name].items()})
                for field in fields(cls)
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"CostModel: not the output of to_dict(): {error!r}") from error
        return cls(**rates)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """JSON-ready."""
        return asdict(self)

    def exact_by_op(self, work: Work) -> bool:
        """Is the sparse op with all keys the fastest way to exact attention?"""
        return not work.plain or self._dense(work) < self._sdpa(work)

    def exact_seconds(self, work: Work) -> float:
        """Seconds of exact attention, by the faster way."""
        return min(self._dense(work), self._sdpa(work)) if work.plain else self._dense(work)

    def sparse_seconds(self, work: Work, density: float, plan: BlockPlan | None = None) -> float:
        """Seconds of the op at this density, in blocks of `plan` (default: blocks of 128)."""
        rows = _BLOCK if plan is None else _rows_that_share(plan, work)
        kept = work.pairs * density
        return self.sparse.seconds(work, kept / rows, kept)

    def _dense(self, work: Work) -> float:
        return self.dense.seconds(work, work.q_len, work.pairs)

    def _sdpa(self, work: Work) -> float:
        # Its causal form needs as many queries as keys: with fewer, a mask hides what it computes.
        square = work.q_len in (1, work.kv_len)
        pairs = work.pairs if square else float(work.q_len * work.kv_len)
        return self.sdpa.seconds(work, work.q_len, pairs)


def keeps_all(q_len: int, kv_len: int) -> BlockPlan:
    """A plan that keeps every key."""
    return BlockPlan(q_len, kv_len, min(_BLOCK, q_len), sink=kv_len)


def _rows_that_share(plan: BlockPlan, work: Work) -> int:
    """Rows of q, over heads, that share one fetch of a key; at most the largest measured block."""
    together = work.heads // math.lcm(work.kv_heads, plan.heads)
    return min(min(plan.block_q, plan.q_len) * max(1, together), _BLOCKS[-1])


def measure(dtype: torch.dtype = torch.float32) -> CostModel:
    """Time attention on this CPU, with PyTorch's present number of threads: a few seconds.

    Calls take turns, and of each the fastest of several rounds counts.
    """
    q, k, v = _inputs(dtype)
    plans = {block: _random_plan(block) for block in _BLOCKS}
    calls: dict[tuple[str, int], Callable[[], Tensor]] = {}
    for n in (_TINY, _NEAR, _FAR):
        tensors = q[:, :n], k[:, :n], v[:, :n]
        calls["sdpa", n] = functools.partial(_sdpa, *tensors)
        calls["dense", n] = functools.partial(_op, *tensors, keeps_all(n, n))
    for block, plan in plans.items():
        calls["sparse", block] = functools.partial(_op, q, k, v, plan)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        best = _fastest(calls)
    rates = {}
    for name in ("sdpa", "dense"):
        points = [(n, n * (n + 1) / 2, best[name, n]) for n in (_NEAR, _FAR)]
        rates[name] = _rate(best[name, _TINY], points)
    kept = {block: plan.density * _FAR * (_FAR + 1) / 2 for block, plan in plans.items()}
    kept_points = [(kept[block] / block, kept[block], best["sparse", block]) for block in _BLOCKS]
    return CostModel(**rates, sparse=_rate(best["dense", _TINY], kept_points))


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(heads, _FAR, _DIM, generator=generator, dtype=torch.float32, device="cpu").to(
            dtype
        )
        for heads in (_HEADS, _KV_HEADS, _KV_HEADS)
    )
    return q, k, v


def _random_plan(block: int) -> BlockPlan:
    generator, n = torch.Generator().manual_seed(0), _FAR // block
    mask = (
        torch.rand(_HEADS, n, n, generator=generator, dtype=torch.float32, device="cpu") < _DENSITY
    )
    mask |= torch.eye(n, dtype=torch.bool, device="cpu")
    return BlockPlan.from_block_mask(mask, block_q=block, block_k=block)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)


def _op(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Tensor:
    return block_sparse_attention(q, k, v, plan, backend="cpu")


def _fastest(calls: Mapping[Any, Callable[[], Tensor]]) -> dict[Any, float]:
    """Seconds of the fastest call of each, over rounds."""
    best = dict.fromkeys(calls, math.inf)
    begin, done = time.perf_counter(), 0
    while done < _LEAST_ROUNDS or (done < _MOST_ROUNDS and time.perf_counter() - begin < _SECONDS):
        for name, call in calls.items():
            first = now = time.perf_counter()
            while now == first or now - first < _REPEAT_SECONDS:
                call()
                before, now = now, time.perf_counter()
                best[name] = min(best[name], now - before)
        done += 1
    return best


def _rate(call: float, points: Sequence[tuple[float, float, float]]) -> Rate:
    """The rate through two measured (rows, pairs, seconds); noise must not make it negative."""
    units = _HEADS * 2 * _DIM
    (rows, pairs, near), (rows_2, pairs_2, far) = (
        (a * units, b * units, max(seconds - call, 0.0)) for a, b, seconds in points
    )
    determinant = rows * pairs_2 - rows_2 * pairs
    row = (near * pairs_2 - far * pairs) / determinant
    pair = (rows * far - rows_2 * near) / determinant
    if row < 0:
        row, pair = 0.0, far / pairs_2
    elif pair < 0:
        row, pair = far / rows_2, 0.0
    return Rate(call, row, pair)


def of_this_machine(dtype: torch.dtype) -> CostModel:
    """The cost model for PyTorch's present number of threads: from the cache, or measured.

    A cache file that is damaged, of another set-up or of another user is ignored and measured anew;
    a cache folder that cannot be written gives one warning.
    """
    return _of_this_machine(dtype, torch.get_num_threads())


@functools.lru_cache(None)
def _of_this_machine(dtype: torch.dtype, threads: int) -> CostModel:
    setup = _machine(dtype, threads)
    digest = hashlib.sha256(json.dumps(setup).encode()).hexdigest()[:16]
    path = cache_folder() / "costs" / f"{digest}.json"
    cached = _read(path, setup)
    if cached is not None:
        return cached
    costs = measure(dtype)
    try:
        _write(path, {"machine": setup, "costs": costs.to_dict()})
    except OSError as error:
        _warn_unwritable(f"{error}")
    return costs


def _machine(dtype: torch.dtype, threads: int) -> dict[str, Any]:
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "dtype": str(dtype),
        "torch": torch.__version__,
        "sparse_patch": __version__,
        "kernel": compiled(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _read(path: Path, setup: Mapping[str, Any]) -> CostModel | None:
    try:
        if not only_ours(path):
            return None
        content = read_json(path)
        if content["machine"] != setup:
            return None
        return CostModel.from_dict(content["costs"])
    except (OSError, ValueError, KeyError, TypeError):  # no file, or not a cost model
        return None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    private_folder(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        new = Path(scratch) / path.name
        new.write_text(json.dumps(content, indent=1))
        new.chmod(0o600)
        new.replace(path)  # all at once: another process may be reading


@functools.lru_cache(1)
def _warn_unwritable(error: str) -> None:
    warnings.warn(
        f"sparse_patch: cannot store the measured costs of attention ({error}), so every process "
        "measures them anew, in a few seconds. Set SPARSE_PATCH_CACHE to a writable folder.",
        UserWarning,
        stacklevel=2,
    )
