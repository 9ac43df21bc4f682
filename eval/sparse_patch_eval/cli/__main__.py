"""The command, also as a module for launchers: `torchrun -m sparse_patch_eval.cli eval ...`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without the packages that it is made of, say how to get them."""
    try:
        from sparse_patch_eval.cli.app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        sys.exit(
            f'sparse-patch: the command line needs {missing}: pip install "sparse-patch[demo]"'
        )
    app()


if __name__ == "__main__":
    main()
