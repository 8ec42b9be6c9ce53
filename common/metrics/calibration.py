"""Maps from what a model says of its answers to the probability that they are right. Imports no torch.

A score is a log-probability: of the tokens (`logprob`), or of the answer among all that a search found (`share`). One
number or two, or a rising curve, turn it into a probability; `features` weighs several scores and facts instead, and so
can also rank answers otherwise.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean
from typing import Any

from common.data.squad import Example
from common.errors import UserError
from common.metrics.error_analysis import WORDS, question_word
from common.metrics.score import exact_match, f1, normalize

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, minimize, minimize_scalar
from scipy.special import expit, logit

FOLDS = 10  # of whole articles
PENALTY = 10.0  # on the squared weights of standardised features
EDGE = 1e-4  # shares are kept this far from 0 and 1
LEAST_MASS = 1e-300  # of an answer: exp of a log-probability below -745 is 0
Features = dict[str, float]
Numbers = dict[str, list[float]]


def features(row: Mapping[str, Any], question: str, other: Mapping[str, Any] | None = None) -> Features | None:
    """Scores of an answer, larger for those that are more certain, and facts about it; None without log-probabilities.

    `row`: of an evaluation's `questions.jsonl`. `other`: the row of a second evaluation, asked by another prompt.
    """
    logprob, ids = row.get("logprob"), row.get("token_ids")
    if logprob is None:
        return None
    word = question_word(question)
    out = {"logprob": logprob, "tokens": math.log(max(1, len(ids or row["text"].split())))}
    out |= {"cut": float(row["hit_limit"])} | {f"question {name}": float(word == name) for name in WORDS}
    if ids:
        out["mean"] = logprob / len(ids)
    if row.get("least") is not None:
        out["least"] = row["least"]
    if row.get("nbest"):
        out |= _of_search(row)
    if other:
        out["agree"] = f1(row["text"], other["text"])
        out["agree exactly"] = float(exact_match(row["text"], other["text"]))
    return out


def probability_of(logprob: float) -> float:
    """The model's own probability of an answer, in [0, 1]: rounding can take a log-probability above 0."""
    return min(1.0, math.exp(logprob))


def _of_search(row: Mapping[str, Any]) -> Features:
    """The answer's share of the probability that its search found or may have missed, and how the others share it."""
    own = normalize(row["text"])
    masses = {normalize(text): mass for text, mass in row["nbest"]}
    mass, rest = max(masses.pop(own, math.exp(row["logprob"])), LEAST_MASS), row.get("rest") or 0.0
    total = mass + sum(masses.values()) + rest
    shares = [each / total for each in (mass, *masses.values(), rest) if each > 0]
    share = min(max(mass / total, EDGE), 1 - EDGE)
    second = max([*masses.values(), EDGE * total])
    overlap = math.fsum(each * f1(own, text) for text, each in masses.items())
    return {
        "mass": math.log(mass),
        "share": math.log(share),
        "odds": float(logit(share)),
        "margin": math.log(mass / second),
        "expected F1": (mass + overlap) / total,
        "entropy": sum(each * math.log(each) for each in shares),  # negative: larger is more certain
    }


# ---- maps ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """A map that was fitted; its fields are JSON."""

    kind: str  # one of `KINDS`
    names: list[str]  # of the features that it reads
    numbers: Numbers

    def __call__(self, rows: Sequence[Features]) -> NDArray:
        """The probabilities [n] that n answers are right. Raises `UserError` where a feature is missing."""
        if missing := next((name for name in self.names if any(name not in row for row in rows)), None):
            raise UserError(f'the calibration reads "{missing}", which these answers do not have')
        values = np.array([[row[name] for name in self.names] for row in rows], float)
        return KINDS[self.kind][1](values, {key: np.array(value) for key, value in self.numbers.items()})


def fit(kind: str, rows: Sequence[Features], right: Sequence[bool], score: str) -> Fitted:
    """The map of a kind by maximum likelihood; those but `features` read the one `score`."""
    names = [score] if kind != "features" else sorted(set.intersection(*(set(row) for row in rows)))
    values = np.array([[row[name] for name in names] for row in rows], float)
    numbers = KINDS[kind][0](values, np.array(right, float))
    return Fitted(kind, names, {key: np.atleast_1d(value).tolist() for key, value in numbers.items()})


def _fit_temperature(values: NDArray, right: NDArray) -> dict[str, Any]:
    """exp(score / T)."""

    def loss(log_t: float) -> float:
        p = np.clip(np.exp(values[:, 0] / math.exp(log_t)), EDGE, 1 - EDGE)
        return -float(np.where(right > 0, np.log(p), np.log(1 - p)).sum())

    return {"temperature": math.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x)}


def _fit_logistic(values: NDArray, right: NDArray) -> dict[str, Any]:
    """The logistic function of standardised features (Platt 1999, for one of them), weights shrunk by `PENALTY`."""
    centre, scale = values.mean(0), values.std(0)
    scale[scale < 1e-9] = 1.0
    x, sign = (values - centre) / scale, 2 * right - 1

    def loss(w: NDArray) -> tuple[float, NDArray]:
        z = x @ w[1:] + w[0]
        off = expit(z) - right
        shrunk = PENALTY * w[1:] if x.shape[1] > 1 else 0 * w[1:]
        value = np.logaddexp(0, -sign * z).sum() + shrunk @ w[1:] / 2
        return float(value), np.append(off.sum(), x.T @ off + shrunk)

    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", bounds=[(-50, 50)] * (x.shape[1] + 1))
    return {"bias": found.x[0], "weights": found.x[1:], "centre": centre, "scale": scale}


