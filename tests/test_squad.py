"""SQuAD files are read whole or refused with file, question and field."""

import copy
import gzip
import json
from collections import Counter
from dataclasses import replace

from common import squad
from common.errors import UserError
from tests.conftest import squad_file

import pytest
from hypothesis import given
from hypothesis import strategies as st

GOOD = {
    "data": [
        {
            "title": "Canals",
            "paragraphs": [
                {
                    "context": "The old canal was dug in 1820 and the new canal in 1905.",
                    "qas": [
                        {"id": "c1", "question": "When?", "answers": [{"text": "1820", "answer_start": 25}]},
                        {"id": "c2", "question": "What?", "answers": [{"text": "canal", "answer_start": 8}]},
                    ],
                }
            ],
        }
    ]
}


@pytest.fixture
def file(tmp_path):
    def write(content) -> str:
        path = tmp_path / "set.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return str(path)

    return write


def broken(*steps):
    """GOOD with the last step's value put at the path before it; `...` deletes."""
    data = copy.deepcopy(GOOD)
    *path, key, value = steps
    place = data
    for step in path:
        place = place[step]
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return data


PARAGRAPH = ("data", 0, "paragraphs", 0)
QUESTION = (*PARAGRAPH, "qas", 0)
ANSWER = (*QUESTION, "answers", 0)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([], r'expected \{"data": \[articles\]\}'),
        ({"data": {}}, r'expected \{"data": \[articles\]\}'),
        ({"data": []}, "holds no question"),
        (broken("data", 0, "title", ...), 'article 1: "title" must be a text, not null'),
        (broken(*PARAGRAPH, "context", "  "), r'article 1 \(Canals\), paragraph 1: "context" is empty'),
        (broken(*PARAGRAPH, "qas", "none"), 'paragraph 1: "qas" must be a list'),
        (broken(*PARAGRAPH, "context", "half \ud83d"), r'"context" holds half a character'),
        (broken(*QUESTION, "id", 7), '"id" must be a text, not 7'),
        (broken(*QUESTION, "question", ...), 'question c1: "question" must be a text'),
        (broken(*QUESTION, "answers", []), "question c1: has no answer"),
        (broken(*QUESTION, "answers", ...), 'question c1: "answers" must be a list'),
        (broken(*ANSWER, "text", ""), 'question c1: answer 1: "text" is empty'),
        (broken(*ANSWER, "answer_start", "25"), 'answer 1: "answer_start" must be a whole number, not "25"'),
        (broken(*ANSWER, "answer_start", True), '"answer_start" must be a whole number, not true'),
        (broken(*ANSWER, "answer_start", 24), 'c1: answer 1 "1820" does not occur at answer_start 24; .*fix_offsets'),
        (broken(*ANSWER, "answer_start", -4), "does not occur at answer_start -4"),
        (broken(*QUESTION, "id", "c2"), "question c2: this id stands in the file twice"),
        (b'{"data": [\n{"title": ', r"set\.json:2: not valid JSON .* is the file complete\?"),
        (gzip.compress(b'{"data": []}')[:-9], "cannot be read .* is the file complete"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_place(file, content, error):
    with pytest.raises(UserError, match=rf"set\.json.*{error}|{error}") as caught:
        squad.read(file(content), "dev")
    assert "set.json" in str(caught.value)


def test_a_missing_file_is_named_and_squad_does_not_stand_in_for_it(tmp_path, monkeypatch):
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(GOOD))
    monkeypatch.setenv("SQUAD_DIR", str(tmp_path))
    for source in ("absent.json", "absent", "./absent", "my/absent.jsonl", f"{tmp_path}/absent.JSON"):
        with pytest.raises(UserError, match=rf"{source}: no such file \(data\.dev\)"):
            squad.read(source, "dev")
    with pytest.raises(UserError, match=rf"{tmp_path}: a folder"):
        squad.read(str(tmp_path), "dev")


def test_a_file_that_is_damaged_in_the_middle_is_named(file):
    whole = bytearray(gzip.compress(json.dumps(GOOD).encode()))
    whole[20:40] = b"\xff" * 20
    with pytest.raises(UserError, match=r"set\.json: cannot be read"):
        squad.read(file(bytes(whole)), "dev")


def test_plain_and_gzipped_copies_are_the_same_data(file, tmp_path):
    packed = tmp_path / "set.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(GOOD, indent=3).encode()))
    plain, zipped = squad.read(file(GOOD), "dev"), squad.read(str(packed), "dev")
    assert plain.examples == zipped.examples
    assert plain.sha256 == zipped.sha256
    other = squad.read(file(broken(*QUESTION, "question", "When, then?")), "dev")
    assert other.sha256 != plain.sha256


