"""What a method keeps and loses on one prompt: head by head, row by row, as numbers and as maps.

Every layer is judged on the dense model's own activations: each layer's exact output goes on to the
next, so no layer is blamed for earlier ones. Their joint effect shows in the next token's
distribution, from a prefill of its own.

Exact attention is computed for a sample of query rows, a few at a time: memory is `[rows, kv_len]`
per head, never q_len x kv_len.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from sparse_patch_kernels import BlockPlan
from torch import Tensor, nn

from .call import Call
from .layer import LayerState, Run
from .patching import latest_method, patch
from .registry import Method
from .targets import Pipeline, module_of


@dataclass(frozen=True)
class HeadView:
    """One query head of one layer, over the judged rows.

    Attributes:
        head: its index.
        density: kept / causal, over all rows.
        recall: attention mass kept, mean over rows.
        worst_recall: of the row that keeps the least.
        worst_row: the position of that row.
        error: distance of sparse and exact outputs, relative to the exact ones (2-norms).
    """

    head: int
    density: float
    recall: float
    worst_recall: float
    worst_row: int
    error: float


@dataclass(frozen=True, eq=False)
class LayerView:
    """One layer.

    Attributes:
        layer: its index in the model.
        exact: why the layer ran exact; None where the method ran.
        heads: one per query head; empty where the layer runs exact.
        plan_seconds, op_seconds: time of choosing keys, and of attending to them.
        mass: float32 `[heads, bands, bands]`, share of a row's attention in each band of keys, mean
            over the judged rows of each band of queries; None where the layer is exact.
        lost: the part of `mass` that the plan leaves out.
        kept: share of the causal (row, key) pairs that the plan keeps.
    """

    layer: int
    exact: str | None = None
    heads: tuple[HeadView, ...] = ()
    plan_seconds: float = 0.0
    op_seconds: float = 0.0
    mass: Tensor | None = None
    lost: Tensor | None = None
    kept: Tensor | None = None

    @property
    def density(self) -> float:
        """Kept / causal, mean over heads; 1 where the layer is exact."""
        return statistics.fmean(head.density for head in self.heads) if self.heads else 1.0

    @property
    def recall(self) -> float:
        """Attention mass kept, mean over heads; 1 where the layer is exact."""
        return statistics.fmean(head.recall for head in self.heads) if self.heads else 1.0

    @property
    def error(self) -> float:
        """Relative error of the output, mean over heads; 0 where the layer is exact."""
        return statistics.fmean(head.error for head in self.heads) if self.heads else 0.0


@dataclass(frozen=True, eq=False)
class Inspection:
    """Result of `inspect`. `print` shows a table; `to_dict()` is JSON-ready, without the maps.

    Attributes:
        method: its repr.
        tokens: length of the prompt.
        rows: query rows judged per head.
        band: tokens per band of the maps.
        layers: every inspected layer.
        kl: KL(dense || sparse) of the next token, nats.
        dense_token, sparse_token: ids of the most likely next token.
        dense_seconds, sparse_seconds: time-to-first-token, one prefill each.
    """

    method: str
    tokens: int
    rows: int
    band: int
    layers: tuple[LayerView, ...]
    kl: float
    dense_token: int
    sparse_token: int
    dense_seconds: float
    sparse_seconds: float

    @property
    def density(self) -> float:
        """Kept / causal, mean over the inspected layers."""
        return statistics.fmean(layer.density for layer in self.layers)

    @property
    def recall(self) -> float:
        """Attention mass kept, mean over the inspected layers."""
        return statistics.fmean(layer.recall for layer in self.layers)

    @property
    def plan_seconds(self) -> float:
        """Seconds of choosing keys, all layers."""
        return sum(layer.plan_seconds for layer in self.layers)

    @property
    def op_seconds(self) -> float:
        """Seconds of attending to the chosen keys, all layers."""
        return sum(layer.op_seconds for layer in self.layers)

    def worst_heads(self, count: int = 10) -> list[tuple[int, HeadView]]:
        """(layer, head) of the heads that lose most attention, the worst first."""
        heads = [(layer.layer, head) for layer in self.layers for head in layer.heads]
        return sorted(heads, key=lambda pair: pair[1].recall)[:count]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "method": self.method,
            "tokens": self.tokens,
            "rows": self.rows,
            "band": self.band,
            "density": self.density,
            "recall": self.recall,
            "kl": self.kl,
            "dense_token": self.dense_token,
            "sparse_token": self.sparse_token,
            "seconds": {
                "dense": self.dense_seconds,
                "sparse": self.sparse_seconds,
                "plan": self.plan_seconds,
                "op": self.op_seconds,
                "rest": self.sparse_seconds - self.plan_seconds - self.op_seconds,
            },
            "layers": [
                {
                    "layer": layer.layer,
                    "exact": layer.exact,
                    "density": layer.density,
                    "recall": layer.recall,
                    "error": layer.error,
                    "plan_seconds": layer.plan_seconds,
                    "op_seconds": layer.op_seconds,
                    "heads": [vars(head) for head in layer.heads],
                }
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        lines = [
            f"{self.method}, {self.tokens:,} tokens, {self.rows:,} rows judged per head",
            f"{'layer':>5} {'density':>7} {'recall':>7} {'worst head':>10} {'error':>7}  exact",
        ]
        for layer in self.layers:
            worst = min((head.recall for head in layer.heads), default=1.0)
            lines.append(
                f"{layer.layer:>5} {layer.density:>7.3f} {layer.recall:>7.3f} {worst:>10.3f} "
                f"{layer.error:>7.3f}  {layer.exact or ''}"
            )
        lines.append(f"{'all':>5} {self.density:>7.3f} {self.recall:>7.3f}")
        same = "same as dense" if self.dense_token == self.sparse_token else "differs from dense"
        lines.append(f"next token: {same}, KL {self.kl:.4f} nats")
        lines.append(
            f"seconds: dense {self.dense_seconds:.2f}, sparse {self.sparse_seconds:.2f}, of which "
            f"choosing {self.plan_seconds:.2f} and attention {self.op_seconds:.2f}"
        )
        return "\n".join(line.rstrip() for line in lines)


def inspect(
    model: nn.Module | Pipeline,
    inputs: Tensor | Mapping[str, Tensor],
    method: str | Method | None = None,
    *,
    rows: int = 1024,
    resolution: int = 64,
    min_length: int = 0,
    on_layer: Callable[[int], None] | None = None,
    **options: Any,
) -> Inspection:
    """Show what a method keeps and loses on a prompt. Takes about three dense prefills.

    Args:
        model: see `patch`; an earlier patch stays as it was.
        inputs: token ids `[1, length]`, or what a tokenizer returns for one sequence.
        method: a name or a method object; default: the method of the model's latest patch.
        rows: query rows judged per head, spread evenly; 0: all.
        resolution: number of bands on each side of a map.
        min_length: see `patch`.
        on_layer: called with the index of each finished layer, for a progress bar.
        options: other arguments of `patch`, and the method's parameters.

    Raises:
        ValueError: no method is named and the model is not patched; the input is not one unpadded
            sequence; or `patch` raises it.
    """
    if rows < 0 or resolution < 1:
        raise ValueError(f"rows={rows} must be 0 (all) or more, resolution={resolution} at least 1")
    arguments = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    ids = arguments["input_ids"]
    if ids.ndim != 2 or len(ids) != 1 or not ids.shape[1]:
        raise ValueError(
            "inspect: input_ids must be [1, length], one sequence of at least one token; got "
            f"{list(ids.shape)}"
        )
    mask = arguments.get("attention_mask")
    if mask is not None and not bool((mask != 0).all()):
        raise ValueError("inspect: this sequence is padded; give it without its padding")
    chosen = latest_method(model) if method is None else method
    model = module_of(model)
    observer = _LayerObserver(ids.shape[1], rows, resolution, on_layer)
    with torch.inference_mode():
        with patch(model, "dense", min_length=0):
            dense, dense_seconds = _prefill(model, arguments)
        with patch(model, chosen, min_length=min_length, min_queries=0, **options) as handle:
            sparse, sparse_seconds = _prefill(model, arguments)
            handle.observe(observer.look)
            _prefill(model, arguments)
    judged = {view.layer: view for view in observer.views}
    views = [
        judged.get(report.layer, LayerView(report.layer, ", ".join(report.exact) or "in chunks"))
        for report in handle.report().layers
    ]
    log_p, log_q = dense.log_softmax(-1), sparse.log_softmax(-1)
    return Inspection(
        method=repr(handle.method),
        tokens=ids.shape[1],
        rows=observer.n_rows,
        band=observer.band,
        layers=tuple(views),
        kl=float((log_p.exp() * (log_p - log_q)).sum()),
        dense_token=int(dense.argmax()),
        sparse_token=int(sparse.argmax()),
        dense_seconds=dense_seconds,
        sparse_seconds=sparse_seconds,
    )


def _prefill(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """Float32 logits `[vocab]` of the next token, and seconds."""
    start = time.perf_counter()
    logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    logits.sum().item()  # waits for a GPU
    return logits, time.perf_counter() - start


class _LayerObserver:
    """Observer of each layer: returns exact attention, and records what sparse attention would do.

    Attributes:
        views: of the layers so far.
        band: tokens per band.
        n_rows: rows judged per head.
    """

    def __init__(
        self, tokens: int, rows: int, resolution: int, on_layer: Callable[[int], None] | None
    ) -> None:
        self.views: list[LayerView] = []
        self._tokens = tokens
        self.band = max(1, -(-tokens // resolution))
        bands = -(-tokens // self.band)
        per_band = self.band if rows == 0 else max(1, min(self.band, rows // bands))
        # Evenly in each band, its last row included: a prompt ends with its question.
        steps = (torch.arange(1, per_band + 1) * self.band // per_band) - 1
        self._positions = [
            (first + steps)[first + steps < tokens] for first in range(0, tokens, self.band)
        ]
        if tokens - 1 not in self._positions[-1].tolist():
            last = torch.tensor([tokens - 1])
            self._positions[-1] = torch.cat([self._positions[-1], last])
        self.n_rows = sum(map(len, self._positions))
        self._on_layer = on_layer

    def look(
        self, state: LayerState, q: Tensor, k: Tensor, v: Tensor, call: Call, run: Run
    ) -> Tensor:
        """See `layer.Observer`: the exact output goes on to the next layer."""
        exact = call.attend(q[None], k[None], v[None])[0]
        if q.shape[1] != self._tokens:  # a chunk of the prompt
            return exact
        assert run.plan is not None
        assert run.out is not None
        view = self._view(state.layer, q, k, run.plan, call, run.out, exact)
        planning, attending = run.planning or 0.0, run.attending or 0.0
        self.views.append(replace(view, plan_seconds=planning, op_seconds=attending))
        if self._on_layer is not None:
            self._on_layer(state.layer)
        return exact

    def _view(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        plan: BlockPlan,
        call: Call,
        out: Tensor,
        exact: Tensor,
    ) -> LayerView:
        heads, bands = q.shape[0], len(self._positions)
        maps = torch.zeros(3, heads, bands, bands, device=q.device)
        kept_rows = []
        for band, positions in enumerate(self._positions):
            rows = positions.to(q.device)
            probs, visible = self._truth(q, k, plan, call, rows)
            kept_rows.append((probs * visible).sum(-1))
            causal = torch.arange(probs.shape[2], device=q.device) <= rows[:, None]
            maps[0, :, band] = self._by_band(probs).mean(1)
            maps[1, :, band] = self._by_band(probs * ~visible).mean(1)
            pairs = self._by_band(causal.float()).sum(0)
            maps[2, :, band] = self._by_band(visible.float()).sum(1) / pairs.clamp(min=1)
        recall = torch.cat(kept_rows, 1)
        positions_judged = torch.cat(self._positions)
        wrong = (out[:, positions_judged].float() - exact[:, positions_judged].float()).norm(
            dim=(1, 2)
        )
        error = wrong / exact[:, positions_judged].float().norm(dim=(1, 2)).clamp(min=1e-30)
        worst, at = recall.min(1)
        density = plan.head_density().repeat_interleave(heads // plan.heads)
        views = [
            HeadView(
                head=head,
                density=float(density[head]),
                recall=float(recall[head].mean()),
                worst_recall=float(worst[head]),
                worst_row=int(positions_judged[at[head]]),
                error=float(error[head]),
            )
            for head in range(heads)
        ]
        mass, lost, kept = maps.cpu()
        return LayerView(layer, None, tuple(views), mass=mass, lost=lost, kept=kept)

    def _truth(
        self, q: Tensor, k: Tensor, plan: BlockPlan, call: Call, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Dense probabilities float32 `[heads, rows, keys]`, keys up to the last row, and bool of
        that
        shape: which keys the plan shows. Keys in pooled groups do not count as shown."""
        end = int(rows[-1]) + 1
        heads, _, dim = q.shape
        key = torch.arange(end, device=q.device)
        queries = (q[:, rows - plan.q_offset].float() * call.scale).view(len(k), -1, dim)
        scores = (queries @ k[:, :end].float().mT).view(heads, len(rows), end)
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        causal = key <= rows[:, None]
        probs = scores.masked_fill_(~causal, float("-inf")).softmax(-1)
        near = (key < plan.sink) | (rows[:, None] - key < plan.window)
        blocks = ((rows - plan.q_offset) // plan.block_q).tolist()
        lists = []
        for head in range(plan.heads):
            listed = {b: plan.listed_keys(head, b)[:end].to(q.device) for b in sorted(set(blocks))}
            lists.append((torch.stack([listed[b] for b in blocks]) | near) & causal)
        return probs, torch.stack(lists).repeat_interleave(heads // plan.heads, 0)

    def _by_band(self, x: Tensor) -> Tensor:
        """Sums of each band of keys: `[..., keys]` -> `[..., bands]`."""
        pad = len(self._positions) * self.band - x.shape[-1]
        x = torch.nn.functional.pad(x, (0, pad))
        return x.reshape(*x.shape[:-1], -1, self.band).sum(-1)
