"""SQuAD files are read whole or refused with file, question and field."""

import copy
import gzip
import hashlib
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from common.config import Data, EarlyStop
from common.data import squad
from common.data.squad import Answer, Dataset, Example
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


def answered(*pairs):
    """GOOD with these answers, (text, start), to its first question."""
    return broken(*QUESTION, "answers", [{"text": text, "answer_start": start} for text, start in pairs])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([], r'expected \{"data": \[articles\]\}'),
        ({"data": {}}, r'expected \{"data": \[articles\]\}'),
        ({"data": []}, "holds no question"),
        (broken("data", 0, "title", ...), 'article 1: "title" must be a text, not null'),
        (broken("data", 0, "Canals"), 'article 1: "title" must be a text, not null'),
        (broken("data", [*GOOD["data"], {"title": "B"}]), r'article 2 \(B\): "paragraphs" must be a list, not null'),
        (
            broken("data", 0, "paragraphs", [*GOOD["data"][0]["paragraphs"], {}]),
            'paragraph 2: "context" must be a text',
        ),
        (broken(*PARAGRAPH, "context", "  "), r'article 1 \(Canals\), paragraph 1: "context" is empty'),
        (broken(*PARAGRAPH, "qas", "none"), 'paragraph 1: "qas" must be a list'),
        (broken(*PARAGRAPH, "context", "half \ud83d"), r'"context" holds half a character'),
        (broken(*QUESTION, "id", "half \udfff"), r'"id" holds half a character'),
        (broken(*QUESTION, "id", 7), r'article 1 \(Canals\), paragraph 1: "id" must be a text, not 7'),
        (
            broken(*QUESTION, "question", ["fifteen letters", "fifteen letters", "more"]),
            (r'question c1: "question" must be a text, not \["fifteen letters", "fifteen letters", "$'),
        ),
        (broken(*QUESTION, "question", ...), 'question c1: "question" must be a text'),
        (broken(*QUESTION, "answers", []), "question c1: has no answer"),
        (broken(*QUESTION, "answers", ...), 'question c1: "answers" must be a list'),
        (broken(*ANSWER, "text", ""), 'question c1: answer 1: "text" is empty'),
        (broken(*ANSWER, "answer_start", "25"), 'answer 1: "answer_start" must be a whole number, not "25"'),
        (broken(*ANSWER, "answer_start", True), '"answer_start" must be a whole number, not true'),
        (broken(*ANSWER, "answer_start", 24), 'c1: answer 1 "1820" does not occur at answer_start 24; .*fix_offsets'),
        (answered(["1820", 25], ["canal", 9]), 'c1: answer 2 "canal" does not occur at answer_start 9; .*fix_offsets'),
        (answered(["1821", 25]), 'c1: answer 1 "1821" does not occur at answer_start 25$'),
        (answered(["1905", -5]), 'c1: answer 1 "1905" does not occur at answer_start -5; .*fix_offsets'),
        (
            answered(["1820", 25], ["canal", "8"]),
            'question c1: answer 2: "answer_start" must be a whole number, not "8"',
        ),
        (broken(*QUESTION, "id", "c2"), "question c2: this id stands in the file twice"),
        (b'{"data": [\n{"title": ', r"set\.json:2: not valid JSON .* is the file complete\?"),
        (gzip.compress(b'{"data": []}', mtime=0)[:-9], "cannot be read .* is the file complete"),
        (b"\x1f\x8b is not gzip's", r"cannot be read \(.*\); is the file complete\?"),
        ([{"id": "1", "question": "?", "context": "c", "answers": {}}], "a row for each question, as datasets writes"),
        ({"data": [{"question": "?", "context": "c"}]}, "a row for each question, as datasets writes"),
        ({"c1": "1820", "c2": "canal"}, "these seem to be predictions"),
        (
            broken(*QUESTION, {"id": "c1", "question": "?", "answers": [], "is_impossible": True}),
            "c1: has no answer; SQuAD v1.1 gives at least one; is_impossible is of SQuAD v2",
        ),
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


