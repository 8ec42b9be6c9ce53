"""Answers that are snapped to the context afterwards (`decode.snap`): the only way to quotes for hosted models."""

import re
import string
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from common.data.tokens import Span
from common.decode.answers import Prediction
from common.metrics.score import normalize

LONGER = 2  # a span has at most so many times the words of the answer
AROUND = string.punctuation + string.whitespace


def nearest(windows: Iterable[tuple[str, int]], answer: str) -> tuple[str, Span] | None:
    """The span of what was read that is most like `answer`, and its characters in the question's context.

    `windows`: the parts that were read, each with its first character's place. An answer that stands there stays as it
    is. Of all other spans of whole words, less punctuation around them, the one with the highest F1 with the answer, by
    the scorer's words; of several the one with the fewest words, then the first. None where no word is shared.
    """
    windows = list(windows)
    if not answer:
        return None
    for context, offset in windows:
        if (at := context.find(answer)) >= 0:
            return answer, (offset + at, offset + at + len(answer))
    wanted = normalize(answer).split()
    best: tuple[float, int] = (0.0, 0)
    found: tuple[str, Span] | None = None
    for context, offset in windows:
        words = [(m.start(), m.end(), normalize(m.group()).split()) for m in re.finditer(r"\S+", context)]
        for i, (start, _, first) in enumerate(words):
            if not set(first) & set(wanted):
                continue  # a span that begins one word later is as like, and shorter
            left, size, same = Counter(wanted), 0, 0
            for _, stop, own in words[i : i + LONGER * max(1, len(answer.split()))]:
                for word in own:
                    size, same, left[word] = size + 1, same + (left[word] > 0), left[word] - 1
                score = 2 * same / (size + len(wanted)), -size
                if same and score > best:
                    text = context[start:stop]
                    inner = text.strip(AROUND) or text
                    at = offset + start + text.index(inner)
                    best, found = score, (inner, (at, at + len(inner)))
    return found


def of(answer: Prediction, windows: Iterable[tuple[str, int]]) -> Prediction:
    """The answer as `nearest` has it; as it is where no word of it stands in what was read."""
    found = nearest(windows, answer.text)
    return replace(answer, text=found[0], span=found[1]) if found else answer
