"""Intervals and tests agree with published worked examples and with their definitions."""

from common.stats import (
    clustered,
    detectable,
    differences,
    equivalence,
    holm,
    mcnemar,
    percentile,
    percentile_interval,
    reliability,
    t_interval,
    wilson,
)

import numpy as np
import pytest
from scipy import stats


def test_wilson_equals_a_published_example():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(29, 29)[1] == 1.0


def test_wilson_covers_about_as_often_as_it_says():
    n = 300
    intervals = np.array([wilson(k, n) for k in range(n + 1)])
    shares = np.linspace(0.2, 0.95, 100)
    held = [
        stats.binom.pmf(np.flatnonzero((intervals[:, 0] <= p) & (p <= intervals[:, 1])), n, p).sum() for p in shares
    ]
    assert 0.945 <= np.mean(held) <= 0.955
    assert min(held) >= 0.93


def of_articles(rng, articles: int):
    """Questions by article, each article as hard as it is, about 0.7 right on average."""
    values, article = {}, {}
    for a, share in enumerate(rng.beta(14, 6, articles)):
        for i, right in enumerate(rng.random(rng.integers(20, 120)) < share):
            values[f"{a}.{i}"], article[f"{a}.{i}"] = bool(right), str(a)
    return values, article


def test_a_clustered_interval_covers_where_one_of_single_questions_does_not():
    rng, found = np.random.default_rng(5), []
    for _ in range(200):
        values, article = of_articles(rng, 48)
        intervals = clustered(values, article, draws=1000), wilson(sum(values.values()), len(values))
        found.append([low <= 0.7 <= high for low, high in intervals])
    by_article, by_question = np.mean(found, axis=0)
    assert 0.91 <= by_article <= 0.98
    assert by_question < 0.7


def test_a_clustered_interval_is_always_the_same_and_holds_the_mean():
    values, article = of_articles(np.random.default_rng(0), 30)
    low, high = clustered(values, article)
    assert low < np.mean(list(values.values())) < high
    assert clustered(dict(reversed(values.items())), article) == (low, high)
    assert clustered(values, dict.fromkeys(article, "one")) is None
    alone = clustered(values, {id_: id_ for id_ in values})  # each question an article of its own
    assert alone == pytest.approx(wilson(sum(values.values()), len(values)), abs=0.004)


def pair(both: int, only_a: int, only_b: int, neither: int):
    rows = [(True, True)] * both + [(True, False)] * only_a + [(False, True)] * only_b + [(False, False)] * neither
    return {str(i): a for i, (a, _) in enumerate(rows)}, {str(i): b for i, (_, b) in enumerate(rows)}


def test_mcnemar_counts_the_questions_that_only_one_side_gets_right():
    a, b = pair(both=5, only_a=8, only_b=1, neither=3)
    assert mcnemar(a, b) == (8, 1, pytest.approx(2 * (1 + 9) / 2**9))  # two-sided binomial of 1 in 9
    assert mcnemar(b, a)[2] == mcnemar(a, b)[2]


def test_two_equal_systems_do_not_differ():
    a, _ = pair(4, 0, 0, 2)
    assert mcnemar(a, a) == (0, 0, 1.0)


def test_a_paired_test_of_other_questions_is_refused():
    for test in (mcnemar, differences):
        with pytest.raises(ValueError, match="same questions"):
            test({"1": True}, {"2": True})


def paired(rng, gain: float, articles: int = 48):
    """Differences of two systems, of which one is better by `gain` on average, by another amount in each article."""
    found, article = {}, {}
    for a, better in enumerate(rng.normal(gain, 0.03, articles)):
        n = rng.integers(20, 120)
        for i, d in enumerate(rng.choice([1, 0, -1], n, p=[0.1 + better / 2, 0.8, 0.1 - better / 2])):
            found[f"{a}.{i}"], article[f"{a}.{i}"] = float(d), str(a)
    return found, article


