"""The ledger has every finished run, is made anew from the records, and takes SQL conditions."""

import json
import runpy
import sqlite3
from pathlib import Path

from common.config import load
from common.data.squad import Dataset
from common.errors import UserError
from common.runs import ledger, record

import pytest

GIB = 2**30
PLAIN = load("smollm2-qlora").to_dict()


def stored(runs: Path, name: str, kind: str, result: dict, lr: float = 1e-3, **change) -> str:
    """Write the record of a finished run; returns its folder."""
    config = {**PLAIN, "train": {**PLAIN["train"], "lr": lr}}
    about = {"device": {"name": "a card"}, "commit": "c0ffee", "dirty": False} | change.pop("may_differ", {})
    found = {
        "schema": 2,
        "kind": kind,
        "system": "s",
        "seed": 0,
        "created": "2026-01-01",
        "random_weights": False,
        "must_match": {"data": "123", "prompt": "0456", "window": {"tokenizer": None}},
        "may_differ": about,
        "config": config,
        "result": result,
    } | change
    (runs / name).mkdir(parents=True)
    (runs / name / "record.json").write_text(json.dumps(found))
    return str(runs / name)


@pytest.fixture
def runs(tmp_path):
    """Four finished runs and one that is not; their folder."""
    trained = {"em": 71, "f1": 80.5, "n": 10, "selected_on": "heldout", "questions_per_s": 195.25}
    memory = {"peak": {"allocated_bytes": 3 * GIB, "reserved_bytes": 9 * GIB, "rss_bytes": 5 * GIB}}
    stored(
        tmp_path,
        "b",
        "train",
        trained | memory,
        created="2026-01-02",
        seed=3,
        system="tuned",
        may_differ={"dirty": True, "commit": "abc"},
    )
    stored(tmp_path, "c", "train", {"em": 69.0}, lr=3e-3, created="2026-01-03")
    stored(tmp_path, "a", "eval", {"em": None, "f1": None, "n": 7}, random_weights=True, created="2026-01-03")
    timed = {"n": 4, "latency": {"p50_ms": 20.0, "p95_ms": 40.5}, "peak": {"allocated_bytes": None, "rss_bytes": GIB}}
    stored(tmp_path, "d", "bench", timed, may_differ={"device": {"name": "a CPU"}})
    (tmp_path / "unfinished").mkdir()
    return tmp_path


def test_every_column_is_what_the_record_says(runs):
    rows = ledger.find(ledger.make(runs), "1")
    assert [row["kind"] for row in rows] == ["bench", "train", "eval", "train"]  # as they were made, then by name
    bench, tuned, shapes, other = rows
    config = json.loads(tuned.pop("config"))
    assert config == {**PLAIN, "train": {**PLAIN["train"], "lr": 1e-3}}
    assert json.loads(other["config"])["train"]["lr"] == 3e-3
    assert tuned == {
        "created": "2026-01-02",
        "kind": "train",
        "system": "tuned",
        "seed": 3,
        "em": 71.0,
        "f1": 80.5,
        "n": 10,
        "chosen_on": "heldout",
        "p95_ms": None,
        "questions_per_s": 195.25,
        "peak_gib": 3.0,
        "random_weights": 0,
        "device": "a card",
        "code": "abc",
        "dirty": 1,
        "data": "123",
        "prompt": "0456",
        "folder": f"{runs}/b",
    }
    assert (bench["p95_ms"], bench["peak_gib"], bench["n"], bench["device"]) == (40.5, 1.0, 4, "a CPU")
    assert (bench["em"], bench["f1"], bench["questions_per_s"], bench["chosen_on"]) == (None,) * 4
    assert (shapes["random_weights"], shapes["em"], shapes["n"], shapes["peak_gib"]) == (1, None, 7, None)
    assert (shapes["folder"], shapes["dirty"], shapes["code"]) == (f"{runs}/a", 0, "c0ffee")


def test_columns_compare_as_what_they_are(runs):
    with sqlite3.connect(ledger.make(runs)) as connection:
        (row,) = connection.execute("select * from runs where kind = 'train' and em > 70").fetchall()
        types = connection.execute("select name, type from pragma_table_info('runs')").fetchall()
    assert dict(zip((name for name, _ in types), row, strict=True))["em"] == 71.0
    numbers = {"em", "f1", "p95_ms", "questions_per_s", "peak_gib"}
    whole = {"seed", "n", "random_weights", "dirty"}
    assert types == [
        (name, "REAL" if name in numbers else "INTEGER" if name in whole else "TEXT") for name in ledger.COLUMNS
    ]


def test_a_record_of_today_and_one_from_before_weights_were_said_to_be_random_have_a_row(tmp_path):
    config = load("smollm2-qlora", [f"runs={tmp_path}"])
    folder = record.new_run(config, "bench")
    record.write(folder, config, "bench", Dataset([], "x.json"), {"name": "a card"}, {"latency": {"p95_ms": 3.0}})
    (row,) = ledger.find(ledger.make(tmp_path), "p95_ms = 3")
    assert (row["system"], row["random_weights"], row["folder"]) == ("smollm2-qlora", 0, str(folder))
    found = json.loads((folder / "record.json").read_text())
    del found["random_weights"]
    (folder / "record.json").write_text(json.dumps(found))
    assert ledger.find(ledger.make(tmp_path), "1")[0]["random_weights"] == 0


