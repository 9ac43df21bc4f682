"""From rows to targets and a Markdown report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

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


def _of_stage(rows: Iterable[Row], stage: str) -> list[Row]:
    return [row for row in rows if row["stage"].split()[0] == stage]


def targets(rows: list[Row], scale: Scale) -> list[Target]:
    """What must hold, and the speeds of issue 5: for an H100, bfloat16, head_dim 128."""
    compared = of_kind(rows, "parity", "estimator", "plan")
    found, left_out = failures(rows), of_kind(rows, "skipped")
    wrong, skipped = _of_stage(found, "parity"), _of_stage(left_out, "parity")
    methods = of_kind(rows, "method", "family")
    wrong_methods, no_methods = _of_stage(found, "methods"), _of_stage(left_out, "methods")
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
    parts += [
        "## Targets",
        _table(results["targets"], {"target": "name", "": "verdict", "measured": "measured"}),
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


def _failures(found: list[Row]) -> list[str]:
    if not found:
        return ["## Failures", "None."]
    lines = []
    for row in found:
        what = row.get("error") or ", ".join(
            f"{name} {row[name]}"
            for name in ("call", "config", "max_error", "of_allowed", "lse_of_allowed", "agreement",
                         "repeats", "same_blind_rows")
            if name in row
        )  # fmt: skip
        lines.append(f"- {row['stage']}, {row.get('item', '')}: {what}")
    return ["## Failures", "\n".join(lines), "Tracebacks are in the JSON file."]


def _parity(rows: list[Row]) -> list[str]:
    """The worst of each case over its configurations, dtypes side by side."""
    cells: dict[tuple[str, str], Row] = {}
    for row in of_kind(rows, "parity", "estimator"):
        call = row.get("call")
        what = row["what"] + (f": {call}" if call else "")
        key = (what, row["dtype"])
        if key not in cells or not row["of_allowed"] <= cells[key]["of_allowed"]:
            cells[key] = row
    dtypes = list(dict.fromkeys(dtype for _, dtype in cells))
    table = []
    for what in dict.fromkeys(what for what, _ in cells):
        line = {"what": what}
        for dtype in dtypes:
            cell = cells.get((what, dtype))
            line[dtype] = "" if cell is None else _errors(cell)
        table.append(line)
    plans = [
        {**row, "density": _number(row["density"]), "agreement": f"{row['agreement']:.4f}",
         "of_allowed": f"{row['of_allowed']:.2f}", "max_error": f"{row['max_error']:.1e}"}
        for row in of_kind(rows, "plan")
    ]  # fmt: skip
    return [
        "## Parity",
        "The largest error; in brackets its share of what rounding explains (above 1 fails), then "
        "its ratio to the error of plain PyTorch in that dtype. Against float64; estimators "
        "against their plain functions.",
        _table(table, {name: name for name in ("what", *dtypes)}),
        "Whole plans with kernels against plans without, and the op on them:",
        _table(
            plans,
            {
                "method": "what",
                "configuration": "config",
                "density": "density",
                "agreement": "agreement",
                "largest error": "max_error",
                "of allowed": "of_allowed",
            },
        ),
    ]


def _errors(row: Row) -> str:
    error, plain = row.get("max_error"), row.get("of_plain_error")
    ratio = "" if plain is None else f", {plain:.2f}x"
    text = f"({row['of_allowed']:.2g}{ratio})"
    return ("" if error is None else f"{error:.1e} ") + text + ("" if row["ok"] else " **wrong**")


def _methods(rows: list[Row]) -> list[str]:
    found, table = of_kind(rows, "method"), []
    for key in dict.fromkeys((row["what"], row["parameters"]) for row in found):
        mine = [row for row in found if (row["what"], row["parameters"]) == key]
        sparse = [row for row in mine if not row.get("exact")]
        line = {"method": key[0], "parameters": key[1], "compared": len(mine)}
        if sparse:
            least, most = (pick(row["density"] for row in sparse) for pick in (min, max))
            line |= {
                "density": f"{least:.2f}-{most:.2f}",
                "agreement": f"{min(row['agreement'] for row in sparse):.4f}",
                "of_allowed": f"{max(row['of_allowed'] for row in sparse):.2f}",
            }
        line["exact"] = len(mine) - len(sparse)
        line["wrong"] = "" if all(row["ok"] for row in mine) else "**wrong**"
        table.append(line)
    patched, families = of_kind(rows, "family"), []
    for family in dict.fromkeys(row["what"] for row in patched):
        mine = [row for row in patched if row["what"] == family]
        line = {"family": family, "methods": sum(row["methods"] for row in mine)}
        line |= {kind: f"{max(row[kind] for row in mine):.1e}" for kind in ("keeps_all", "padded")}
        line["wrong"] = ", ".join(f"**{name}**" for row in mine for name in row["wrong"])
        families.append(line)
    return [
        "## Methods",
        "Plans on this device against the same method's on the CPU, as the share that both keep of "
        "the (row, key) pairs that either keeps, and the op on them (with steps of decode, where "
        "a method has its own); where a method wants exact attention, that it does on both.",
        _table(
            table,
            {
                "method": "method",
                "parameters": "parameters",
                "compared": "compared",
                "density": "density",
                "agreement": "agreement",
                "error, of allowed": "of_allowed",
                "exact": "exact",
                "": "wrong",
            },
        ),
        "Patched into tiny models: how far logits, of magnitude 1, are from eager attention's if "
        "all is kept, and those of a padded row from that row's alone if not.",
        _table(
            families,
            {
                "family": "family",
                "methods": "methods",
                "keeps everything": "keeps_all",
                "padded row": "padded",
                "wrong": "wrong",
            },
        ),
    ]


def _op(rows: list[Row]) -> list[str]:
    table = []
    for row in sorted(of_kind(rows, "op"), key=lambda r: (r["tokens"], r["density"])):
        line = {"tokens": f"{row['tokens']:,}", "density": f"{row['density']:.3f}"}
        for name in ("op", "flash", "cudnn", "flex"):
            timing = row.get(name)
            line[name] = "" if timing is None else _milliseconds(timing)
        line |= {
            "ideal": f"{row['of_ideal']:.2f}x",
            "fastest": f"{row['of_ideal_fastest_dense']:.2f}x",
            "dense": f"{row['speed_up']:.2f}x",
            "over_flex": _number(row["speed_up_over_flex"], "x"),
            "host": f"{row['op']['host_ms']:.2f}",
            "wrong": "" if row["ok"] else "**wrong**",
        }
        table.append(line)
    columns = {
        "tokens": "tokens",
        "density": "density",
        "op, ms": "op",
        "FlashAttention, ms": "flash",
        "cuDNN, ms": "cudnn",
        "FlexAttention, ms": "flex",
        "op / (density x Flash)": "ideal",
        "op / (density x faster dense)": "fastest",
        "Flash / op": "dense",
        "Flex / op": "over_flex",
        "host, ms": "host",
        "": "wrong",
    }
    return [
        "## The op",
        "Medians (lowest to highest), in turns. Random blocks, the diagonal and block 0; a list "
        "for each head. Host: until the call came back.",
        _table(table, columns),
    ]


def _selection(rows: list[Row]) -> list[str]:
    kinds = {"estimator_time": "estimator", "plan_time": "plan of", "plain_time": "plain"}
    found = of_kind(rows, *kinds)
    lengths = sorted({row["tokens"] for row in found})
    cells = {(f"{kinds[row['kind']]} {row['what']}", row["tokens"]): row for row in found}
    table = []
    for what in dict.fromkeys(what for what, _ in cells):
        line = {"what": what}
        for n in lengths:
            row = cells.get((what, n))
            if row is not None:
                density = row.get("density")
                kept = "" if density is None else f", density {density:.2f}"
                line[f"{n}"] = f"{row['of_dense']:.1%} ({row['ms']:.2f} ms{kept})"
        table.append(line)
    return [
        "## Selection",
        "Time as a share of dense FlashAttention's at that length.",
        _table(table, {"what": "what", **{f"{n:,}": f"{n}" for n in lengths}}),
    ]


def _prefill(rows: list[Row]) -> list[str]:
    models = of_kind(rows, "model")
    table = [
        {
            "tokens": f"{row['tokens']:,}",
            "method": row["method"],
            "seconds": f"{row['seconds']:.3f}",
            "speed_up": f"{row['speed_up']:.2f}x",
            "over_flash": f"{row['speed_up_over_flash']:.2f}x",
            "density": _number(row["density"]),
            "layer": f"{row['seconds_per_layer'] * 1e3:.1f}",
            "whole": f"~{row['seconds_32_layers_estimated']:.2f}",
            "peak": f"{row['peak_gib']:.1f}",
            "rounds": row["rounds"],
            "exact": ", ".join(f"{why} {n}" for why, n in row["exact_calls"].items()),
        }
        for row in sorted(of_kind(rows, "prefill"), key=lambda row: row["tokens"])
    ]
    layers = models[0]["layers"] if models else "?"
    return [
        "## Prefill",
        f"Time-to-first-token of a model shaped like Llama 3.1 8B, {layers} layers of it, random "
        "weights with biases that make attention local: densities are arbitrary, read them with "
        "the times. ~: an estimate, for 32 layers, that counts all time as the layers'.",
        _table(
            table,
            {
                "tokens": "tokens",
                "method": "method",
                "seconds": "seconds",
                "dense / this": "speed_up",
                "FlashAttention / this": "over_flash",
                "density": "density",
                "a layer, ms": "layer",
                "32 layers, s": "whole",
                "peak, GiB": "peak",
                "rounds": "rounds",
                "exact calls": "exact",
            },
        ),
    ]


def _configurations(rows: list[Row]) -> list[str]:
    timed = [{**row, "time": _milliseconds(row)} for row in of_kind(rows, "configuration")]
    chosen = {
        (row["kernel"], str(row["values"]), row["config"]): row
        for row in of_kind(rows, "chosen")
        if row["values"]
    }
    classes = [
        {**row, "class": ", ".join(f"{name} {value}" for name, value in row["values"])}
        for row in chosen.values()
    ]
    return [
        "## Configurations",
        "Of the op, each by itself:",
        _table(timed, {"configuration": "config", "tokens": "tokens", "ms": "time"}),
        "What each shape class runs with, tuned at the first length of its stage:",
        _table(classes, {"kernel": "kernel", "class": "class", "configuration": "config"}),
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


def _table(rows: Iterable[Any], columns: dict[str, str]) -> str:
    """Markdown; `columns` maps headings to fields."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        fields = row if isinstance(row, dict) else asdict(row)
        cells = (str(fields.get(name, "")).replace("|", "/") for name in columns.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
