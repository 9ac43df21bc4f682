"""One of the processes of test_scale_out, as `accelerate launch` starts them.

First the processes hold one model together (tensor parallel), then each has its own and a share of
the data, as if each were on a node of its own. `lm_worker MODEL OUT ARGUMENTS` writes what it saw
to OUT/RANK.json, and last runs lm-eval's command line with the arguments.
"""

import json
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from sparse_patch_eval.lm_eval_model.model import SparsePatchLM

import sparse_patch
from tests.eval.lm_models import PAIRS, SPARSE, TASKS, instances

SEEN = set()


@dataclass(frozen=True)
class Watching(type(sparse_patch.get_method("a_shape"))):
    """A-shape that remembers how many heads it was given."""

    def plan(self, q, k, *, scale, q_offset):
        SEEN.add((q.shape[0], k.shape[0]))
        return super().plan(q, k, scale=scale, q_offset=q_offset)


def evaluate(lm):
    """lm-eval's results, or None where it has none to write."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    tasks = ["sp_choice", "sp_write", "sp_perplexity"]
    found = simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    if found is None:
        return None
    samples = {
        task: [(one["doc_id"], one["filtered_resps"]) for one in rows]
        for task, rows in found["samples"].items()
    }
    info = found["config"]["sparse_patch"]
    return {"results": found["results"], "samples": samples, "info": info}


def score(lm):
    return lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)


def refusal(model, method):
    """What is said to a method with a parameter about all heads."""
    try:
        SparsePatchLM(model, method=method, tp_plan="auto")
    except ValueError as error:
        return str(error)
    return None


def tensor_parallel(model):
    method = Watching(sink=4, window=16, block_size=16)
    lm = SparsePatchLM(model, tp_plan="auto", **{**SPARSE, "method": method})
    asked = [(context, {"max_gen_toks": 6}) for context, _ in PAIRS[:-1:5]]
    of_all_heads = (
        {"name": "xattention", "gamma": (0.9, 0.8, 0.7, 0.6)},
        {"name": "minference", "heads": [(0, "stream_llm", 4, 16)]},
        {"name": "proxyattn", "preset": "paper"},
    )
    return {
        "scores": score(lm),
        "texts": lm.generate_until(instances("generate_until", asked), disable_tqdm=True),
        "heads": sorted(SEEN),
        "writer": lm.is_writer,
        "shared": lm.share(["row"]),
        "run": evaluate(lm),
        "refused": [refusal(model, table) for table in of_all_heads],
    }


def data_parallel(model):
    os.environ["LOCAL_RANK"] = "0"  # the first process of its node
    lm = SparsePatchLM(model, **SPARSE)
    return {
        "rank": lm.rank,
        "world": lm.world_size,
        "writer": lm.is_writer,
        "shared": lm.share([f"row of {lm.rank}"]),
        "gathered": lm.all_gather(torch.tensor([lm.rank])).tolist(),
        "run": evaluate(lm),
    }


def command_line(arguments):
    """`python -m sparse_patch_eval.lm_eval_model`, in this process."""
    sys.argv[1:] = arguments
    runpy.run_module("sparse_patch_eval.lm_eval_model", run_name="__main__")


if __name__ == "__main__":
    model, out, *arguments = sys.argv[1:]
    local_rank = os.environ["LOCAL_RANK"]
    found = {"tensor": tensor_parallel(model), "data": data_parallel(model)}
    (Path(out) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    os.environ["LOCAL_RANK"] = local_rank
    command_line(arguments)
    torch.distributed.destroy_process_group()
