"""What methods tell the worth of keys by, and lists of what they choose: a folder each.

    plain.py    what is computed, in PyTorch: the specification, which runs anywhere
    kernel.py   the same functions as Triton kernels, where it has any
    native.py   the same functions in C++, where it has any

A folder gives what its `plain.py` has; `dispatch` puts the others in its place where they run.
Shapes: q `[heads, q_len, dim]`, k `[kv_heads, kv_len, dim]`, block masks
`[heads, q_blocks, k_blocks]`. Blocks are counted from position 0.
"""

__all__ = ["TILE_ELEMENTS"]

# Most elements of what is pooled or reduced as it is made, at a time (16 MiB in float32): small
# tiles stay in the caches.
TILE_ELEMENTS = 1 << 22
