"""Intervals and tests agree with published worked examples and with their definitions."""

import itertools
import math
from statistics import fmean, variance

from common.metrics.stats import (
    clustered,
    detectable,
    differences,
    equivalence,
    holm,
    mcnemar,
    nonzero,
    percentile,
    percentile_interval,
    slower,
    t_interval,
    wilson,
    worse,
)

import numpy as np
import pytest
from scipy import special, stats


def by_hand(k: int, n: int, z: float) -> tuple[float, float]:
    """Wilson 1927."""
    middle, half = k / n + z * z / (2 * n), z * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def test_wilson_equals_a_published_example():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(29, 29)[1] == 1.0
    assert wilson(3, 7) == pytest.approx(by_hand(3, 7, 1.959964), abs=1e-6)
    assert wilson(3, 7, confidence=0.99) == pytest.approx(by_hand(3, 7, 2.575829), abs=1e-6)


def test_wilson_covers_about_as_often_as_it_says():
    n = 300
    intervals = np.array([wilson(k, n) for k in range(n + 1)])
    shares = np.linspace(0.2, 0.95, 100)
    held = [
        stats.binom.pmf(np.flatnonzero((intervals[:, 0] <= p) & (p <= intervals[:, 1])), n, p).sum() for p in shares
    ]
    assert 0.945 <= np.mean(held) <= 0.955
    assert min(held) >= 0.93


# ---- clusters ------------------------------------------------------------------------------------------------------


def of_articles(rng, articles: int):
    """Questions by article, each article as hard as it is, about 0.7 right on average."""
    sizes = rng.integers(10, 60, articles)
    at = np.repeat(np.arange(articles), sizes)
    right = rng.random(len(at)) < rng.beta(7, 3, articles)[at]
    return dict(enumerate(right.tolist())), dict(enumerate(at.tolist()))


UNEVEN = {"d": [1.0, 0.0], "a": [0.25], "c": [0.0, 0.0, 1.0, 0.0, 0.0], "b": [1.0, 1.0, 0.5]}  # values by cluster


def rows(clusters: dict[str, list[float]]) -> tuple[dict[str, float], dict[str, str]]:
    """The values and clusters of questions that are in no order."""
    found = [(f"{name}{i}", name, x) for name, xs in clusters.items() for i, x in enumerate(xs)]
    found = found[1::2] + found[::2]
    return {id_: x for id_, _, x in found}, {id_: name for id_, name, _ in reversed(found)}


@pytest.mark.parametrize("confidence", [0.5, 0.6, 0.8, 0.95])
def test_a_clustered_interval_weighs_clusters_by_their_size(confidence):
    """Of four clusters all 256 bootstrap samples can be counted."""
    drawn = itertools.product(UNEVEN.values(), repeat=4)
    means = sorted(fmean(x for xs in four for x in xs) for four in drawn)
    # https://arxiv.org/abs/1411.5279, and Student's t with 3 degrees of freedom, found by its distribution
    t = special.stdtrit(3, (1 + confidence) / 2)
    share = special.ndtr(-math.sqrt(4 / 3) * t)
    at = math.ceil(256 * share) - 1  # the sample below which so large a share lies
    assert clustered(*rows(UNEVEN), confidence=confidence) == pytest.approx((means[at], means[-1 - at]))


def test_two_clusters_alone_give_the_range_of_their_means():
    values, cluster = rows({"a": [1, 1, 0], "b": [0, 1, 0, 0, 0]})
    assert clustered(values, cluster) == pytest.approx((0.2, 2 / 3))
    assert clustered(values, dict.fromkeys(cluster, "one")) is None


def test_a_clustered_interval_covers_where_one_of_single_questions_does_not():
    rng, found = np.random.default_rng(5), []
    for _ in range(150):
        values, article = of_articles(rng, 48)
        intervals = clustered(values, article, draws=400), wilson(sum(values.values()), len(values))
        found.append([low <= 0.7 <= high for low, high in intervals])
    by_article, by_question = np.mean(found, axis=0)
    assert 0.91 <= by_article <= 0.98
    assert by_question < 0.7


