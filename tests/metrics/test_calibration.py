"""Maps are found again, a cross-fit never reads its own article, and annotators decide what gold answers are worth."""

import json
import math
import random
from dataclasses import asdict
from itertools import pairwise
from statistics import fmean

from common.data.squad import Answer, Example
from common.errors import UserError
from common.metrics import calibration
from common.metrics.calibration import (
    FOLDS,
    KINDS,
    Fitted,
    abstaining,
    annotators_exponent,
    cross_fitted,
    features,
    fit,
    folds,
    for_golds,
    threshold,
)

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit

ROW = {"text": "the north gate", "logprob": math.log(0.5), "least": -0.6, "token_ids": [5, 6, 7, 1], "hit_limit": False}


def drawn(n: int, true, seed: int = 0):
    """Answers whose log-probability is uniform up to 0, right with the probability `true` of it."""
    rng = np.random.default_rng(seed)
    scores = -3 * rng.random(n)
    rows = [{"logprob": float(x), "tokens": float(t)} for x, t in zip(scores, rng.integers(1, 9, n), strict=True)]
    return rows, [bool(rng.random() < true(row)) for row in rows]


# ---- features --------------------------------------------------------------------------------------------------------


def test_features_of_a_greedy_answer():
    found = features(ROW, "How many gates are there?")
    words = {name.removeprefix("question "): value for name, value in found.items() if name.startswith("question ")}
    assert [name for name, value in words.items() if value] == ["how many"]
    rest = {name: value for name, value in found.items() if not name.startswith("question ")}
    half = math.log(0.5)
    assert rest == {"logprob": half, "mean": half / 4, "least": -0.6, "tokens": math.log(4), "cut": 0.0}
    assert features({**ROW, "hit_limit": True}, "")["cut"] == 1
    assert features({**ROW, "logprob": None}, "") is None
    hosted = features({**ROW, "token_ids": [], "least": None}, "")
    assert "least" not in hosted
    assert "mean" not in hosted
    assert hosted["tokens"] == math.log(3), "words, where the tokens are not known"


def test_features_of_a_search_are_of_the_answers_share_of_what_it_found_or_may_have_missed():
    row = ROW | {"nbest": [["The north gate", 0.5], ["gate", 0.2], ["south", 0.1]], "rest": 0.2}
    found = features(row, "")
    assert found["mass"] == pytest.approx(math.log(0.5))
    assert found["share"] == pytest.approx(math.log(0.5))
    assert found["odds"] == pytest.approx(0, abs=1e-12)
    assert found["margin"] == pytest.approx(math.log(0.5 / 0.2))
    shares = (0.5, 0.2, 0.1, 0.2)
    assert found["entropy"] == pytest.approx(sum(s * math.log(s) for s in shares))
    second = features(row | {"text": "gate", "logprob": math.log(0.15)}, "")
    assert second["mass"] == pytest.approx(math.log(0.2)), "of all its paths"
    assert second["margin"] == pytest.approx(math.log(0.2 / 0.5))
    assert found["expected F1"] == pytest.approx(0.5 + 0.2 * 2 / 3), "north gate against gate: 2/3"
    hopeless = features(row | {"text": "other", "logprob": -1000.0, "rest": None}, "")
    assert all(map(math.isfinite, hopeless.values()))
    alone = features(row | {"nbest": [["north gate", 0.9]], "rest": 0.0}, "")
    assert alone["share"] == pytest.approx(math.log(1 - 1e-4))
    assert math.isfinite(alone["margin"])


def test_a_probability_is_at_most_1_whatever_rounding_does():
    assert calibration.probability_of(1e-6) == 1
    assert calibration.probability_of(math.log(0.25)) == pytest.approx(0.25)


def test_agreement_is_with_the_other_answer():
    found = features(ROW, "", {"text": "North gate"})
    assert (found["agree"], found["agree exactly"]) == (1, 1)
    found = features(ROW, "", {"text": "gate"})
    assert (found["agree"], found["agree exactly"]) == (pytest.approx(2 / 3), 0)


