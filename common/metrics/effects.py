"""What variants change against a baseline, over seeds, question by question. Imports no torch.

A question's difference is its mean over the seeds that both have. Tests and intervals are over articles, as in
`common.metrics.compare`; p-values are adjusted for all variants of a family (Holm). Two questions are asked of each:
does it differ from the baseline, and is it equal within a margin (two one-sided tests)?
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from common.metrics.compare import ALPHA, Rows, brackets
from common.metrics.stats import Interval, clustered, detectable, differences, equivalence, holm, nonzero

BySeed = Mapping[int, Rows]  # an evaluation's rows by the seed of its training


@dataclass(frozen=True)
class Effect:
    """A variant against the baseline. Gains are points of EM and F1; intervals are 95 %, None for one article."""

    variant: str
    seeds: Sequence[int]  # that both have
    em_gain: float
    em_interval: Interval | None
    f1_gain: float
    f1_interval: Interval | None
    em_by_seed: Sequence[float]  # gains
    f1_by_seed: Sequence[float]
    p: float | None  # that EM differs, adjusted; None for one article
    p_equal: float | None  # that EM is equal within the margin, adjusted
    tests: int  # that both are adjusted for
    margin: float  # points of EM

    @property
    def better(self) -> bool | None:
        """True if the variant is better, False if it is worse, None if the difference is not significant."""
        inside = self.em_interval is None or self.em_interval[0] <= 0 <= self.em_interval[1]
        return None if self.p is None or self.p >= ALPHA or inside else self.em_gain > 0

    @property
    def equal(self) -> bool:
        return self.p_equal is not None and self.p_equal < ALPHA

    @property
    def verdict(self) -> str:
        """better, worse, equal, undecided, or of the first two with equal: a difference that does not matter."""
        found = {True: "better", False: "worse", None: ""}[self.better]
        equal = f"equal within {self.margin:g}" if self.equal else ""
        return ", ".join(filter(None, (found, equal))) or "undecided"

    def __str__(self) -> str:
        what = f"{self.em_gain:+.2f}{brackets(self.em_interval)} EM, {self.f1_gain:+.2f}{brackets(self.f1_interval)} F1"
        seeds = f"{len(self.seeds)} seed{'s' * (len(self.seeds) != 1)}"
        tests = f", p = {self.p:.2g}, equal p = {self.p_equal:.2g}" if self.p is not None else ""
        return f"{self.variant}: {self.verdict}: {what} ({seeds}{tests}, among {self.tests})"


def effects(baseline: BySeed, variants: Mapping[str, BySeed], margin: float) -> list[Effect]:
    """The effect of each variant that has a seed in common with the baseline; `margin` in points of EM."""
    shared = {name: [seed for seed in baseline if seed in rows] for name, rows in variants.items()}
    shared = {name: seeds for name, seeds in shared.items() if seeds}
    em, f1 = (
        {name: [gains(variants[name][seed], baseline[seed], what) for seed in seeds] for name, seeds in shared.items()}
        for what in ("em", "f1")
    )
    article = article_of(next(iter(baseline.values()))) if baseline else {}
    tested = shared if len(set(article.values())) > 1 else {}
    means = {name: mean_of(em[name]) for name in shared}
    p = holm({name: nonzero(means[name], article) for name in tested})
    p_equal = holm({name: equivalence(means[name], article, margin / 100) for name in tested})
    out = []
    for name, seeds in shared.items():
        points = (*_points(means[name], article), *_points(mean_of(f1[name]), article))
        em_by_seed, f1_by_seed = ([100 * fmean(of.values()) for of in one[name]] for one in (em, f1))
        tests = p.get(name), p_equal.get(name), len(tested)
        out.append(Effect(name, seeds, *points, em_by_seed, f1_by_seed, *tests, margin))
    return out


def findable(pairs: Sequence[tuple[Rows, Rows]], seeds: int, tests: int) -> tuple[float, float] | None:
    """The smallest true differences in EM, in points, that `seeds` of each would mostly find: of one test, of `tests`.

    `pairs`: evaluations of one seed each, of a variant and a baseline. What they differ by scatters from article to
    article; of S seeds it scatters by 1 / √S as much. None without pairs, or with one article.
    """
    found = [(gains(a, b, "em"), article_of(a)) for a, b in pairs]
    found = [(gain, article) for gain, article in found if len(set(article.values())) > 1]
    if not found:
        return None

    def least(alpha: float) -> float:
        squares = [detectable(gain, article, alpha) ** 2 for gain, article in found]
        return float(100 * (fmean(squares) / seeds) ** 0.5)

    return least(ALPHA), least(ALPHA / max(1, tests))


def gains(a: Rows, b: Rows, what: str) -> dict[str, float]:
    """a - b of each question's em or f1, in [-1, 1]."""
    return differences({id_: row[what] for id_, row in a.items()}, {id_: row[what] for id_, row in b.items()})


def mean_of(by_seed: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each question's mean over seeds."""
    return {id_: fmean(one[id_] for one in by_seed) for id_ in by_seed[0]}


def article_of(rows: Rows) -> dict[str, str]:
    return {id_: row["article"] for id_, row in rows.items()}


def _points(shares: Mapping[str, float], article: Mapping[str, str]) -> tuple[float, Interval | None]:
    """The mean of `shares` and its interval, both times 100."""
    interval = clustered(shares, article)
    return 100 * fmean(shares.values()), interval and (100 * interval[0], 100 * interval[1])