def test_a_clustered_interval_is_always_the_same_and_holds_the_mean():
    values, article = of_articles(np.random.default_rng(0), 30)
    low, high = clustered(values, article)
    assert low < np.mean(list(values.values())) < high
    assert clustered(dict(reversed(values.items())), article) == (low, high)
    alone = clustered(values, {id_: id_ for id_ in values}, draws=1000)  # each question an article of its own
    assert alone == pytest.approx(wilson(sum(values.values()), len(values)), abs=0.006)


def test_the_draws_of_published_intervals_do_not_change():
    values, article = of_articles(np.random.default_rng(0), 30)
    hard = np.random.default_rng(1).dirichlet(np.ones(30), 10_000)  # another bootstrap (Rubin 1981)
    sums, sizes = (np.bincount(list(article.values()), w) for w in (list(values.values()), None))
    assert clustered(values, article) == pytest.approx(
        np.quantile(hard @ sums / (hard @ sizes), (0.025, 0.975)), abs=0.01
    )
    assert clustered(values, article) == pytest.approx((0.6321523244202711, 0.7638511461764622), abs=1e-12)


# ---- two systems on the same questions -----------------------------------------------------------------------------


def pair(both: int, only_a: int, only_b: int, neither: int):
    rows = [(True, True)] * both + [(True, False)] * only_a + [(False, True)] * only_b + [(False, False)] * neither
    return {str(i): a for i, (a, _) in enumerate(rows)}, {str(i): b for i, (_, b) in enumerate(rows)}


@pytest.mark.parametrize(("only_a", "only_b"), [(8, 1), (1, 8), (3, 4), (4, 4), (5, 0), (0, 3), (30, 12)])
def test_mcnemar_is_the_sign_test_of_the_questions_that_only_one_side_gets_right(only_a, only_b):
    a, b = pair(both=5, only_a=only_a, only_b=only_b, neither=3)
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    assert mcnemar(a, b) == (only_a, only_b, pytest.approx(min(1, 2 * tail)))


def test_two_equal_systems_do_not_differ():
    a, _ = pair(4, 0, 0, 2)
    assert mcnemar(a, a) == (0, 0, 1.0)


def test_differences_are_a_less_b_by_question():
    assert differences({"x": 1.0, "y": True}, {"y": 0.25, "x": 0.5}) == {"x": 0.5, "y": 0.75}


def test_a_paired_test_of_other_questions_is_refused():
    for test in (mcnemar, differences):
        with pytest.raises(ValueError, match="same questions"):
            test({"1": True}, {"2": True})


def robust(clusters: dict[str, list[float]]) -> tuple[float, float, int]:
    """Mean, its cluster-robust standard error and degrees of freedom (Cameron and Miller 2015, eq. 11 and 12)."""
    x = [x for xs in clusters.values() for x in xs]
    mean, c = fmean(x), len(clusters)
    meat = sum(sum(x - mean for x in xs) ** 2 for xs in clusters.values())
    return mean, math.sqrt(c / (c - 1) * meat) / len(x), c - 1


@pytest.mark.parametrize("margin", [0.1, 0.45, 0.7])
def test_equivalence_is_the_larger_of_two_one_sided_t_tests_by_clusters_of_any_size(margin):
    mean, error, df = robust(UNEVEN)
    assert mean == 4.75 / 11
    below, above = special.stdtr(df, -(mean + margin) / error), special.stdtr(df, (mean - margin) / error)
    assert equivalence(*rows(UNEVEN), margin=margin) == pytest.approx(max(below, above))
    turned = {id_: -x for id_, x in rows(UNEVEN)[0].items()}
    assert equivalence(turned, rows(UNEVEN)[1], margin=margin) == pytest.approx(max(below, above))


@pytest.mark.parametrize("margin", [-0.5, 0.0, 0.2])
def test_worse_is_a_one_sided_t_test_by_clusters_of_any_size(margin):
    mean, error, df = robust(UNEVEN)
    assert worse(*rows(UNEVEN), margin=margin) == pytest.approx(special.stdtr(df, (mean + margin) / error))