def test_conditions_are_sql_over_columns_and_configuration(runs):
    path = ledger.make(runs)
    for condition, names in (
        ("kind = 'train' and em > 70", ["b"]),
        ("config->>'$.train.lr' > 2e-3", ["c"]),
        ("seed = 3 or p95_ms < 50", ["d", "b"]),
        ("em is null", ["d", "a"]),
        ("n > 100", []),
    ):
        assert [Path(row["folder"]).name for row in ledger.find(path, condition)] == names
    for wrong in ("emm > 2", "em >", "1; drop table runs"):
        with pytest.raises(UserError) as error:
            ledger.find(path, wrong)
        assert str(error.value).startswith(f"WHERE={wrong}: ")
        assert str(error.value).endswith(f"; an SQL condition over {', '.join(ledger.COLUMNS)}")
    assert len(ledger.find(path, "1")) == 4


def test_a_folder_may_have_any_name(tmp_path, monkeypatch):
    runs = tmp_path / "my runs?#%41"
    stored(runs, "a", "train", {"em": 1.0})
    assert ledger.find(ledger.make(runs), "em = 1")
    monkeypatch.chdir(runs.parent)
    assert ledger.find(ledger.make(Path(runs.name)), "em = 1")


def test_it_is_made_anew_each_time_and_a_record_that_is_gone_is_gone(runs):
    path = ledger.make(runs)
    assert path == runs / "ledger.sqlite"
    (runs / "d" / "record.json").unlink()
    path.write_bytes(b"damaged")
    path.with_name("ledger.sqlite.partial").write_bytes(b"left by a crash")
    assert len(ledger.find(ledger.make(runs), "1")) == 3
    assert sorted(p.name for p in runs.glob("ledger*")) == ["ledger.sqlite"]
    with sqlite3.connect(path) as connection:
        assert connection.execute("select count(*) from runs").fetchone() == (3,)


def test_one_that_cannot_be_written_leaves_the_last(runs, monkeypatch):
    before = ledger.make(runs).read_bytes()

    def full(*_):
        raise sqlite3.OperationalError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(sqlite3, "connect", full)
        with pytest.raises(UserError, match=r"ledger\.sqlite: cannot be written \(disk full\)"):
            ledger.make(runs)
    assert (runs / "ledger.sqlite").read_bytes() == before


def test_what_differs_is_said_as_overrides():
    a, b, c = (
        load("smollm2-qlora", words).to_dict()
        for words in (
            ["train.lr=1e-3", "data.dev=x"],
            ["train.lr=3e-3", "data.dev=x", "seed=2", "adapter=x", "runs=y", "system=z", "tracker=wandb"],
            ["train.lr=1e-3", "data.dev=y"],
        )
    )
    c["prompt"]["before"] = "Hello"
    assert ledger.differing([a, b]) == ["train.lr=0.001", "train.lr=0.003"]
    assert ledger.differing([a, b, c]) == [
        "data.dev=x train.lr=0.001",
        "data.dev=x train.lr=0.003",
        "data.dev=y train.lr=0.001",
    ]
    assert ledger.differing(iter([a])) == [""]
    assert ledger.differing([{"x": {"y": 1}}, {"z": 2}, {"x": {"y": 1}, "z": 2}]) == ["x.y=1", "z=2", "x.y=1 z=2"]


def test_runs_are_listed_with_what_differs_in_columns_that_line_up(runs, capsys):
    ledger.main([str(runs), "kind <> 'eval' and system = 's'"])
    lines = capsys.readouterr().out.splitlines()
    folder = "folder".ljust(len(f"{runs}/c"))
    assert lines == [
        f"created     kind   system  seed  em     f1  n  chosen_on  p95_ms  peak_gib  {folder}  differs in",
        f"2026-01-01  bench  s       0     –      –   4  –          40.50   1.00      {runs}/d  train.lr=0.001",
        f"2026-01-03  train  s       0     69.00  –   –  –          –       –         {runs}/c  train.lr=0.003",
        f"2 runs; {runs}/ledger.sqlite",
    ]
    ledger.main([str(runs), "kind = 'eval'"])
    (_, line, last) = capsys.readouterr().out.splitlines()
    assert line == f"2026-01-03  eval  s       0     –   –   7  –          –       –         {runs}/a"
    assert last.startswith("1 runs; ")


def test_where_no_run_is_found_the_head_stands_alone(runs, capsys):
    ledger.main([str(runs), "n > 100"])
    assert capsys.readouterr().out.splitlines() == [
        "created  kind  system  seed  em  f1  n  chosen_on  p95_ms  peak_gib  folder  differs in",
        f"0 runs; {runs}/ledger.sqlite",
    ]


def test_a_condition_only_reads(runs, monkeypatch):
    path, connect, asked = ledger.make(runs), sqlite3.connect, []
    monkeypatch.setattr(sqlite3, "connect", lambda *of, **more: asked.append((of, more)) or connect(*of, **more))
    ledger.find(path, "1")
    assert asked == [((f"file://{path}?mode=ro",), {"uri": True})]


@pytest.mark.parametrize("words", [[], [""], ["  "]])
def test_without_a_condition_all_runs_are_listed(runs, capsys, words):
    ledger.main([str(runs), *words])
    assert capsys.readouterr().out.splitlines()[-1].startswith("4 runs; ")


def test_a_folder_without_any_and_words_too_many_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"absent/: no finished run is there yet"):
        ledger.main([str(tmp_path / "absent")])
    for words in ([], ["runs", "1", "2"]):
        with pytest.raises(UserError, match="usage: make runs"):
            ledger.main(words)


def test_it_is_a_program(runs, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ledger.py", str(runs), "em = 69"])
    runpy.run_path(ledger.__file__, run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1] == f"1 runs; {runs}/ledger.sqlite"
    monkeypatch.setattr("sys.argv", ["ledger.py"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(ledger.__file__, run_name="__main__")
    assert capsys.readouterr().err.startswith("error: usage: make runs")
