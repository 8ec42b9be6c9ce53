"""The official SQuAD v1.1 scorer; `make verify-scorer` runs it on any prediction file. Imports no torch.

Source: `evaluate-v1.1.py`, Rajpurkar et al. 2016 (https://rajpurkar.github.io/SQuAD-explorer/). EM and F1 each take
their own maximum over the gold answers. A missing id scores 0 and stays in the denominator; an unknown id is ignored.
"""

import json
import re
import string
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.data import squad
from common.errors import UserError, one_line_errors
from common.files import read_json

VERSION = "squad-v1.1"
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """`text` in lower case, without ASCII punctuation and the words a, an, the, with single spaces."""
    without_articles = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(without_articles.split())


def exact_match(prediction: str, gold: str) -> bool:
    return normalize(prediction) == normalize(gold)


def f1(prediction: str, gold: str) -> float:
    """The harmonic mean of precision and recall over the normalised words, in [0, 1]."""
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
    """EM and F1 of `predictions` ({id: text}) over `examples`, of which there is at least one."""
    correct, overlap = {}, {}
    for example in examples:
        text = predictions.get(example.id)
        golds = [answer.text for answer in example.answers]
        correct[example.id] = text is not None and any(exact_match(text, gold) for gold in golds)
        overlap[example.id] = 0.0 if text is None else max(f1(text, gold) for gold in golds)
    n, missing, unknown = len(correct), correct.keys() - predictions.keys(), predictions.keys() - correct.keys()
    em, mean_f1 = 100 * sum(correct.values()) / n, 100 * sum(overlap.values()) / n
    return Score(em, mean_f1, n, len(missing), len(unknown), correct, overlap)


def read_predictions(path: Path) -> dict[str, str]:
    """The answers of a file in the official format, `{id: text}`, plain or gzipped. Raises `UserError`."""
    expected = "expected {question id: answer text}"
    predictions = read_json(path)
    if not isinstance(predictions, dict):
        raise UserError(f"{path}: {'a list' if isinstance(predictions, list) else 'one value'}; {expected}")
    for id_, text in predictions.items():
        if not isinstance(text, str):
            what = "a list of candidates" if isinstance(text, list) else json.dumps(text, ensure_ascii=False)[:40]
            raise UserError(f'{path}: the answer to "{id_}" is {what}; {expected}, "" for no answer')
    return predictions


def of_file(path: str, data: str, examples: Iterable[squad.Example]) -> Score:
    """The score of a prediction file over `examples`, which are of `data`. Raises `UserError` if it answers none."""
    predictions = read_predictions(Path(path))
    result = score(examples, predictions)
    if result.missing == result.n:
        raise UserError(f"{path}: none of its {len(predictions)} answers is to a question of {data}")
    return result


def main() -> None:
    if len(sys.argv) != 3 or not all(sys.argv):
        raise UserError("usage: make verify-scorer PRED=predictions.json DATA=dev.json (each plain or .gz)")
    _, path, data = sys.argv
    result = of_file(path, data, squad.golds(data))
    if result.missing or result.unknown:
        print(f"{result.missing} missing, {result.unknown} unknown")
    print(f"EM {result.em:.4f} F1 {result.f1:.4f}")


if __name__ == "__main__":
    with one_line_errors():
        main()
