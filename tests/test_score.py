"""The score is the official one."""

import json
import os
import re
import string
import subprocess
from collections import Counter
from pathlib import Path

from common.score import exact_match, f1, normalize, score
from common.squad import Answer, Example
from tests.conftest import ROOT

import pytest
from hypothesis import given
from hypothesis import strategies as st

words = st.lists(st.sampled_from(["a", "an", "The", "bridge", "Bridge!", "1,820", "x-y", "été", "  ", ";"])).map(
    " ".join
)
anything = st.one_of(words, st.text(max_size=20))


def question(id_: str, *golds: str) -> Example:
    return Example(id_, "T", " ".join(golds), "?", tuple(Answer(gold, 0) for gold in golds))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Bridge.", "bridge"),
        ("an  apple a day", "apple day"),
        ("theatre Athens", "theatre athens"),
        ("U.S.", "us"),
        ("x-y", "xy"),
        ("“quoted”", "“quoted”"),  # only ASCII punctuation goes
        ("a", ""),
        ("the\tend\n", "end"),
    ],
)
def test_normalising_follows_the_official_steps(text, normal):
    assert normalize(text) == normal


@given(anything, anything)
def test_em_and_f1_agree_with_a_plain_reading_of_the_official_rules(prediction, gold):
    def simple(s: str) -> list[str]:
        s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", s).split()

    p, g = simple(prediction), simple(gold)
    common = sum((Counter(p) & Counter(g)).values())
    expected = 0.0
    if common:
        precision, recall = common / len(p), common / len(g)
        expected = 2 * precision * recall / (precision + recall)
    assert exact_match(prediction, gold) == (p == g)
    assert f1(prediction, gold) == pytest.approx(expected)


@given(anything, anything)
def test_f1_is_a_symmetric_share_that_an_exact_match_fills(a, b):
    assert 0 <= f1(a, b) <= 1
    assert f1(a, b) == f1(b, a)
    assert f1(a, f"The {a.upper()}!" if a.isascii() else a) == (1 if normalize(a) else 0)


def test_em_and_f1_take_their_own_best_gold():
    result = score([question("q", "red stone bridge", "bridge")], {"q": "red stone bridge over"})
    assert (result.em, result.f1) == (0, pytest.approx(100 * 6 / 7))
    assert score([question("q", "stone", "bridge")], {"q": "the Bridge"}).em == 100


def test_a_missing_id_scores_zero_and_stays_in_the_denominator_and_an_unknown_one_is_ignored():
    result = score([question("a", "one"), question("b", "two")], {"a": "one", "z": "two"})
    assert (result.em, result.f1, result.n, result.missing, result.unknown) == (50, 50, 2, 1, 1)
    assert result.correct == {"a": True, "b": False}


def test_an_empty_prediction_of_an_article_matches_but_has_no_overlap():
    result = score([question("q", "the")], {"q": ""})  # as the official script has it
    assert (result.em, result.f1) == (100, 0)


# ---- make verify-scorer --------------------------------------------------------------------------------------------


def verify(prediction, data) -> subprocess.CompletedProcess:
    command = ["make", "--no-print-directory", "verify-scorer", f"PRED={prediction}", f"DATA={data}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.published
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("bert-ensemble", ["EM 86.2062 F1 92.1956"]),
        ("logistic-regression", ["13 missing, 28 unknown", "EM 40.1419 F1 50.9815"]),
    ],
)
def test_published_predictions_score_as_published(name, lines):
    folder = Path(os.environ["PUBLISHED"] or "DATA=folder is missing")
    assert folder.is_dir(), folder
    (predictions,), (data,) = folder.glob(f"**/{name}.json*"), folder.glob("*dev*.json*")
    result = verify(predictions, data)
    assert result.stdout.splitlines() == lines


def test_any_predictions_can_be_verified(tmp_path, dev_file):
    (tmp_path / "p.json").write_text(json.dumps({"p0q0": "amber", "other": "x"}))
    assert re.match(
        r"11 missing, 1 unknown\nEM \d+\.\d{4} F1 \d+\.\d{4}\n$", verify(tmp_path / "p.json", dev_file).stdout
    )


def test_predictions_of_other_data_are_no_zero(tmp_path, dev_file):
    (tmp_path / "p.json").write_text('{"other": "x"}')
    result = verify(tmp_path / "p.json", dev_file)
    assert (result.returncode, result.stdout) == (2, "")
    assert "none of its 1 answers is to a question of" in result.stderr
    assert "no such file" in verify(tmp_path / "absent.json", dev_file).stderr


@pytest.mark.parametrize("content", ["", "[1]", '{"q": 3}', '{"q": "a'])
def test_predictions_that_cannot_be_read_are_named(tmp_path, dev_file, content):
    (tmp_path / "p.json").write_text(content)
    result = verify(tmp_path / "p.json", dev_file)
    assert result.returncode == 2
    assert "p.json: " in result.stderr
    assert "Traceback" not in result.stderr
