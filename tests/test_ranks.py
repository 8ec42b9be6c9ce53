"""Two processes train and evaluate as one does. They are real ones, over gloo."""

import json
import os
import subprocess
import sys

import eval_loop
import train_loop
from common import checkpoint, ranks
from common.errors import UserError
from tests.conftest import ROOT
from tests.test_train_loop import last_json, metrics

import pytest
import torch

LAUNCH = ("-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")


def launch(*command: str, several: str = "--multi_gpu") -> subprocess.CompletedProcess:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    port = ("--main_process_port", "0")
    return subprocess.run(
        [sys.executable, *LAUNCH, "--dynamo_backend", "no", several, *port, *command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def arguments(tiny_config) -> list[str]:
    return [str(tiny_config), "early_stop.patience=2", "train.epochs=4", "train.pack_tokens=100"]


def test_two_processes_take_the_steps_of_one_and_stop_together(arguments, tmp_path, capsys):
    train_loop.main([*arguments, f"runs={tmp_path / 'one'}"])
    alone = last_json(capsys)
    done = launch("train_loop.py", *arguments, f"runs={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]  # only the first rank speaks
    shared = json.loads(line)
    assert (alone["processes"], shared["processes"]) == (1, 2)
    assert shared["stopped_early"]
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
    done = launch("eval_loop.py", str(tiny_config), "lora=null", f"runs={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((next((tmp_path / n).iterdir()) / "predictions.json").read_text()) for n in ("one", "two"))
    assert one == two
    assert json.loads(done.stdout.splitlines()[-1])["processes"] == 2


def test_a_launcher_that_starts_one_process_in_place_of_two_is_noticed(tiny_config):
    done = launch("eval_loop.py", str(tiny_config), "lora=null", several="--cpu")
    assert "error: accelerate launch started one process, not several; add --multi_gpu" in done.stderr


def test_one_process_keeps_its_gradients_and_numbers():
    ranks.join()
    weight = torch.nn.Parameter(torch.ones(3))
    weight.sum().backward()
    assert ranks.sum_gradients([weight], 1.5, 2) == [1.5, 2]
    assert weight.grad.tolist() == [1, 1, 1]


def test_single_queries_are_not_timed_by_several_processes(tiny_config, monkeypatch):
    import bench_latency

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="timed by one process"):
        bench_latency.main([str(tiny_config)])