def test_nonzero_is_the_two_sided_t_test_by_clusters_of_any_size():
    mean, error, n = robust(UNEVEN)
    assert nonzero(*rows(UNEVEN)) == pytest.approx(2 * stats.t.sf(abs(mean) / error, n))
    turned = {id_: -value for id_, value in rows(UNEVEN)[0].items()}
    assert nonzero(turned, rows(UNEVEN)[1]) == pytest.approx(nonzero(*rows(UNEVEN)))
    assert nonzero({"a": 0.0, "b": 0.0}, {"a": "x", "b": "y"}) == 1.0
    assert nonzero({"a": 1.0, "b": 1.0}, {"a": "x", "b": "y"}) == 0.0


@pytest.mark.parametrize(
    ("level", "beyond"),
    [({}, 3.182446 + 0.978472), ({"alpha": 0.1, "power": 0.9}, 2.353363 + 1.637744)],  # tables of t, 3 df
)
def test_what_is_detectable_is_two_quantiles_of_t_times_the_standard_error(level, beyond):
    _, error, _ = robust(UNEVEN)
    assert detectable(*rows(UNEVEN), **level) == pytest.approx(beyond * error, rel=1e-6)


@pytest.mark.parametrize(
    ("shift", "alike", "lower"),
    [(0.0, 0.0, 1.0), (0.5, 0.0, 1.0), (1.0, 1.0, 1.0), (-1.0, 1.0, 1.0), (-1.01, 1.0, 0.0), (-2.0, 1.0, 0.0)],
)
def test_what_does_not_vary_is_within_the_margin_or_not_for_sure(shift, alike, lower, recwarn):
    values = {str(i): shift for i in range(9)}
    assert equivalence(values, {id_: id_ for id_ in values}, margin=1.0) == alike
    assert worse(values, {id_: id_ for id_ in values}, margin=1.0) == lower
    assert not recwarn.list


def test_a_test_over_one_cluster_is_refused_and_over_two_is_not():
    values = {"a": 0.0, "b": 1.0, "c": 0.5}
    for test in (lambda *of: equivalence(*of, margin=1), lambda *of: worse(*of, margin=1), detectable):
        with pytest.raises(ValueError, match="two of them"):
            test(values, dict.fromkeys(values, "one"))
        test(values, {"a": "one", "b": "two", "c": "two"})


def paired(rng, gain: float, articles: int = 48):
    """Differences of two systems, of which one is better by `gain` on average, by another amount in each article."""
    better, sizes = rng.normal(gain, 0.03, articles), rng.integers(20, 120, articles)
    at = np.repeat(np.arange(articles), sizes)
    draw = rng.random(len(at))
    found = (draw < 0.1 + better[at] / 2).astype(float) - (draw > 0.9 + better[at] / 2)
    return dict(enumerate(found.tolist())), dict(enumerate(at.tolist()))


def test_paired_intervals_by_article_cover_the_true_difference():
    rng, found = np.random.default_rng(3), []
    for _ in range(200):
        low, high = clustered(*paired(rng, 0.02), draws=400)
        found.append(low <= 0.02 <= high)
    assert 0.91 <= np.mean(found) <= 0.98


def test_equivalence_is_seldom_found_at_the_margin_and_mostly_well_within():
    rng = np.random.default_rng(4)
    at_margin = np.mean([equivalence(*paired(rng, 0.04), margin=0.04) < 0.05 for _ in range(100)])
    within = np.mean([equivalence(*paired(rng, 0.0), margin=0.04) < 0.05 for _ in range(30)])
    assert at_margin <= 0.085
    assert within >= 0.9


def test_a_detectable_difference_is_found_as_often_as_it_says():
    rng = np.random.default_rng(6)
    gain = np.mean([detectable(*paired(rng, 0.0)) for _ in range(50)])
    found = [clustered(*paired(rng, gain), draws=400) for _ in range(200)]
    assert 0.72 <= np.mean([low > 0 for low, _ in found]) <= 0.88


def test_holm_equals_a_published_example():
    # R's p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm")
    found = holm({"c": 0.03, "a": 0.01, "b": 0.02, "e": 0.05, "d": 0.04})
    assert found == pytest.approx({"a": 0.05, "b": 0.08, "c": 0.09, "d": 0.09, "e": 0.09})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.4}) == {"a": 0.4}
    assert holm({}) == {}


# ---- seeds and samples ---------------------------------------------------------------------------------------------


