"""Intervals and paired tests, by SciPy. Values and intervals of EM and F1 are shares in [0, 1]. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Interval = tuple[float, float]
Values = Mapping[str, float]  # id → value
Clusters = Mapping[str, str]  # id → its cluster, here its article
CONSTANT = 1e-12  # range of values that differ by rounding alone
ROUND = 1000  # bootstrap samples at a time: tens of MB for a thousand queries


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share, in [0, 1]."""
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def clustered(values: Values, cluster_of: Clusters, confidence: float = 0.95, draws: int = 10_000) -> Interval | None:
    """Bootstrap interval of the mean of `values` by id, resampling whole clusters; None for a single cluster.

    SQuAD's questions come by article: another dev set would hold other articles, not other single questions. The seed
    is fixed. Because clusters are few, the percentiles are expanded a little (https://arxiv.org/abs/1411.5279).
    """
    sums, sizes = _of_clusters(values, cluster_of)
    if len(sums) < 2:
        return None
    drawn = resampled(len(sums), draws)
    return expanded_percentiles((drawn @ sums) / (drawn @ sizes), len(sums), confidence)


def resampled(n: int, draws: int) -> NDArray:
    """How often each of `n` clusters is in each bootstrap sample, [draws, n]; the seed is fixed."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=draws)


def expanded_percentiles(samples: NDArray, n: int, confidence: float = 0.95) -> Interval:
    """The interval of a figure by its bootstrap samples over `n` clusters."""
    tail = 100 * stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf((1 - confidence) / 2, n - 1))
    low, high = np.percentile(samples, (tail, 100 - tail))
    return float(low), float(high)


def _of_clusters(values: Values, cluster_of: Clusters) -> tuple[NDArray, NDArray]:
    """Sum of values and number of them, each [clusters], in order of names."""
    _, at = np.unique([cluster_of[id_] for id_ in values], return_inverse=True)
    return np.bincount(at, list(map(float, values.values()))), np.bincount(at)


# ---- two systems on the same questions -----------------------------------------------------------------------------


def differences(a: Values, b: Values) -> dict[str, float]:
    """a - b by question, for the tests below. Raises `ValueError` if a and b have other questions."""
    if a.keys() != b.keys():
        raise ValueError("a paired test needs the same questions on both sides")
    return {id_: float(a[id_]) - float(b[id_]) for id_ in a}


def mcnemar(a: Mapping[str, bool], b: Mapping[str, bool]) -> tuple[int, int, float]:
    """Exact McNemar test: (only a right, only b right, two-sided p)."""
    found = list(differences(a, b).values())
    only_a, only_b = found.count(1), found.count(-1)
    return only_a, only_b, float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def equivalence(values: Values, cluster_of: Clusters, margin: float) -> float:
    """p of two one-sided tests (TOST) that the mean of `values` lies between -margin and margin."""
    numbers = _by_cluster(values, cluster_of)
    return max(_one_sided(numbers, -margin, "greater"), _one_sided(numbers, margin, "less"))


def nonzero(values: Values, cluster_of: Clusters) -> float:
    """p of a two-sided test that the mean of `values` is not 0."""
    numbers = _by_cluster(values, cluster_of)
    return min(1.0, 2 * min(_one_sided(numbers, 0, "less"), _one_sided(numbers, 0, "greater")))


def worse(values: Values, cluster_of: Clusters, margin: float) -> float:
    """p of a one-sided test that the mean of `values` lies below -margin."""
    return _one_sided(_by_cluster(values, cluster_of), -margin, "less")


def _one_sided(numbers: NDArray, bound: float, side: Literal["less", "greater"]) -> float:
    """p of Student's t test that the mean lies on that side of `bound`."""
    if np.ptp(numbers) < CONSTANT:  # nothing varies, so nothing is random
        return float(numbers.mean() >= bound if side == "less" else numbers.mean() <= bound)
    return float(stats.ttest_1samp(numbers, bound, alternative=side).pvalue)


def detectable(values: Values, cluster_of: Clusters, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true mean that a two-sided test at `alpha` on values that spread like these finds with `power`."""
    numbers = _by_cluster(values, cluster_of)
    return float(stats.t.ppf([1 - alpha / 2, power], len(numbers) - 1).sum() * stats.sem(numbers))


def _by_cluster(values: Values, cluster_of: Clusters) -> NDArray:
    """One number per cluster, [clusters]: their mean is that of `values`, their standard error is cluster-robust.

    A number is the mean plus C / n times the cluster's sum of deviations from it, for C clusters of n values: a mean's
    sandwich error, with C / (C - 1) (Cameron and Miller 2015, eq. 11 and 12). `ValueError` for fewer than two clusters.
    """
    sums, sizes = _of_clusters(values, cluster_of)
    if len(sums) < 2:
        raise ValueError("a test over clusters needs two of them")
    mean = sums.sum() / sizes.sum()
    return mean + (sums - mean * sizes) * len(sums) / sizes.sum()


def holm(p: Values) -> dict[str, float]:
    """p-values of several tests, adjusted so that the chance of any false alarm is at most the level (Holm 1979)."""
    names = sorted(p, key=lambda name: p[name])
    adjusted = np.maximum.accumulate([min(1.0, (len(p) - i) * p[name]) for i, name in enumerate(names)])
    return dict(zip(names, adjusted.tolist(), strict=True))


# ---- seeds and samples ---------------------------------------------------------------------------------------------


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Student's t interval of the mean over seeds, in the unit of `values`; None for a single one."""
    if len(values) < 2:
        return None
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile, q in [0, 100], by linear interpolation."""
    return float(np.percentile(samples, q))


def percentile_interval(samples: Sequence[float], q: float, confidence: float = 0.95) -> Interval | None:
    """Distribution-free interval of the q-th percentile by order statistics; None if n is too small for one."""
    low, high = stats.quantile_test(samples, p=q / 100).confidence_interval(confidence)
    return None if np.isnan(low) or np.isnan(high) else (float(low), float(high))


def slower(
    old: Sequence[Sequence[float]], new: Sequence[Sequence[float]], q: float, alpha: float, draws: int = 20_000
) -> tuple[float, float]:
    """The q-th percentile of `new` over that of `old`, each [processes, queries]: (ratio, lower bound).

    A query counts by its median over processes. The bound is the lower of two. The first is a bootstrap of queries,
    one-sided at `alpha`, with a fixed seed. The second is the ratio less a standard error over processes, if there are
    several, because processes differ by more than their queries show. It was chosen by simulation and has no level of
    its own (benchmarks/false_alarms.py); a disturbed process lowers it, so it can hide a change but not invent one.
    """
    a, b = np.median(old, axis=0), np.median(new, axis=0)
    if len(a) != len(b):
        raise ValueError("a paired ratio needs the same queries on both sides")
    rng = np.random.default_rng(0)
    samples = (rng.integers(len(a), size=(ROUND, len(a))) for _ in range(0, draws, ROUND))
    ratios = [np.percentile(b[at], q, axis=1) / np.percentile(a[at], q, axis=1) for at in samples]
    ratio, low = np.percentile(b, q) / np.percentile(a, q), np.quantile(np.concatenate(ratios), alpha)
    if min(len(old), len(new)) > 1:
        variance = np.mean([np.log(np.percentile(side, q, axis=1)).var(ddof=1) for side in (old, new)])
        # π / 2: the variance of a median over that of a mean, for normal values
        low = min(low, ratio * np.exp(-np.sqrt(np.pi / 2 * variance * (1 / len(old) + 1 / len(new)))))
    return float(ratio), float(low)