TWO = [
    Example("a", "T", "Zürich or Basel", "Which?", (Answer("Zürich", 0), Answer("Basel", 10))),
    Example("b", "U", "A canal.", "What?", (Answer("canal", 2),)),
]


def test_the_hash_of_data_is_of_one_row_of_json_a_question():
    rows = (
        '["a", "T", "Zürich or Basel", "Which?", [["Zürich", 0], ["Basel", 10]]]'
        '["b", "U", "A canal.", "What?", [["canal", 2]]]'
    )
    assert Dataset(TWO, "x").sha256 == hashlib.sha256(rows.encode()).hexdigest()
    assert Dataset(TWO, "y", fixed_offsets=3).sha256 == Dataset(TWO, "x").sha256


@pytest.mark.parametrize(
    "change",
    [
        {"id": "c"},
        {"title": "U"},
        {"context": "Zürich or Bern"},
        {"question": "What?"},
        {"answers": (Answer("Zürich", 1), Answer("Basel", 10))},
        {"answers": (Answer("Zürich", 0), Answer("Basel", 9))},
        {"answers": (Answer("Zürich", 0), Answer("Base", 10))},
        {"answers": (Answer("Zürich", 0),)},
        {"answers": (Answer("Basel", 10), Answer("Zürich", 0))},
    ],
)
def test_the_hash_of_data_changes_with_every_field(change):
    assert Dataset([replace(TWO[0], **change), TWO[1]], "x").sha256 != Dataset(TWO, "x").sha256


def test_the_hash_of_data_changes_with_the_order_and_number_of_questions():
    assert len({Dataset(rows, "x").sha256 for rows in (TWO, TWO[::-1], TWO[:1], [*TWO, TWO[0]])}) == 4


def test_offsets_are_repaired_only_when_asked_to_the_nearest_place_and_counted(file):
    wrong = file(broken(*PARAGRAPH, "qas", 1, "answers", 0, "answer_start", 40))
    fixed = squad.read(wrong, "dev", fix_offsets=True)
    assert [a.start for e in fixed.examples for a in e.answers] == [25, 42]
    assert fixed.fixed_offsets == 1
    assert squad.read(file(GOOD), "dev", fix_offsets=True).fixed_offsets == 0
    with pytest.raises(UserError, match=r'answer 1 "1821" does not occur in its context'):
        squad.read(file(broken(*ANSWER, "text", "1821")), "dev", fix_offsets=True)


@pytest.mark.parametrize(
    ("start", "repaired"), [(0, 0), (-9, 0), (7, 0), (8, 14), (14, 14), (21, 14), (22, 29), (29, 29), (900, 29)]
)
def test_an_offset_is_repaired_to_the_nearest_place(start, repaired):
    e = Example("q", "T", "canal, bridge canal and lake canal", "?", (Answer("canal", start),))
    assert [k for k in range(34) if e.context.startswith("canal", k)] == [0, 14, 29]
    assert squad._at_its_start(e, 0, True, "f") == Answer("canal", repaired)


@pytest.mark.parametrize("split", ["train", "dev"])
def test_squad_dir_has_a_file_of_a_usual_name_the_first_of_them_is_read(tmp_path, monkeypatch, split):
    monkeypatch.setenv("SQUAD_DIR", str(tmp_path))
    for name in ("squad-v1.1-{}.json.gz", "squad-v1.1-{}.json", "{}-v1.1.json.gz", "{}-v1.1.json"):
        file = tmp_path / name.format(split)
        file.touch()
        assert squad.locate("rajpurkar/squad", split) == file
    names = "{0}-v1.1.json, {0}-v1.1.json.gz, squad-v1.1-{0}.json, squad-v1.1-{0}.json.gz"
    monkeypatch.setenv("SQUAD_DIR", str(tmp_path / "empty"))
    with pytest.raises(UserError) as caught:
        squad.locate("rajpurkar/squad", split)
    assert str(caught.value).endswith(f"empty: no {split} file there; expected one of {names.format(split)}")


