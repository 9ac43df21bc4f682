"""vLLM's CPU engine in processes of its own: tensor parallel on two, and the server with OpenAI's
client. `pytest -m vllm` in an environment with vLLM."""

import asyncio
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.serving.tiny import prompts, save

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

ROOT = Path(__file__).parents[2]
SPARSE = {"method": "strided:gamma=0.6,block_size=16,stride=4", "min_length": 64}
START, WAIT = 900, 300  # seconds, on a machine that does other things too
LENGTHS = (400, 250, 120, 20, 90, 333, 65, 200)


def environment(**more):
    """Of a process that starts an engine; Triton's interpreter is for our own tests."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "eval")),
    }
    return {**kept, **own, **more}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With a tokenizer in which every token is a word."""
    folder = tmp_path_factory.mktemp("llama")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(128)}, unk_token="w5"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return save("llama", folder)


# --- tensor parallel ------------------------------------------------------------------------------


def run_engine(model, **options):
    command = [sys.executable, "-m", "tests.serving.run_engine", model]
    command += [json.dumps(options), json.dumps(prompts(*LENGTHS[:3]))]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=START
    )
    found = re.search("^RESULT (.*)$", done.stdout, re.MULTILINE)
    assert found, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(found[1])


def test_two_processes_that_share_the_heads_answer_as_one(model):
    extra = {"sparse_patch": SPARSE}
    one = run_engine(model, additional_config=extra)
    two = run_engine(
        model,
        additional_config=extra,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    )
    for alone, shared in zip(one["said"], two["said"], strict=True):
        assert shared["tokens"] == alone["tokens"]
        assert shared["logprobs"] == pytest.approx(alone["logprobs"], abs=1e-3)
    (whole,), halves = one["reports"], two["reports"]
    assert len(halves) == 2
    assert {half["sparse_calls"] for half in halves} == {whole["sparse_calls"]} == {12}
    mean = sum(half["density"] for half in halves) / 2
    assert mean == pytest.approx(whole["density"], abs=1e-3)
    assert whole["density"] < 0.9


# --- the server -----------------------------------------------------------------------------------


class Server:
    """What `vllm serve` runs: that command itself fails in `vllm-cpu`, which looks for a package
    named `vllm`."""

    def __init__(self, model, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = folder / "log"
        (folder / "metrics").mkdir()
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "tiny"]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
        command += ["--block-size", "32", "--no-enable-prefix-caching"]
        command += ["--additional-config", json.dumps({"sparse_patch": SPARSE})]
        own = {
            "PROMETHEUS_MULTIPROC_DIR": str(folder / "metrics"),
            "VLLM_LOG_STATS_INTERVAL": "1",
        }
        self.process = subprocess.Popen(
            command,
            env=environment(**own),
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self):
        end = time.monotonic() + START
        while time.monotonic() < end:
            assert self.process.poll() is None, self.said()[-6000:]
            try:
                return self.get("/health")
            except OSError:
                time.sleep(1)
        raise AssertionError(f"not up after {START} seconds: {self.said()[-6000:]}")

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=WAIT) as reply:
            return reply.read().decode()

    def said(self):
        return self.log.read_text(errors="replace")

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # a session of its own


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    started = Server(model, tmp_path_factory.mktemp("server"))
    try:
        started.wait()
        yield started
    finally:
        started.stop()


def ask(server, what):
    """Run `what(complete)`, where `await complete(prompt, ...)` asks the server."""
    from openai import AsyncOpenAI

    async def run():
        address = f"http://127.0.0.1:{server.port}/v1"
        async with AsyncOpenAI(base_url=address, api_key="none", timeout=WAIT) as client:

            async def complete(prompt, **options):
                options = {"max_tokens": 8, "temperature": 0, **options}
                options["extra_body"] = {"ignore_eos": True}
                return await client.completions.create(model="tiny", prompt=prompt, **options)

            return await what(complete)

    return asyncio.run(run())


def test_many_at_once_are_answered_as_each_alone(server):
    """Eight at once, of which one streams; another is broken off, and one does not fit."""
    from openai import BadRequestError

    asked = [one["prompt_token_ids"] for one in prompts(*LENGTHS)]

    async def all_of_them(complete):
        async def streamed(prompt):
            stream = await complete(prompt, stream=True)
            parts = [part.choices[0].text async for part in stream]
            assert len(parts) > 1
            return "".join(parts)

        async def whole(prompt):
            return (await complete(prompt)).choices[0].text

        async def broken_off(prompt):
            async with await complete(prompt, stream=True, max_tokens=150) as stream:
                await anext(aiter(stream))

        async def too_long(prompt):
            with pytest.raises(BadRequestError, match="512"):
                await complete(prompt * 2)

        answers = [streamed(asked[0]), *map(whole, asked[1:])]
        others = [broken_off(asked[1]), too_long(asked[0])]
        together = (await asyncio.gather(*answers, *others))[: len(asked)]
        return together, [await whole(prompt) for prompt in asked]

    together, alone = ask(server, all_of_them)
    assert together == alone
    assert all(len(text.split()) == 8 for text in alone)
    server.get("/health")


def test_the_log_and_the_metrics_say_that_it_is_on(server):
    prompt = prompts(300)[0]["prompt_token_ids"]
    counted = re.compile(r"^sparse_patch:sparse_calls_total.* ([0-9.]+)$", re.MULTILINE)
    end = time.monotonic() + WAIT
    found = None
    while found is None and time.monotonic() < end:
        ask(server, lambda complete: complete(prompt))
        time.sleep(1.5)
        found = counted.search(server.get("/metrics"))
    said = server.said()
    assert found, said[-3000:]
    assert float(found[1]) > 0
    assert "in 4 layers of 4, for prompts from 64 tokens on" in said
    assert re.search(r"sparse_patch, since the last line: \d+ sparse calls, density 0\.", said)
