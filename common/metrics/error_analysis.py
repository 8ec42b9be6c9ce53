"""What separates wrong answers from right ones: kinds of mistakes, and accuracy by question, answer and context.

A kind is found from the text alone: where the predicted words stand in the context, and where the gold ones do.
Imports no torch.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from common.data.squad import Example

KINDS = (  # the first that holds
    "right",
    "empty",
    "cut by the limit",
    "not a span of the context",
    "boundary off",  # the words overlap a gold answer's
    "right sentence, other words",
    "another sentence",
)
OFF = {"1 word": 1, "2 words": 2, "3 or 4": 4, "5 or more": math.inf}  # of both ends together, at most
WORDS = ("what", "who", "when", "where", "which", "why", "how many", "how much", "how")
LENGTHS = {"1 word": 1, "2 words": 2, "3 words": 3, "4 or 5": 5, "6 to 9": 9, "10 or more": math.inf}
CONTEXTS = {"up to 80 words": 80, "81 to 120 words": 120, "121 to 160 words": 160, "more than 160 words": math.inf}
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")

Span = tuple[int, int]  # characters


def table(examples: Iterable[Example], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of an evaluation's rows by question (`text`, `em`, `hit_limit`).

    `kinds` and `off`: how many questions; `by`: for each way to sort them and each of its classes (right ones, all).
    """
    kinds, off = Counter(dict.fromkeys(KINDS, 0)), Counter(dict.fromkeys(OFF, 0))
    by: dict[str, Counter[tuple[str, bool]]] = {"question": Counter(), "answer": Counter(), "context": Counter()}
    for example in examples:
        row = rows[example.id]
        kind = kind_of(example, row["text"], row["em"], row["hit_limit"])
        kinds[kind] += 1
        if kind == "boundary off":
            off[_class_of(off_by(example, row["text"]), OFF)] += 1
        answer = min((a.text for a in example.answers), key=lambda text: len(text.split()))
        for name, value in (
            ("question", question_word(example.question)),
            ("answer", _class_of(len(answer.split()), LENGTHS)),
            ("context", _class_of(len(example.context.split()), CONTEXTS)),
        ):
            by[name][value, row["em"]] += 1
    orders = {"question": (*WORDS, "other"), "answer": tuple(LENGTHS), "context": tuple(CONTEXTS)}
    return {
        "kinds": dict(kinds), "off": dict(off),
        "by": {name: {c: (by[name][c, True], by[name][c, True] + by[name][c, False]) for c in order}
               for name, order in orders.items()},
    }  # fmt: skip


def kind_of(example: Example, text: str, right: bool, hit_limit: bool) -> str:
    """One of `KINDS`."""
    if right:
        return "right"
    if not text.strip():
        return "empty"
    if hit_limit:
        return "cut by the limit"
    places = list(_places(example.context, text.strip()))
    if not places:
        return "not a span of the context"
    if any(a < d and c < b for a, b in places for c, d in _golds(example)):
        return "boundary off"
    ends = [match.end() for match in _SENTENCE_END.finditer(example.context)]

    def sentence(start: int) -> int:
        return sum(end <= start for end in ends)

    golds = {sentence(start) for start, _ in _golds(example)}
    same = any(sentence(start) in golds for start, _ in places)
    return "right sentence, other words" if same else "another sentence"


def off_by(example: Example, text: str) -> int:
    """By how many words the start and the end of the prediction are off together; the nearest of all pairs."""

    def words(a: int, b: int) -> int:
        return len(example.context[min(a, b) : max(a, b)].split())

    return min(
        words(a, c) + words(b, d)
        for a, b in _places(example.context, text.strip())
        for c, d in _golds(example)
        if a < d and c < b
    )


def question_word(question: str) -> str:
    """The first of `WORDS` that stands in it; "how many" before "how"."""
    found = [(match.start(), -len(word), word) for word in WORDS if (match := _word(word).search(question))]
    return min(found)[2] if found else "other"


def _word(word: str) -> re.Pattern[str]:
    return re.compile(rf"\b{word}\b", re.I)


def _golds(example: Example) -> list[Span]:
    return [(a.start, a.start + len(a.text)) for a in example.answers]


def _places(context: str, text: str) -> Iterator[Span]:
    """Where `text` stands in `context`; in any case of its letters, where that moves no letter."""
    lower = context.lower()
    if len(lower) == len(context):
        context, text = lower, text.lower()
    start = context.find(text)
    while start >= 0:
        yield start, start + len(text)
        start = context.find(text, start + 1)


def _class_of(value: int, classes: dict[str, float]) -> str:
    return next(name for name, most in classes.items() if value <= most)