# ---- maps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.5, 1.0, 3.0])
def test_a_temperature_is_found_again(t):
    rows, right = drawn(20_000, lambda row: math.exp(row["logprob"] / t))
    fitted = fit("temperature", rows, right, "logprob")
    assert fitted.numbers["temperature"] == [pytest.approx(t, rel=0.05)]
    assert fitted([{"logprob": -1.5}]) == pytest.approx(math.exp(-1.5 / fitted.numbers["temperature"][0]))


def test_platts_line_is_found_again():
    def true(row):
        p = math.exp(row["logprob"])
        return float(expit(0.7 * logit(min(max(p, 1e-4), 1 - 1e-4)) + 1.2))

    rows, right = drawn(20_000, true)
    fitted = fit("platt", rows, right, "logprob")
    some = [{"logprob": x} for x in (-2.5, -1.0, -0.2)]
    assert fitted(some) == pytest.approx([true(row) for row in some], abs=0.02)


def test_weights_of_features_are_found_again():
    rows, right = drawn(20_000, lambda row: float(expit(2 + row["logprob"] - 0.3 * row["tokens"])))
    fitted = fit("features", rows, right, "logprob")
    assert fitted.names == ["logprob", "tokens"]
    weights = np.array(fitted.numbers["weights"]) / fitted.numbers["scale"]
    assert weights == pytest.approx([1, -0.3], abs=0.06)
    some = [{"logprob": -1.0, "tokens": 3.0}]
    assert fitted(some) == pytest.approx([expit(2 - 1 - 0.9)], abs=0.02)


def test_isotonic_steps_by_hand():
    """Right answers by rising score 0 1 0 1 1: the middle two are pooled; ends half an answer from 0 and 1."""
    rows = [{"logprob": float(i)} for i in (-5, -4, -3, -2, -1)]
    fitted = fit("isotonic", rows, [False, True, False, True, True], "logprob")
    assert fitted.numbers == {"score": [-5.0, -3.5, -1.5], "probability": [0.1, 0.5, 0.9]}
    found = fitted([{"logprob": x} for x in (-9.0, -5.0, -3.5, -2.5, -1.0, 0.0)])
    assert found.tolist() == pytest.approx([0.1, 0.1, 0.5, 0.7, 0.9, 0.9])


@given(st.lists(st.tuples(st.floats(-20, 0), st.booleans()), min_size=1, max_size=30), st.sampled_from(sorted(KINDS)))
def test_a_map_rises_stays_within_0_and_1_and_is_json(answers, kind):
    rows = [{"logprob": score} for score, _ in answers]
    fitted = fit(kind, rows, [right for _, right in answers], "logprob")
    read = Fitted(**json.loads(json.dumps(asdict(fitted))))
    scores = [{"logprob": score} for score in np.linspace(-25, 0, 20)]
    found = fitted(scores)
    assert (read(scores) == found).all()
    assert ((found >= 0) & (found <= 1)).all()
    if kind in ("temperature", "isotonic"):
        assert all(a <= b + 1e-12 for a, b in pairwise(found))


def test_a_feature_that_is_missing_is_named():
    rows, right = drawn(20, lambda row: 0.5)
    with pytest.raises(UserError, match=r'the calibration reads "tokens", which these answers do not have'):
        fit("features", rows, right, "logprob")([{"logprob": -1.0}])


# ---- by article ------------------------------------------------------------------------------------------------------


def test_folds_are_of_whole_articles_of_equal_number_and_fixed():
    titles = [f"Article {i}" for i in range(48)]
    found = folds(titles * 3)
    assert found == folds(reversed(titles))
    assert {list(found.values()).count(i) for i in range(FOLDS)} == {4, 5}


