"""Runs never overwrite each other, and the adapter that answers is the one that was trained for it."""

import gc
import importlib.metadata
import json
import locale
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta

from common.config import load
from common.data import prompt
from common.data.squad import Answer, Dataset, Example
from common.errors import UserError
from common.files import write_text
from common.runs import record
from tests.conftest import ROOT

import pytest
import yaml

DATA = Dataset([Example("q1", "T", "An amber canal.", "Which canal?", (Answer("amber", 3),))], "dev.json")
SYSTEM = "smollm2-qlora"
PACKAGES = record.PACKAGES


@pytest.fixture
def config(tmp_path):
    def with_overrides(*overrides: str):
        return load(SYSTEM, [f"runs={tmp_path / 'runs'}", *overrides])

    return with_overrides


@pytest.fixture(autouse=True)
def code(monkeypatch):
    """A commit without asking git, and no versions, which take as long as the rest of a test."""
    known = record.code
    monkeypatch.setattr(record, "code", lambda: ("c0ffee", True))
    monkeypatch.setattr(record, "PACKAGES", ())
    return known


def finish(config, kind: str = "train"):
    run = record.new_run(config, kind)
    return run, record.write(run, config, kind, DATA, {"name": "CPU"}, {"em": 50.0})


def test_every_run_has_a_folder_of_its_own_with_its_configuration(config):
    first, second = record.new_run(config(), "eval"), record.new_run(config(), "eval")
    assert (first.name[-3:], second.name[-3:]) == ("001", "002")
    assert first.name.startswith(f"{SYSTEM}-s0-{config().hash('eval')}-eval-")
    assert load(str(first / "config.yaml")) == config()
    assert (first / "config.yaml").read_text() == yaml.safe_dump(config().to_dict(), sort_keys=False)
    assert (first / "config.yaml").read_text().startswith(f"system: {SYSTEM}\nbase:\n  path: ")
    first.joinpath("config.yaml").unlink()
    first.rmdir()
    assert record.new_run(config(), "eval").name[-3:] == "003"  # a number is not used twice while a later one stands


def test_a_folder_that_another_process_makes_meanwhile_is_passed_over(config, monkeypatch):
    for _ in range(3):
        record.new_run(config(), "eval")
    monkeypatch.setattr(record, "_runs", lambda *_: [])  # it has looked before they were made
    assert record.new_run(config(), "eval").name[-3:] == "004"


def test_a_record_has_all_that_is_known_of_a_run(config, monkeypatch):
    monkeypatch.setattr(record, "PACKAGES", PACKAGES)
    asked = config("seed=3", "window.answer=48")
    run = record.new_run(asked, "eval")
    made_by = {"engine": "auto", "cutter": "0123456789abcdef"}
    data = Dataset(DATA.examples, "dev.json", fixed_offsets=2)
    written = record.write(run, asked, "eval", data, {"name": "CPU"}, {"em": 50.0}, made_by)
    created = written.pop("created")
    assert datetime.now(UTC) - datetime.fromisoformat(created) < timedelta(seconds=9)
    assert re.fullmatch(r"....-..-..T..:..:..\+00:00", created)
    assert written == {
        "schema": 2,
        "kind": "eval",
        "system": SYSTEM,
        "random_weights": False,
        "seed": 3,
        "folder": str(run),
        "must_match": {
            "data": DATA.sha256,
            "questions": 1,
            "prompt": prompt.fingerprint(asked.prompt),
            "scorer": record.score.VERSION,
            "window": {
                "context": 416,
                "question": 64,
                "answer": 48,
                "overflow": "truncate",
                "stride": 208,
                "tokenizer": "0123456789ab",
            },
        },
        "may_differ": {
            "data_source": "dev.json",
            "fixed_offsets": 2,
            "config_hash": asked.hash("eval"),
            "commit": "c0ffee",
            "dirty": True,
            "python": platform.python_version(),
            "versions": written["may_differ"]["versions"],
            "device": {"name": "CPU"},
            "engine": "auto",
        },
        "config": asked.to_dict(),
        "result": {"em": 50.0},
    }
    assert list(written["may_differ"]["versions"])[:8] == [
        "torch",
        "transformers",
        "tokenizers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "numpy",
        "scipy",
    ]
    assert all(importlib.metadata.version(name) == v for name, v in written["may_differ"]["versions"].items())
    assert made_by == {"engine": "auto", "cutter": "0123456789abcdef"}
    assert (run / "record.json").read_text() == json.dumps(record.read_one(run / "record.json"), indent=1) + "\n"


