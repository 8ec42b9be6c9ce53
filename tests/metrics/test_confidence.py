"""Figures of confidence are what their definitions say, by hand and by brute force."""

import math
import random
from statistics import fmean

from common.metrics.confidence import figures, perfect_error, reliability, risk_coverage
from common.metrics.stats import clustered, wilson
from tests.metrics.test_stats import by_hand

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def test_reliability_sorts_answers_into_bins_of_equal_size():
    probability = {f"{i:02}": i / 20 for i in range(20)}
    bins = reliability(probability, {id_: p >= 0.5 for id_, p in probability.items()}, bins=4)
    assert [(n, right) for _, right, _, n in bins] == [(5, 0.0), (5, 0.0), (5, 1.0), (5, 1.0)]
    assert [p for p, *_ in bins] == pytest.approx([0.1, 0.35, 0.6, 0.85])
    assert bins[2][2] == wilson(5, 5)
    assert sum(n for *_, n in reliability(probability, dict.fromkeys(probability, True), bins=7)) == 20


def test_a_bin_has_mean_probability_share_right_its_interval_and_n():
    probability = {"c": 0.9, "g": 0.1, "b": 0.75, "e": 0.4, "a": 0.2, "d": 0.5, "f": 0.8}
    right = {"g": False, "a": True, "e": False, "d": True, "b": True, "f": False, "c": True}
    z = 1.959964
    assert reliability(probability, right, bins=3) == [
        (pytest.approx(0.7 / 3), 1 / 3, pytest.approx(by_hand(1, 3, z)), 3),
        (pytest.approx(0.625), 1.0, pytest.approx(by_hand(2, 2, z)), 2),
        (pytest.approx(0.85), 0.5, pytest.approx(by_hand(1, 2, z)), 2),
    ]
    assert [n for *_, n in reliability(probability, right)] == [1] * 7  # no empty bins
    many = {str(i): i / 100 for i in range(50)}
    assert [n for *_, n in reliability(many, dict.fromkeys(many, True))] == [5] * 10


def test_the_calibration_error_weighs_bins_by_their_size():
    """Sixteen answers in fifteen bins: the first bin has two, one of them right."""
    probability = {str(i): 0.2 + i * 1e-6 for i in range(16)}
    found = figures(probability, {id_: id_ == "0" for id_ in probability}, dict.fromkeys(probability, "a"))
    assert found["ece"].value == pytest.approx((2 * 0.3 + 14 * 0.2) / 16, abs=1e-5)


# ---- figures ---------------------------------------------------------------------------------------------------------

ANSWERS = st.lists(st.tuples(st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9]), st.booleans()), min_size=1, max_size=30)


def mappings(answers):
    ids = [str(i) for i in range(len(answers))]
    probability = {id_: p for id_, (p, _) in zip(ids, answers, strict=True)}
    return probability, {id_: right for id_, (_, right) in zip(ids, answers, strict=True)}


def risks(answers, k: int) -> list[float]:
    """The error rate of the k most certain answers, in each of many orders of equal ones."""
    rng, out = random.Random(k), []
    for _ in range(400):
        shuffled = sorted(rng.sample(answers, len(answers)), key=lambda answer: -answer[0])
        out.append(sum(not right for _, right in shuffled[:k]) / k)
    return out


@given(ANSWERS)
@settings(max_examples=20)
def test_aurc_is_the_mean_error_rate_over_all_coverages_equal_ones_shuffled(answers):
    found = figures(*mappings(answers), dict.fromkeys(map(str, range(30)), "one"))
    expected = [fmean(risks(answers, k)) for k in range(1, len(answers) + 1)]
    assert found["aurc"].value == pytest.approx(fmean(expected), abs=0.06)
    distinct = [(p + i * 1e-6, right) for i, (p, right) in enumerate(answers)]  # no ties: exact
    found = figures(*mappings(distinct), dict.fromkeys(map(str, range(30)), "one"))
    assert found["aurc"].value == pytest.approx(fmean(risks(distinct, k)[0] for k in range(1, len(answers) + 1)))


