"""An engine in processes of its own, for `test_vllm_processes.py`: answers as JSON.

python -m tests.serving.run_engine MODEL OPTIONS PROMPTS: the last two are JSON.
"""

import json
import sys

from vllm import LLM, SamplingParams

import sparse_patch.serving


def main() -> None:
    model, options, prompts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        block_size=32,
        skip_tokenizer_init=True,
        **options,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=6, logprobs=0, detokenize=False, ignore_eos=True
    )
    said = []
    for out in llm.generate(prompts, sampling, use_tqdm=False):
        tokens = list(out.outputs[0].token_ids)
        steps = zip(out.outputs[0].logprobs, tokens, strict=True)
        said.append({"tokens": tokens, "logprobs": [of[token].logprob for of, token in steps]})
    reports = [one.to_dict() for one in sparse_patch.serving.report(llm)]
    print("RESULT " + json.dumps({"said": said, "reports": reports}), flush=True)


if __name__ == "__main__":
    main()