def test_offsets_are_repaired_only_when_asked_to_the_nearest_place_and_counted(file):
    wrong = file(broken(*PARAGRAPH, "qas", 1, "answers", 0, "answer_start", 40))
    fixed = squad.read(wrong, "dev", fix_offsets=True)
    assert [a.start for e in fixed.examples for a in e.answers] == [25, 42]
    assert fixed.fixed_offsets == 1
    assert squad.read(file(GOOD), "dev", fix_offsets=True).fixed_offsets == 0
    with pytest.raises(UserError, match=r'answer 1 "1821" does not occur in its context'):
        squad.read(file(broken(*ANSWER, "text", "1821")), "dev", fix_offsets=True)


def test_squad_dir_stands_in_for_the_hub_and_files_win_over_it(file, tmp_path, monkeypatch):
    (tmp_path / "dev-v1.1.json.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    monkeypatch.setenv("SQUAD_DIR", str(tmp_path))
    assert squad.read("rajpurkar/squad", "dev").source.endswith("dev-v1.1.json.gz")
    assert squad.read(file(GOOD), "dev").source.endswith("set.json")
    with pytest.raises(UserError, match=r"SQUAD_DIR=.*no train file there; expected one of train-v1\.1\.json"):
        squad.read("rajpurkar/squad", "train")


def test_the_hubs_rows_become_the_same_examples(file, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [
        {
            "id": e.id,
            "title": e.title,
            "context": e.context,
            "question": e.question,
            "answers": {"text": [a.text for a in e.answers], "answer_start": [a.start for a in e.answers]},
        }
        for e in squad.read(file(GOOD), "dev").examples
    ]
    asked = []
    monkeypatch.delenv("SQUAD_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or rows)
    assert squad.read("rajpurkar/squad", "dev").sha256 == squad.read(file(GOOD), "dev").sha256
    assert asked == [("rajpurkar/squad", "validation")]


def test_a_hub_out_of_reach_names_the_way_around(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.delenv("SQUAD_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"data\.train=rajpurkar/squad.*ConnectionError.*SQUAD_DIR.*data\.train"):
        squad.read("rajpurkar/squad", "train")


texts = st.text(min_size=1, max_size=30).filter(str.strip)


@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=8))
def test_whatever_is_valid_is_read_as_it_stands(rows):
    import tempfile
    from pathlib import Path

    qas = [
        {"context": before + answer, "qas": [{"id": f"{i}", "question": question, "answers": [
            {"text": answer, "answer_start": len(before)}]}]}
        for i, (before, answer, question) in enumerate(rows)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.json"
        path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": qas}]}))
        examples = squad.read(str(path), "dev").examples
    assert [(e.context, e.answers[0].text, e.answers[0].start, e.question) for e in examples] == [
        (before + answer, answer, len(before), question) for before, answer, question in rows
    ]


# ---- subsets -------------------------------------------------------------------------------------------------------


@pytest.fixture
def examples(tmp_path):
    return squad.read(str(squad_file(tmp_path / "many.json", paragraphs=30, questions=4)), "dev").examples


def test_a_stratified_subset_is_fixed_proportional_and_in_order(examples):
    chosen = squad.stratified(examples, 31)
    assert len(chosen) == 31
    again = [replace(e, context=e.context + " ") for e in reversed(examples)]  # other objects, another order
    assert {e.id for e in squad.stratified(again, 31)} == {e.id for e in chosen}
    assert [e for e in examples if e in chosen] == chosen
    whole, part = (Counter(e.title for e in rows) for rows in (examples, chosen))
    assert all(abs(part[title] - whole[title] * 31 / len(examples)) < 1 for title in whole)
    assert squad.stratified(examples, 10**6) == examples
    assert {e.id for e in squad.stratified(examples, 10)} <= {e.id for e in chosen}


def test_held_out_articles_are_whole_and_apart(examples):
    rest, held = squad.hold_out(examples, 0.2)
    assert sorted(e.id for e in rest + held) == sorted(e.id for e in examples)
    assert not {e.title for e in rest} & {e.title for e in held}
    assert len(held) >= 0.2 * len(examples)
    assert rest
    with pytest.raises(UserError, match="at least two articles"):
        squad.hold_out([e for e in examples if e.title == "Article 0"], 0.2)


def test_first_paragraphs_come_with_all_their_questions(examples):
    first = squad.first_paragraphs(examples, 3)
    assert first == examples[:12]
    assert squad.first_paragraphs(examples, 10**6) == examples