def test_a_t_interval_equals_a_published_example():
    # Student 1908: hours of sleep that ten patients gained more by one drug than by the other
    hours = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert t_interval(hours) == pytest.approx((0.7001, 2.4599), abs=5e-5)
    half = 1.833113 * math.sqrt(variance(hours) / 10)  # tables: t of 9 degrees of freedom at 0.95
    assert t_interval(hours, confidence=0.9) == pytest.approx((1.58 - half, 1.58 + half), rel=1e-6)
    assert t_interval([71.0, 73.0]) == pytest.approx((72 - 12.7062, 72 + 12.7062), rel=1e-6)
    assert t_interval([71.7]) is None


@pytest.mark.parametrize(("q", "found"), [(0, 10), (25, 15), (50, 20), (75, 30), (95, 38), (100, 40)])
def test_a_percentile_is_interpolated_between_its_neighbours(q, found):
    assert percentile([40, 10, 20], q) == found


@pytest.mark.parametrize(("q", "least"), [(95, 72), (99, 368)])
def test_a_percentile_has_an_interval_only_where_n_allows_one(q, least):
    samples = np.random.default_rng(0).random(least)
    low, high = percentile_interval(samples, q)
    assert low < percentile(samples, q) < high
    assert percentile_interval(samples[:-1], q) is None
    assert percentile_interval(samples[:-1], 100 - q) is None


def test_the_interval_of_a_percentile_is_of_the_samples_that_the_binomial_names():
    samples = [*range(1, 101)]
    assert percentile_interval(samples, 50) == (40, 61)  # of a median of 100: Conover 1999, table A3
    assert percentile_interval(samples, 90, confidence=0.8) == (ranks := by_binomial(100, 0.9, 0.8))
    assert ranks != by_binomial(100, 0.9, 0.95) == percentile_interval(samples, 90)


def by_binomial(n: int, p: float, confidence: float) -> tuple[int, int]:
    """Ranks from 1: the highest below which, and the lowest above which, the percentile lies seldom enough."""
    pmf = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    tail = (1 - confidence) / 2
    low = max(rank for rank in range(1, n + 1) if sum(pmf[:rank]) <= tail)
    high = min(rank for rank in range(1, n + 1) if sum(pmf[rank:]) <= tail)
    return low, high


@pytest.mark.parametrize(("n", "q"), [(100, 90), (100, 50), (400, 95), (1000, 99)])
def test_percentile_intervals_cover_as_often_as_they_say(n, q):
    low, high = map(int, percentile_interval([*range(1, n + 1)], q))
    covered = sum(math.comb(n, k) * (q / 100) ** k * (1 - q / 100) ** (n - k) for k in range(low, high))
    assert 0.95 <= covered <= 0.98


# ---- is it slower? -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "low"), [(0.1, 1), (0.25, 1), (0.27, 2), (0.5, 2), (0.7, 2), (0.75, 4), (0.9, 4)])
def test_the_bound_of_a_ratio_is_a_bootstrap_of_queries(alpha, low):
    """Of three queries the median is 1 in 7 of 27 samples, 2 in 13, 4 in 7."""
    assert slower([[1, 1, 1]], [[1, 2, 4]], 50, alpha) == (2, low)
    assert slower([[2, 2, 2]], [[1, 2, 4]], 50, alpha) == (1, low / 2)


def test_the_draws_of_the_bound_do_not_change():
    rng = np.random.default_rng(3)
    old = rng.lognormal(0, 0.5, 200)
    new = old * rng.lognormal(0.2, 0.3, 200)
    at = rng.integers(200, size=(4000, 200))  # other draws
    a, b = (np.sort(x[at], axis=1)[:, 99:101].mean(axis=1) for x in (old, new))
    low = slower([old], [new], 50, 0.3)[1]
    assert low == pytest.approx(np.sort(b / a)[1200], abs=0.01)
    assert low == pytest.approx(1.1911240344843936, abs=1e-12)


def test_a_ratio_is_of_the_same_queries():
    usual = np.random.default_rng(7).lognormal(0, 1, 60)
    assert slower([usual], [1.2 * usual], 95, 0.001) == pytest.approx((1.2, 1.2))
    assert slower([1.2 * usual], [usual], 95, 0.001) == pytest.approx((1 / 1.2, 1 / 1.2))
    with pytest.raises(ValueError, match="same queries"):
        slower([[1.0]], [[1.0, 2.0]], 95, 0.05)


