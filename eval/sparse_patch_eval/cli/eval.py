"""`sparse-patch eval` and `sparse-patch tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sparse_patch import RECOMMENDED
from sparse_patch.spelling import join_list, literal, split_list, split_method
from sparse_patch_eval.base.console import console, note, plain, user_errors
from sparse_patch_eval.base.options import leaves_folder, parse_lengths
from sparse_patch_eval.base.text_file import read_text

_NEEDS = 'lm-eval is missing: pip install "sparse-patch[eval]"'


def _from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take the options of a YAML file as defaults; flags take precedence.

    Paths in it are relative to the current folder, as those of flags are, and must stay in it.
    Other paths and `trust_remote_code` are accepted only as flags.
    """
    if path is None:
        return None
    import yaml

    with user_errors():
        text = read_text(path, "--config")
    try:
        options = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # Besides YAML's own errors: Python's for an invalid date or number, a tag without its
        # value, or endlessly nested lists.
        raise typer.BadParameter(f"{path} is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise typer.BadParameter(f"{path} must hold options, as in `model: smollm2`")
    names = {str(key).replace("-", "_"): value for key, value in options.items()}
    known = {parameter.name for parameter in context.command.params} - {"config"}
    if unknown := sorted(set(names) - known):
        raise typer.BadParameter(
            f"{path}: no such option: {', '.join(unknown)} (known: {', '.join(sorted(known))})"
        )
    flags = _as_flags(names)
    for name, value in flags.items():
        for entry in value if isinstance(value, list) else [value]:
            _check_from_file(path, name, str(entry))
    context.default_map = {**(context.default_map or {}), **flags}
    return path


def _check_from_file(path: Path, option: str, value: str) -> None:
    """Refuse a value that is accepted only as a flag."""
    flag = f"--{option.replace('_', '-')}"
    key, _, rest = value.partition("=")
    if option == "model_arg" and key.strip() == "trust_remote_code" and literal(rest) is not False:
        raise typer.BadParameter(f"{path}: {flag} {value} must be given on the command line")
    for word in _paths(option, value):
        if leaves_folder(word):
            raise typer.BadParameter(
                f"{path}: {flag}: {word!r} leads out of the current folder; leave it out and "
                f"give {flag} on the command line"
            )


def _paths(option: str, value: str) -> list[str]:
    """The possible paths in the value of an option."""
    if option == "method":
        try:
            params = split_method(value)[1]
        except ValueError:
            return []  # raised again, with the name of the flag, where it is parsed
        return [param for param in params.values() if isinstance(param, str)]
    if option in ("model_arg", "task_arg"):
        return [value.partition("=")[2]]
    if option == "tasks":
        return [task.removeprefix("perplexity_") for task in split_list(value)]
    return [value] if option in ("output", "model", "data_dir") else []


def _as_flags(options: dict[str, Any]) -> dict[str, Any]:
    """YAML lists for options that take commas on the command line, and back."""
    listed = ("method", "model_arg", "task_arg")
    flags: dict[str, Any] = {}
    for name, value in options.items():
        if name in listed:
            flags[name] = (
                [str(entry) for entry in value] if isinstance(value, list) else [str(value)]
            )
        elif isinstance(value, list):
            flags[name] = join_list(map(str, value))
        else:
            flags[name] = value if isinstance(value, bool) else str(value)
    return flags


def evaluate(
    output: Annotated[
        Path, typer.Option(help="Folder for the runs; a stopped evaluation resumes there.")
    ] = Path("runs"),
    model: Annotated[
        str, typer.Option(help="Hub id, folder, .gguf file, or `smollm2`, `gemma3-270m` (PyPI).")
    ] = "smollm2",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="`NAME:key=value,...`; repeatable. `dense`, the unpatched model, always runs too. "
            f"Default: {RECOMMENDED}"
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Task names, separated by commas (in a name: `\\,`); see `sparse-patch tasks`."
        ),
    ] = "",
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths in tokens, as in 4096,8192 or 4k,8k.")
    ] = "",
    limit: Annotated[
        int,
        typer.Option(
            min=0, help="Samples per task and length; 0: all (of generated tasks 500, as in RULER)."
        ),
    ] = 20,
    recall_samples: Annotated[
        int,
        typer.Option(min=0, help="Samples per task with recall measured (one more prefill)."),
    ] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Chooses the samples of generated tasks.")] = 0,
    min_length: Annotated[
        int, typer.Option(min=0, help="Prompts with fewer tokens run exact.")
    ] = 1024,
    dense_layers: Annotated[
        int | None,
        typer.Option(min=0, help="Number of first layers kept exact; default: the method's."),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Backend of the sparse op: auto, cpu, triton or reference.")
    ] = "auto",
    chat_template: Annotated[
        bool, typer.Option(help="Put prompts through the tokenizer's chat template.")
    ] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with the data of hub benchmarks; default: the hub itself."),
    ] = None,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="`key=value` for lm-eval's model: device_map=auto, tp_plan=auto, peft=...; "
            "repeatable. trust_remote_code=True runs Python code of the model's repository."
        ),
    ] = None,
    task_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="`key=value` for generated tasks: haystack=stdlib, depths=5; repeatable."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with these options; flags take precedence.",
            callback=_from_file,
            is_eager=True,
        ),
    ] = None,
) -> None:
    """Measure methods against dense on long-context benchmarks.

    Every method sees the same prompts, one after the other; the question is inside the sparse
    prefill, the answer is decoded from its KV cache. Prints accuracy, the difference to dense with
    a paired 95 % interval, density, recall and prefill time. Each method's run is a folder below
    --output: answers are written at once, so a stopped run resumes at the next sample and a
    finished run is not repeated. `sparse-patch report` makes a page of it.

    sparse-patch eval --method flexprefill:gamma=0.95 --method strided --tasks ruler --lengths 4k

    Several processes share the samples: accelerate launch -m sparse_patch_eval.cli eval ...
    """
    with user_errors():
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise ImportError(_NEEDS) from error
        from sparse_patch_eval.base.early import check_backend, check_device, check_output
        from sparse_patch_eval.lm_eval_model.model import SparsePatchLM
        from sparse_patch_eval.runs.evaluation import Setup
        from sparse_patch_eval.runs.evaluation import evaluate as run
        from sparse_patch_eval.runs.wanted import Wanted, build_units, check_names

        task_args = _pairs("--task-arg", task_arg)
        wanted = Wanted(
            tasks=tuple(split_list(tasks)),
            lengths=tuple(parse_lengths(lengths)) if lengths else (),
            model=model,
            limit=limit or None,
            seed=seed,
            task_args=task_args,
            data_dir=data_dir,
            chat_template=chat_template,
        )
        model_args = _pairs("--model-arg", model_arg)
        settings = {"dtype": dtype, "device": device, "model_args": model_args}
        # Task arguments change the prompts, so they make another run.
        settings |= {"task_args": task_args} if task_args else {}
        setup = Setup(
            model=model,
            methods=tuple(method or (RECOMMENDED,)),
            patch_options={
                "min_length": min_length,
                "backend": backend,
                **({} if dense_layers is None else {"dense_layers": dense_layers}),
            },
            model_settings=settings,
            seed=seed,
            chat_template=chat_template,
            recall_samples=recall_samples,
        )
        setup.parsed()
        check_names(wanted)
        check_device(device)
        check_backend(backend, device)
        check_output(output)
        lm = SparsePatchLM(pretrained=model, dtype=dtype, device=device, **model_args)
        folders = run(setup, output, lm, lambda lm: build_units(wanted, lm))
        if lm.is_writer:
            _show(folders, output)


