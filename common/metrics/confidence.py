"""Confidence: how far probabilities are from how often answers are right, and how well they rank. Imports no torch.

Two different things. A calibrated probability of 0.8 is right in 80 % of cases: the calibration errors, Brier and NLL
measure that, and a monotone map can mend it. A good ranking puts right answers before wrong ones: AURC and coverage
measure that, and no monotone map changes it.
"""

from collections.abc import Mapping
from typing import NamedTuple

from common.metrics.stats import Clusters, Interval, Values, expanded_percentiles, resampled, wilson

import numpy as np
from numpy.typing import NDArray

BINS = 15  # of equal mass, for the calibration error
LEVELS = (80, 90, 95)  # EM in percent that the answered questions must reach
CLIP = 1e-4  # for the log-likelihood, probabilities are kept this far from 0 and 1
DRAWS, CHUNK = 1000, 100  # bootstrap samples over articles, and how many at a time


class Bin(NamedTuple):
    """Answers of similar probability."""

    probability: float  # their mean, in [0, 1]
    right: float  # share of them that is right, in [0, 1]
    interval: Interval  # of that share, 95 %
    n: int  # answers


class Figure(NamedTuple):
    value: float
    interval: Interval | None = None  # 95 %, by article


def reliability(probability: Values, right: Mapping[str, bool], bins: int = 10) -> list[Bin]:
    """Bins of equal size by rising probability; fewer if there are fewer answers."""
    out = []
    for ids in np.array_split(sorted(probability, key=lambda id_: probability[id_]), min(bins, len(probability))):
        n, found = len(ids), sum(bool(right[id_]) for id_ in ids)
        out.append(Bin(float(np.mean([probability[id_] for id_ in ids])), found / n, wilson(found, n), n))
    return out


def risk_coverage(probability: Values, right: Mapping[str, bool]) -> tuple[NDArray, NDArray]:
    """(share of questions that is answered, error rate of these), the most confident first; both rise to their ends.

    Answers of equal probability are answered together.
    """
    p, r = np.array(list(probability.values())), np.array([right[id_] for id_ in probability], float)
    n, found = _Groups(p).sums(np.ones((1, len(p))), r)
    answered, correct = n[0].cumsum(), found[0].cumsum()
    return answered / len(probability), 1 - correct / answered


def figures(probability: Values, right: Mapping[str, bool], article: Clusters, draws: int = DRAWS) -> dict[str, Figure]:
    """All figures of confidence, shares in [0, 1] but `nll` (nats); intervals by `draws` samples of whole articles.

    - `ece`: the mean distance of probability from share right over `BINS` bins of equal mass, weighted by size
      (https://arxiv.org/abs/1706.04599). It is above 0 for the best of models: `perfect_ece` is its mean where every
      answer is right with exactly its probability.
    - `smooth_ece`: without bins (https://arxiv.org/abs/2309.12236), by the authors' package relplot.
    - `brier`, `nll`: mean squared error and mean negative log-likelihood.
    - `aurc`: the area under the risk-coverage curve: the error rate of the k most confident answers, averaged over all
      k (https://arxiv.org/abs/1805.08206); equal probabilities count as shuffled.
    - `coverage_90`: the largest share of questions, most confident first, of which 90 % are right; 0 if there is none.
    """
    import relplot  # a second to import

    ids = list(probability)
    p, r = np.array([probability[id_] for id_ in ids], float), np.array([bool(right[id_]) for id_ in ids], float)
    clip = np.clip(p, CLIP, 1 - CLIP)
    means = {"brier": (p - r) ** 2, "nll": -np.where(r > 0, np.log(clip), np.log(1 - clip))}
    bins, groups = _bins(p), _Groups(p)

    def of(weights: NDArray) -> dict[str, NDArray]:
        """Each figure [draws] of questions that are there as often as `weights` [draws, n] says."""
        total, (n, found) = weights.sum(1), groups.sums(weights, r)
        off = np.abs([weights[:, members] @ (p - r)[members] for members in bins])
        out = {name: weights @ values / total for name, values in means.items()}
        return out | {"ece": off.sum(0) / total, "aurc": _aurc(n, found)} | _coverages(n, found)

    out = {name: Figure(float(value[0])) for name, value in of(np.ones((1, len(ids)))).items()}
    names, at = np.unique([article[id_] for id_ in ids], return_inverse=True)
    if len(names) > 1 and draws:
        drawn = resampled(len(names), draws).astype(float)
        parts = [of(drawn[i : i + CHUNK][:, at]) for i in range(0, draws, CHUNK)]
        for name, (value, _) in out.items():
            samples = np.concatenate([part[name] for part in parts])
            out[name] = Figure(value, expanded_percentiles(samples, len(names)))
    return out | {"perfect_ece": Figure(perfect_error(p)), "smooth_ece": Figure(float(relplot.smECE(p, r)))}


def perfect_error(probability: NDArray, draws: int = 200) -> float:
    """The mean calibration error of answers that are right with exactly their probability, at this number of them."""
    drawn = np.random.default_rng(0).random((draws, len(probability))) < probability
    off = [np.abs((probability - drawn)[:, members].sum(1)) for members in _bins(probability)]
    return float(np.mean(np.sum(off, 0)) / len(probability))


def _bins(probability: NDArray) -> list[NDArray]:
    """The indices of each bin's answers."""
    return np.array_split(np.argsort(probability, kind="stable"), min(BINS, len(probability)))


class _Groups:
    """Answers of equal probability, the most confident first."""

    def __init__(self, probability: NDArray):
        self.order = np.argsort(-probability, kind="stable")
        falling = probability[self.order]
        self.start = np.flatnonzero(np.append(True, falling[1:] != falling[:-1]))

    def sums(self, weights: NDArray, right: NDArray) -> tuple[NDArray, NDArray]:
        """(answers, right ones) of each group, [draws, groups] each, `weights` [draws, n] times."""
        each = weights[:, self.order]
        return np.add.reduceat(each, self.start, 1), np.add.reduceat(each * right[self.order], self.start, 1)


def _aurc(n: NDArray, right: NDArray) -> NDArray:
    """The AURC [draws] of groups of equal confidence [draws, groups].

    Behind N answers with E errors, the m answers of a group whose error rate is e add, shuffled, the expectation
    sum over j = 1..m of (E + j e) / (N + j) = m e + (E - N e) (H(N + m) - H(N)), H the harmonic numbers.
    """
    wrong = n - right
    before, errors = n.cumsum(1) - n, wrong.cumsum(1) - wrong
    rate = np.divide(wrong, n, out=np.zeros_like(n), where=n > 0)
    harmonic = np.append(0, (1 / np.arange(1, n.sum(1).max() + 1)).cumsum())
    harmonic = harmonic[(before + n).astype(np.int64)] - harmonic[before.astype(np.int64)]
    return (n * rate + (errors - before * rate) * harmonic).sum(1) / n.sum(1)


def _coverages(n: NDArray, right: NDArray) -> dict[str, NDArray]:
    answered, correct = n.cumsum(1), right.cumsum(1)
    share = answered / answered[:, -1:]
    return {f"coverage_{level}": np.where(100 * correct >= level * answered, share, 0).max(1) for level in LEVELS}
