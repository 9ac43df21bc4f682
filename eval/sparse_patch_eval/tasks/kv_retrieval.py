"""One value out of a JSON object of UUID pairs (Liu et al., arXiv:2307.03172, in their wording).

InfiniteBench's `kv_retrieval` (arXiv:2402.13718) is the same task at 128k tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from sparse_patch_eval.tasks.problem import CANDIDATES, Draw, Growth, Problem, Series
from sparse_patch_eval.tasks.values import distinct, insert

_PROMPT = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\n"
    'JSON data:\n{{{pairs}}}\n\nKey: "{key}"'
)


@dataclass(frozen=True)
class KvRetrieval:
    """Random keys and values, all different.

    Attributes:
        tokens_to_generate: tokens kept free for the answer.
    """

    tokens_to_generate: int = 50

    def grow(self, draw: Draw) -> Growth:
        """Draw the pair that is asked for, and those around it."""
        keys = Series(distinct("uuids", draw.random("keys")))
        values = Series(distinct("uuids", draw.random("values")))
        key, value = keys.first(1)[0], values.first(1)[0]

        def build(units: int) -> Problem:
            pairs = [
                f"{json.dumps(k)}: {json.dumps(v)}"
                for k, v in zip(keys.first(units + 1), values.first(units + 1), strict=True)
            ]
            cut = int(units * draw.depth)
            text = ",\n ".join(insert(pairs[1:], [cut], pairs[:1]))
            return Problem(
                input=_PROMPT.format(pairs=text, key=key),
                gen_prefix="Corresponding value:",
                outputs=(value,),
                answer=json.dumps(value),
                wrong=tuple(map(json.dumps, values.first(CANDIDATES)[1:])),
                depth=draw.depth,
            )

        return Growth(build, least=CANDIDATES - 1, most=draw.length)
