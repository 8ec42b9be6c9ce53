"""The official SQuAD v1.1 scorer, and `make verify-scorer` to prove it. Imports no torch.

Source: `evaluate-v1.1.py`, Rajpurkar et al. 2016 (https://rajpurkar.github.io/SQuAD-explorer/). Lower-case, delete
ASCII punctuation, drop the articles, collapse white space; EM and F1 each take their own maximum over the gold answers;
a missing id scores 0 and stays in the denominator, an unknown id is ignored.
"""

import gzip
import json
import re
import string
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.data import squad
from common.errors import UserError, one_line_errors

VERSION = "squad-v1.1"
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower-case, without ASCII punctuation and the words a, an, the; single spaces."""
    without_articles = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(without_articles.split())


def exact_match(prediction: str, gold: str) -> bool:
    return normalize(prediction) == normalize(gold)


def f1(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the normalised words, in [0, 1]."""
    predicted, wanted = normalize(prediction).split(), normalize(gold).split()
    same = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * same / (len(predicted) + len(wanted)) if same else 0.0


@dataclass(frozen=True)
class Score:
    em: float  # percent
    f1: float  # percent
    n: int  # questions, missing ones included
    missing: int  # questions without a prediction
    unknown: int  # predictions without a question
    correct: dict[str, bool]  # id → exact match
    overlap: dict[str, float]  # id → F1 in [0, 1]


def score(examples: Iterable[squad.Example], predictions: Mapping[str, str]) -> Score:
    """EM and F1 of `predictions` ({id: text}) over `examples`."""
    correct, overlap = {}, {}
    for example in examples:
        text = predictions.get(example.id)
        golds = [answer.text for answer in example.answers]
        correct[example.id] = text is not None and any(exact_match(text, gold) for gold in golds)
        overlap[example.id] = 0.0 if text is None else max(f1(text, gold) for gold in golds)
    n = len(correct)
    return Score(
        em=100 * sum(correct.values()) / n,
        f1=100 * sum(overlap.values()) / n,
        n=n,
        missing=sum(id_ not in predictions for id_ in correct),
        unknown=sum(id_ not in correct for id_ in predictions),
        correct=correct,
        overlap=overlap,
    )


def read_predictions(path: Path) -> dict[str, str]:
    """The official format, `{id: text}`, plain or gzipped."""
    try:
        raw = path.read_bytes()
        predictions = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(predictions, dict) or not all(isinstance(text, str) for text in predictions.values()):
        raise UserError(f"{path}: expected {{question id: answer text}}")
    return predictions


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("usage: make verify-scorer PRED=predictions.json DATA=dev.json (each plain or .gz)")
    predictions = read_predictions(Path(sys.argv[1]))
    result = score(squad.read(sys.argv[2], "dev").examples, predictions)
    if result.missing == result.n:
        raise UserError(f"{sys.argv[1]}: none of its {len(predictions)} answers is to a question of {sys.argv[2]}")
    if result.missing or result.unknown:
        print(f"{result.missing} missing, {result.unknown} unknown")
    print(f"EM {result.em:.4f} F1 {result.f1:.4f}")


if __name__ == "__main__":
    with one_line_errors():
        main()
