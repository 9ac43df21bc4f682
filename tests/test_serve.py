"""`transformers serve` on a patched model, started as docs/guides/continuous-batching.md says."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.robustness.real import folder_of, load

for needed in ("fastapi", "uvicorn", "openai"):  # what Transformers' server needs
    pytest.importorskip(needed)
pytest.importorskip("transformers.cli.serving")

GUIDE = Path(__file__).parents[1] / "docs/guides/continuous-batching.md"
SMALL = {
    "device": "cpu",
    "dtype": "float32",
    "default_seed": 0,
    "cb_num_blocks": 16,
    "cb_max_batch_tokens": 1024,
}
REPORT = """
import json
input()
print(json.dumps(sparse_patch.report(loaded.model).to_dict()), flush=True)
server.kill_server()
"""


def launcher(method: str, **options) -> str:
    """The guide's program, with other options, that reports when it is asked to, and ends."""
    (code,) = re.findall(r"```python\n(import sys\n.*?)```", GUIDE.read_text(), re.S)
    asked = "".join(f", {name}={value!r}" for name, value in options.items())
    code, served = re.subn(r"non_blocking=True", "non_blocking=True" + asked, code)
    code, patched = re.subn(r'"strided", preset="fine"', method, code)
    assert served == patched == 1
    return code + REPORT


def answer(url: str, folder: str, prompt: str) -> str:
    body = {"model": folder, "prompt": prompt, "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)["choices"][0]["text"]


def served(method: str, prompts: list[str]) -> tuple[list[str], dict]:
    """The answers to prompts that are asked at once, and the patch's report."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    url, folder = f"http://localhost:{port}", folder_of("smollm2")
    command = [sys.executable, "-c", launcher(method, port=port, **SMALL), folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        try:
            for _ in range(600):
                assert run.poll() is None, "the server has ended"
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5).close()
                    break
                except urllib.error.URLError:
                    time.sleep(0.2)
            with ThreadPoolExecutor(len(prompts)) as pool:
                answers = list(pool.map(lambda prompt: answer(url, folder, prompt), prompts))
            printed, _ = run.communicate("\n", timeout=120)
        finally:
            run.kill()
    return answers, json.loads(printed.splitlines()[-1])


def generated(prompt: str) -> str:
    """What `generate` answers on the model as it is."""
    tokenizer = AutoTokenizer.from_pretrained(folder_of("smollm2"))
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = load("smollm2", None).generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_patched_model_is_served_sparse():
    """Two requests at once, through the sparse op with all keys: the model's own answers."""
    facts = "The capital of France is Paris. The capital of Italy is Rome. "
    prompts = [facts * 8 + "The capital of France is", facts * 3 + "The capital of Italy is"]
    answers, report = served('"dense", min_length=100', prompts)
    assert answers == [generated(prompt) for prompt in prompts]
    layers = len(report["layers"])
    assert report["sparse_calls"] == report["exact"]["short"] == layers
    assert report["exact"]["decode"] > 0
