"""Runs never overwrite each other, and the adapter that answers is the one that was trained for it."""

import json
import os
import shutil
import subprocess
import sys

from common import record
from common.config import load
from common.errors import UserError
from common.squad import Answer, Dataset, Example
from tests.conftest import ROOT

import pytest

DATA = Dataset([Example("q1", "T", "An amber canal.", "Which canal?", (Answer("amber", 3),))], "dev.json")
SYSTEM = "smollm2-qlora"


@pytest.fixture
def config(tmp_path):
    def with_overrides(*overrides: str):
        return load(SYSTEM, [f"runs={tmp_path / 'runs'}", *overrides])

    return with_overrides


def finish(config, kind: str = "train"):
    run = record.new_run(config, kind)
    return run, record.write(run, config, kind, DATA, {"name": "CPU"}, {"em": 50.0})


def test_every_run_has_a_folder_of_its_own_with_its_configuration(config):
    first, second = record.new_run(config(), "eval"), record.new_run(config(), "eval")
    assert (first.name[-3:], second.name[-3:]) == ("001", "002")
    assert first.name.startswith(f"{SYSTEM}-s0-{config().hash('eval')}-eval-")
    assert load(str(first / "config.yaml")) == config()
    first.joinpath("config.yaml").unlink()
    first.rmdir()
    assert record.new_run(config(), "eval").name[-3:] == "003"  # a number is not used twice while a later one stands


def test_a_record_reads_back_and_says_what_must_match(config):
    run, written = finish(config())
    (read,) = record.read_all(run.parent)
    assert {**read, "folder": None} == {**written, "folder": None}
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


def test_a_run_without_a_record_is_unfinished_and_a_damaged_record_is_named(config):
    run = record.new_run(config(), "train")
    assert record.read_all(run.parent) == []
    assert record.newest_run(config(), "train") == run
    (run / "record.json").write_text('{"schema"')
    with pytest.raises(UserError, match=r"001/record\.json: not a readable record"):
        record.read_all(run.parent)


def test_the_adapter_is_that_of_the_newest_training_of_the_same_system_seed_base_lora_and_prompt(config):
    assert record.trained_adapter(load("smollm2-raw")) is None
    with pytest.raises(UserError, match=rf"no finished training.*make train MODEL={SYSTEM}"):
        record.trained_adapter(config())
    finish(config("seed=1"))
    finish(config("lora.rank=4"))
    finish(config("base.quant=fp4"))
    record.new_run(config(), "train")  # not finished
    with pytest.raises(UserError, match="no finished training"):
        record.trained_adapter(config())
    run, _ = finish(config("train.lr=1e-5"))
    assert record.trained_adapter(config("data.dev_questions=5")) == run / "best"
    other, written = finish(config("train.lr=1e-4"))
    (other / "record.json").write_text(json.dumps(written | {"created": "2999-01-01T00:00:00+00:00"}))
    assert record.trained_adapter(config()) == other / "best"
    assert record.trained_adapter(config("train.lr=1e-5", "data.dev_questions=5")) == run / "best"
    shutil.rmtree(other)
    # that adapter has learned another prompt
    with pytest.raises(UserError, match=rf"no finished training.*{run} has prompt\.order=both\)"):
        record.trained_adapter(config("prompt.order=question"))
    written = json.loads((run / "record.json").read_text())
    del written["config"]["prompt"]  # as in records from before there was a choice
    (run / "record.json").write_text(json.dumps(written))
    assert record.trained_adapter(config("prompt.order=context")) == run / "best"


def test_an_adapter_of_other_data_or_another_window_comes_after_one_that_was_trained_so(config):
    asked = ("train.lr=1e-4", "data.train_paragraphs=9")
    run, written = finish(config(*asked))
    (run / "record.json").write_text(json.dumps(written | {"created": "2000-01-01T00:00:00+00:00"}))
    for other in ("data.train_paragraphs=8", "window.context=300", "data.fix_offsets=true"):
        finish(config(*asked, other))
    assert record.trained_adapter(config(*asked)) == run / "best"


def test_an_adapter_that_is_asked_otherwise_than_it_was_trained_is_noted(config, capsys):
    run, _ = finish(config("prompt.order=context"))
    record.note_prompt(run / "best", config("prompt.order=context"))
    record.note_prompt(run.parent / "from elsewhere", config())
    record.note_prompt(None, config())
    assert capsys.readouterr().err == ""
    record.note_prompt(run / "best", config("window.answer=48"))
    assert capsys.readouterr().err == f"note: {run}/best was trained with prompt.order=context window.answer=32\n"


def test_a_training_that_went_on_with_other_memory_was_trained_so(config):
    run, written = finish(config("train.lr=1e-4", "train.memory_budget_gib=20", "train.pack_tokens=512"))
    (run / "record.json").write_text(json.dumps(written | {"created": "2000-01-01T00:00:00+00:00"}))
    other, _ = finish(config("train.lr=2e-4"))
    assert record.trained_adapter(config("train.lr=1e-4", "train.memory_budget_gib=30")) == run / "best"
    assert record.trained_adapter(config("train.lr=1e-4", "train.memory_budget_gib=null")) == other / "best"


def test_a_copy_of_a_run_under_another_name_is_not_taken_for_it(config):
    first = record.new_run(config(), "train")
    shutil.copytree(first, f"{first}.bak")
    thousandth = first.with_name(f"{first.name[:-3]}1000")
    first.with_name(f"{first.name[:-3]}999").mkdir()
    thousandth.mkdir()
    assert record.newest_run(config(), "train") == first  # the disk was full before the others had settings
    (thousandth / "config.yaml").touch()
    assert record.newest_run(config(), "train") == thousandth
    assert record.new_run(config(), "train").name.endswith("-1001")


def test_a_run_is_of_one_process_at_a_time(config):
    run = record.new_run(config(), "train")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom common import record\n"
    code += f"record.claim(Path({str(run)!r}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    record.claim(run)
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"{run}: another process works there" in other.stderr


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b", "a\nb"])
def test_an_answer_may_have_any_character(config, text):
    run = record.new_run(config(), "eval")
    written = record.write(run, config(), "eval", DATA, {"name": "CPU"}, {"em": 50.0, "n": 2})
    rows = [{"id": i, "text": text, "em": False, "f1": 0.0, "hit_limit": False} for i in ("q1", "q2")]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)  # as eval_loop.py writes them
    (run / "questions.jsonl").write_text(lines, encoding="utf-8")
    assert [row["text"] for row in record.read_questions(written).values()] == [text, text]


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


def test_a_named_adapter_wins_and_must_exist(config, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        record.trained_adapter(config(f"adapter={tmp_path / 'absent'}"))
    assert record.trained_adapter(config(f"adapter={tmp_path}")) == tmp_path


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    record.write_text(tmp_path / "file", "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        record.write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_that_cannot_be_made_is_a_users_error(config, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="cannot make a folder"):
        record.new_run(config(), "eval")


def test_records_are_compared_only_where_what_must_match_does(config):
    (_, a), (_, b), (_, c) = (finish(config(word)) for word in ("seed=0", "base.dtype=fp32", "window.context=300"))
    assert record.mismatch(a, b) == {}
    ((key, (was, now)),) = record.mismatch(a, c).items()
    assert (key, was["context"], now["context"]) == ("window", 416, 300)
