"""From rows to targets and a Markdown report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sparse_patch_eval.base.markdown import table
from sparse_patch_eval.base.rows import Row

from gpu_checks.scale import Scale

PASS, MISS, UNKNOWN = "pass", "miss", "not measured"


@dataclass(frozen=True)
class Target:
    """What was to be reached, and what was."""

    name: str
    verdict: str
    measured: str


def of_kind(rows: Iterable[Row], *kinds: str) -> list[Row]:
    return [row for row in rows if row["kind"] in kinds]


def failures(rows: list[Row]) -> list[Row]:
    """Errors, comparisons that are not ok, and items whose process did not live to end them."""
    found = [row for row in rows if row["kind"] == "error" or row.get("ok") is False]
    ended = {(row["stage"], row["item"]) for row in of_kind(rows, "end")}
    lost = [row for row in of_kind(rows, "begin") if (row["stage"], row["item"]) not in ended]
    return found + [{**row, "error": "the process died or was stopped in this"} for row in lost]


def of_stage(rows: Iterable[Row], stage: str) -> list[Row]:
    """Those of a stage, or of a part of it."""
    return [row for row in rows if row["stage"].split()[0] == stage]


def targets(rows: list[Row], scale: Scale) -> list[Target]:
    """What must hold, and the speeds of issue 5: for an H100, bfloat16, head_dim 128."""
    compared = of_kind(rows, "parity", "estimator", "plan")
    found, left_out = failures(rows), of_kind(rows, "skipped")
    wrong, skipped = of_stage(found, "parity"), of_stage(left_out, "parity")
    methods = of_kind(rows, "method", "family")
    wrong_methods, no_methods = of_stage(found, "methods"), of_stage(left_out, "methods")
    op = [row for row in of_kind(rows, "op") if row["tokens"] >= scale.target]
    cost = [row for row in of_kind(rows, "estimator_time") if row["tokens"] == scale.target]
    long = [row for row in of_kind(rows, "prefill") if row["tokens"] >= scale.prefill_target]
    return [
        _target(
            "every kernel as the reference",
            compared,
            lambda: not wrong and not skipped,
            lambda: (
                f"{sum(row['ok'] for row in compared)} of {len(compared)} comparisons, "
                f"{len(wrong)} failures, {len(skipped)} not run"
            ),
        ),
        _target(
            "every method as on the CPU, in every family as eager attention",
            methods,
            lambda: not wrong_methods and not no_methods,
            lambda: (
                f"{sum(row['ok'] for row in methods)} of {len(methods)} comparisons, "
                f"{len(wrong_methods)} failures, {len(no_methods)} not run"
            ),
        ),
        _target(
            f"op within 1.15x of density x dense FlashAttention from {scale.target:,} tokens on",
            op,
            lambda: all(row["of_ideal"] <= 1.15 for row in op),
            lambda: _each(
                op, lambda r: f"{r['of_ideal']:.2f}x at {r['tokens']:,}, {r['density']:.0%}"
            ),
        ),
        _target(
            f"every estimator under 8 % of dense attention at {scale.target:,} tokens",
            cost,
            lambda: all(row["of_dense"] < 0.08 for row in cost),
            lambda: _each(cost, lambda r: f"{r['what']} {r['of_dense']:.1%}"),
        ),
        *(
            _faster_prefill(long, name, least)
            for name, least in (("proxyattn", 2.4), ("pbs", 2.75))
        ),
    ]


def _faster_prefill(rows: list[Row], method: str, least: float) -> Target:
    mine = [row for row in rows if row["method"] == method]
    return _target(
        f"prefill with {method} above {least}x of dense with FlashAttention, as in its paper, best "
        "of 128k and longer",
        mine,
        lambda: max(row["speed_up_over_flash"] for row in mine) > least,
        lambda: _each(
            mine,
            lambda r: (
                f"{r['speed_up_over_flash']:.2f}x at {r['tokens']:,}, density "
                f"{_number(r['density'])} ({r['speed_up']:.2f}x of what SDPA chooses)"
            ),
        ),
    )


def _target(
    name: str, rows: list[Row], reached: Callable[[], bool], measured: Callable[[], str]
) -> Target:
    if not rows:
        return Target(name, UNKNOWN, "")
    return Target(name, PASS if reached() else MISS, measured())


def _each(rows: Iterable[Row], say: Callable[[Row], str]) -> str:
    return "; ".join(map(say, rows))


def markdown(results: dict[str, Any]) -> str:
    """The report of a JSON file, as `gpu_check.py` writes it."""
    rows: list[Row] = results["rows"]
    parts = [f"# GPU check: {results['gpu']['name']}", _about(results)]
    if results["dry_run"]:
        parts.append(
            "**Dry run: toy sizes in Triton's interpreter. Times and targets mean nothing.**"
        )
    reached = ({**one, "target": one["name"], "": one["verdict"]} for one in results["targets"])
    parts += [
        "## Targets",
        _table(reached, "target", "", "measured"),
        "Stated for an H100 in bfloat16 at head_dim 128.",
        *_failures(results["failures"]),
        *_parity(rows),
        *_methods(rows),
        *_op(rows),
        *_selection(rows),
        *_prefill(rows),
        *_configurations(rows),
        *_skipped(rows, results["stages"]),
    ]
    return "\n\n".join(parts) + "\n"


def _about(results: dict[str, Any]) -> str:
    gpu = ", ".join(f"{name} {value}" for name, value in results["gpu"].items() if value)
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items() if value)
    return (
        f"`{results['command']}`, commit {results['commit'] or 'unknown'}, {results['started']}, "
        f"{results['seconds']:.0f} s.\n\nGPU: {gpu}.\n\nMachine: {machine}."
    )


# Of a row that failed, what tells why.
_TELLING = ("call", "config", "max_error", "of_allowed", "lse_of_allowed", "agreement", "repeats",
            "same_blind_rows")  # fmt: skip


def _failures(found: list[Row]) -> list[str]:
    if not found:
        return ["## Failures", "None."]
    lines = []
    for row in found:
        what = row.get("error") or ", ".join(f"{x} {row[x]}" for x in _TELLING if x in row)
        lines.append(f"- {row['stage']}, {row.get('item', '')}: {what}")
    return ["## Failures", "\n".join(lines), "Tracebacks are in the JSON file."]


def _parity(rows: list[Row]) -> list[str]:
    """The worst of each case over its configurations, dtypes side by side."""
    worst: dict[str, dict[str, Row]] = {}
    for row in of_kind(rows, "parity", "estimator"):
        call = row.get("call")
        cells = worst.setdefault(row["what"] + (f": {call}" if call else ""), {})
        known = cells.get(row["dtype"])
        if known is None or not row["of_allowed"] <= known["of_allowed"]:
            cells[row["dtype"]] = row
    lines = [
        {"what": what, **{dtype: _errors(cell) for dtype, cell in cells.items()}}
        for what, cells in worst.items()
    ]
    dtypes = sorted({dtype for cells in worst.values() for dtype in cells})
    plans = [
        {
            "method": row["what"],
            "configuration": row["config"],
            "density": _number(row["density"]),
            "agreement": f"{row['agreement']:.4f}",
            "largest error": f"{row['max_error']:.1e}",
            "of allowed": f"{row['of_allowed']:.2f}",
        }
        for row in of_kind(rows, "plan")
    ]
    return [
        "## Parity",
        "The largest error; in brackets its share of what rounding explains (above 1 fails), then "
        "its ratio to the error of plain PyTorch in that dtype. Against float64; estimators "
        "against their plain functions.",
        _table(lines, "what", *dtypes),
        "Whole plans with kernels against plans without, and the op on them:",
        _table(plans, "method", "configuration", "density", "agreement", "largest error",
               "of allowed"),
    ]  # fmt: skip


def _errors(row: Row) -> str:
    error, plain = row.get("max_error"), row.get("of_plain_error")
    ratio = "" if plain is None else f", {plain:.2f}x"
    text = f"({row['of_allowed']:.2g}{ratio})"
    return ("" if error is None else f"{error:.1e} ") + text + ("" if row["ok"] else " **wrong**")


def _by(rows: Iterable[Row], *fields: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of these fields, in their order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[field] for field in fields), []).append(row)
    return found


def _methods(rows: list[Row]) -> list[str]:
    lines = []
    for (method, parameters), mine in _by(of_kind(rows, "method"), "what", "parameters").items():
        sparse = [row for row in mine if not row.get("exact")]
        line = {"method": method, "parameters": parameters, "compared": len(mine)}
        if sparse:
            least, most = (pick(row["density"] for row in sparse) for pick in (min, max))
            line |= {
                "density": f"{least:.2f}-{most:.2f}",
                "agreement": f"{min(row['agreement'] for row in sparse):.4f}",
                "error, of allowed": f"{max(row['of_allowed'] for row in sparse):.2f}",
            }
        line["exact"] = len(mine) - len(sparse)
        line[""] = "" if all(row["ok"] for row in mine) else "**wrong**"
        lines.append(line)
    families = [
        {
            "family": family,
            "methods": sum(row["methods"] for row in mine),
            "keeps everything": f"{max(row['keeps_all'] for row in mine):.1e}",
            "padded row": f"{max(row['padded'] for row in mine):.1e}",
            "wrong": ", ".join(f"**{name}**" for row in mine for name in row["wrong"]),
        }
        for (family,), mine in _by(of_kind(rows, "family"), "what").items()
    ]
    return [
        "## Methods",
        "Plans on this device against the same method's on the CPU, as the share that both keep of "
        "the (row, key) pairs that either keeps, and the op on them (with steps of decode, where "
        "a method has its own); where a method wants exact attention, that it does on both.",
        _table(lines, "method", "parameters", "compared", "density", "agreement",
               "error, of allowed", "exact", ""),
        "Patched into tiny models: how far logits, of magnitude 1, are from eager attention's if "
        "all is kept, and those of a padded row from that row's alone if not.",
        _table(families, "family", "methods", "keeps everything", "padded row", "wrong"),
    ]  # fmt: skip


def _op(rows: list[Row]) -> list[str]:
    peers = {"op, ms": "op", "FlashAttention, ms": "flash", "cuDNN, ms": "cudnn",
             "FlexAttention, ms": "flex"}  # fmt: skip
    lines = [
        {
            "tokens": f"{row['tokens']:,}",
            "density": f"{row['density']:.3f}",
            **{title: _milliseconds(row[name]) for title, name in peers.items() if row.get(name)},
            "op / (density x Flash)": f"{row['of_ideal']:.2f}x",
            "op / (density x faster dense)": f"{row['of_ideal_fastest_dense']:.2f}x",
            "Flash / op": f"{row['speed_up']:.2f}x",
            "Flex / op": _number(row["speed_up_over_flex"], "x"),
            "host, ms": f"{row['op']['host_ms']:.2f}",
            "": "" if row["ok"] else "**wrong**",
        }
        for row in sorted(of_kind(rows, "op"), key=lambda r: (r["tokens"], r["density"]))
    ]
    return [
        "## The op",
        "Medians (lowest to highest), in turns. Random blocks, the diagonal and block 0; a list "
        "for each head. Host: until the call came back.",
        _table(lines, "tokens", "density", *peers, "op / (density x Flash)",
               "op / (density x faster dense)", "Flash / op", "Flex / op", "host, ms", ""),
    ]  # fmt: skip


def _selection(rows: list[Row]) -> list[str]:
    kinds = {"estimator_time": "estimator", "plan_time": "plan of", "plain_time": "plain"}
    found = of_kind(rows, *kinds)
    lines = []
    for (kind, what), mine in _by(found, "kind", "what").items():
        line = {"what": f"{kinds[kind]} {what}"}
        for row in mine:
            density = row.get("density")
            kept = "" if density is None else f", density {density:.2f}"
            line[f"{row['tokens']:,}"] = f"{row['of_dense']:.1%} ({row['ms']:.2f} ms{kept})"
        lines.append(line)
    return [
        "## Selection",
        "Time as a share of dense FlashAttention's at that length.",
        _table(lines, "what", *(f"{n:,}" for n in sorted({row["tokens"] for row in found}))),
    ]


def _prefill(rows: list[Row]) -> list[str]:
    models = of_kind(rows, "model")
    lines = [
        {
            "tokens": f"{row['tokens']:,}",
            "method": row["method"],
            "seconds": f"{row['seconds']:.3f}",
            "dense / this": f"{row['speed_up']:.2f}x",
            "FlashAttention / this": f"{row['speed_up_over_flash']:.2f}x",
            "density": _number(row["density"]),
            "a layer, ms": f"{row['seconds_per_layer'] * 1e3:.1f}",
            "32 layers, s": f"~{row['seconds_32_layers_estimated']:.2f}",
            "peak, GiB": f"{row['peak_gib']:.1f}",
            "rounds": row["rounds"],
            "exact calls": ", ".join(f"{why} {n}" for why, n in row["exact_calls"].items()),
        }
        for row in sorted(of_kind(rows, "prefill"), key=lambda row: row["tokens"])
    ]
    layers = models[0]["layers"] if models else "?"
    return [
        "## Prefill",
        f"Time-to-first-token of a model shaped like Llama 3.1 8B, {layers} layers of it, random "
        "weights with biases that make attention local: densities are arbitrary, read them with "
        "the times. ~: an estimate, for 32 layers, that counts all time as the layers'.",
        _table(lines, "tokens", "method", "seconds", "dense / this", "FlashAttention / this",
               "density", "a layer, ms", "32 layers, s", "peak, GiB", "rounds", "exact calls"),
    ]  # fmt: skip


def _configurations(rows: list[Row]) -> list[str]:
    timed = [
        {"configuration": row["config"], "tokens": row["tokens"], "ms": _milliseconds(row)}
        for row in of_kind(rows, "configuration")
    ]
    chosen = {
        (row["kernel"], str(row["values"]), row["config"]): {
            "kernel": row["kernel"],
            "class": ", ".join(f"{name} {value}" for name, value in row["values"]),
            "configuration": row["config"],
        }
        for row in of_kind(rows, "chosen")
        if row["values"]
    }
    return [
        "## Configurations",
        "Of the op, each by itself:",
        _table(timed, "configuration", "tokens", "ms"),
        "What each shape class runs with, tuned at the first length of its stage:",
        _table(chosen.values(), "kernel", "class", "configuration"),
    ]


def _skipped(rows: list[Row], stages: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"- {row['stage']}, {row['item']}: {row['reason']}" for row in of_kind(rows, "skipped")
    ]
    peers = {row["peer"]: row["reason"] for row in of_kind(rows, "peer_missing")}
    lines += [f"- {name} did not run: {reason}" for name, reason in peers.items()]
    spent = ", ".join(f"{one['name']} {one['seconds']:.0f} s" for one in stages)
    return ["## Not run", "\n".join(lines) or "Everything ran.", f"Stages: {spent}."]


def _milliseconds(timing: dict[str, Any]) -> str:
    return f"{timing['ms']:.2f} ({timing['low']:.2f}-{timing['high']:.2f})"


def _number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.2f}{unit}"


def _table(rows: Iterable[Row], *head: str) -> str:
    """Markdown, of rows by heading; what a row has not stays empty."""
    cells = ([str(row.get(name, "")).replace("|", "/") for name in head] for row in rows)
    return "\n".join(table(head, "l" * len(head), cells))
