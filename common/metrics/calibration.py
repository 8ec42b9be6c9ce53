"""Calibration: how far a model's probability of an answer is from how often it is right. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from common.metrics.stats import Interval, wilson

import numpy as np


class Bin(NamedTuple):
    """Answers of similar probability."""

    probability: float  # their mean, in [0, 1]
    right: float  # share of them that is right, in [0, 1]
    interval: Interval  # of that share, 95 %
    n: int  # answers


def reliability(probability: Mapping[str, float], right: Mapping[str, bool], bins: int = 10) -> list[Bin]:
    """Bins of equal size by rising probability; fewer if there are fewer answers."""
    out = []
    for ids in np.array_split(sorted(probability, key=lambda id_: probability[id_]), min(bins, len(probability))):
        n, found = len(ids), sum(bool(right[id_]) for id_ in ids)
        out.append(Bin(float(np.mean([probability[id_] for id_ in ids])), found / n, wilson(found, n), n))
    return out


def expected_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error, in [0, 1]: the mean distance of probability from share right, weighted by n.

    Guo et al. 2017 (https://arxiv.org/abs/1706.04599), with bins of equal size instead of equal width.
    """
    return sum(n * abs(probability - right) for probability, right, _, n in bins) / sum(n for *_, n in bins)
