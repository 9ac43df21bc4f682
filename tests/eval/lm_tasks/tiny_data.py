"""Documents of different lengths, "!" (token 0 of the tests' tokenizer) among the words."""

import datasets

WORDS = ("mill", "river!", "lamp", "stone", "wind!", "road", "bread")


def documents(count=5, **_):
    rows = []
    for number in range(count):
        words = [WORDS[(number + step * step) % len(WORDS)] for step in range(8 + 5 * number)]
        rows.append(
            {
                "question": " ".join(words),
                "choices": ["mill", "a river!", "no"],
                "answer": number % 3,
            }
        )
    return {"test": datasets.Dataset.from_list(rows)}
