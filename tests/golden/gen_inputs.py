"""Deterministic, numpy-only generator of attention-like q/k/v for golden tests.

    q, k, v = make_qkv(seed, seqlen, n_q_heads, n_kv_heads, head_dim)

returns float32 arrays  q [1, N, Hq, D], k [1, N, Hkv, D], v [1, N, Hkv, D]
(layout: batch, sequence, heads, dim).  Every value is rounded to the bfloat16
grid, so casting to bf16 loses nothing and fp32 and bf16 runs see equal inputs.
All arithmetic is float64 before that single rounding, and the random numbers
come from numpy's frozen legacy MT19937 stream (RandomState), so the arrays are
expected to be the same on every machine; `digest(q, k, v)` (sha256, first 16
hex digits) is stored with each golden file so that a test can check it.

Structure of one head (D is split in three parts):
  dims [0, D/2)      position part, RoPE-like: scores depend on (t_q - t_k) and
                     peak at a per-query-head offset        -> slash patterns
  dims [D/2, 3D/4)   topic part: piecewise-smooth low-rank signal shared by q/k
                     (segments of 90..400 tokens)           -> block patterns
  dims [3D/4, D)     marker part: token 0 and a few random tokens carry a
                     common direction all queries look for  -> vertical patterns
Query heads differ in how much they weigh each part (HEAD_KINDS, cycled).
"""

import hashlib

import numpy as np

# (topic weight, marker weight, position weight, offset in tokens) in logits
HEAD_KINDS = [
    (3.0, 0.0, 0.0, 0),  # 0 smooth topic head  (block / query-aware)
    (0.5, 7.0, 5.0, 0),  # 1 sink + local window
    (1.0, 2.0, 8.0, 217),  # 2 off-diagonal slash at distance 217
    (2.0, 6.5, 0.0, 0),  # 3 topic head with strong vertical columns
    (1.5, 0.0, 1.0, 40),  # 4 flat smooth head
    (0.0, 8.5, 7.0, 96),  # 5 few verticals + slash at 96
]


def round_bf16(x):
    """Round-to-nearest-even to the bfloat16 grid; returns float32."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    u = x.view(np.uint32).astype(np.uint64)
    u = (u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000
    return u.astype(np.uint32).view(np.float32).reshape(x.shape)


def digest(*arrays):
    h = hashlib.sha256()
    for a in arrays:
        h.update(np.ascontiguousarray(a, dtype=np.float32).tobytes())
    return h.hexdigest()[:16]


def _topic_signal(rng, n, dim, n_topics=6):
    """[n, dim] unit-norm, piecewise smooth; also returns the topic bank."""
    bank = rng.standard_normal((n_topics, dim))
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    sig = np.empty((n, dim))
    t = 0
    while t < n:
        length = int(rng.randint(90, 401))
        mix = rng.uniform(0.0, 1.0, n_topics) ** 3
        vec = mix @ bank
        sig[t : t + length] = vec / np.linalg.norm(vec)
        t += length
    # smooth the segment borders with a 33-tap box filter
    pad = np.pad(sig, ((16, 16), (0, 0)), mode="edge")
    csum = np.vstack([np.zeros((1, dim)), np.cumsum(pad, axis=0)])
    return (csum[33:] - csum[:-33]) / 33.0


def make_qkv(seed, seqlen, n_q_heads, n_kv_heads, head_dim, kinds=None, q_scale=None):
    """kinds: per-query-head index into HEAD_KINDS (default: cycled).
    q_scale: per-query-head power-of-two factor on q (exact in bf16); large
    values make far blocks underflow to probability exactly 0."""
    rng = np.random.RandomState(seed)
    n, d = seqlen, head_dim
    group = n_q_heads // n_kv_heads
    if kinds is None:
        kinds = [i % len(HEAD_KINDS) for i in range(n_q_heads)]
    dp, dt = d // 2, d // 4
    dm = d - dp - dt
    half = dp // 2
    freq = 2.0 * np.pi / np.geomspace(6.0, 900.0, half)
    pos = np.arange(n, dtype=np.float64)[:, None]
    root = np.sqrt(float(d))

    q = np.zeros((1, n, n_q_heads, d))
    k = np.zeros((1, n, n_kv_heads, d))
    v = rng.standard_normal((1, n, n_kv_heads, d))
    topics, markers = [], []
    for g in range(n_kv_heads):
        sig = _topic_signal(rng, n, dt)
        mdir = rng.standard_normal(dm)
        mdir /= np.linalg.norm(mdir)
        n_mark = 3 + n // 400
        where = np.unique(np.concatenate([[0], rng.randint(0, n, n_mark)]))
        strength = np.zeros(n)
        strength[where] = rng.uniform(0.7, 1.0, len(where))
        strength[0] = 1.0
        ang = pos * freq
        k[0, :, g, :half] = np.cos(ang) / np.sqrt(half)
        k[0, :, g, half:dp] = np.sin(ang) / np.sqrt(half)
        k[0, :, g, dp : dp + dt] = sig
        k[0, :, g, dp + dt :] = strength[:, None] * mdir
        k[0, :, g] += 0.03 * rng.standard_normal((n, d))
        topics.append(sig)
        markers.append(mdir)
        v[0, :, g, :dt] += 1.5 * sig  # values carry the topic too
    for h in range(n_q_heads):
        g = h // group
        wt, wm, wp, off = HEAD_KINDS[kinds[h]]
        ang = (pos - off) * freq
        q[0, :, h, :half] = wp * np.cos(ang) / np.sqrt(half)
        q[0, :, h, half:dp] = wp * np.sin(ang) / np.sqrt(half)
        q[0, :, h, dp : dp + dt] = wt * topics[g]
        q[0, :, h, dp + dt :] = wm * markers[g]
        q[0, :, h] += 0.15 * rng.standard_normal((n, d))
    # logits above are q.k ; attention divides by sqrt(d), so put it back,
    # shared evenly between q and k
    q *= np.sqrt(root)
    k *= np.sqrt(root)
    q, k, v = round_bf16(q), round_bf16(k), round_bf16(v)
    if q_scale is not None:
        q = q * np.asarray(q_scale, dtype=np.float32)[None, None, :, None]
    return q, k, v


def load_inputs(inputs, folder="."):
    """inputs: the "inputs" entry of a golden file's config JSON."""
    import os

    if inputs["kind"] == "generated":
        q, k, v = make_qkv(
            *inputs["args"], kinds=inputs.get("kinds"), q_scale=inputs.get("q_scale")
        )
    else:  # bf16 bit patterns in a file
        z = np.load(os.path.join(folder, inputs["file"]))
        q, k, v = [
            (z[x].astype(np.uint32) << 16).view(np.float32) for x in ("q_bf16", "k_bf16", "v_bf16")
        ]
    n = inputs.get("crop")
    if n:
        q, k, v = q[:, :n], k[:, :n], v[:, :n]
    got = digest(q, k, v)
    if got != inputs["digest"]:
        raise ValueError("inputs differ from the golden run: %s != %s" % (got, inputs["digest"]))
    return q, k, v


if __name__ == "__main__":
    for args in [(1, 512, 4, 2, 64), (2, 1000, 4, 4, 128)]:
        a = make_qkv(*args)
        print(args, [x.shape for x in a], digest(*a))