def test_a_hub_id_is_left_to_the_hub_unless_it_is_squads_or_a_file(tmp_path, monkeypatch):
    (tmp_path / "dev-v1.1.json").touch()
    monkeypatch.delenv("SQUAD_DIR", raising=False)
    assert squad.locate("rajpurkar/squad", "dev") is None
    monkeypatch.setenv("SQUAD_DIR", "")
    assert squad.locate("rajpurkar/squad", "dev") is None
    monkeypatch.setenv("SQUAD_DIR", str(tmp_path))
    assert squad.locate("my-org/squad_v1.1", "dev") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rajpurkar").mkdir()
    (tmp_path / "rajpurkar" / "squad").touch()
    assert squad.locate("rajpurkar/squad", "dev") == Path("rajpurkar/squad")
    for source in ("my/set.json", "my/set.jsonl", "my/set.gz", "set", "a/b/c", "-my/set", "my/"):
        with pytest.raises(UserError, match=rf"^{source}: no such file \(data\.train\)$"):
            squad.locate(source, "train")
    with pytest.raises(UserError, match=r"^rajpurkar: a folder; name a file in it \(data\.dev\)$"):
        squad.locate("rajpurkar", "dev")


def test_squad_dir_stands_in_for_the_hub_and_files_win_over_it(file, tmp_path, monkeypatch):
    (tmp_path / "dev-v1.1.json.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    monkeypatch.setenv("SQUAD_DIR", str(tmp_path))
    assert squad.read("rajpurkar/squad", "dev").source.endswith("dev-v1.1.json.gz")
    assert squad.read(file(GOOD), "dev").source.endswith("set.json")
    with pytest.raises(UserError, match=r"SQUAD_DIR=.*no train file there; expected one of train-v1\.1\.json"):
        squad.read("rajpurkar/squad", "train")


def row_of(e: Example) -> dict:
    texts, starts = [a.text for a in e.answers], [a.start for a in e.answers]
    return {
        "id": e.id,
        "title": e.title,
        "context": e.context,
        "question": e.question,
        "answers": {"text": texts, "answer_start": starts},
    }


@pytest.fixture
def hub(monkeypatch):
    """Gives `load_dataset` these rows, and says what it was asked for."""
    monkeypatch.delenv("SQUAD_DIR", raising=False)

    def give(rows):
        asked = []

        def load_dataset(name, split):
            asked.append((name, split))
            if isinstance(rows, Exception):
                raise rows
            return rows

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return asked

    return give


@pytest.mark.parametrize(("split", "hubs"), [("train", "train"), ("dev", "validation")])
def test_the_hubs_rows_become_the_same_examples(file, hub, split, hubs):
    examples = squad.read(file(answered(["1820", 25], ["canal", 8])), "dev").examples
    asked = hub([row_of(e) for e in examples])
    found = squad.read("rajpurkar/squad", split)
    assert (found.examples, found.source, found.fixed_offsets) == (examples, "rajpurkar/squad", 0)
    assert asked == [("rajpurkar/squad", hubs)]


def test_the_hubs_rows_are_gathered_by_article_and_paragraph_in_order(hub):
    contexts = {"a": ("T", "One."), "b": ("U", "One."), "c": ("T", "Two."), "d": ("T", "One.")}
    hub([row_of(Example(i, *where, f"{i}?", (Answer("O", 0),))) for i, where in contexts.items()])
    articles = squad.hub_articles("my/set", "train")
    found = [(a["title"], [(p["context"], [q["id"] for q in p["qas"]]) for p in a["paragraphs"]]) for a in articles]
    assert found == [("T", [("One.", ["a", "d"]), ("Two.", ["c"])]), ("U", [("One.", ["b"])])]


def test_a_row_of_the_hub_with_more_texts_than_starts_is_not_read(hub):
    hub([{**row_of(TWO[0]), "answers": {"text": ["Zürich", "Basel"], "answer_start": [0]}}])
    with pytest.raises(ValueError, match="shorter"):
        squad.hub_articles("my/set", "train")


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_hub_out_of_reach_names_the_way_around(hub, split):
    hub(ConnectionError("no route"))
    with pytest.raises(UserError) as caught:
        squad.read("rajpurkar/squad", split)
    assert str(caught.value) == (
        f"data.{split}=rajpurkar/squad: the hub gave no such data set (ConnectionError); "
        f"set SQUAD_DIR to a folder with {split}-v1.1.json, or data.{split} to a file"
    )


texts = st.text(min_size=1, max_size=30).filter(str.strip)


@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=8))
def test_whatever_is_valid_is_read_as_it_stands(rows):
    import tempfile

    qas = [
        {
            "context": before + answer,
            "qas": [{"id": f"{i}", "question": question, "answers": [{"text": answer, "answer_start": len(before)}]}],
        }
        for i, (before, answer, question) in enumerate(rows)
    ]
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


