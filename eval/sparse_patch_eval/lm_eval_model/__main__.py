"""lm-eval's own command line, with the model `sparse_patch` and our tasks in it.

    python -m sparse_patch_eval.lm_eval_model run --model sparse_patch --model_args ... --tasks ...

    data parallel:
    accelerate launch --num_processes 2 -m sparse_patch_eval.lm_eval_model run ...

    tensor parallel:
    torchrun --nproc-per-node 2 -m sparse_patch_eval.lm_eval_model run ... tp_plan=auto

`sparse-patch-lm-eval` is the first of these. Every argument is lm-eval's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Registers the model, or raises an error that names a missing package.
import sparse_patch_eval.lm_eval_model.model  # noqa: F401
from sparse_patch_eval.tasks import TASKS_FOLDER
from sparse_patch_eval.tasks.hub.load import without_remote_code

COMMANDS = ("run", "ls", "validate")
_HELP = """\
lm-eval with the model `sparse_patch` and the tasks of sparse-patch. Our model in it:

  --model sparse_patch
  --model_args "pretrained=smollm2,method=strided:preset=fine;gamma=0.95"
      pretrained: hub id, folder, .gguf file, or smollm2 (from PyPI)
      method: NAME:key=value;key=value, see `sparse-patch methods`; dense: unpatched
      patch_layers, dense_layers, min_length, min_queries, patch_backend, continuation
  --tasks sp_passkey,sp_niah_grid,...    see `sparse-patch tasks`

What follows is lm-eval's own.
"""


def main() -> None:
    """Run lm-eval's command line on `sys.argv`."""
    import lm_eval
    from lm_eval.__main__ import cli_evaluate

    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv[1:]):
        print(_HELP)
    sys.argv[1:] = with_our_tasks(sys.argv[1:])
    if "--trust_remote_code" not in sys.argv:
        without_remote_code()
    if os.environ.get("RANK", "0") != "0":
        lm_eval.simple_evaluate = _silenced(lm_eval.simple_evaluate)
    cli_evaluate()


def with_our_tasks(arguments: Sequence[str], tasks: Path = TASKS_FOLDER) -> list[str]:
    """The arguments with our folder of tasks added, unless they name another folder.

    A configuration file may set `include_path`, which the command line would override, so with
    `--config` nothing is added.
    """
    names = [word.split("=", 1)[0] for word in arguments]
    own = any(name == "--config" or name.startswith(("-C", "--i")) for name in names)
    if own or len(arguments) < 2 or not tasks.is_dir():
        return list(arguments)
    command = list(arguments[:1]) if arguments[0] in COMMANDS else ["run"]
    rest = arguments[1:] if arguments[0] in COMMANDS else arguments
    return [*command, *rest, "--include_path", str(tasks)]


def _silenced(evaluate: Any) -> Any:
    """The evaluation without results: with tensor parallelism, lm-eval would write once per
    node."""

    def run(*args: Any, **kwargs: Any) -> None:
        evaluate(*args, **kwargs)

    return run


if __name__ == "__main__":
    main()
