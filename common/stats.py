"""Intervals and paired tests, by SciPy. Imports no torch."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, in [0, 1]."""
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def clustered(
    values: Mapping[str, float], cluster_of: Mapping[str, str], confidence: float = 0.95, draws: int = 10_000
) -> tuple[float, float] | None:
    """Bootstrap interval of the mean of `values` by id, whole clusters drawn; None where there is but one.

    SQuAD's questions come by article: another dev set would have had other articles, not other single questions.
    Percentiles of the means of as many clusters, drawn with replacement, always the same ones; a little further out
    than 2.5 and 97.5, since clusters are few (expanded percentiles, https://arxiv.org/abs/1411.5279).
    """
    names = sorted({cluster_of[id_] for id_ in values})
    if len(names) < 2:
        return None
    number = {name: i for i, name in enumerate(names)}
    at = np.array([number[cluster_of[id_]] for id_ in values])
    sums, sizes = np.bincount(at, list(map(float, values.values()))), np.bincount(at)
    drawn = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    n = len(names)
    tail = 100 * stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf((1 - confidence) / 2, n - 1))
    low, high = np.percentile((drawn @ sums) / (drawn @ sizes), (tail, 100 - tail))
    return float(low), float(high)


def mcnemar(a: Mapping[str, bool], b: Mapping[str, bool]) -> tuple[int, int, float]:
    """Exact McNemar test of two systems on the same questions: (only a right, only b right, two-sided p)."""
    if a.keys() != b.keys():
        raise ValueError("a paired test needs the same questions on both sides")
    only_a = sum(a[id_] and not b[id_] for id_ in a)
    only_b = sum(b[id_] and not a[id_] for id_ in a)
    return only_a, only_b, float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile, q in [0, 100], by linear interpolation."""
    return float(np.percentile(samples, q))


def percentile_interval(samples: Sequence[float], q: float, confidence: float = 0.95) -> tuple[float, float] | None:
    """Distribution-free interval of the q-th percentile by order statistics; None where n is too small for one."""
    low, high = stats.quantile_test(samples, p=q / 100).confidence_interval(confidence)
    return None if np.isnan(low) or np.isnan(high) else (float(low), float(high))