def of_articles(**sizes: int) -> list[Example]:
    """So many questions of each article, one of each in turn: A0 B0 A1 …"""
    turns = [(i, title) for i in range(max(sizes.values())) for title, n in sizes.items() if i < n]
    return [Example(f"{title}{i}", title, title, "?", (Answer("A", 0),)) for i, title in turns]


def by_hash(names) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


@pytest.mark.parametrize(
    ("sizes", "n", "taken"),
    [
        ({"A": 5, "B": 3, "C": 2}, 4, {"A": 2, "B": 1, "C": 1}),  # 2, 1.2, 0.8: the one left over to C
        ({"A": 5, "B": 3, "C": 2}, 7, {"A": 4, "B": 2, "C": 1}),  # 3.5, 2.1, 1.4: to A
        ({"A": 6, "B": 3, "C": 2}, 5, {"A": 3, "B": 1, "C": 1}),  # 2.73, 1.36, 0.91: one to C, one to A
        ({"D": 1, "B": 1, "C": 1, "A": 1}, 2, {"A": 1, "B": 1}),  # 0.5 each: by title
        ({"A": 2, "B": 4}, 3, {"A": 1, "B": 2}),  # nothing is left over
        ({"A": 2, "B": 3}, 5, {"A": 2, "B": 3}),
        ({"A": 2, "B": 3}, 9, {"A": 2, "B": 3}),
        ({"A": 9, "B": 1}, 1, {"A": 1}),
    ],
)
def test_a_subset_shares_by_largest_remainder_and_takes_the_first_by_hash_of_the_id(sizes, n, taken):
    examples = of_articles(**sizes)
    first = {id_ for title, k in taken.items() for id_ in by_hash(f"{title}{i}" for i in range(sizes[title]))[:k]}
    assert [e.id for e in squad.stratified(examples, n)] == [e.id for e in examples if e.id in first]


@pytest.mark.parametrize(
    ("sizes", "share", "articles"),
    [
        ({"A": 2, "B": 2, "C": 2, "D": 2, "E": 2}, 0.2, "D"),  # just reached
        ({"A": 2, "B": 2, "C": 2, "D": 2, "E": 2}, 0.21, "DA"),
        ({"A": 1, "B": 1, "C": 1, "D": 1, "E": 16}, 0.2, "DACE"),  # of the questions, not of the articles
        ({"A": 1, "B": 1, "C": 1, "D": 16, "E": 1}, 0.5, "D"),
        ({"A": 1, "B": 18, "D": 1}, 0.5, "DA"),  # one article is left to train on
        ({"A": 1, "D": 3}, 0.05, "D"),
    ],
)
def test_held_out_is_a_share_of_the_questions_in_whole_articles_by_hash_of_the_title(sizes, share, articles):
    assert "".join(by_hash("ABCDE")) == "DACEB"
    examples = of_articles(**sizes)
    rest, held = squad.hold_out(examples, share)
    assert held == [e for e in examples if e.title in articles]
    assert rest == [e for e in examples if e.title not in articles]


