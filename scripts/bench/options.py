"""Options that several scripts take, each described once."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Dtypes = Annotated[str, typer.Option(help="`float32`, `bfloat16`.")]
Layers = Annotated[str, typer.Option(help="Layers, as in `0,5,-1` or `::3`.")]
Length = Annotated[str, typer.Option(help="Prompt length in tokens.")]
Lengths = Annotated[str, typer.Option(help="Prompt lengths in tokens.")]
Methods = Annotated[list[str] | None, typer.Option(help="`NAME:key=value,...`; may repeat.")]
Model = Annotated[str, typer.Option(help="Hub id, local folder, .gguf file, or `smollm2`.")]
Text = Annotated[str, typer.Option(help="`kjv`, `stdlib`, `pydoc`, or a UTF-8 file.")]
Threads = Annotated[str, typer.Option(help="Of PyTorch.")]
