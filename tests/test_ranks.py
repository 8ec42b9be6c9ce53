"""Two processes train and evaluate as one does. They are real ones, over gloo."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import eval_loop
import train_loop
from common import checkpoint, ranks
from common import launch as launch_module
from common.errors import UserError
from tests.conftest import ROOT
from tests.test_train_loop import interrupt_at_evaluation, last_json, metrics

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip
OURS = ("common.launch", "2")


@contextlib.contextmanager
def started(launcher: tuple[str, ...], *command: str) -> Iterator[subprocess.Popen]:
    """A launcher, which is ended with what it has launched."""
    words = [sys.executable, "-m", *launcher, *command]
    how = {"cwd": ROOT, "env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}, "text": True}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how) as process:
        try:
            yield process
        finally:
            process.terminate()


def launch(launcher: tuple[str, ...], *command: str) -> list[str]:
    """What it printed."""
    with started(launcher, *command) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.splitlines()


@pytest.fixture
def arguments(tiny_config) -> list[str]:
    return [str(tiny_config), "early_stop.patience=2", "train.epochs=4", "train.pack_tokens=100"]


def test_two_processes_go_on_with_the_run_of_one_take_its_steps_and_stop_together(
    arguments, tmp_path, monkeypatch, capsys
):
    train_loop.main([*arguments, f"runs={tmp_path / 'one'}"])
    alone = last_json(capsys)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at_evaluation(patch, 2)
        train_loop.main([*arguments, f"runs={tmp_path / 'two'}"])
    said = launch(ACCELERATE, "train_loop.py", *arguments, f"runs={tmp_path / 'two'}")
    (line,) = [line for line in said if line.startswith("{")]  # only the first rank speaks
    shared = json.loads(line)
    assert (alone["processes"], shared["processes"]) == (1, 2)
    assert shared["stopped_early"]
    assert 0 < shared["idle_share"] < 1
    same = ("em", "f1", "n", "steps", "best_step", "stopped_early", "questions")
    assert {key: shared[key] for key in same} == {key: alone[key] for key in same}
    (one,), (two,) = ((tmp_path / name).iterdir() for name in ("one", "two"))
    checkpoint.verify(two / "last")
    ours, theirs = metrics(two), metrics(one)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if "loss" in a:
            assert a["questions"] == b["questions"]
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        else:
            assert a == b


def test_two_processes_answer_every_question_as_one_does(tiny_config, tmp_path, capsys):
    eval_loop.main([str(tiny_config), "lora=null", f"runs={tmp_path / 'one'}"])
    said = launch(OURS, "eval_loop.py", str(tiny_config), "lora=null", f"runs={tmp_path / 'two'}")
    one, two = (json.loads((next((tmp_path / n).iterdir()) / "predictions.json").read_text()) for n in ("one", "two"))
    assert one == two
    assert json.loads(said[-1])["processes"] == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, 137), (signal.SIGTERM, 143)])
def test_all_end_when_one_is_killed_and_all_save_when_the_launcher_is_told_to_end(arguments, tmp_path, number, code):
    began = time.monotonic()
    with started(OURS, "train_loop.py", *arguments, "train.epochs=5000", "train.eval_every=5000") as launcher:
        while not (lines := list(tmp_path.glob("runs/*/metrics.jsonl"))) or not lines[0].stat().st_size:
            assert launcher.poll() is None, launcher.communicate()[1]
            assert time.monotonic() < began + 60
            time.sleep(0.1)
        ids = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
        assert len(ids) == 2
        os.kill(int(ids[-1]) if number == signal.SIGKILL else launcher.pid, number)
        _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == code
    if number == signal.SIGKILL:
        assert "rank 1 of 2 ended by SIGKILL, and the others with it" in err
    else:
        checkpoint.verify(lines[0].parent / "last")


@pytest.mark.parametrize(
    ("ended", "said", "code"),
    [
        ({0: (2, 5), 1: (-9, 5)}, "rank 1 of 2 ended by SIGKILL", 137),  # seen at once: the first died of the other
        ({0: (2, 5), 1: (-15, 5)}, "rank 0 of 2 ended with 2", 2),  # the launcher's own SIGTERM
        ({0: (1, 6), 1: (2, 5)}, "rank 1 of 2 ended with 2", 2),
        ({0: (-99, 5)}, "rank 0 of 2 ended by signal 99", 227),
    ],
)
def test_what_a_launch_died_of_is_one_line(monkeypatch, capsys, ended, said, code):
    def failed(*_):
        failures = {rank: ProcessFailure(rank, rank, exitcode, "") for rank, (exitcode, _) in ended.items()}
        for rank, failure in failures.items():
            failure.timestamp = ended[rank][1]
        raise launch_module.ChildFailedError("train_loop.py", failures)

    monkeypatch.setattr(launch_module.run, "run", failed)
    with pytest.raises(SystemExit) as stop:
        launch_module.main(["2", "train_loop.py"])
    assert stop.value.code == code
    assert capsys.readouterr().err == f"{said}, and the others with it\n"


@pytest.mark.parametrize("words", [[], ["2"], ["0", "x.py"], ["x", "y.py"], ["²", "y.py"]])
def test_a_launch_of_nothing_says_what_it_wants(words):
    with pytest.raises(UserError, match="wants how many processes"):
        launch_module.main(words)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were asked for, and this machine has 1 GPUs"):
        ranks.join()


@pytest.mark.parametrize("wrong", [None, UserError("what is wrong")])
@pytest.mark.parametrize("first", [True, False])
def test_a_machines_first_rank_goes_first_and_nobody_waits_for_it_for_ever(monkeypatch, first, wrong):
    done: list[str] = []
    state = SimpleNamespace(is_local_main_process=first, wait_for_everyone=lambda: done.append("met"))
    monkeypatch.setattr(ranks, "PartialState", lambda: state)
    with contextlib.suppress(UserError), ranks.local_first():
        done.append("did")
        if wrong:
            raise wrong
    assert done == (["did", "met"] if first else ["met", "did"])


def test_a_launcher_that_starts_one_process_in_place_of_two_is_noticed(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"):  # as `accelerate launch --num_processes 2 --cpu` does
        monkeypatch.setenv(name, "set")
    with pytest.raises(UserError, match="started one process, not several; add --multi_gpu"):
        ranks.join()


def test_one_process_keeps_its_gradients_and_numbers():
    ranks.join()
    weight = torch.nn.Parameter(torch.ones(3))
    weight.sum().backward()
    assert ranks.sum_gradients([weight], torch.tensor(1.5), 2).tolist() == [1.5, 2]
    assert weight.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize("turns", ["abab", "aaaab", "abbbbbb", "b"])
def test_whoever_asks_takes_the_next_item_and_each_item_is_of_one(monkeypatch, turns):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    both = {name: ranks.take("vwxyz", "a round") for name in "ab"}
    taken = [item for name in turns for item in [next(both[name], None)] if item]
    rest = [*both["b"], *both["a"]]
    assert "".join(taken + rest) == "vwxyz"
    assert "".join(ranks.take("vwxyz", "another")) == "vwxyz"


def test_single_queries_are_not_timed_by_several_processes(tiny_config, monkeypatch):
    import bench_latency

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="timed by one process"):
        bench_latency.main([str(tiny_config)])