def test_the_percentile_that_is_asked_for_is_compared():
    old, new = [[1.0, 2.0, 3.0, 4.0, 5.0]], [[2.0, 3.0, 5.0, 5.0, 10.0]]
    for q, ratio in ((0, 2), (25, 3 / 2), (50, 5 / 3), (75, 5 / 4), (100, 2)):
        assert slower(old, new, q, 0.05, draws=1000)[0] == pytest.approx(ratio)


def test_of_processes_the_one_in_the_middle_counts_and_how_far_they_are_apart():
    usual = np.tile([1.0, 2.0, 3.0], 50)
    held_up = [usual, usual * 9, usual]  # one process beside other work
    assert slower([usual] * 3, held_up, 95, 0.001)[0] == 1
    ratio, low = slower([usual, usual, 1.2 * usual], [1.2 * usual] * 3, 95, 0.001)
    assert ratio == pytest.approx(1.2)
    apart = np.log(1.2) / np.sqrt(3)  # standard deviation of the three
    assert low == pytest.approx(1.2 * np.exp(-np.sqrt(np.pi / 2 * apart**2 / 2 * 2 / 3)))
    with_three_times_as_many = slower([usual, usual, 1.2 * usual] * 3, [1.2 * usual] * 9, 95, 0.001)[1]
    assert low < with_three_times_as_many < ratio


def test_processes_of_both_sides_count_by_their_number():
    usual = np.tile([1.0, 2.0, 3.0], 10)
    old, new = [usual, 1.1 * usual], [usual, 1.3 * usual, 1.3 * usual]
    ratio, low = slower(old, new, 50, 0.001, draws=1000)
    assert ratio == pytest.approx(1.3 / 1.05)
    apart = fmean([variance([0, math.log(1.1)]), variance([0, math.log(1.3), math.log(1.3)])])
    assert low == pytest.approx(ratio * math.exp(-math.sqrt(math.pi / 2 * apart * (1 / 2 + 1 / 3))))


def test_one_process_tells_nothing_about_processes(recwarn):
    usual = np.tile([1.0, 2.0, 3.0], 50)
    several = [usual, 1.2 * usual, 1.2 * usual]
    assert slower([usual], several, 95, 0.001) == pytest.approx((1.2, 1.2))
    assert slower(several, [usual], 95, 0.001) == pytest.approx((1 / 1.2, 1 / 1.2))
    assert slower([usual], [usual], 95, 0.001) == (1, 1)
    assert not recwarn.list  # of a variance of one


def test_the_lower_of_two_bounds_counts():
    few = slower([[1, 1, 1], [1, 1, 1]], [[1, 2, 4], [1, 2, 4]], 50, 0.1)
    assert few == (2, 1)  # by queries: no process is apart from another


def test_what_may_be_the_processes_is_not_surely_slower():
    """All queries took 1.2 times as long, and the processes are far apart, or as far as a 7B model's are."""
    usual = np.random.default_rng(7).lognormal(0, 0.3, 1000)
    for apart, surely in ((0.1, False), (0.02, True)):
        old = [usual * (1 + apart * z) for z in (-1, 0, 1)]
        bound = slower(old, [1.2 * times for times in old], 95, 0.001, draws=1000)[1]
        assert (bound > 1.1) == surely


def test_noise_is_called_worse_or_slower_as_seldom_as_is_allowed():
    rng = np.random.default_rng(7)
    article = {str(i): str(i % 48) for i in range(480)}
    worst = []
    for _ in range(200):  # at the very margin, where alarms are most frequent
        single, shared = rng.choice([1, 0, -1], 480, p=[0.05, 0.9, 0.05]), rng.normal(0, 0.02, 48)
        off = single + np.resize(shared, 480) - 0.01
        worst.append(worse(dict(zip(article, off.tolist(), strict=True)), article, margin=0.01))
    assert np.mean(np.array(worst) < 0.01) <= 0.03
    usual = rng.lognormal(0, 0.3, 200)
    low = [slower([usual], [usual * rng.normal(1.1, 0.05, 200)], 95, 0.01, draws=1000)[1] for _ in range(40)]
    assert np.mean(np.array(low) > 1.1) <= 0.05
