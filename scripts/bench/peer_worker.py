#!/usr/bin/env python
"""One other engine, loaded once, that prefills prompts on request. `bench_prefill.py` starts it.

    peer_worker.py ENGINE MODEL.gguf --threads N --longest TOKENS --dtype bfloat16

Needs nothing of ours, so that the Python of another environment can run it: ENGINE is `openvino`,
`openvino:trishape`, `openvino:xattention` (pip install openvino-genai) or `llama.cpp` (pip install
xllamacpp). By default OpenVINO keeps the KV cache in 8 bits and multiplies by packed weights in 8
bits, too, whatever --dtype; `openvino:xattention:unquantised` computes in --dtype, as we do.

Reads a line of JSON per prompt, `{"ids": [...]}`, and answers with one: `{"seconds": wall time of a
prefill and one token, "token": what came out}`. The first line it writes is `{"engine": ...,
"version": ...}`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

# Takes token ids, returns the one that follows, as an id or as text.
Engine = Callable[[list[int]], Any]


def openvino(options: argparse.Namespace, mode: str) -> tuple[Engine, str]:
    """One-shot prefill in OpenVINO GenAI's continuous batching; `mode`: what follows its name."""
    import numpy
    import openvino_genai as genai
    from openvino import Tensor

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = options.longest + 1
    scheduler.cache_size = 4  # GiB
    mode, _, arithmetic = mode.partition(":")
    if mode:
        modes = genai.SparseAttentionMode
        scheduler.use_sparse_attention = True
        scheduler.sparse_attention_config = genai.SparseAttentionConfig(
            mode=getattr(modes, mode.upper())
        )
    dtype = {"float32": "f32", "bfloat16": "bf16"}[options.dtype]
    properties: dict[str, Any] = {}
    if arithmetic == "unquantised":
        properties = {"KV_CACHE_PRECISION": dtype, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    pipeline = genai.LLMPipeline(
        options.model,
        "CPU",
        scheduler_config=scheduler,
        INFERENCE_NUM_THREADS=options.threads,
        INFERENCE_PRECISION_HINT=dtype,
        **properties,
    )
    one = genai.GenerationConfig(max_new_tokens=1, ignore_eos=True, do_sample=False)

    def prefill(ids: list[int]) -> int:
        tokens = numpy.array([ids], dtype=numpy.int64)
        inputs = genai.TokenizedInputs(Tensor(tokens), Tensor(numpy.ones_like(tokens)))
        return int(pipeline.generate(inputs, one).tokens[0][0])

    return prefill, version("openvino-genai")


def llama_cpp(options: argparse.Namespace) -> tuple[Engine, str]:
    """llama.cpp's server, in this process. It keeps its own precision, whatever --dtype says. Of a
    prompt that fills the model's context it gets all but the first token."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.n_ctx = options.longest + 16
    params.n_predict = 1
    params.n_parallel = 1
    params.cache_prompt = False
    params.n_gpu_layers = 0
    params.verbosity = -1
    params.cpuparams.n_threads = options.threads
    params.cpuparams_batch.n_threads = options.threads
    server = xllamacpp.Server(params)

    def ask(ids: list[int]) -> dict[str, Any]:
        wish = {"prompt": ids, "max_tokens": 1, "temperature": 0, "cache_prompt": False}
        answer: dict[str, Any] = server.handle_completions(wish)
        return answer

    def prefill(ids: list[int]) -> str:
        answer = ask(ids)
        error = answer.get("error", {})
        if error and error.get("n_ctx") == len(ids):  # the answer has to fit the context, too
            answer = ask(ids[1:])
            error = answer.get("error", {})
        if error:
            raise RuntimeError(f"llama.cpp: {error}")
        return str(answer["choices"][0]["text"])

    return prefill, version("xllamacpp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine")
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--longest", type=int, required=True, help="tokens of the longest prompt")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    options = parser.parse_args()
    # Engines print to stdout too: answers go to where that led, and stdout leads to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, _, mode = options.engine.partition(":")
    if name == "openvino":
        prefill, of_version = openvino(options, mode)
    elif name == "llama.cpp" and not mode:
        prefill, of_version = llama_cpp(options)
    else:
        parser.error(f"engine {options.engine}: see --help")
    print(json.dumps({"engine": options.engine, "version": of_version}), file=answers)
    for line in sys.stdin:
        ids = json.loads(line)["ids"]
        start = time.perf_counter()
        token = prefill(ids)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "token": token}), file=answers)


if __name__ == "__main__":
    main()