def _show(folders: list[Path], output: Path) -> None:
    """The main numbers of these runs on the terminal, and all of them as table.md."""
    from sparse_patch_eval.report.comparison import comparison_table
    from sparse_patch_eval.report.terminal import tables
    from sparse_patch_eval.report.text import markdown
    from sparse_patch_eval.runs.reading import find_runs

    rows = comparison_table(find_runs(folders))
    (output / "table.md").write_text(markdown(rows), encoding="utf-8")
    for table in tables(rows):
        console.print(table)
    note(f"all scores, and how to read them: {output / 'table.md'}")
    note(f"a page with figures and answers: sparse-patch report {output}")


def _pairs(flag: str, pairs: list[str] | None) -> dict[str, Any]:
    """`key=value` options as a dictionary of Python values.

    Raises:
        ValueError: a pair has no key or no value.
    """
    result = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not key or not equals or not value:
            raise ValueError(f"{flag} {pair!r} must be key=value")
        result[key] = literal(value)
    return result


def list_tasks() -> None:
    """List the tasks of `sparse-patch eval --tasks`."""
    from sparse_patch_eval.runs.known import described

    table = Table(box=None, show_edge=False)
    for column in ("task", "from", "lengths", "description"):
        table.add_column(column, overflow="fold")
    for row in described():
        table.add_row(*map(plain, row))
    console.print(table)
    console.print("Any other task of lm-eval can be given by its name.")
