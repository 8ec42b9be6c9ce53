"""Intervals and paired tests, by SciPy. Imports no torch."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Bin = tuple[float, float, tuple[float, float], int]  # mean probability, share right, its interval, n


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
    sums, sizes = _of_clusters(values, cluster_of)
    n = len(sums)
    if n < 2:
        return None
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=draws)
    tail = 100 * stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf((1 - confidence) / 2, n - 1))
    low, high = np.percentile((drawn @ sums) / (drawn @ sizes), (tail, 100 - tail))
    return float(low), float(high)


def _of_clusters(values: Mapping[str, float], cluster_of: Mapping[str, str]) -> tuple[NDArray, NDArray]:
    """Sum of values and number of them, by cluster, in order of names."""
    names = sorted({cluster_of[id_] for id_ in values})
    number = {name: i for i, name in enumerate(names)}
    at = np.array([number[cluster_of[id_]] for id_ in values])
    return np.bincount(at, list(map(float, values.values()))), np.bincount(at)


# ---- two systems on the same questions -----------------------------------------------------------------------------


def differences(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """a - b, question by question: for `clustered`, `equivalence` and `detectable`."""
    if a.keys() != b.keys():
        raise ValueError("a paired test needs the same questions on both sides")
    return {id_: float(a[id_]) - float(b[id_]) for id_ in a}


def mcnemar(a: Mapping[str, bool], b: Mapping[str, bool]) -> tuple[int, int, float]:
    """Exact McNemar test: (only a right, only b right, two-sided p)."""
    found = list(differences(a, b).values())
    only_a, only_b = found.count(1), found.count(-1)
    return only_a, only_b, float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def equivalence(values: Mapping[str, float], cluster_of: Mapping[str, str], margin: float) -> float:
    """p of the two one-sided tests (TOST): small where the mean of `values` lies within -margin and margin for sure."""
    shares = _by_cluster(values, cluster_of)
    if np.ptp(shares) < 1e-12:  # nothing varies, so nothing is random
        return float(abs(shares.mean()) >= margin)
    above = stats.ttest_1samp(shares, -margin, alternative="greater").pvalue
    return float(max(above, stats.ttest_1samp(shares, margin, alternative="less").pvalue))


def worse(values: Mapping[str, float], cluster_of: Mapping[str, str], margin: float) -> float:
    """p of the mean of `values` lying no lower than -margin: small where it does for sure."""
    shares = _by_cluster(values, cluster_of)
    if np.ptp(shares) < 1e-12:  # nothing varies, so nothing is random
        return float(shares.mean() >= -margin)
    return float(stats.ttest_1samp(shares, -margin, alternative="less").pvalue)


def detectable(
    values: Mapping[str, float], cluster_of: Mapping[str, str], alpha: float = 0.05, power: float = 0.8
) -> float:
    """The smallest true mean that a two-sided test at `alpha` on values that spread like these finds with `power`."""
    shares = _by_cluster(values, cluster_of)
    beyond = stats.t.ppf([1 - alpha / 2, power], len(shares) - 1).sum()
    return float(beyond * stats.sem(shares))


def _by_cluster(values: Mapping[str, float], cluster_of: Mapping[str, str]) -> NDArray:
    """A number a cluster, whose mean is that of `values` and whose standard error allows for clusters of any size.

    That error is the cluster-robust one of a mean, with C / (C - 1): the number is the mean plus the cluster's sum of
    what its values are off by, times C over all values. Two clusters at least.
    """
    sums, sizes = _of_clusters(values, cluster_of)
    if len(sums) < 2:
        raise ValueError("a test over clusters needs two of them")
    mean = sums.sum() / sizes.sum()
    return mean + (sums - mean * sizes) * len(sums) / sizes.sum()


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values of several tests, adjusted so that none of them is a false alarm more often than it says (Holm 1979)."""
    adjusted: dict[str, float] = {}
    least = 0.0
    for i, name in enumerate(sorted(p, key=lambda name: p[name])):
        least = adjusted[name] = max(least, min(1.0, (len(p) - i) * p[name]))
    return adjusted


# ---- seeds and samples ---------------------------------------------------------------------------------------------


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Of the mean over seeds, by Student's t; None for a single one."""
    if len(values) < 2:
        return None
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile, q in [0, 100], by linear interpolation."""
    return float(np.percentile(samples, q))


def slower(
    old: Sequence[Sequence[float]], new: Sequence[Sequence[float]], q: float, alpha: float, draws: int = 20_000
) -> tuple[float, float]:
    """The q-th percentile of `new` over that of `old`, each [processes, queries]: (ratio, lower bound).

    Of each query the median over processes counts. The bound is the lower of two: a bootstrap of queries, one-sided at
    `alpha`, always with the same draws; and, since processes differ by more than their queries tell, the ratio less a
    standard error by processes, where there are several. The second was chosen by simulation and has no level of its
    own (benchmarks/false_alarms.py); a process that was held up makes it lower, so it hides a change and invents none.
    """
    a, b = np.median(old, axis=0), np.median(new, axis=0)
    if len(a) != len(b):
        raise ValueError("a paired ratio needs the same queries on both sides")
    rng, ratios = np.random.default_rng(0), []
    for _ in range(0, draws, 1000):
        at = rng.integers(len(a), size=(1000, len(a)))
        ratios.append(np.percentile(b[at], q, axis=1) / np.percentile(a[at], q, axis=1))
    ratio, low = np.percentile(b, q) / np.percentile(a, q), np.quantile(np.concatenate(ratios), alpha)
    if min(len(old), len(new)) > 1:
        apart = np.mean([np.log(np.percentile(side, q, axis=1)).var(ddof=1) for side in (old, new)])
        # π / 2: of a median, beside a mean
        low = min(low, ratio * np.exp(-np.sqrt(np.pi / 2 * apart * (1 / len(old) + 1 / len(new)))))
    return float(ratio), float(low)


def reliability(probability: Mapping[str, float], right: Mapping[str, bool], bins: int = 10) -> list[Bin]:
    """Answers by their probability, in `bins` of equal size."""
    ids = sorted(probability, key=lambda id_: probability[id_])
    out = []
    for part in np.array_split(np.arange(len(ids)), min(bins, len(ids))):
        n, found = len(part), sum(bool(right[ids[i]]) for i in part)
        out.append((float(np.mean([probability[ids[i]] for i in part])), found / n, wilson(found, n), n))
    return out


def percentile_interval(samples: Sequence[float], q: float, confidence: float = 0.95) -> tuple[float, float] | None:
    """Distribution-free interval of the q-th percentile by order statistics; None where n is too small for one."""
    low, high = stats.quantile_test(samples, p=q / 100).confidence_interval(confidence)
    return None if np.isnan(low) or np.isnan(high) else (float(low), float(high))
