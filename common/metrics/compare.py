"""Which of two systems answers better, by how much, and how sure that is: question by question. Imports no torch.

`python -m common.metrics.compare dev.json a.json b.json …` is for prediction files in the official format: b, and all
that follow, against a.

A system is better where both say so: the exact McNemar test, adjusted for all tests of a table (Holm), and the interval
of the difference with whole articles drawn. McNemar's takes questions for independent, which those of an article are
not.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data import squad
from common.errors import UserError, one_line_errors
from common.metrics import score
from common.metrics.stats import clustered, detectable, differences, equivalence, holm, mcnemar

ALPHA, MARGIN = 0.05, 1.0  # points of EM within which two are called alike
Rows = Mapping[str, Mapping[str, Any]]  # of an evaluation, by question: em, f1, article
Interval = tuple[float, float] | None  # None where there is but one article


@dataclass(frozen=True)
class Verdict:
    """Of `a` over `b`; gains in points of EM and F1."""

    a: str
    b: str
    em_gain: float
    em_interval: Interval  # 95 %
    f1_gain: float
    f1_interval: Interval
    only_a: int  # questions that a alone gets right
    only_b: int
    p: float  # of this test alone
    p_adjusted: float
    tests: int  # that it is adjusted for
    detectable: float | None  # the smallest true difference in EM that would be found four times in five

    @property
    def better(self) -> bool | None:
        """Whether a is; None where they cannot be told apart."""
        sure = self.p_adjusted < ALPHA and (self.em_interval is None or not _holds_zero(self.em_interval))
        return self.em_gain > 0 if sure else None

    def __str__(self) -> str:
        em, f1 = (
            f"{self.em_gain:+.2f}{_brackets(self.em_interval)}",
            f"{self.f1_gain:+.2f}{_brackets(self.f1_interval)}",
        )
        if self.better is None:
            words = f"{self.a} and {self.b} cannot be told apart: {em} EM"
            words += f" (a difference of {self.detectable:.1f} would mostly have been seen)" if self.detectable else ""
        else:
            words = f"{self.a} {'beats' if self.better else 'loses to'} {self.b}: {em} EM"
        several = f", {_p(self.p_adjusted)} among {self.tests} tests" if self.tests > 1 else ""
        return (
            f"{words}, {f1} F1; right where the other is wrong: {self.only_a} against {self.only_b} questions, exact "
            f"McNemar {_p(self.p)}{several}"
        )


def compare(pairs: Sequence[tuple[str, str, Rows, Rows]]) -> list[Verdict]:
    """One verdict for each (name of a, name of b, a's rows, b's rows), adjusted for all of them together.

    Raises `ValueError` where a pair does not have the same questions.
    """
    tests = [mcnemar(_column(a, "em"), _column(b, "em")) for _, _, a, b in pairs]
    adjusted = holm({str(i): p for i, (_, _, p) in enumerate(tests)})
    out = []
    for i, ((name_a, name_b, a, b), (only_a, only_b, p)) in enumerate(zip(pairs, tests, strict=True)):
        article = {id_: row["article"] for id_, row in a.items()}
        em, f1 = (differences(_column(a, name), _column(b, name)) for name in ("em", "f1"))
        several = len(set(article.values())) > 1
        out.append(Verdict(
            name_a, name_b, _mean(em), _points(clustered(em, article)), _mean(f1), _points(clustered(f1, article)),
            only_a, only_b, p, adjusted[str(i)], len(pairs), 100 * detectable(em, article) if several else None,
        ))  # fmt: skip
    return out


def _column(rows: Rows, name: str) -> dict[str, Any]:
    return {id_: row[name] for id_, row in rows.items()}


def _mean(values: Mapping[str, float]) -> float:
    return 100 * sum(values.values()) / len(values)


def _points(interval: Interval) -> Interval:
    return interval and (100 * interval[0], 100 * interval[1])


def _holds_zero(interval: tuple[float, float]) -> bool:
    return interval[0] <= 0 <= interval[1]


def _brackets(interval: Interval) -> str:
    return f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""


def _p(p: float) -> str:
    return f"p = {p:.2g}" if p >= 1e-10 else "p < 1e-10"


def main(argv: list[str]) -> None:
    if len(argv) < 3:
        raise UserError("usage: make compare PRED='a.json b.json …' DATA=dev.json (each plain or .gz)")
    data, first, *others = argv
    dev = squad.read(data, "dev").examples
    article = {e.id: e.title for e in dev}
    scored = {file: score.score(dev, score.read_predictions(Path(file))) for file in (first, *others)}
    for file, s in scored.items():
        incomplete = f", {s.missing} missing" if s.missing else ""
        print(f"{file}: EM {s.em:.2f} F1 {s.f1:.2f}, n {s.n}{incomplete}")
    rows = {
        file: {id_: {"em": s.correct[id_], "f1": s.overlap[id_], "article": article[id_]} for id_ in article}
        for file, s in scored.items()
    }
    for verdict in compare([(file, first, rows[file], rows[first]) for file in others]):
        alike = ""
        if len(set(article.values())) > 1:
            p = equivalence(differences(scored[verdict.a].correct, scored[first].correct), article, MARGIN / 100)
            alike = f"; within {MARGIN:g} EM of each other: p = {p:.2g}"
        print(f"{verdict}{alike}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
