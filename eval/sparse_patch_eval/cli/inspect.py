"""`sparse-patch inspect`: one prompt in; tables, JSON and an HTML page of maps out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    ] = "flexprefill:gamma=0.9",
    prompt: Annotated[
        Path | None, typer.Option(help="UTF-8 file that is the prompt; default: --text.")
    ] = None,
    length: Annotated[
        str, typer.Option(help="Tokens of a prompt with a passkey hidden in prose.")
    ] = "4k",
    text: Annotated[
        str, typer.Option(help="That prose: `kjv`, `stdlib`, or a UTF-8 file.")
    ] = "kjv",
    layers: Annotated[str, typer.Option(help="Layers, as in `0,5,-1` or `::3`.")] = "::",
    rows: Annotated[
        int, typer.Option(min=0, help="Query rows judged per head, about; 0: all.")
    ] = 1024,
    resolution: Annotated[int, typer.Option(min=1, help="Pixels of a map, on each side.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Chooses the prose and the passkey.")] = 0,
) -> None:
    """Show what a method keeps of a prompt's attention, and what it loses.

    Per layer and head: the density, the true recall on a sample of rows, the row that loses most,
    the error of the output, and a map of what was kept over where the attention is. Then what all
    layers together do to the next token (KL), and where the time goes.

    Takes about three dense prefills. The HTML page needs no network.
    """
    with user_errors():
        import sparse_patch
        from sparse_patch.specs import parse_method
        from sparse_patch_eval.base.machine import machine
        from sparse_patch_eval.base.options import choose_layers, parse_layers, parse_length
        from sparse_patch_eval.base.text_file import read_text
        from sparse_patch_eval.inputs.models import check_context, load
        from sparse_patch_eval.inputs.text import long_text, passkey_prompt
        from sparse_patch_eval.report.inspect_page import page

        chosen, wanted, tokens = parse_method(method), parse_layers(layers), parse_length(length)
        words = long_text(text) if prompt is None else read_text(prompt, "--prompt")
        lm, tokenizer = load(model, dtype=dtype, device=device)
        if prompt is None:
            ids = passkey_prompt(tokenizer, tokens, text=words, seed=seed).input_ids
        else:
            ids = tokenizer(words, return_tensors="pt").input_ids
        if not ids.shape[1]:
            raise ValueError(
                f"--prompt: {prompt} is empty to this model: its tokenizer makes no token of it; "
                "give another text"
            )
        check_context(lm.config, ids.shape[1], "--length" if prompt is None else "--prompt")
        indices = choose_layers(lm, wanted)
        with progress() as bar:
            task = bar.add_task("layers", total=len(indices))
            found = sparse_patch.inspect(
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

        # Quoted: it may be white space.
        names = [repr(tokenizer.decode([x])) for x in (found.dense_token, found.sparse_token)]
        html = page(found, about, text_until, (names[0], names[1]))
        output.mkdir(parents=True, exist_ok=True)
        (output / "inspect.html").write_text(html, encoding="utf-8")
        content = {**about, "machine": machine(), **found.to_dict()}
        (output / "inspect.json").write_text(json.dumps(content, indent=1) + "\n")
    _print(found)
    for name in ("inspect.html", "inspect.json"):
        print(f"wrote {output / name}")


def _machine(about: Mapping[str, Any]) -> str:
    return f"{about['device']}, {about['threads']} threads, torch {about['torch']}"


def _print(found: Inspection) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=plain(found.method), title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for column in ("layer", "density", "recall", "worst head", "its recall", "output error"):
        table.add_column(column, justify="right")
    table.add_column("exact")
    for layer in found.layers:
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
    table.add_row("all", f"{found.density:.3f}", f"{found.recall:.3f}")
    console.print(table)
    same = "the same as dense" if found.dense_token == found.sparse_token else "not dense's"
    console.print(f"next token {same}, KL {found.kl:.4f} nats", highlight=False)
    console.print(
        f"prefill {found.sparse_seconds:.2f} s (dense {found.dense_seconds:.2f} s), of which "
        f"choosing {found.plan_seconds:.2f} s and attention {found.op_seconds:.2f} s",
        highlight=False,
    )
