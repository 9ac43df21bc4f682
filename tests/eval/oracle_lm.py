"""A scripted lm-eval model that knows each document: it answers all right, all wrong, or undecided.

A task is right if the oracle's right answers score 1.0 and its wrong ones 0.0. Import it as
`from tests.eval.oracle_lm import OracleLM`.
"""

from lm_eval.api.model import LM

WRONG = "I do not know."


class OracleLM(LM):
    """Answers from the documents.

    Args:
        mode: "right"; "wrong"; or "tie", where the likelihood prefers no answer.
        answer: the whole right answer to a document.
        said: what is generated where the answer is right.
    """

    def __init__(self, mode="right", *, answer=None, said=None):
        super().__init__()
        self.mode = mode
        self._answer = answer or (lambda doc: doc["candidates"][doc["gold"]])
        self._said = said or (lambda doc: " ".join(doc["outputs"]))
        self.asked = []

    def generate_until(self, requests, disable_tqdm=False):
        self.asked += requests
        return [WRONG if self.mode == "wrong" else self._said(one.doc) for one in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        self.asked += requests
        return [self._likelihood(one.doc, one.args[1]) for one in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError("no task rolls")

    def _likelihood(self, doc, continuation):
        if self.mode == "tie":
            return -0.5 * doc["candidate_tokens"][doc["candidates"].index(continuation[1:])], False
        is_gold = continuation == f" {self._answer(doc)}"
        likely = is_gold == (self.mode == "right")
        return (0.0 if likely else -100.0), likely

    @property
    def tokenizer_name(self):
        return "oracle"

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        turns = "".join(f"<{turn['role']}>{turn['content']}" for turn in chat_history)
        return turns + "<assistant>" * add_generation_prompt
