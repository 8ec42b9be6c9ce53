"""The stacks that are compared get the same questions, and one that cannot run says why."""

import json
import subprocess
import sys

from benchmarks import peers, train_throughput
from common.config import load
from tests.conftest import ROOT

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.fixture
def job(tiny_config, tmp_path):
    config = load(str(tiny_config), ["train.questions_per_step=8"])
    args = train_throughput.parser().parse_args(["--steps", "2", "--warmup", "1", "--questions", "12"])
    return {
        **train_throughput.job_of(config, args, tmp_path), "budgets": [1e6], "search": [], "timed": {"1e6": 4},
    }  # fmt: skip


def test_without_a_model_the_machine_decides_and_overrides_stay_overrides():
    on_gpu = train_throughput.parse(["base.random_weights=true", "--rounds", "1"], gpu=True)
    assert (on_gpu.model, on_gpu.overrides) == ("qlora7b", ["base.random_weights=true"])
    assert (on_gpu.budgets, on_gpu.rounds, on_gpu.whole_process) == ([8, 24], 1, False)
    on_cpu = train_throughput.parse(["seed=1"], gpu=False)
    assert (on_cpu.model, on_cpu.overrides[-1]) == ("smollm2-qlora", "seed=1")
    assert (on_cpu.systems, on_cpu.whole_process) == (["ours", "hf"], True)
    named = train_throughput.parse(["tiny.yaml", "seed=1"], gpu=True)
    assert (named.model, named.overrides, named.budgets) == ("tiny.yaml", ["seed=1"], None)


def test_every_batch_size_sees_the_same_lengths(job):
    mean = {b: sum(len(r["input_ids"]) for r in peers.rows_of(job, b, 5)) / (5 * b) for b in (1, 4, 8)}
    assert max(mean.values()) <= 1.05 * min(mean.values())


def test_peers_get_the_questions_of_our_first_steps_with_loss_on_the_answers(job, tiny_base):
    rows = peers.rows_of(job, batch=4, steps=5)
    assert len(job["rows"]) == 3 * 8
    assert len(rows) == 20
    ours = {tuple(ids): n for ids, n in job["rows"]}
    for row in rows:
        n = ours[tuple(row["input_ids"])]
        assert row["labels"] == [-100] * n + row["input_ids"][n:]
        assert row["input_ids"][-1] == 1  # EOS
    lengths = [[len(row["input_ids"]) for row in rows[i : i + 4]] for i in range(0, 20, 4)]
    spread = max(map(max, lengths)) - min(map(min, lengths))
    assert sum(max(batch) - min(batch) for batch in lengths) <= spread  # sorted, so little is padding


def test_the_plain_loop_learns_and_is_timed(job, tiny_base):
    peer = peers.HfLoop({**job, "model": str(tiny_base), "lr": 1e-2})
    before = [w.detach().clone() for w in peer.weights]
    found = peers.measure(torch, peer, job)["timed"]["1e6"]
    assert any(not torch.equal(a, b) for a, b in zip(before, peer.weights, strict=True))
    assert (found["batch"], found["questions"]) == (4, (peers.WARMUP_STEPS + peers.LEAST_STEPS) * 4)
    assert found["questions_per_s"] > 0


def test_a_peer_that_is_not_there_says_so(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", None)
    (tmp_path / "job.json").write_text(json.dumps(job))
    peers.main("unsloth", str(tmp_path / "job.json"))
    assert "unsloth" in json.loads(capsys.readouterr().out)["failed"]


def test_a_budget_at_which_ours_fails_is_a_row_and_not_the_end(tmp_path, monkeypatch):
    args = train_throughput.parse(["tiny.yaml"], gpu=True)
    failed = subprocess.CompletedProcess([], 2, stdout="", stderr="one line\ntoo little memory\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    (row,) = train_throughput.one("ours", {"budgets": [8.0]}, args, tmp_path)
    assert (row["budget"], row["failed"]) == (8.0, "too little memory")


def test_flops_are_those_of_the_layers_matrices(tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    assert train_throughput.flops_per_token(str(tiny_base), recomputed=0.0) == 4 * matrices
    assert train_throughput.flops_per_token(str(tiny_base), recomputed=1.0) == 6 * matrices
    seven = train_throughput.flops_per_token(str(ROOT / "configs" / "shapes" / "llama-2-7b"), 0.0) / 4
    assert seven == pytest.approx(6.48e9, rel=0.01)
    assert AutoConfig.from_pretrained(tiny_base).num_key_value_heads == 2  # grouped heads are counted right above
