"""Parameters with which every method shows what it does on a short sequence, and keeps everything.

The tests over all methods read these: a method that is not in both tables fails them.
"""

SPARSE = {
    "a_shape": {"sink": 3, "window": 21, "block_size": 16},
    "dense": {"block_size": 16},
    "dhsa": {"block_size": 16, "topk": 4, "dense_rows": 0},
    "flashprefill": {
        "block_size": 16,
        "alpha": 0.9,
        "sink_blocks": 0,
        "local_blocks": 1,
        "dense_rows": 0,
    },
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
    "mean_pool": {"block_size": 16, "gamma": 0.6},
    "minference": {"vertical": 30, "slash": 50},
    "moba": {"block_size": 16, "chunk_size": 16, "topk": 3},
    "pbs": {"block_size": 16, "segment": 32, "tau": 0.5},
    "power": {"block_size": 16, "local_blocks": 2},
    "prism": {"block_size": 16, "gamma": 0.5},
    "proxyattn": {"block_size": 16, "min_budget": 0, "gamma": 0.6, "stride_q": 4},
    "psa": {"block_size": 16, "thresholds": (0.3, 0.4, 0.5, 0.6), "similarity": -1, "stride_q": 4},
    "sparge": {"block_size": 32, "similarity": -1.0, "gamma": 0.5},
    "strided": {"block_size": 16, "gamma": 0.6, "stride": 4},
    "tri_shape": {"sink": 3, "window": 21, "dense_rows": 5, "block_size": 16},
    "xattention": {"block_size": 16, "gamma": 0.6, "stride": 4},
}
"""Sparse from about 100 tokens on (`dense` keeps all, by its nature)."""

KEEP_ALL = {
    "a_shape": {"window": 10_000},
    "dense": {},
    "dhsa": {"topk": 10_000},
    "flashprefill": {"alpha": 1e-300},
    "flexprefill": {"gamma": 1.0},
    "hip": {"mask_k": 100_000},
    "infinite_hip": {"window": 100_000},
    "mean_pool": {"gamma": 1.0},
    "minference": {"slash": 100_000},
    "moba": {"topk": 10_000},
    "pbs": {"tau": 1.0},
    "power": {"local_blocks": 10_000},
    "prism": {"gamma": 1.0},
    "proxyattn": {"gamma": 1.0},
    "psa": {"thresholds": (1.0, 1.0, 1.0, 1.0)},
    "sparge": {"gamma": 1.0},
    "strided": {"gamma": 1.0},
    "tri_shape": {"window": 10_000},
    "xattention": {"gamma": 1.0},
}
"""Parameters that ask for everything: the plan is None, or shows every causal key."""

LONG: dict[str, dict[str, object]] = {"moba": {"chunk_size": 512}}
"""Where a method's defaults keep all of 16k tokens: parameters under which it has to choose."""
