"""Intervals and tests agree with published worked examples and with their definitions."""

from common.stats import clustered, mcnemar, percentile, percentile_interval, wilson

import numpy as np
import pytest


def test_wilson_equals_a_published_example():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(29, 29)[1] == 1.0


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
    with pytest.raises(ValueError, match="same questions"):
        mcnemar({"1": True}, {"2": True})


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