def test_a_cross_fit_reads_no_answer_of_its_own_fold(monkeypatch):
    rows, right = drawn(60, lambda row: 0.5)
    ids = [str(i) for i in range(60)]
    by_id, rights = dict(zip(ids, rows, strict=True)), dict(zip(ids, right, strict=True))
    article = {id_: f"Article {int(id_) % 12}" for id_ in ids}
    whole, seen = calibration.fit, []
    monkeypatch.setattr(calibration, "fit", lambda kind, rows, *rest: seen.append(rows) or whole(kind, rows, *rest))
    found = cross_fitted("platt", by_id, rights, article, "logprob")
    assert list(found) == ids
    fold = folds(article.values())
    for held, read in zip(sorted(set(fold.values())), seen, strict=True):
        mine = [id_ for id_ in ids if fold[article[id_]] == held]
        assert len(read) == 60 - len(mine)
        assert not any(by_id[id_] in read for id_ in mine)
        expected = whole("platt", read, [rights[i] for i in ids if i not in mine], "logprob")
        assert [found[id_] for id_ in mine] == pytest.approx(expected([by_id[i] for i in mine]).tolist())
    with pytest.raises(UserError, match="two articles at least"):
        cross_fitted("platt", by_id, rights, dict.fromkeys(ids, "one"), "logprob")


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.3, 0.5, 0.8]), st.booleans()), min_size=1, max_size=20))
def test_a_threshold_is_the_least_that_reaches_the_level(answers):
    probability = {str(i): p for i, (p, _) in enumerate(answers)}
    right = {str(i): r for i, (_, r) in enumerate(answers)}
    reached = []
    for least in {p for p, _ in answers}:
        kept = [r for p, r in answers if p >= least]
        reached += [least] if 100 * sum(kept) >= 80 * len(kept) else []
    assert threshold(probability, right, 80) == min(reached, default=2.0)


def test_abstention_takes_each_folds_threshold_from_the_others():
    """Two articles: in A all above 0.5 are right, in B all above 0.8; so A is asked from 0.8 on, B from 0.5 on."""
    probability = {"a1": 0.9, "a2": 0.6, "a3": 0.4, "b1": 0.85, "b2": 0.6, "b3": 0.4}
    right = {"a1": True, "a2": True, "a3": False, "b1": True, "b2": False, "b3": False}
    article = {id_: id_[0] for id_ in probability}
    assert len(set(folds(article.values()).values())) == 2
    assert abstaining(probability, right, article, 100) == (3 / 6, pytest.approx(100 * 2 / 3)), "a1; b1, b2"
    never = abstaining(probability, dict.fromkeys(right, False), article, 80)
    assert never == (0, None)


# ---- gold answers ----------------------------------------------------------------------------------------------------


def of_golds(id_: str, *texts: str) -> Example:
    return Example(id_, "A", "c", "q", tuple(Answer(text, 0) for text in texts))


def test_the_annotators_exponent_by_hand():
    """One question: x, X and y. x equals one other with 1/2 and one of both; y never: p1 = 1/3, p2 = 2/3."""
    found = annotators_exponent([of_golds("1", "x", "the X", "y"), of_golds("2", "only", "two")])
    assert found == pytest.approx(math.log2(math.log(1 / 3) / math.log(2 / 3)))
    assert for_golds(1 / 3, 2, found) == pytest.approx(2 / 3)
    assert for_golds(0.4, 1, found) == pytest.approx(0.4)
    with pytest.raises(UserError, match="no question has three gold answers"):
        annotators_exponent([of_golds("2", "only", "two")])


def test_annotators_who_draw_independently_have_the_exponent_that_counts_them():
    """Each says "x" with 0.5 or something of their own: what the rule says of the third holds for the others."""
    rng = random.Random(0)
    examples = [
        of_golds(str(i), *("x" if rng.random() < 0.5 else f"own {i} {k}" for k in range(5))) for i in range(3000)
    ]
    exponent = annotators_exponent(examples)
    p = {m: fmean(e.answers[0].text in [a.text for a in e.answers[1 : 1 + m]] for e in examples) for m in (1, 2, 3, 4)}
    for m in (2, 3):
        assert for_golds(p[1], m, exponent) == pytest.approx(p[m], abs=0.03)
