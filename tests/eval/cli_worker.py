"""A process of `torchrun`: `python -m sparse_patch_eval.cli` several times, in one process.

`torchrun -m tests.eval.cli_worker '[["eval", "--model", ...], ...]'`
"""

import json
import runpy
import sys

if __name__ == "__main__":
    for words in json.loads(sys.argv[1]):
        sys.argv[1:] = words
        try:
            runpy.run_module("sparse_patch_eval.cli", run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