def _logistic(values: NDArray, numbers: Mapping[str, NDArray]) -> NDArray:
    z = (values - numbers["centre"]) / numbers["scale"] @ numbers["weights"] + numbers["bias"]
    return expit(z)


def _log_odds(score: NDArray) -> NDArray:
    return logit(np.clip(np.exp(score), EDGE, 1 - EDGE))


def _fit_isotonic(values: NDArray, right: NDArray) -> dict[str, Any]:
    """The rising step function, by the means of its steps, kept half an answer away from 0 and 1."""
    scores, at = np.unique(values[:, 0], return_inverse=True)
    n = np.bincount(at)
    found = isotonic_regression(np.bincount(at, right) / n, weights=n).x
    edge = 0.5 / len(right)
    steps = np.flatnonzero(np.append(True, found[1:] != found[:-1]))
    centres = np.add.reduceat(scores * n, steps) / np.add.reduceat(n, steps)
    return {"score": centres, "probability": np.clip(found[steps], edge, 1 - edge)}


# kind → (fit: values [n, names], right [n] → numbers; the map: values [n, names], numbers → probabilities [n])
KINDS: dict[str, tuple[Callable[[NDArray, NDArray], dict[str, Any]], Callable[[NDArray, Any], NDArray]]] = {
    "temperature": (_fit_temperature, lambda x, a: np.exp(np.minimum(x[:, 0], 0) / a["temperature"])),
    "platt": (lambda x, right: _fit_logistic(_log_odds(x), right), lambda x, a: _logistic(_log_odds(x), a)),
    "isotonic": (_fit_isotonic, lambda x, a: np.interp(x[:, 0], a["score"], a["probability"])),
    "features": (_fit_logistic, _logistic),
}


# ---- by the articles of the same questions -------------------------------------------------------------------------


def folds(articles: Iterable[str]) -> dict[str, int]:
    """The fold of each article, [0, FOLDS): by rank of the title's hash."""
    ordered = sorted(set(articles), key=lambda title: hashlib.sha256(title.encode()).hexdigest())
    return {title: i % FOLDS for i, title in enumerate(ordered)}


def cross_fitted(
    kind: str, rows: Mapping[str, Features], right: Mapping[str, bool], article: Mapping[str, str], score: str
) -> dict[str, float]:
    """The probability of each answer, by id, by a map that was fitted without its article's fold.

    Raises `UserError` for answers of a single article.
    """
    fold = folds(article[id_] for id_ in rows)
    if len(set(fold.values())) < 2:
        raise UserError("a cross-fit needs the questions of two articles at least")
    out: dict[str, float] = {}
    for held in sorted(set(fold.values())):
        inside = [id_ for id_ in rows if fold[article[id_]] != held]
        outside = [id_ for id_ in rows if fold[article[id_]] == held]
        fitted = fit(kind, [rows[i] for i in inside], [right[i] for i in inside], score)
        out |= zip(outside, fitted([rows[i] for i in outside]).tolist(), strict=True)
    return {id_: out[id_] for id_ in rows}


def threshold(probability: Mapping[str, float], right: Mapping[str, bool], level: float) -> float:
    """The least probability from which on at least `level` percent are right; above 1 where there is none."""
    best, found = 2.0, 0
    for n, id_ in enumerate(ordered := sorted(probability, key=lambda id_: -probability[id_]), 1):
        found += right[id_]
        last = n == len(ordered) or probability[ordered[n]] < probability[id_]
        if last and 100 * found >= level * n:
            best = probability[id_]
    return best


def abstaining(
    probability: Mapping[str, float], right: Mapping[str, bool], article: Mapping[str, str], level: float
) -> tuple[float, float | None]:
    """(share of questions answered, EM of these in percent) where each fold's threshold is chosen on the others."""
    fold = folds(article[id_] for id_ in probability)
    answered: list[str] = []
    for held in set(fold.values()):
        others = {id_: p for id_, p in probability.items() if fold[article[id_]] != held}
        least = threshold(others, right, level)
        answered += [id_ for id_, p in probability.items() if fold[article[id_]] == held and p >= least]
    em = 100 * mean(right[id_] for id_ in answered) if answered else None
    return len(answered) / len(probability), em


# ---- by questions with one gold answer -----------------------------------------------------------------------------


def annotators_exponent(examples: Iterable[Example]) -> float:
    """How much more often an answer equals one of m gold answers than one of them, by the annotators themselves.

    Each annotator's answer is compared with one other's, and with two others': it equals one with the probability p1,
    one of two with p2. An answerer that equals a gold answer with probability p then equals one of m with
    1 - (1 - p) ** (m ** b), where b, which is returned, is such that it holds for m = 2: no answer of a model is read.
    On SQuAD's dev set b is 0.48, and the questions with four and five answers follow it. Raises `UserError` where no
    question has three gold answers.
    """
    equal: dict[int, list[float]] = {1: [], 2: []}
    for example in examples:
        golds = [normalize(answer.text) for answer in example.answers]
        if len(golds) > 2:
            for m, found in equal.items():
                others = ((gold, golds[:i] + golds[i + 1 :]) for i, gold in enumerate(golds))
                found.append(mean(gold in some for gold, rest in others for some in combinations(rest, m)))
    if not equal[1]:
        raise UserError("no question has three gold answers, so annotators cannot be compared")
    one, two = (1 - min(mean(found), 1 - EDGE) for found in equal.values())
    return math.log2(math.log(two) / math.log(one))


def for_golds(probability: float, golds: int, exponent: float) -> float:
    """The probability that an answer equals one of `golds` gold answers, by that for one (`annotators_exponent`)."""
    return 1 - (1 - probability) ** (golds**exponent)