def test_aurc_of_equal_answers_by_hand():
    """Two equal answers, one of them wrong: 1/2 and 1/2; a sure one before them: 0, (0 + 1)/2 / 2, 1/3."""
    assert figures(*mappings([(0.5, True), (0.5, False)]), {"0": "a", "1": "a"})["aurc"].value == pytest.approx(0.5)
    found = figures(*mappings([(0.9, True), (0.5, True), (0.5, False)]), dict.fromkeys("012", "a"))
    assert found["aurc"].value == pytest.approx((0 + 1 / 4 + 1 / 3) / 3)


@given(ANSWERS)
def test_coverage_is_the_largest_share_whose_answers_are_right_so_often(answers):
    probability, right = mappings(answers)
    found = figures(probability, right, dict.fromkeys(probability, "one"))
    for level in (80, 90, 95):
        shares = [0.0]
        for least in {p for p, _ in answers}:
            kept = [r for p, r in answers if p >= least]
            if 100 * sum(kept) >= level * len(kept):
                shares.append(len(kept) / len(answers))
        assert found[f"coverage_{level}"].value == pytest.approx(max(shares))
    answered, wrong = risk_coverage(probability, right)
    assert answered[-1] == 1
    assert wrong[-1] == pytest.approx(1 - fmean(right.values()))


def test_errors_by_hand():
    answers = [(0.9, True), (0.6, False), (0.2, False), (1.0, True)]
    found = figures(*mappings(answers), dict.fromkeys("0123", "one"))
    assert found["brier"].value == pytest.approx((0.01 + 0.36 + 0.04 + 0) / 4)
    clipped = -math.log(1 - 1e-4)
    assert found["nll"].value == pytest.approx((-math.log(0.9) - math.log(0.4) - math.log(0.8) + clipped) / 4)
    assert found["ece"].value == pytest.approx((0.1 + 0.6 + 0.2 + 0) / 4), "each is a bin"
    assert all(figure.interval is None for figure in found.values()), "of one article"


def test_the_calibration_error_has_15_bins_of_equal_mass():
    probability = {str(i): (i + 0.5) / 3000 for i in range(3000)}
    right = {id_: int(id_) % 2 == 0 for id_ in probability}
    found = figures(probability, right, dict.fromkeys(probability, "a"))
    middles = [(i + 0.5) / 15 for i in range(15)]
    assert found["ece"].value == pytest.approx(fmean(abs(middle - 0.5) for middle in middles))


def test_exact_probabilities_show_the_error_of_a_perfect_model_and_hardly_a_smooth_one():
    rng = np.random.default_rng(1)
    p = rng.random(2000)
    probability, right = (
        {str(i): float(x) for i, x in enumerate(p)},
        {str(i): bool(rng.random() < x) for i, x in enumerate(p)},
    )
    found = figures(probability, right, {id_: str(int(id_) // 100) for id_ in probability})
    assert found["ece"].value == pytest.approx(found["perfect_ece"].value, abs=0.01)
    # of a bin of m answers with variance v: the mean of |N(0, v / m)|
    expected = fmean(math.sqrt(2 * x * (1 - x) / math.pi / (2000 / 15)) for x in sorted(p))
    assert perfect_error(p) == pytest.approx(expected, rel=0.1)
    assert found["smooth_ece"].value < 0.03
    off = figures({id_: x**3 for id_, x in probability.items()}, right, dict.fromkeys(probability, "a"))
    assert off["smooth_ece"].value > 0.15


def test_intervals_are_of_whole_articles():
    """Ten articles, each with one answer ten times: as wide as that of ten questions, not of a hundred."""
    rng = random.Random(2)
    rights, certain = [rng.random() < 0.6 for _ in range(10)], [rng.random() for _ in range(10)]
    ids = [f"{a} {i}" for a in range(10) for i in range(10)]
    p, right = ({id_: values[int(id_[0])] for id_ in ids} for values in (certain, rights))
    found = figures(p, right, {id_: id_[0] for id_ in ids})
    by_article = clustered({id_: (p[id_] - right[id_]) ** 2 for id_ in ids}, {id_: id_[0] for id_ in ids}, draws=1000)
    assert found["brier"].interval == pytest.approx(by_article)
    for name in ("aurc", "ece", "coverage_80"):
        low, high = found[name].interval
        assert low < high
    assert all(f.interval is None for f in figures(p, right, {id_: id_[0] for id_ in ids}, draws=0).values())
