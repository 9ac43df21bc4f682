"""Documents of offline tasks for tests: a byte-level tokenizer and prose of our own."""

import functools

from sparse_patch_eval.tasks.documents import documents


@functools.cache
def made(tokenizer, folder, task, length=6000, count=40, **options):
    """Documents of a task with prose from the shared folder; a token is a character."""
    options = {"haystack": str(folder / "walks.txt"), **options}
    found = documents(task, tokenizer, max_seq_lengths=[length], num_samples=count, **options)
    for doc in found:
        assert len(set(doc["candidates"])) == len(doc["candidates"]) == 8
        blank = "" if doc["input"][-1].isspace() else " "
        doc["prompt"] = f"{doc['input']}{blank}{doc['gen_prefix']}"
    return found
