"""The command as a module, for launchers: `torchrun -m sparse_patch_eval.cli eval ...`."""

from sparse_patch_eval.cli.app import app

if __name__ == "__main__":
    app()