def test_a_part_is_of_whole_articles_in_a_fixed_order_that_is_not_the_one_of_hold_out():
    order = sorted("ABCDE", key=lambda title: hashlib.sha256(f"train_share {title}".encode()).hexdigest())
    assert "".join(order) == "DBEAC" != "".join(by_hash("ABCDE"))
    examples = of_articles(A=2, B=2, C=2, D=2, E=2)
    for share, titles in ((0.01, "D"), (0.2, "D"), (0.3, "D"), (0.31, "DB"), (0.9, "DBEA"), (1.0, "ABCDE")):
        assert squad.part(examples, share, "article") == [e for e in examples if e.title in titles]
    large = of_articles(D=9, B=1, E=2)  # one article at least, and the nearest: of 12 questions 9 are nearer than 10
    assert [len(squad.part(large, share, "article")) for share in (0.01, 0.7, 0.8, 0.95)] == [9, 9, 10, 12]
    assert len(squad.part(of_articles(A=9), 0.01, "article")) == 9


@given(
    st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 9), min_size=1, max_size=12),
    st.floats(1e-6, 1),
    st.floats(1e-6, 1),
    st.sampled_from(["article", "question"]),
    st.randoms(use_true_random=False),
)
def test_a_smaller_part_is_in_a_larger_one_and_each_is_as_near_its_share_as_units_allow(sizes, a, b, unit, shuffler):
    examples, small, large = of_articles(**sizes), *sorted((a, b))
    part, more = (squad.part(examples, share, unit) for share in (small, large))
    assert {e.id for e in part} <= {e.id for e in more}
    assert [e for e in examples if e in part] == part, "in the order of the file"
    n, biggest = len(examples), max(sizes.values()) if unit == "article" else 1
    assert len(part) >= 1
    assert abs(len(part) - small * n) <= max(biggest / 2, biggest - small * n)
    if unit == "article":
        titles = {e.title for e in part}
        assert part == [e for e in examples if e.title in titles]
    other = examples[:]
    shuffler.shuffle(other)
    assert {e.id for e in squad.part(other, small, unit)} == {e.id for e in part}
    assert squad.part(examples, 1.0, unit) == examples


def test_one_article_cannot_be_held_out_from_itself():
    with pytest.raises(UserError, match="at least two articles"):
        squad.hold_out(of_articles(A=9), 0.2)


def test_first_paragraphs_come_with_all_their_questions(examples):
    first = squad.first_paragraphs(examples, 3)
    assert first == examples[:12]
    assert squad.first_paragraphs(examples, 10**6) == examples


def test_a_paragraph_is_counted_once_an_article():
    rows = [("T", "x"), ("T", "y"), ("T", "x"), ("U", "x"), ("U", "y")]
    examples = [Example(str(i), *row, "?", (Answer("x", 0),)) for i, row in enumerate(rows)]
    assert [len(squad.first_paragraphs(examples, n)) for n in range(1, 6)] == [1, 3, 4, 5, 5]


