"""Bins hold the answers of similar probability, and the error weighs them by their size."""

from common.metrics.calibration import Bin, expected_error, reliability
from common.metrics.stats import wilson
from tests.metrics.test_stats import by_hand

import pytest


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
    bins = [Bin(0.2, 0.5, (0, 1), 3), Bin(0.9, 0.5, (0, 1), 1)]
    assert expected_error(bins) == pytest.approx((3 * 0.3 + 0.4) / 4)
