"""Which of two systems answers better, by how much, and how surely, question by question. Imports no torch.

`python -m common.metrics.compare dev.json a.json b.json …`: prediction files in the official format, each against a.

A system is better if the exact McNemar test, adjusted for all tests of a table (Holm), and the interval of the
difference over resampled articles agree. The test alone takes questions for independent; those of an article are not.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data import squad
from common.errors import UserError, one_line_errors
from common.metrics import score
from common.metrics.stats import Interval, clustered, detectable, differences, equivalence, holm, mcnemar

ALPHA = 0.05  # level of the tests
MARGIN_POINTS = 1.0  # of EM, within which two systems count as equal: five seeds of one differ by 0.6 (docs/results.md)
Rows = Mapping[str, Mapping[str, Any]]  # an evaluation by question: em (bool), f1 in [0, 1], article


@dataclass(frozen=True)
class Verdict:
    """The comparison of `a` with `b`. Gains are in points of EM and F1; intervals are 95 %, None for one article."""

    a: str
    b: str
    em_gain: float
    em_interval: Interval | None
    f1_gain: float
    f1_interval: Interval | None
    only_a: int  # questions that a alone gets right
    only_b: int
    p: float  # of this test alone
    p_adjusted: float
    tests: int  # that it is adjusted for
    detectable: float | None  # smallest true difference, in points of EM, that is found with a power of 80 %

    @property
    def better(self) -> bool | None:
        """True if a is better, False if b is, None if the difference is not significant."""
        interval = self.em_interval
        sure = self.p_adjusted < ALPHA and not (interval and interval[0] <= 0 <= interval[1])
        return self.em_gain > 0 if sure else None

    def __str__(self) -> str:
        em = f"{self.em_gain:+.2f}{brackets(self.em_interval)} EM"
        if self.better is None:
            words = f"{self.a} and {self.b} cannot be told apart: {em}"
            words += f" (a difference of {self.detectable:.1f} would mostly have been seen)" if self.detectable else ""
        else:
            words = f"{self.a} {'beats' if self.better else 'loses to'} {self.b}: {em}"
        several = f", {_p(self.p_adjusted)} among {self.tests} tests" if self.tests > 1 else ""
        test = f"{self.only_a} against {self.only_b} questions, exact McNemar {_p(self.p)}{several}"
        return f"{words}, {self.f1_gain:+.2f}{brackets(self.f1_interval)} F1; right where the other is wrong: {test}"


def compare(pairs: Sequence[tuple[str, str, Rows, Rows]]) -> list[Verdict]:
    """A verdict on each (name of a, name of b, a's rows, b's rows) of the same questions, adjusted for all of them."""
    tests = [mcnemar(_column(a, "em"), _column(b, "em")) for _, _, a, b in pairs]
    adjusted = holm({str(i): p for i, (_, _, p) in enumerate(tests)})
    out = []
    for i, ((name_a, name_b, a, b), test) in enumerate(zip(pairs, tests, strict=True)):
        article = _column(a, "article")
        em, f1 = (differences(_column(a, name), _column(b, name)) for name in ("em", "f1"))
        gains = (*_points(em, article), *_points(f1, article))
        least = 100 * detectable(em, article) if gains[1] else None
        out.append(Verdict(name_a, name_b, *gains, *test, adjusted[str(i)], len(pairs), least))
    return out


def brackets(interval: Sequence[float] | None, digits: int = 2) -> str:
    """An interval as it follows a figure; nothing for None."""
    return f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""


def _column(rows: Rows, name: str) -> dict[str, Any]:
    return {id_: row[name] for id_, row in rows.items()}


def _points(shares: Mapping[str, float], article: Mapping[str, str]) -> tuple[float, Interval | None]:
    """The mean of `shares` and its interval, both times 100."""
    interval = clustered(shares, article)
    return 100 * sum(shares.values()) / len(shares), interval and (100 * interval[0], 100 * interval[1])


def _p(p: float) -> str:
    return f"p = {p:.2g}" if p >= 1e-10 else "p < 1e-10"


def main(argv: list[str]) -> None:
    data, *words = argv or [""]
    # make's PRED is one word, a file whose name may hold spaces or several names as a shell would take them apart
    try:
        files = [file for word in words for file in ([word] if Path(word).is_file() else shlex.split(word))]
    except ValueError as error:
        raise UserError(f"PRED={' '.join(words)}: {error}; quote a name as a shell would have it") from error
    if len(files) < 2:
        raise UserError("usage: make compare PRED='a.json b.json …' DATA=dev.json (each plain or .gz)")
    first, *others = files
    dev = squad.golds(data)
    article = {e.id: e.title for e in dev}
    scored = {file: score.of_file(file, data, dev) for file in files}
    rows: dict[str, Rows] = {}
    for file, s in scored.items():
        print(f"{file}: EM {s.em:.2f} F1 {s.f1:.2f}, n {s.n}" + (f", {s.missing} missing" if s.missing else ""))
        rows[file] = {id_: {"em": s.correct[id_], "f1": s.overlap[id_], "article": article[id_]} for id_ in article}
    for verdict in compare([(file, first, rows[file], rows[first]) for file in others]):
        alike = ""
        if verdict.em_interval:
            differ = differences(scored[verdict.a].correct, scored[first].correct)
            p = equivalence(differ, article, MARGIN_POINTS / 100)
            alike = f"; within {MARGIN_POINTS:g} EM of each other: p = {p:.2g}"
        print(f"{verdict}{alike}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