@pytest.mark.parametrize(
    ("settings", "train", "dev"),
    [
        ({}, "t0 t1 t2 t3", "d0 d1 d2 d3"),
        ({"train_paragraphs": 1}, "t0 t1", "d0 d1 d2 d3"),
        ({"train_paragraphs": 9}, "t0 t1 t2 t3", "d0 d1 d2 d3"),
        ({"dev_questions": 1}, "t0 t1 t2 t3", "d0"),
        ({"dev_questions": 9}, "t0 t1 t2 t3", "d0 d1 d2 d3"),
    ],
)
def test_data_cuts_train_by_paragraphs_and_dev_by_questions(tmp_path, settings, train, dev):
    for name in ("t", "d"):
        paragraphs = [
            {
                "context": context,
                "qas": [
                    {"id": f"{name}{i}", "question": "?", "answers": [{"text": "One", "answer_start": 0}]} for i in ids
                ],
            }
            for context, ids in (("One.", (0, 1)), ("One more.", (2, 3)))
        ]
        (tmp_path / name).write_text(json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}))
    data = Data(str(tmp_path / "t"), str(tmp_path / "d"), **settings)
    for split, source, ids in (("train", data.train, train), ("dev", data.dev, dev)):
        loaded = squad.load(data, split)
        assert (" ".join(e.id for e in loaded.examples), loaded.source, loaded.fixed_offsets) == (ids, source, 0)


@pytest.mark.parametrize("split", ["train", "dev"])
def test_data_repairs_offsets_of_both_splits_where_asked(file, split):
    wrong = file(answered(["1820", 24]))
    data = Data(wrong, wrong, train_paragraphs=1, dev_questions=1)
    with pytest.raises(UserError, match="answer_start 24"):
        squad.load(data, split)
    assert squad.load(replace(data, fix_offsets=True), split).fixed_offsets == 1


@pytest.mark.parametrize(("split", "hubs"), [("train", "train"), ("dev", "validation")])
def test_data_asks_for_the_split_by_its_name(hub, split, hubs):
    asked = hub([row_of(e) for e in TWO])
    data = Data(**{"train": "other/set", "dev": "other/set", split: "my/set"})
    assert squad.load(data, split).examples == TWO
    assert asked == [("my/set", hubs)]


def test_an_evaluation_scores_dev_or_what_a_training_holds_out(monkeypatch, examples):
    sets = {"train": Dataset(examples, "train.json"), "dev": Dataset(of_articles(X=9, Y=3), "dev.json")}
    monkeypatch.setattr(squad, "load", lambda data, split: sets[split])
    stop = EarlyStop(split="heldout", heldout_share=0.5)
    assert squad.evaluated(Data(), stop) is sets["dev"]
    held = squad.evaluated(Data(split="heldout"), stop)
    assert held.source == "train.json, held out"
    assert held.examples == squad.selection(*sets.values(), Data(), stop)[1].examples != examples
    few = squad.evaluated(Data(split="heldout", dev_questions=2), stop)
    assert few.examples == squad.stratified(held.examples, 2)


def test_questions_that_stop_a_training_are_devs_or_held_out_and_as_many_as_asked(examples):
    train, dev = Dataset(examples, "train.json"), Dataset(of_articles(X=9, Y=3), "dev.json")
    assert (train.fixed_offsets, dev.fixed_offsets) == (0, 0)
    assert squad.selection(train, dev, Data(), EarlyStop()) == (train, dev)
    four = replace(dev, examples=squad.stratified(dev.examples, 4))
    assert squad.selection(train, dev, Data(), EarlyStop(questions=4)) == (train, four)
    assert four.sha256 != dev.sha256
    for share in (0.05, 0.5):
        rest, held = squad.hold_out(examples, share)
        options = EarlyStop(split="heldout", heldout_share=share)
        expected = replace(train, examples=rest), replace(train, examples=held)
        assert squad.selection(train, dev, Data(), options) == expected
        some = EarlyStop(split="heldout", heldout_share=share, questions=2)
        assert squad.selection(train, dev, Data(), some)[1].examples == squad.stratified(held, 2)
        small = Data(train_share=0.2)  # of what is left, and what is held out stays
        less = replace(train, examples=squad.part(rest, 0.2, "article"))
        assert squad.selection(train, dev, small, options) == (less, expected[1])
    by_one = squad.selection(train, dev, Data(train_share=0.1, train_unit="question"), EarlyStop())[0]
    assert by_one.examples == squad.part(examples, 0.1, "question")
    assert len({d.sha256 for d in (train, less, by_one)}) == 3, "or the cache of trees would mix them up"
