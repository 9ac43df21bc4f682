"""`sparse-patch inspect`: one prompt in; tables, JSON and an HTML page of maps out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_patch import RECOMMENDED
from sparse_patch_eval.base.console import console, plain, progress, user_errors

if TYPE_CHECKING:  # seconds of import, which `--help` can do without
    from sparse_patch import Inspection

_WORDS = 12


def inspect(
    output: Annotated[Path, typer.Option(help="Folder for inspect.html and inspect.json.")] = Path(
        "inspect"
    ),
    model: Annotated[
        str, typer.Option(help="Hub id, folder, .gguf file, or `smollm2`, `gemma3-270m` (PyPI).")
    ] = "smollm2",
    method: Annotated[
        str, typer.Option(help="`NAME:key=value,...`; see `sparse-patch methods`.")
    ] = RECOMMENDED,
    prompt: Annotated[
        Path | None, typer.Option(help="UTF-8 file with the prompt; default: a passkey in --text.")
    ] = None,
    length: Annotated[str, typer.Option(help="Tokens of the passkey prompt.")] = "4k",
    text: Annotated[
        str, typer.Option(help="Prose around the passkey: `kjv`, `stdlib`, or a UTF-8 file.")
    ] = "kjv",
    layers: Annotated[str, typer.Option(help="Layers, as in `0,5,-1` or `::3`.")] = "::",
    rows: Annotated[
        int, typer.Option(min=0, help="Approximate number of query rows judged per head; 0: all.")
    ] = 1024,
    resolution: Annotated[int, typer.Option(min=1, help="Pixels of a map, on each side.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Chooses the prose and the passkey.")] = 0,
) -> None:
    """Show what a method keeps of a prompt's attention, and what it loses.

    Per layer and head: the density, the true recall on a sample of rows, the row that loses most,
    the error of the output, and a map of the attention and of the keys kept. Then the effect of all
    layers together on the next token (KL), and where the time goes.

    Takes about three dense prefills. The HTML page needs no network.
    """
    with user_errors():
        import sparse_patch
        from sparse_patch import get_method
        from sparse_patch_eval.base.early import check_device, check_output, require
        from sparse_patch_eval.base.machine import machine
        from sparse_patch_eval.base.options import choose_layers, parse_layers, parse_length
        from sparse_patch_eval.base.text_file import read_text
        from sparse_patch_eval.inputs.models import check_context, load
        from sparse_patch_eval.inputs.text import long_text, passkey_prompt
        from sparse_patch_eval.report.inspect_page import page

        require("a page of maps", "jinja2", "matplotlib", extra="eval")
        chosen, selection, tokens = get_method(method), parse_layers(layers), parse_length(length)
        words = long_text(text) if prompt is None else read_text(prompt, "--prompt")
        check_device(device)
        check_output(output)
        lm, tokenizer = load(model, dtype=dtype, device=device)
        if prompt is None:
            ids = passkey_prompt(tokenizer, tokens, text=words, seed=seed).input_ids
        else:
            ids = tokenizer(words, return_tensors="pt").input_ids
        if not ids.shape[1]:
            raise ValueError(
                f"--prompt: {prompt} is empty for this model: its tokenizer makes no token of it; "
                "give another text"
            )
        check_context(lm.config, ids.shape[1], "--length" if prompt is None else "--prompt")
        indices = choose_layers(lm, selection)
        with progress() as bar:
            task = bar.add_task("layers", total=len(indices))
            inspection = sparse_patch.inspect(
                lm,
                ids.to(lm.device),
                chosen,
                layers=indices,
                rows=rows,
                resolution=resolution,
                on_layer=lambda _: bar.advance(task),
            )
            bar.update(task, completed=len(indices))
        about = {
            "model": f"{model}, {dtype}, {device}",
            "prompt": f"passkey in {text}, seed {seed}" if prompt is None else str(prompt),
            "machine": _machine(machine()),
        }

        def text_until(position: int) -> str:
            return str(tokenizer.decode(ids[0, max(0, position - _WORDS) : position + 1]))

        # Quoted: a token may be white space.
        names = [
            repr(tokenizer.decode([x])) for x in (inspection.dense_token, inspection.sparse_token)
        ]
        html = page(inspection, about, text_until, (names[0], names[1]))
        output.mkdir(parents=True, exist_ok=True)
        (output / "inspect.html").write_text(html, encoding="utf-8")
        content = {**about, "machine": machine(), **inspection.to_dict()}
        (output / "inspect.json").write_text(json.dumps(content, indent=1) + "\n")
    _print(inspection)
    for name in ("inspect.html", "inspect.json"):
        print(f"wrote {output / name}")


def _machine(machine: Mapping[str, Any]) -> str:
    return f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}"


def _print(inspection: Inspection) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        title=plain(inspection.method), title_justify="left", box=box.SIMPLE_HEAD, padding=0
    )
    for column in ("layer", "density", "recall", "worst head", "its recall", "output error"):
        table.add_column(column, justify="right")
    table.add_column("exact")
    for layer in inspection.layers:
        worst = min(layer.heads, key=lambda head: head.recall, default=None)
        table.add_row(
            str(layer.layer),
            f"{layer.density:.3f}",
            f"{layer.recall:.3f}",
            "-" if worst is None else str(worst.head),
            "-" if worst is None else f"{worst.recall:.3f}",
            f"{layer.error:.3f}",
            layer.exact or "",
        )
    table.add_section()
    table.add_row("all", f"{inspection.density:.3f}", f"{inspection.recall:.3f}")
    console.print(table)
    same = (
        "same as dense"
        if inspection.dense_token == inspection.sparse_token
        else "differs from dense"
    )
    console.print(f"next token: {same}, KL {inspection.kl:.4f} nats", highlight=False)
    console.print(
        f"prefill {inspection.sparse_seconds:.2f} s (dense {inspection.dense_seconds:.2f} s), "
        f"of which choosing {inspection.plan_seconds:.2f} s "
        f"and attention {inspection.op_seconds:.2f} s",
        highlight=False,
    )
