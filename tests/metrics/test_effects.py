"""Effects are means over seeds of paired differences, tested over articles, and adjusted for the family."""

import math
import random

from common.metrics.compare import compare
from common.metrics.effects import Effect, effects, findable
from common.metrics.stats import holm

import pytest
from hypothesis import given
from hypothesis import strategies as st


def rows(right: float, seed: int = 0, n: int = 200, articles: int = 10) -> dict[str, dict]:
    """Questions of which a share is right, by chance."""
    rng = random.Random(f"{right} {seed}")
    found = {f"q{i}": rng.random() < right for i in range(n)}
    return {
        id_: {"em": em, "f1": 1.0 if em else 0.25, "article": f"article {i % articles}"}
        for i, (id_, em) in enumerate(found.items())
    }


def test_one_seed_is_the_comparison_of_two_files():
    a, b = rows(0.7), rows(0.5)
    (effect,) = effects({3: b}, {"a": {3: a}}, margin=1.0)
    (verdict,) = compare([("a", "b", a, b)])
    for name in ("em_gain", "em_interval", "f1_gain", "f1_interval"):
        assert getattr(effect, name) == pytest.approx(getattr(verdict, name))
    assert (effect.seeds, effect.em_by_seed, effect.tests) == ([3], [effect.em_gain], 1)


def test_a_gain_is_the_mean_over_the_seeds_that_both_have():
    base = {0: rows(0.5, 0), 1: rows(0.5, 1), 2: rows(0.5, 2)}
    (effect,) = effects(base, {"a": {1: rows(0.7, 1), 2: rows(0.8, 2), 9: rows(0.1, 9)}}, margin=1.0)

    def em(some: dict) -> float:
        return 100 * sum(row["em"] for row in some.values()) / len(some)

    expected = [em(rows(0.7, 1)) - em(rows(0.5, 1)), em(rows(0.8, 2)) - em(rows(0.5, 2))]
    assert effect.seeds == [1, 2]
    assert effect.em_by_seed == pytest.approx(expected)
    assert effect.em_gain == pytest.approx(sum(expected) / 2)
    assert effects(base, {"a": {9: rows(0.1, 9)}}, margin=1.0) == []
    assert effects({}, {"a": base}, margin=1.0) == []


def test_better_worse_equal_and_undecided_are_told_apart():
    base = {0: rows(0.5)}
    flipped = {id_: {**row, "em": not row["em"]} if id_ == "q0" else row for id_, row in base[0].items()}
    variants = {"more": {0: rows(0.95)}, "less": {0: rows(0.1)}, "same": base, "close": {0: flipped}}
    found = {effect.variant: effect for effect in effects(base, variants, margin=2.0)}
    assert (found["more"].better, found["less"].better, found["same"].better) == (True, False, None)
    assert found["more"].verdict == "better"
    assert found["less"].verdict == "worse"
    assert found["same"].verdict == found["close"].verdict == "equal within 2"
    narrow = {effect.variant: effect for effect in effects(base, variants, margin=0.1)}
    assert narrow["close"].verdict == "undecided"
    assert "more: better: +" in str(found["more"])
    assert "among 4)" in str(found["more"])


def test_p_is_adjusted_for_the_family():
    base = {0: rows(0.5)}
    alone = {share: effects(base, {"v": {0: rows(share)}}, margin=1.0)[0] for share in (0.55, 0.6, 0.65)}
    family = {str(share): {0: rows(share)} for share in alone}
    for name in ("p", "p_equal"):
        expected = holm({str(share): getattr(effect, name) for share, effect in alone.items()})
        assert {e.variant: getattr(e, name) for e in effects(base, family, margin=1.0)} == pytest.approx(expected)


def test_one_article_has_no_tests():
    base, other = ({0: rows(share, articles=1)} for share in (0.5, 0.9))
    (effect,) = effects(base, {"v": other}, margin=1.0)
    assert (effect.p, effect.p_equal, effect.em_interval) == (None, None, None)
    assert (effect.better, effect.equal, effect.verdict) == (None, False, "undecided")


def test_significant_but_small_is_both_better_and_equal():
    effect = Effect("v", [0], 0.5, (0.3, 0.7), 0.4, None, [0.5], [0.4], 0.001, 0.01, 1, 1.0)
    assert effect.verdict == "better, equal within 1"


@pytest.mark.parametrize(
    ("interval", "p", "better"),
    [
        ((0.1, 0.9), 0.049, True),
        ((0.1, 0.9), 0.05, None),  # the interval alone is not enough,
        ((0.0, 0.9), 0.01, None),  # nor is the test
        ((-0.9, 0.0), 0.01, None),
        ((-0.9, 0.1), 0.01, None),
        (None, 0.01, None),
    ],
)
def test_a_difference_needs_the_test_and_the_interval(interval, p, better):
    assert Effect("v", [0], 0.5, interval, 0.4, None, [0.5], [0.4], p, 1.0, 1, 1.0).better is better


def test_a_sentence_has_all_figures():
    seeds, one = Effect("v", [0, 2], -1.5, (-2.0, -1.0), -1.25, (-2.5, 0.0), [], [], 0.0123, 0.5, 3, 1.0), "1 seed"
    assert str(seeds) == (
        "v: worse: -1.50 [-2.00, -1.00] EM, -1.25 [-2.50, 0.00] F1 (2 seeds, p = 0.012, equal p = 0.5, among 3)"
    )
    assert f"({one}, among 1)" in str(Effect("v", [0], 0.5, None, 0.4, None, [0.5], [0.4], None, None, 1, 1.0))


def test_two_articles_are_enough():
    pairs = [(rows(0.5, articles=2), rows(0.9, articles=2))]
    assert findable(pairs, 1, 1)


def test_what_can_be_found_falls_with_the_root_of_the_seeds_and_grows_with_tests():
    pairs = [(rows(0.5, seed), rows(0.5, seed + 1)) for seed in range(3)]
    one, of_one = findable(pairs, seeds=1, tests=1)
    assert one == of_one
    four, of_many = findable(pairs, seeds=4, tests=10)
    assert four == pytest.approx(one / 2)
    assert of_many > four
    assert findable([], 1, 1) is None
    assert findable([(rows(0.5, articles=1), rows(0.6, articles=1))], 1, 1) is None


@given(st.integers(0, 1000))
def test_a_difference_that_can_be_found_mostly_is(seed):
    # the rule of the power of a t test: about (2.0 + 0.84) standard errors with many articles
    a, b = rows(0.5, seed, articles=100), rows(0.5, seed + 5000, articles=100)
    least, _ = findable([(a, b)], 1, 1)
    n = len(a)
    spread = math.sqrt(sum((a[i]["em"] - b[i]["em"]) ** 2 for i in a) / n**2)
    assert 2.0 < least / (100 * spread) < 4.0
