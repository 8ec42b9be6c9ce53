"""Several scripts in one process: the same weights and answers as in processes of their own, and nothing is kept."""

import json
from pathlib import Path

from common.runs import sweeps
from common.runs.pool import Worker, step
from tests.conftest import ROOT

import pytest


def job(config: Path | str, runs: Path, *words: str) -> sweeps.Job:
    """A training and its evaluation in a folder of runs."""
    path = runs.with_suffix(".yaml")
    path.write_text(f"systems: [{config}]\noverrides: [{', '.join((*words, f'runs={runs}'))}]\n")
    (found,), _ = sweeps.plan(path)
    return found


def made_of(runs: Path) -> dict[str, bytes]:
    """The weights, the optimizer's state and the answers of all runs in a folder, by file."""
    files = ("best/adapter_model.safetensors", "last/adapter_model.safetensors", "questions.jsonl", "predictions.json")
    # an evaluation's folder has the hash of its adapter's
    return {
        f"{kind}/{name}": p.read_bytes()
        for kind in ("train", "eval")
        for name in files
        for p in runs.glob(f"*-{kind}-*/{name}")
    }


def do(worker: Worker, job: sweeps.Job) -> None:
    while steps := sweeps.left(job, ("train", "eval")):
        kind, words = steps[0]
        code, said = step(job, kind, words, worker)
        assert code == 0, said


def test_a_second_run_in_a_process_computes_what_a_process_of_its_own_does(answering_config, tmp_path):
    words = ("train.max_steps=4", "train.eval_every=2", "lora.dropout=0.1", "seed=1")
    shared, alone = Worker(None), Worker(None)
    # another size, storage of the base, seed and prompt before
    before = ("lora.rank=2", "train.max_steps=2", "prompt.order=both", "base.quant=fp4")
    do(shared, job(answering_config, tmp_path / "before", *before))
    first = shared.child
    do(shared, job(answering_config, tmp_path / "shared", *words))
    assert shared.child is first
    do(alone, job(answering_config, tmp_path / "alone", *words))
    shared.end()
    alone.end()
    found = made_of(tmp_path / "shared")
    assert len(found) == 5
    assert found == made_of(tmp_path / "alone")


@pytest.fixture
def worker():
    made = Worker(None)
    yield made
    made.end()


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(text)
    return str(path)


def test_a_script_runs_as_python_runs_it(worker, tmp_path):
    code = "import sys; print(__name__, sys.argv, sys.path[0], repr(sys.stdin.read()))"
    path = script(tmp_path, code)
    log = tmp_path / "log"
    assert worker.run(path, ["a b", "c"], log, "") == 0
    assert log.read_text() == f"__main__ {[path, 'a b', 'c']} {tmp_path} ''\n"
    assert worker.run(path, [], log, "") == 0
    assert log.read_text().count("__main__") == 2


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('it broke')", 1, "it broke"),
        ("import sys; sys.exit()", 0, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("import os; os._exit(5)", 5, ""),
    ],
)
def test_how_a_script_ended_is_known_and_the_next_one_runs(worker, tmp_path, text, code, said):
    log = tmp_path / "log"
    assert worker.run(script(tmp_path, text), [], log, "") == code
    assert said in log.read_text()
    assert worker.run(script(tmp_path, "print('next')"), [], log, "") == 0
    assert log.read_text().endswith("next\n")


def test_scripts_of_another_kind_have_another_process(worker, tmp_path):
    log = tmp_path / "log"
    path = script(tmp_path, "import os; print(os.getpid())")
    for serves in ("a", "a", "b"):
        worker.run(path, [], log, serves)
    first, second, third = log.read_text().split()
    assert first == second != third


def test_no_model_outlives_its_script(worker, answering_config, tmp_path):
    do(worker, job(answering_config, tmp_path / "runs", "train.max_steps=2", "train.eval_every=2"))
    count = "import gc, torch, json; print(json.dumps([type(x).__name__ for x in gc.get_objects()"
    count += " if type(x).__name__.endswith(('ForCausalLM', 'DecoderLayer'))]))"
    log = tmp_path / "log"
    serves = worker.serves
    assert worker.run(script(tmp_path, count), [], log, serves) == 0
    assert json.loads(log.read_text().splitlines()[-1]) == []


def test_no_run_stays_claimed(worker, answering_config, tmp_path):
    do(worker, job(answering_config, tmp_path / "runs", "train.max_steps=2", "train.eval_every=2"))
    code = "import json, os; print(json.dumps([os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')"
    code += " if os.path.exists(f'/proc/self/fd/{n}')]))"
    log = tmp_path / "log"
    assert worker.run(script(tmp_path, code), [], log, worker.serves) == 0
    assert not [path for path in json.loads(log.read_text().splitlines()[-1]) if "config.yaml" in path]


def test_it_needs_no_repository_on_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worker = Worker(None)
    assert worker.run(str(ROOT / "common" / "words.py"), ["variable", "MODLE", "MODEL"], tmp_path / "log", "") == 0
    worker.end()
    assert "MODEL" in (tmp_path / "log").read_text()
