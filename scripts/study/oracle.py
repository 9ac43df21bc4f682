"""The least that any choice of blocks must keep: an oracle that knows the true attention mass.

For a head and a query block, the mass of a key block is the sum of the dense probabilities in it.
With the first block and a row's own always kept, the best choice of a given size takes the largest
masses, wherever they are: blocks of all heads and query blocks compete. No method with such blocks
reaches the same recall with fewer. Blocks are worked through one query block at a time: nothing of
length x length is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sparse_patch_eval.ask.capture import Attention
from sparse_patch_eval.ask.judge import sampled_blocks
from sparse_patch_eval.ask.true_attention import block_mass
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Oracle:
    """Blocks by mass, ready to be asked.

    Attributes:
        masses: float64 `[n]`, of the blocks that are a choice, largest first.
        block_k: keys in each of them.
        forced_mass: of the blocks that are always kept.
        forced_keys, all_keys: (query block, key) pairs of those, and of all causal blocks.
        rows: query rows, all heads together; a row's mass is 1.
    """

    masses: Tensor
    block_k: int
    forced_mass: float
    forced_keys: int
    all_keys: int
    rows: int

    def density(self, recall: float) -> float:
        """Least kept / causal at which the mean over rows of the mass kept is `recall`."""
        needed = recall * self.rows - self.forced_mass
        if needed <= 0:
            return self.forced_keys / self.all_keys
        running = self.masses.cumsum(0)
        # Rounding may leave the sum of everything just below what everything holds.
        count = min(int((running < needed).sum()) + 1, len(self.masses))
        return (self.forced_keys + count * self.block_k) / self.all_keys

    @staticmethod
    def join(parts: Sequence[Oracle]) -> Oracle:
        """One oracle for several layers or prompts, whose blocks then compete."""
        if len({part.block_k for part in parts}) != 1:
            raise ValueError("Oracle.join: the parts must be of one block size")
        return Oracle(
            masses=torch.cat([part.masses for part in parts]).sort(descending=True).values,
            block_k=parts[0].block_k,
            forced_mass=sum(part.forced_mass for part in parts),
            forced_keys=sum(part.forced_keys for part in parts),
            all_keys=sum(part.all_keys for part in parts),
            rows=sum(part.rows for part in parts),
        )


@torch.no_grad()
def oracle(
    layer: Attention, *, block_q: int = 128, block_k: int = 128, rows: int | None = None
) -> Oracle:
    """The oracle of one layer.

    Args:
        block_q, block_k: tokens per query block and key block.
        rows: look only at about so many query rows, those that `sparse_patch.recall` looks at;
            default: all.
    """
    heads, q_len, _ = layer.q.shape
    kv_len = layer.k.shape[1]
    offset = kv_len - q_len
    free, forced_mass, forced_keys, all_keys, n_rows = [], 0.0, 0, 0, 0
    for block in sampled_blocks(-(-q_len // block_q), block_q, rows):
        first = offset + block * block_q
        end = min(first + block_q, kv_len)
        own = torch.arange(first, end, device=layer.q.device) - offset
        mass = block_mass(layer, own, block_k).sum(1, dtype=torch.float64)
        mass = mass[:, : -(-end // block_k)]
        start = torch.arange(mass.shape[1], device=mass.device) * block_k
        keys = (end - start).clamp(max=block_k)
        forced = (start == 0) | (start + block_k > first)
        free.append(mass[:, ~forced].flatten())
        forced_mass += float(mass[:, forced].sum())
        forced_keys += heads * int(keys[forced].sum())
        all_keys += heads * end
        n_rows += heads * (end - first)
    masses = torch.cat(free).sort(descending=True).values.cpu()
    return Oracle(masses, block_k, forced_mass, forced_keys, all_keys, n_rows)
