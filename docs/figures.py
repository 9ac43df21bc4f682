"""Draw the README's figure from the tables under `results/`.

    python docs/figures.py

Writes `results/speed.png`: speed-up of time-to-first-token against prompt length, on a CPU and on a
GPU. Needs matplotlib (the extra `plot`).
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parents[1] / "results"
CPU = {
    "strided:preset=fine,gamma=0.93": "strided, recommended (gamma 0.93)",
    "xattention": "XAttention",
    "flexprefill:gamma=0.95,min_budget=512,block_size=64": "FlexPrefill",
}
GPU = {"flexprefill": "FlexPrefill", "proxyattn": "ProxyAttn", "pbs": "PBS-Attn"}
COLORS = {
    "strided, recommended (gamma 0.93)": "tab:blue",
    "XAttention": "tab:green",
    "FlexPrefill": "tab:red",
    "ProxyAttn": "tab:purple",
    "PBS-Attn": "tab:brown",
}

Lines = dict[str, list[tuple[int, float]]]


def main() -> None:
    cpu = [
        RESULTS / name / "table.md"
        for name in ("prefill_smollm2_bfloat16", "prefill_long_bfloat16")
    ]
    gpu = [RESULTS / "gpu_nvidia-h100-80gb-hbm3.md"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    draw(axes[0], lines(cpu, CPU, "speed-up (range)"), "CPU: SmolLM2-135M, 2 cores, bfloat16")
    draw(axes[1], lines(gpu, GPU, "dense / this"), "H100: 8 layers as in Llama 3.1 8B, bfloat16")
    axes[0].set_ylabel("dense time / sparse time")
    figure.savefig(RESULTS / "speed.png", dpi=110)


def lines(files: list[Path], names: dict[str, str], column: str) -> Lines:
    """Speed-ups by prompt length, of the methods named, from tables with such a column."""
    found: Lines = defaultdict(list)
    for file in files:
        head: list[str] = []
        for line in file.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if cells[0] == "tokens":
                head = cells
            elif column in head and len(cells) == len(head):
                row = dict(zip(head, cells, strict=True))
                if row["method"] in names:
                    speed_up = float(row[column].split("x")[0])
                    found[names[row["method"]]].append(
                        (int(row["tokens"].replace(",", "")), speed_up)
                    )
    return found


def draw(axes: plt.Axes, found: Lines, title: str) -> None:
    lengths = sorted({length for points in found.values() for length, _ in points})
    for name, points in found.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name, color=COLORS[name])
    axes.axhline(1, color="gray", linewidth=1, linestyle="--", label="dense")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
    axes.set_xlabel("prompt, tokens")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")


if __name__ == "__main__":
    main()
