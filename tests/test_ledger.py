"""The ledger has every finished run, is made anew from the records, and takes SQL conditions."""

import sqlite3

from common import ledger, record
from common.config import load
from common.errors import UserError
from common.squad import Dataset

import pytest


@pytest.fixture
def runs(tmp_path):
    """Three finished runs and one that is not; their folder."""
    for kind, words, result in (
        ("train", ["train.lr=1e-3"], {"em": 71.5, "f1": 80.0, "n": 10, "selected_on": "heldout"}),
        ("train", ["train.lr=3e-3"], {"em": 69.0, "f1": 79.0, "n": 10, "selected_on": "heldout"}),
        ("bench", ["train.lr=1e-3"], {"n": 4, "latency": {"p95_ms": 40.0}, "peak": {"allocated_bytes": 2**31}}),
    ):
        config = load("smollm2-qlora", [*words, f"runs={tmp_path}"])
        record.write(record.new_run(config, kind), config, kind, Dataset([], "x.json"), {"name": "a card"}, result)
    record.new_run(config, "eval")
    return tmp_path


def test_it_has_every_finished_run_with_what_was_measured(runs):
    rows = ledger.find(ledger.make(runs), "1")
    assert [row["kind"] for row in rows].count("train") == 2
    (bench,) = [row for row in rows if row["kind"] == "bench"]
    assert (bench["p95_ms"], bench["peak_gib"], bench["em"], bench["device"]) == (40.0, 2.0, None, "a card")
    assert all((runs / row["folder"] / "record.json").exists() for row in rows)


def test_conditions_are_sql_over_columns_and_configuration(runs):
    path = ledger.make(runs)
    (best,) = ledger.find(path, "kind = 'train' and em > 70")
    assert best["em"] == 71.5
    (other,) = ledger.find(path, "config->>'$.train.lr' > 2e-3")
    assert other["em"] == 69.0
    for wrong in ("emm > 2", "em >", "1; drop table runs"):
        with pytest.raises(UserError, match="an SQL condition over created, kind"):
            ledger.find(path, wrong)
    assert len(ledger.find(path, "1")) == 3


def test_it_is_made_anew_each_time_and_a_record_that_is_gone_is_gone(runs):
    path = ledger.make(runs)
    (bench,) = ledger.find(path, "kind = 'bench'")
    (runs / bench["folder"] / "record.json").unlink()
    path.write_bytes(b"damaged")
    assert [row["kind"] for row in ledger.find(ledger.make(runs), "1")] == ["train", "train"]
    with sqlite3.connect(path) as connection:
        assert connection.execute("select count(*) from runs").fetchone() == (2,)


def test_what_differs_is_said_as_overrides():
    configs = [load("smollm2-qlora", words).to_dict() for words in (["train.lr=1e-3"], ["train.lr=3e-3", "seed=2"])]
    assert ledger.differing(configs) == ["train.lr=0.001", "train.lr=0.003"]
    assert ledger.differing(configs[:1]) == [""]


def test_runs_are_listed_and_a_folder_without_any_is_an_error(runs, tmp_path, capsys):
    ledger.main([str(runs), "kind = 'train'"])
    header, *lines, last = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["created", "kind", "system"]
    assert {line.split()[-1] for line in lines} == {"train.lr=0.001", "train.lr=0.003"}
    assert last.startswith("2 runs; ")
    with pytest.raises(UserError, match="no finished run is there yet"):
        ledger.main([str(tmp_path / "absent")])
