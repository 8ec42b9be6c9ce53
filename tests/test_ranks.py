"""Two processes train and evaluate as one does. They are real ones, over gloo."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import eval_loop
import train_loop
from common import checkpoint, ranks
from common import launch as launch_module
from common.errors import UserError
from tests.conftest import ROOT
from tests.test_train_loop import metrics

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


@contextlib.contextmanager
def started(*command: str) -> Iterator[subprocess.Popen]:
    """A launcher of two processes, which is ended with what it has launched."""
    words = [sys.executable, "-m", "common.launch", "2", *command]
    how = {"cwd": ROOT, "env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}, "text": True}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how) as process:
        try:
            yield process
        finally:
            process.terminate()


def seen(launcher: subprocess.Popen, runs: Path, text: str) -> Path:
    """The folder of the one run, once its metrics hold `text`."""
    end = time.monotonic() + 60
    while not (found := [f for f in runs.glob("*/metrics.jsonl") if text in f.read_text()]):
        assert launcher.poll() is None, launcher.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)
    return found[0].parent


def test_two_processes_do_as_one_does_save_when_told_to_end_and_one_goes_on(tiny_config, tmp_path, capsys):
    asked = [str(tiny_config), "lora=null"]
    arguments = [str(tiny_config), "train.epochs=10", "train.eval_every=8", "train.pack_tokens=100"]
    eval_loop.main([*asked, f"runs={tmp_path / 'eval one'}"])
    train_loop.main([*arguments, f"runs={tmp_path / 'one'}"])
    script = tmp_path / "both.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport eval_loop, train_loop\n"
        "eval_loop.main(sys.argv[1:4])\ntrain_loop.main(sys.argv[4:])\n"
    )
    words = [*asked, f"runs={tmp_path / 'eval two'}", *arguments, f"runs={tmp_path / 'two'}"]
    with started(str(script), *words) as launcher:
        two = seen(launcher, tmp_path / "two", '"em"')
        launcher.send_signal(signal.SIGTERM)
        out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 143, err
    assert out.count(" steps of ~8 questions") == 1  # only the first rank speaks
    assert "on 2 × CPU" in out

    # every question was answered once, as one process does
    runs = [next((tmp_path / f"eval {n}").iterdir()) for n in ("one", "two")]
    assert len({(run / "predictions.json").read_text() for run in runs}) == 1
    assert json.loads((runs[1] / "record.json").read_text())["result"]["processes"] == 2

    # its steps were those of one, and one goes on
    checkpoint.verify(two / "last")
    capsys.readouterr()
    train_loop.main([*arguments, f"runs={tmp_path / 'two'}"])
    said = capsys.readouterr().out
    assert "going on after step" in said
    assert 0 < json.loads(said.splitlines()[-1])["idle_share"] < 1
    ours, theirs = metrics(two), metrics(next((tmp_path / "one").iterdir()))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if "loss" in a:
            assert a["questions"] == b["questions"]
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        else:
            assert a == b


def test_all_end_when_one_is_killed_and_the_last_line_says_of_what(tiny_config, tmp_path):
    with started("train_loop.py", str(tiny_config), "train.epochs=5000", "train.eval_every=5000") as launcher:
        seen(launcher, tmp_path / "runs", '"loss"')
        ids = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
        assert len(ids) == 2
        os.kill(int(ids[-1]), signal.SIGKILL)
        _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 137
    assert err.endswith("rank 1 of 2 ended by SIGKILL, and the others with it\n")


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
    with pytest.raises(UserError, match=r"PROCESSES=.*how many processes, 1 or more"):
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
