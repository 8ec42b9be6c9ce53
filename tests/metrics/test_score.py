"""The score is the official one."""

import gzip
import json
import os
import re
import string
import subprocess
from collections import Counter
from pathlib import Path

from common.data.squad import Answer, Example
from common.errors import UserError
from common.metrics import score as module
from common.metrics.score import exact_match, f1, normalize, read_predictions, score
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
        ("th'e end", "end"),  # punctuation goes before articles
        ("the-end", "theend"),
        ("a–b", "–b"),  # an article ends at any sign that is left
        ("one the other", "one other"),
        (string.punctuation + "x", "x"),
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


@pytest.mark.parametrize(
    ("prediction", "gold", "share"),
    [
        ("bridge bridge", "bridge", 2 / 3),  # a word counts as often as both have it
        ("stone red", "red stone", 1),
        ("red bridge over water", "red stone bridge", 4 / 7),
        ("canal", "bridge", 0),
    ],
)
def test_f1_counts_words_with_their_multiplicity_in_any_order(prediction, gold, share):
    assert f1(prediction, gold) == pytest.approx(share)


def test_em_and_f1_take_their_own_best_gold():
    result = score([question("q", "red stone bridge", "bridge")], {"q": "red stone bridge over"})
    assert (result.em, result.f1) == (0, pytest.approx(100 * 6 / 7))
    assert score([question("q", "stone", "bridge")], {"q": "the Bridge"}).em == 100


def test_a_missing_id_scores_zero_and_stays_in_n_and_an_unknown_one_is_ignored():
    examples = [question("a", "one"), question("b", "two three"), question("c", "four")]
    result = score(examples, {"a": "One.", "b": "two", "x": "four", "y": "one", "z": ""})
    assert result == module.Score(
        em=pytest.approx(100 / 3),
        f1=pytest.approx(100 * (1 + 2 / 3) / 3),
        n=3,
        missing=1,
        unknown=3,
        correct={"a": True, "b": False, "c": False},
        overlap={"a": 1.0, "b": pytest.approx(2 / 3), "c": 0.0},
    )


def test_an_empty_prediction_of_an_article_matches_but_has_no_overlap_and_is_not_missing():
    result = score([question("q", "the")], {"q": ""})  # as the official script has it
    assert (result.em, result.f1, result.missing) == (100, 0, 0)


def test_a_missing_answer_is_wrong_even_where_nothing_is_wanted():
    assert score([question("q", "the")], {}).correct == {"q": False}


def test_records_name_the_scorer_by_its_version():
    assert module.VERSION == "squad-v1.1"  # it stands in every record: another name, and none is comparable any more


# ---- make verify-scorer --------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path) -> Path:
    """Three questions of one paragraph: `red stone bridge`, `canal`, `amber`."""
    context = "the red stone bridge over amber canal"
    qas = [
        {"id": id_, "question": "?", "answers": [{"text": text, "answer_start": context.index(text)}]}
        for id_, text in (("q1", "red stone bridge"), ("q2", "canal"), ("q3", "amber"))
    ]
    path = tmp_path / "dev.json"
    path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": [{"context": context, "qas": qas}]}]}))
    return path


@pytest.fixture
def verified(monkeypatch, capsys):
    def verify(*words) -> list[str]:
        monkeypatch.setattr("sys.argv", ["score.py", *map(str, words)])
        module.main()
        return capsys.readouterr().out.splitlines()

    return verify


def make_verify(prediction, data) -> subprocess.CompletedProcess:
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
    result = make_verify(predictions, data)
    assert result.stdout.splitlines() == lines