def test_random_weights_are_marked_and_what_is_not_installed_has_no_version(config, monkeypatch):
    asked = config("base.random_weights=true")
    monkeypatch.setattr(record, "PACKAGES", ("numpy", "no-such-package"))
    written = record.write(record.new_run(asked, "bench"), asked, "bench", DATA, {}, {})
    assert (written["random_weights"], list(written["may_differ"]["versions"])) == (True, ["numpy"])
    assert written["must_match"]["window"]["tokenizer"] is None
    assert PACKAGES[8:] == ("triton",)  # which is not on every machine


def test_code_is_the_commit_and_whether_what_it_tracks_was_changed(code, tmp_path, monkeypatch):
    assert record.ROOT == ROOT
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert code() == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert code() == (None, None)
    monkeypatch.undo()
    monkeypatch.setattr(record, "ROOT", tmp_path)

    def git(*words: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x")
        return subprocess.run(["git", "-C", tmp_path, *who, *words], capture_output=True, text=True, check=True).stdout

    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-qm", "x")
    (tmp_path / "untracked").touch()
    assert code() == (git("rev-parse", "HEAD").strip(), False)
    (tmp_path / "file").write_text("b")
    assert code()[1] is True


def test_a_record_reads_back_and_says_what_must_match(config, tmp_path):
    run, written = finish(config())
    (read,) = record.read_all(run.parent)
    assert read == written
    moved = tmp_path / "moved"
    run.rename(moved)
    assert record.read_one(moved / "record.json") == written | {"folder": str(moved)}
    older = json.loads((moved / "record.json").read_text())
    del older["config"]["bench"], older["config"]["window"]["stride"]
    (moved / "record.json").write_text(json.dumps(older))
    assert record.read_one(moved / "record.json")["config"] == written["config"]
    assert written["must_match"]["data"] == DATA.sha256
    other = Dataset([*DATA.examples, Example("q2", "T", "x y", "Which?", (Answer("x", 0),))], "dev.json")
    assert other.sha256 != DATA.sha256


def test_records_of_another_schema_are_not_compared_by_what_they_call_the_tokenizer(config):
    runs = [finish(config(f"seed={seed}"))[0] for seed in range(4)]
    for run, (schema, name) in zip(runs, [(1, "a"), (1, "b"), (2, "a"), (2, "b")], strict=True):
        written = json.loads((run / "record.json").read_text())
        written["must_match"]["window"]["tokenizer"], written["schema"] = name, schema
        (run / "record.json").write_text(json.dumps(written))
    old, older, new, newer = (record.read_one(run / "record.json") for run in runs)
    assert record.mismatch(old, old) == record.mismatch(old, new) == record.mismatch(older, new) == {}
    assert list(record.mismatch(old, older)) == list(record.mismatch(new, newer)) == ["window"]


@pytest.mark.parametrize(
    ("window", "may_differ", "read", "kept"),
    [
        ({"tokenizer": "0123456789abcdef"}, {"tokenizer": "own", "x": 1}, "file 0123456789ab", {"x": 1}),
        ({"tokenizer": None}, {"tokenizer": "fedcba9876543210"}, "file fedcba987654", {}),
        ({}, {"tokenizer": "fedcba9876543210"}, "file fedcba987654", {}),
        ({}, {}, None, {}),
    ],
)
def test_a_record_of_the_first_schema_says_what_cut_its_text_by_the_hash_of_a_file(
    config, window, may_differ, read, kept
):
    run, written = finish(config())
    old = written | {"schema": 1, "must_match": {"window": {"context": 9} | window}, "may_differ": may_differ}
    (run / "record.json").write_text(json.dumps(old))
    found = record.read_one(run / "record.json")
    assert found["must_match"] == {"window": {"context": 9, "tokenizer": read}}
    assert (found["may_differ"], found["schema"]) == (kept, 1)


def test_records_come_oldest_first_and_only_those_that_are_files(config, tmp_path):
    runs = [finish(config(f"seed={seed}"))[0] for seed in range(3)]
    for run, created in zip(runs, ("2026-02", "2026-03", "2026-02"), strict=True):
        written = json.loads((run / "record.json").read_text())
        (run / "record.json").write_text(json.dumps(written | {"created": created}))
    (runs[0].parent / "other" / "record.json").mkdir(parents=True)
    assert [r["seed"] for r in record.read_all(runs[0].parent)] == [0, 2, 1]
    assert record.read_all(tmp_path / "absent") == []


@pytest.mark.parametrize("text", ["[]", "{}", "3", "null", '{"schema": 2}', '{"must_match": 3, "schema": 1}'])
def test_what_is_no_record_is_named(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/record\.json: not a readable record \(.*\); move the folder away$"
    ):
        record.read_one(tmp_path / "record.json")


def test_a_run_without_a_record_is_unfinished_and_a_damaged_record_is_named(config):
    run = record.new_run(config(), "train")
    assert record.read_all(run.parent) == []
    assert record.newest_run(config(), "train") == run
    (run / "record.json").write_text('{"schema"')
    with pytest.raises(UserError, match=r"001/record\.json: not a readable record"):
        record.read_all(run.parent)


def test_a_copy_of_a_run_under_another_name_is_not_taken_for_it(config):
    assert record.newest_run(config(), "train") is None
    first = record.new_run(config(), "train")
    for other in ("{}.bak", "{}-2", "{}9x", "{}٣"):
        shutil.copytree(first, other.format(first))
    thousandth = first.with_name(f"{first.name[:-3]}1000")
    first.with_name(f"{first.name[:-3]}999").mkdir()
    thousandth.mkdir()
    assert record.newest_run(config(), "train") == first  # the disk was full before the others had settings
    for number in ("999", "1000"):
        (first.with_name(f"{first.name[:-3]}{number}") / "config.yaml").touch()
    assert record.newest_run(config(), "train") == thousandth
    assert record.new_run(config(), "train").name.endswith("-1001")


def test_a_run_is_of_one_process_at_a_time(config):
    run = record.new_run(config(), "train")
    locks = "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB); "
    locks += "print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-S", "-c", locks, str(run / "config.yaml")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError) as caught:
            record.claim(run)
        other.stdin.close()
    said = "another process works there; wait until it is done, or FRESH=1 starts anew"
    assert str(caught.value) == f"{run}: {said}"
    record.claim(run)
    gc.collect()
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert "BlockingIOError" in ended.stderr


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b", "a\nb"])
def test_an_answer_may_have_any_character(config, text):
    run = record.new_run(config(), "eval")
    written = record.write(run, config(), "eval", DATA, {"name": "CPU"}, {"em": 50.0, "n": 2})
    rows = [{"id": i, "text": text, "em": False, "f1": 0.0, "hit_limit": False} for i in ("q1", "q2")]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)  # as eval_loop.py writes them
    (run / "questions.jsonl").write_text(lines, encoding="utf-8")
    assert [row["text"] for row in record.read_questions(written).values()] == [text, text]