def test_paired_intervals_by_article_cover_the_true_difference():
    rng, found = np.random.default_rng(3), []
    for _ in range(200):
        low, high = clustered(*paired(rng, 0.02), draws=1000)
        found.append(low <= 0.02 <= high)
    assert 0.91 <= np.mean(found) <= 0.98


def test_equivalence_is_seldom_found_at_the_margin_and_mostly_well_within():
    rng = np.random.default_rng(4)
    at_margin = np.mean([equivalence(*paired(rng, 0.04), margin=0.04) < 0.05 for _ in range(300)])
    within = np.mean([equivalence(*paired(rng, 0.0), margin=0.04) < 0.05 for _ in range(100)])
    assert at_margin <= 0.085
    assert within >= 0.9


@pytest.mark.parametrize(("shift", "p"), [(0.0, 0.0), (0.5, 0.0), (1.0, 1.0), (-2.0, 1.0)])
def test_what_does_not_vary_is_equivalent_within_the_margin_for_sure(shift, p, recwarn):
    values = {str(i): shift for i in range(9)}
    assert equivalence(values, {id_: id_ for id_ in values}, margin=1.0) == p
    assert not recwarn.list


def test_equivalence_of_single_questions_is_the_two_one_sided_t_tests():
    values = {str(i): x for i, x in enumerate(np.random.default_rng(0).normal(0.1, 1, 50))}
    x = np.array(list(values.values()))
    t = (1.0 - abs(x.mean())) / (x.std(ddof=1) / np.sqrt(50))  # of the nearer margin
    assert equivalence(values, {id_: id_ for id_ in values}, margin=1.0) == pytest.approx(stats.t.sf(t, 49))
    with pytest.raises(ValueError, match="two of them"):
        equivalence(values, dict.fromkeys(values, "one"), margin=1.0)


def test_a_detectable_difference_is_found_as_often_as_it_says():
    rng = np.random.default_rng(6)
    gain = np.mean([detectable(*paired(rng, 0.0)) for _ in range(50)])
    found = [clustered(*paired(rng, gain), draws=1000) for _ in range(300)]
    assert 0.72 <= np.mean([low > 0 for low, _ in found]) <= 0.88


def test_holm_equals_a_published_example():
    # R's p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm")
    found = holm({"c": 0.03, "a": 0.01, "b": 0.02, "e": 0.05, "d": 0.04})
    assert found == pytest.approx({"a": 0.05, "b": 0.08, "c": 0.09, "d": 0.09, "e": 0.09})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_a_t_interval_equals_a_published_example():
    # Student 1908: hours of sleep that ten patients gained more by one drug than by the other
    assert t_interval([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]) == pytest.approx((0.7001, 2.4599), abs=5e-5)
    assert t_interval([71.7]) is None


@pytest.mark.parametrize(("q", "least"), [(95, 72), (99, 368)])
def test_a_percentile_has_an_interval_only_where_n_allows_one(q, least):
    samples = np.random.default_rng(0).random(least)
    low, high = percentile_interval(samples, q)
    assert low < percentile(samples, q) < high
    assert percentile_interval(samples[:-1], q) is None


def test_percentile_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(1)
    intervals = [percentile_interval(rng.random(100), 90) for _ in range(500)]
    covered = np.mean([low <= 0.9 <= high for low, high in intervals])
    assert covered >= 0.93


def test_reliability_sorts_answers_into_bins_of_equal_size():
    probability = {f"{i:02}": i / 20 for i in range(20)}
    bins = reliability(probability, {id_: p >= 0.5 for id_, p in probability.items()}, bins=4)
    assert [(n, right) for _, right, _, n in bins] == [(5, 0.0), (5, 0.0), (5, 1.0), (5, 1.0)]
    assert [p for p, *_ in bins] == pytest.approx([0.1, 0.35, 0.6, 0.85])
    assert bins[2][2] == wilson(5, 5)
    assert sum(n for *_, n in reliability(probability, dict.fromkeys(probability, True), bins=7)) == 20