@pytest.mark.parametrize(
    ("predictions", "lines"),
    [
        ({"q1": "the red stone bridge", "q2": "canal", "q3": "amber"}, ["EM 100.0000 F1 100.0000"]),
        ({"q1": "a bridge of stone", "q2": "Canal!", "q3": ""}, ["EM 33.3333 F1 55.5556"]),  # 2 · 2 / (3 + 3)
        ({"q1": "red", "q3": "amber", "z": "?"}, ["1 missing, 1 unknown", "EM 33.3333 F1 50.0000"]),
        ({"q3": "amber"}, ["2 missing, 0 unknown", "EM 33.3333 F1 33.3333"]),
        ({"q1": "", "q2": "canal", "q3": "no", "y": "", "z": ""}, ["0 missing, 2 unknown", "EM 33.3333 F1 33.3333"]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_any_predictions_can_be_verified_plain_or_gzipped(tmp_path, data, verified, predictions, lines, packed):
    path, raw = tmp_path / "p", json.dumps(predictions).encode()
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert verified(path, data) == lines


def test_make_verify_scorer_takes_pred_and_data(tmp_path, data):
    (tmp_path / "p.json").write_text('{"q2": "canal", "z": "?", "y": "?"}')
    assert make_verify(tmp_path / "p.json", data).stdout == "2 missing, 2 unknown\nEM 33.3333 F1 33.3333\n"
    result = make_verify(tmp_path / "absent.json", data)
    assert (result.returncode, result.stdout) == (2, "")
    assert "error: " in result.stderr
    assert "absent.json: no such file" in result.stderr
    assert "Traceback" not in result.stderr


def test_predictions_of_other_data_are_no_zero(tmp_path, data, verified):
    path = tmp_path / "p.json"
    path.write_text('{"other": "x", "another": "y"}')
    with pytest.raises(UserError) as error:
        verified(path, data)
    assert str(error.value) == f"{path}: none of its 2 answers is to a question of {data}"


def test_a_mistake_in_the_data_is_said_to_be_of_dev(tmp_path, verified):
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(UserError, match=r"absent\.json: no such file \(data\.dev\)"):
        verified(tmp_path / "p.json", tmp_path / "absent.json")


@pytest.mark.parametrize("words", [[], ["p.json"], ["p.json", "dev.json", "more"]])
def test_too_few_or_too_many_words_are_told_the_usage(verified, words):
    with pytest.raises(UserError, match=r"^usage: make verify-scorer PRED=predictions.json DATA=dev.json"):
        verified(*words)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ":1: the file is empty"),
        (b'{"q": "a', ":1: not valid JSON .*; is the file complete"),
        (b'["q"]', ": a list; expected {question id: answer text}"),
        (b'"q"', ": one value; expected {question id: answer text}"),
        (b'{"q": 3}', ': the answer to "q" is 3; expected {question id: answer text}, "" for no answer'),
        (b'{"q": "a", "r": null}', ': the answer to "r" is null; expected'),
        (b'{"q": [{"text": "a", "probability": 0.9}]}', ': the answer to "q" is a list of candidates; expected'),
        (b'{"predictions": {"q": "a"}}', ': the answer to "predictions" is {"q": "a"}; expected'),
        (b'{"q": "a", "q": "b"}', ': "q" stands twice in an object, with two values'),
    ],
)
def test_predictions_that_cannot_be_read_are_named(tmp_path, content, said):
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}{said}"):
        read_predictions(path)
    with pytest.raises(UserError, match="no such file"):
        read_predictions(tmp_path / "absent.json")
    with pytest.raises(UserError, match="a folder; name a file in it"):
        read_predictions(tmp_path)


def test_the_official_rules_read_no_offsets(tmp_path, verified):
    """Offsets that count CRLF as one, or are not there at all, change no score."""
    answers = [{"text": "noon", "answer_start": 3}, {"text": "12:00"}]
    qas = [{"id": "q", "question": "When?", "answers": answers}]
    data, predictions = tmp_path / "d.json", tmp_path / "p.json"
    paragraphs = [{"context": "It leaves\r\nat noon.", "qas": qas}]
    data.write_text(json.dumps({"data": [{"title": "Ferry", "paragraphs": paragraphs}]}))
    predictions.write_text('{"q": "at noon"}')
    assert verified(predictions, data) == ["EM 0.0000 F1 66.6667"]