def test_rows_are_by_question_and_older_ones_have_a_question_for_an_article(config):
    run = record.new_run(config(), "eval")
    written = record.write(run, config(), "eval", DATA, {"name": "CPU"}, {"em": 50.0, "n": 2})
    row = {"id": "q1", "text": "a", "em": True, "f1": 0.5, "hit_limit": False}
    newer = {
        "id": "q2",
        "text": "b",
        "em": False,
        "f1": 0.0,
        "hit_limit": True,
        "article": "A",
        "logprob": -1.5,
        "x": 1,
    }
    (run / "questions.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(newer) + "\n")
    assert record.read_questions(written) == {
        "q1": {"text": "a", "em": True, "f1": 0.5, "hit_limit": False, "article": "q1", "logprob": None},
        "q2": {"text": "b", "em": False, "f1": 0.0, "hit_limit": True, "article": "A", "logprob": -1.5},
    }
    for damaged in ("", "{}\n{}\n", "[]\n[]\n", json.dumps(row) + "\n{\n"):
        (run / "questions.jsonl").write_text(damaged)
        with pytest.raises(
            UserError, match=rf"^{run}/questions\.jsonl: cannot be read \(.*\); evaluate that system again$"
        ):
            record.read_questions(written)
    (run / "questions.jsonl").unlink()
    with pytest.raises(UserError, match="No such file"):
        record.read_questions(written)


def test_metrics_are_read_but_for_a_line_that_a_crash_cut_short(tmp_path):
    assert record.read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 2, "note": "é"}\n{"step"', encoding="utf-8")
    assert record.read_metrics(tmp_path) == [{"step": 1}, {"step": 2, "note": "é"}]


def test_a_row_too_few_is_noticed(config):
    run = record.new_run(config(), "eval")
    written = record.write(run, config(), "eval", DATA, {"name": "CPU"}, {"em": 50.0, "n": 2})
    row = {"id": "q1", "text": "", "em": False, "f1": 0.0, "hit_limit": False}
    (run / "questions.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="1 lines for 2 questions"):
        record.read_questions(written)


def test_every_adapter_of_llama_2_has_the_base_that_it_is_compared_with():
    """They differ in what memory they need, and the T4's in what it is computed in."""
    raw, *adapted = (load(name).to_dict()["base"] for name in ("raw7b", "qlora7b", "qlora7b-fast", "qlora7b-t4"))
    assert all(record.weights_of(base) == record.weights_of(raw) for base in adapted)
    assert all(base != raw for base in adapted), "or there is nothing to leave out"
    for other in ({"path": "other"}, {"quant": "fp4"}, {"double_quant": False}, {"random_weights": True}):
        assert record.weights_of(raw | other) != record.weights_of(raw)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    write_text(tmp_path / "file", "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_that_cannot_be_made_is_a_users_error(config, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="cannot make a folder"):
        record.new_run(config(), "eval")


def test_a_write_is_whole_and_leaves_nothing_beside_it(tmp_path):
    write_text(tmp_path / "file.json", "é")
    assert (tmp_path / "file.json").read_bytes() == "é".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_files_are_utf_8_whatever_the_locale_says(config):
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")  # which has no é
    try:
        run = record.new_run(config(), "eval")
        write_text(run / "metrics.jsonl", '{"text": "é"}\n')
        row = {"id": "é", "text": "é", "em": True, "f1": 1.0, "hit_limit": False}
        write_text(run / "questions.jsonl", json.dumps(row, ensure_ascii=False) + "\n")
        written = record.write(run, config(), "eval", DATA, {"name": "é"}, {"n": 1})
        path = run / "record.json"
        write_text(path, json.dumps(written, ensure_ascii=False))
        assert record.read_one(path)["may_differ"]["device"] == {"name": "é"}
        assert record.read_metrics(run) == [{"text": "é"}]
        assert record.read_questions(written)["é"]["text"] == "é"
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


def test_a_write_goes_beside_the_file_until_it_is_whole(tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(os, "replace", lambda *names: moved.append(names))
    write_text(tmp_path / "file.json", "new")
    assert moved == [(tmp_path / "file.json.partial", tmp_path / "file.json")]


def test_records_are_compared_only_where_what_must_match_does(config):
    _, a = finish(config())
    for key, value in a["must_match"].items():
        other = {**value, "context": 300} if key == "window" else f"{value} "
        assert record.mismatch(a, a | {"must_match": {**a["must_match"], key: other}}) == {key: (value, other)}
    assert record.mismatch(a, a | {"config": {}, "may_differ": {}, "system": "other", "seed": 9}) == {}


@pytest.mark.parametrize(
    ("names", "alike"),
    [
        (("a", "a"), True),
        (("a", "b"), False),
        (("file a", "file a"), True),
        (("file a", "file b"), False),
        (("a", "file a"), True),
        (("file a", "b"), True),
        ((None, "b"), True),
        (("a", None), True),
        ((None, "file b"), True),
        ((None, None), True),
    ],
)
def test_windows_are_compared_by_what_cut_them_where_both_say_it_alike(names, alike):
    a, b = ({"must_match": {"window": {"context": 9, "tokenizer": name}}} for name in names)
    assert record.mismatch(a, b) == (
        {} if alike else {"window": (a["must_match"]["window"], b["must_match"]["window"])}
    )
    b["must_match"]["window"]["context"] = 8
    assert list(record.mismatch(a, b)) == ["window"]
