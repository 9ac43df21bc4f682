"""Parameters with which every method shows what it does on a short sequence, and keeps everything.

The tests over all methods read these: a method that is not in both tables fails them.
"""

SPARSE = {
    "a_shape": {"sink": 3, "window": 21, "block_size": 16},
    "dense": {"block_size": 16},
    "flexprefill": {"block_size": 16, "min_budget": 1, "gamma": 0.5},
    "hip": {"mask_k": 32, "block_q": 16, "block_k": 4, "sink": 4, "window": 16},
    "infinite_hip": {
        "chunks": (16, 4),
        "keep": (32, 16),
        "stride_q": (2, 1),
        "refresh": (4, 2),
        "early_layers": 0,
        "block_q": 16,
        "sink": 4,
        "window": 16,
    },
    "minference": {"vertical": 30, "slash": 50},
    "proxyattn": {"block_size": 16, "min_budget": 0, "gamma": 0.6, "stride_q": 4},
    "strided": {"block_size": 16, "gamma": 0.6, "stride": 4},
    "xattention": {"block_size": 16, "gamma": 0.6, "stride": 4},
}
"""Sparse from about 100 tokens on (`dense` keeps all, by its nature)."""

KEEP_ALL = {
    "a_shape": {"window": 10_000},
    "dense": {},
    "flexprefill": {"gamma": 1.0},
    "hip": {"mask_k": 100_000},
    "infinite_hip": {"window": 100_000},
    "minference": {"slash": 100_000},
    "proxyattn": {"gamma": 1.0},
    "strided": {"gamma": 1.0},
    "xattention": {"gamma": 1.0},
}
"""Parameters that ask for everything: the plan is None, or shows every causal key."""

LONG: dict[str, dict[str, object]] = {}
"""Where a method's defaults keep all of 16k tokens: parameters under which it has to choose."""
