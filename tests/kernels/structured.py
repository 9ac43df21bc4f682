"""Queries and keys whose attention looks like a model's: a sink, neighbours, a few strong keys."""

import torch


def sequence(heads, kv_heads, q_len, kv_len, dim, dtype=torch.float32):
    """q `[heads, q_len, dim]`, the last rows; k `[kv_heads, kv_len, dim]`; the scale."""
    generator = torch.Generator().manual_seed(heads + q_len + kv_len + dim)

    def noise(*shape):
        return torch.randn(*shape, dim, generator=generator)

    wanted = noise(1, 1)
    angle = torch.arange(kv_len)[:, None] / torch.logspace(0.5, 2, dim)
    k = noise(kv_heads, kv_len) + 2 * angle.sin()
    k[:, 0] += 2 * wanted[:, 0]
    k[:, kv_len // 3 :: max(1, kv_len // 3)] += wanted
    q = noise(heads, q_len) + 2 * angle[kv_len - q_len :].sin() + wanted
    return q.to(dtype), k.to(dtype), dim**-0.5


def laid_out(x):
    """The same numbers as a model has them: `[seq, heads, dim]` in memory, inside of more."""
    heads, n, dim = x.shape
    wide = torch.full((n + 3, heads + 2, dim), float("nan"), dtype=x.dtype)
    view = wide[1:-2, 1:-1].transpose(0, 1)
    view.copy_(x)
    return view


def scattered(x):
    """The same numbers, neighbours in a row apart in memory."""
    return x.mT.contiguous().mT
