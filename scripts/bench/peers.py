"""Other engines beside ours: each in a process of its own, loaded once (see `peer_worker.py`)."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_patch_eval.base.fetch import package_file
from sparse_patch_eval.base.rows import Row
from sparse_patch_eval.inputs.models import SMOLLM2_GGUF

PEERS = (
    "openvino",
    "openvino:trishape",
    "openvino:xattention",
    "openvino:xattention:unquantised",
    "llama.cpp",
)


@contextlib.contextmanager
def gguf_of(model: str) -> Iterator[str]:
    """The file that peers load for a model of ours; good inside the block.

    Raises:
        ValueError: there is none.
    """
    if model == "smollm2":
        with package_file(SMOLLM2_GGUF) as path:
            yield str(path)
    elif model.lower().endswith(".gguf"):
        yield model
    else:
        raise ValueError(f"--peer with --model {model}: other engines load .gguf files, or smollm2")


class Peer:
    """An engine that waits for prompts. Close it, or use it as a context manager."""

    def __init__(self, engine: str, python: str, gguf: str, **options: Any) -> None:
        """options: of `peer_worker.py`, by name.

        Raises:
            ValueError: the engine does not start; with what it said.
        """
        self.engine = engine
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        worker = Path(__file__).with_name("peer_worker.py")
        words = [x for name, value in options.items() for x in (f"--{name}", str(value))]
        self._process = subprocess.Popen(
            [python, str(worker), engine, gguf, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.version: str = self._answer()["version"]
        except ValueError:
            self.close()
            raise

    def prefill(self, ids: list[int]) -> Row:
        """Seconds until the token after a prompt was there, and that token, an id or text."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self._process.stdin.write(json.dumps({"ids": ids}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Row:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            said = self._log.read()[-2000:].strip()
            raise ValueError(f"--peer {self.engine} ended by itself; it said:\n{said}")
        row: Row = json.loads(line)
        return row

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
