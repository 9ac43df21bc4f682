"""Run folders as `sparse-patch eval` writes them, made up: for whatever reads runs."""

import json
import random

MACHINE = {
    "device": "Test CPU, 2 cores",
    "cpu_capability": "AVX2",
    "threads": 2,
    "platform": "Linux",
    "python": "3.11.2",
    "torch": "2.9.0",
    "transformers": "5.23.0",
    "sparse_patch": "0.1.0",
    "git": "abc1234",
}
DIRECTIONS = {
    "string_match": True, "rank": True, "answer_nll": False, "nll": False, "kl": False,
}  # fmt: skip


def sample(doc_id=0, *, task="sp_niah_single_1", length=4096, scores=None, **fields):
    """A line of samples.jsonl; its prompt is told by task, length and document."""
    return {
        "benchmark": "ruler",
        "task": task,
        "length": length,
        "doc_id": doc_id,
        "prompt_hash": f"{task}-{length}-{doc_id}",
        "tokens": (length or 1000) - 5,
        "depth": None,
        "scores": {"string_match": 1.0} if scores is None else scores,
        "answer": " 1234567",
        "target": "1234567",
        "density": 1.0,
        "recall": None,
        "exact": {},
        "prefill_seconds": 2.0,
        "truncated": 0,
        "machine": MACHINE,
        **fields,
    }


def write_run(folder, method="dense", samples=(), *, finished=True, directions=None, **about):
    """Write a run folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "format": 1,
        "model": "smollm2",
        "dtype": "float32",
        "device": "cpu",
        "method": method,
        "params": {},
        "seed": 0,
        "chat_template": False,
        "patch": {"min_length": 1024},
        **about,
    }
    (folder / "run.json").write_text(json.dumps(run))
    lines = [json.dumps(one) + "\n" for one in samples]
    (folder / "samples.jsonl").write_text("".join(lines))
    if finished:
        results = {"higher_is_better": directions or DIRECTIONS, "tasks": [], "lm_eval": {}}
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def write_comparison(root, *, samples=12, lengths=(2048, 4096, 8192), **about):
    """Dense and five sparse runs on three RULER tasks (one beyond the model) and perplexity."""
    methods = {
        "dense": 0.0,
        "flexprefill:gamma=0.95": 0.03,
        "flexprefill:gamma=0.9": 0.08,
        "flexprefill:gamma=0.8,min_budget=512": 0.2,
        "xattention:threshold=0.9": 0.06,
        "a_shape:window=512": 0.6,
    }
    for number, (method, harm) in enumerate(methods.items()):
        lines = [
            line
            for length in lengths
            for doc_id in range(samples)
            for line in _four_tasks(doc_id, length, number, harm)
        ]
        name, _, settings = method.partition(":")
        params = dict(item.split("=") for item in settings.split(",") if item)
        write_run(root / f"{number}-{name}", method, lines, params=params, **about)
    return root


def _four_tasks(doc_id, length, number, harm):
    sparse = number > 0
    rng = random.Random(f"{doc_id}-{length}-{number}")
    density = 1.0 if not sparse else min(1.0, (1 - harm) * 1500 / length)
    short = number == 4 and length < 3000  # one method runs exact on short prompts
    measured = {
        "density": None if short else density,
        "recall": 1 - harm / 3 if sparse else None,
        "prefill_seconds": length / 1000 * (0.3 + 0.7 * density) * rng.uniform(0.95, 1.05),
        "exact": {"short": 30} if short else {},
        "sparse_calls": 0 if short else 30,
    }
    for task, ease in (("sp_niah_single_1", 1), ("sp_niah_multikey_1", 0.75), ("sp_vt", 0.02)):
        dense_right = random.Random(f"{task}-{doc_id}-{length}").random() < ease
        right = float(dense_right and rng.random() >= harm)
        yield sample(
            doc_id,
            task=task,
            length=length,
            depth=None if task == "sp_vt" else (doc_id % 6) / 5,
            scores={
                "string_match": right,
                "rank": max(right, float(rng.random() < 0.125 + ease / 2)),
                "answer_nll": 0.3 + harm + rng.uniform(0, 0.1) + (1 - ease),
            },
            answer=f" {1234567 if right else rng.randrange(10**6, 10**7)}.",
            **measured,
        )
    kl = harm * rng.uniform(0.5, 1)
    yield sample(
        doc_id,
        task="sp_perplexity",
        benchmark="perplexity",
        length=length,
        scores={"nll": 2.2 - length / 40000 + 0.1 * (doc_id % 5) + kl / 2, "kl": kl},
        answer=None,
        target=None,
        **measured,
    )
