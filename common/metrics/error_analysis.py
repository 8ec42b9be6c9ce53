"""Kinds of wrong answers by where they stand in the context, and accuracy by class of question. Imports no torch."""

import bisect
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from common.data.squad import Example
from common.data.tokens import Span

KINDS = (  # an answer is of the first that holds
    "right",
    "empty",
    "cut by the limit",
    "not a span of the context",
    "boundary off",  # the words overlap a gold answer's
    "right sentence, other words",
    "another sentence",
)
WORDS = ("what", "who", "when", "where", "which", "why", "how many", "how much", "how")
# Classes by a number of words: the most that belong to each.
OFF = {"1 word": 1, "2 words": 2, "3 or 4": 4, "5 or more": math.inf}  # both ends together
LENGTHS = {"1 word": 1, "2 words": 2, "3 words": 3, "4 or 5": 5, "6 to 9": 9, "10 or more": math.inf}
CONTEXTS = {"up to 80 words": 80, "81 to 120 words": 120, "121 to 160 words": 160, "more than 160 words": math.inf}
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")


class Mistakes(TypedDict):
    kinds: dict[str, int]  # questions by kind
    off: dict[str, int]  # questions whose boundary is off, by how many words
    by: dict[str, dict[str, tuple[int, int]]]  # "question", "answer", "context" → class → (right ones, all)


def table(examples: Iterable[Example], rows: Mapping[str, Mapping[str, Any]]) -> Mistakes:
    """Questions of each kind and class; `rows` are an evaluation's, by question (`text`, `em`, `hit_limit`)."""
    kinds, off = dict.fromkeys(KINDS, 0), dict.fromkeys(OFF, 0)
    classes = {"question": (*WORDS, "other"), "answer": LENGTHS, "context": CONTEXTS}
    by = {name: dict.fromkeys(order, (0, 0)) for name, order in classes.items()}
    for example in examples:
        row = rows[example.id]
        kind = kind_of(example, row["text"], row["em"], row["hit_limit"])
        kinds[kind] += 1
        if kind == "boundary off":
            off[_class_of(off_by(example, row["text"]), OFF)] += 1
        shortest, length = min(len(answer.text.split()) for answer in example.answers), len(example.context.split())
        own = (question_word(example.question), _class_of(shortest, LENGTHS), _class_of(length, CONTEXTS))
        for counts, name in zip(by.values(), own, strict=True):
            right, n = counts[name]
            counts[name] = right + row["em"], n + 1
    return {"kinds": kinds, "off": off, "by": by}


def kind_of(example: Example, text: str, right: bool, hit_limit: bool) -> str:
    """The kind of an answer, one of `KINDS`."""
    if right:
        return "right"
    if not text.strip():
        return "empty"
    if hit_limit:
        return "cut by the limit"
    places, golds = _places(example.context, text.strip()), _golds(example)
    if not places:
        return "not a span of the context"
    if any(a < d and c < b for a, b in places for c, d in golds):
        return "boundary off"
    ends = [match.end() for match in _SENTENCE_END.finditer(example.context)]
    answered, wanted = ({bisect.bisect(ends, start) for start, _ in spans} for spans in (places, golds))  # sentences
    return "right sentence, other words" if answered & wanted else "another sentence"


def off_by(example: Example, text: str) -> int:
    """Words by which start and end of the prediction are off together, from the nearest gold answer it overlaps."""

    def words(a: int, b: int) -> int:
        return len(example.context[min(a, b) : max(a, b)].split())

    pairs = ((*place, *gold) for place in _places(example.context, text.strip()) for gold in _golds(example))
    return min(words(a, c) + words(b, d) for a, b, c, d in pairs if a < d and c < b)


def question_word(question: str) -> str:
    """The first of `WORDS` in the question ("how many" before "how"), or "other"."""
    found = [(m.start(), -len(word), word) for word in WORDS if (m := re.search(rf"\b{word}\b", question, re.I))]
    return min(found)[2] if found else "other"


def _golds(example: Example) -> list[Span]:
    return [(a.start, a.start + len(a.text)) for a in example.answers]


def _places(context: str, text: str) -> list[Span]:
    """The places of `text` in `context`, in upper or lower case."""
    lower = context.lower()
    if len(lower) == len(context):  # "İ" becomes two characters, which would shift the places
        context, text = lower, text.lower()
    return [(at.start(), at.start() + len(text)) for at in re.finditer(f"(?={re.escape(text)})", context)]


def _class_of(value: int, classes: dict[str, float]) -> str:
    return next(name for name, most in classes.items() if value <= most)
