"""The stacks that are compared get the same questions, and one that cannot run says why."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import decode_peers, decode_throughput, peers, scaling, train_throughput
from common.config import load
from common.errors import UserError
from tests.conftest import ROOT

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.fixture
def job(tiny_config, tmp_path):
    config = load(str(tiny_config), ["train.questions_per_step=8"])
    args = train_throughput.parser().parse_args(["--steps", "2", "--warmup", "1", "--questions", "12"])
    return {**train_throughput.job_of(config, args, tmp_path), "budgets": [1e6], "search": [], "timed": {"1e6": 4}}


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
    found = peers.measure(peer, job)["timed"]["1e6"]
    assert any(not torch.equal(a, b) for a, b in zip(before, peer.weights, strict=True))
    assert (found["batch"], found["questions"]) == (4, (peers.WARMUP_STEPS + peers.LEAST_STEPS) * 4)
    assert found["questions_per_s"] > 0


def test_a_peer_that_is_not_there_says_so(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", None)
    (tmp_path / "job.json").write_text(json.dumps(job))
    peers.main("unsloth", str(tmp_path / "job.json"))
    assert "unsloth" in json.loads(capsys.readouterr().out)["failed"]


def test_cards_are_of_a_gpu_and_those_that_are_larger_than_it_are_left_out(monkeypatch, capsys):
    with pytest.raises(UserError, match="--cards: no CUDA device"):
        train_throughput.parse(["tiny.yaml", "--cards", "8"], gpu=False)
    monkeypatch.setattr(train_throughput.torch.cuda, "mem_get_info", lambda: (12 * 2**30, 0))
    assert train_throughput.parse(["tiny.yaml", "--cards", "8", "24", "12"], gpu=True).cards == [8, 12]
    assert capsys.readouterr().err == "left out: a card of 24 GB, for this GPU has 12.0 GiB free\n"
    with pytest.raises(UserError, match="--cards: none of them is smaller"):
        train_throughput.parse(["tiny.yaml", "--cards", "24"], gpu=True)
    with pytest.raises(UserError, match="leave --budgets out"):
        train_throughput.parse(["tiny.yaml", "--cards", "8", "--budgets", "8"], gpu=True)


def test_on_a_card_ours_takes_what_is_free_and_rows_share_nothing(tmp_path, monkeypatch):
    commands: list[list[str]] = []
    failed = subprocess.CompletedProcess([], 2, stdout="", stderr="enough\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or failed)
    monkeypatch.setattr(train_throughput.torch.cuda, "mem_get_info", lambda: (12 * 2**30, 0))
    for words in (["--cards", "8"], []):
        args = train_throughput.parse(["tiny.yaml", *words], gpu=True)
        for system in ("ours", "rows"):
            (row,) = train_throughput.one(system, {"budgets": [7.6]}, args, tmp_path)
            assert (row["system"], row["budget"]) == (system, 7.6)
    budget, rows = "train.memory_budget_gib=7.6", "train.share_prefixes=false"
    assert [(budget in c, rows in c) for c in commands] == [(False, False), (False, True), (True, False), (True, True)]


def test_a_budget_at_which_ours_fails_is_a_row_and_not_the_end(tmp_path, monkeypatch):
    args = train_throughput.parse(["tiny.yaml"], gpu=True)
    failed = subprocess.CompletedProcess([], 2, stdout="", stderr="one line\ntoo little memory\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    (row,) = train_throughput.one("ours", {"budgets": [8.0]}, args, tmp_path)
    assert (row["budget"], row["failed"]) == (8.0, "too little memory")


@pytest.mark.parametrize("kinds", [["natural"], ["a", "b"]])
def test_decoding_stacks_answer_the_same_questions_alike(tiny_config, dev_file, tmp_path, kinds, capsys):
    """Ours and `generate`, in this process: answers equal where the model decides, and scripts are followed by both."""
    args = decode_throughput.parser(gpu=False).parse_args(
        ["tiny.yaml", "--questions", "9", "--alone", "4", "--batches", "1", "3"]
    )
    config = load(str(tiny_config), ["lora=null", "base.quant=nf4", "window.context=416"])
    job, examples = decode_throughput.job_of(config, args, kinds, tmp_path)
    assert len(job["questions"]) == len(examples) == 9
    assert all(q["gold"][-1] == job["eos"] for q in job["questions"])
    ours, theirs = decode_peers.ours(job), decode_peers.hf(job)
    for found, batches in ((ours, [None, 1]), (theirs, [1, 3])):
        assert {(r["kind"], r["batch"]) for r in found["rows"]} == {(k, b) for k in kinds for b in batches}
        assert all(r["questions_per_s"] > 0 for r in found["rows"])
        assert all(("p95_ms" in r) == (r["batch"] == 1) for r in found["rows"])
    both = decode_throughput.equal(examples, {"ours": ours, "hf": theirs}, config)
    if kinds == ["natural"]:
        assert (both["n"], both["same"], both["same_alone"], both["em"]) == (4, 4, 4, both["em_generate"])
    else:
        assert both is None
        (passes,) = {r["passes"] for r in ours["rows"] if (r["kind"], r["batch"]) == ("b", 1)}
        assert passes == 8, "no draft of such a script is right"


def test_the_decoding_table_has_ratios_and_says_why_a_stack_failed(tiny_config, monkeypatch, capsys):
    def row(kind, batch, speed, **more):
        return {
            "kind": kind,
            "batch": batch,
            "questions": 9,
            "seconds": 1,
            "questions_per_s": speed,
            "allocated_gib": 1.0,
            **more,
        }

    found = {
        "ours": {"rows": [row("natural", None, 80.0), row("natural", 1, 20.0, p50_ms=40, p95_ms=50)]},
        "hf": {"rows": [row("natural", 1, 2.0, p50_ms=400, p95_ms=600), row("natural", 16, 10.0)]},
        "vllm": {"failed": "ImportError: no vllm"},
    }
    monkeypatch.setattr(decode_throughput, "last_line", lambda script, stack, job, folder: found[stack])
    decode_throughput.main([str(tiny_config), "lora=null", "--systems", "ours", "hf", "vllm"])
    out = capsys.readouterr().out
    rows = {(r["system"], r.get("batch")): r for r in json.loads(out.splitlines()[-1])["rows"]}
    assert rows["hf", 1]["ours_is_questions_per_s"] == 40
    assert rows["hf", 16]["ours_is_questions_per_s"] == 8
    assert rows["hf", 1]["ours_is_p95_ms"] == 12
    assert "40.0 ×" in out
    assert "no vllm" in out


def test_flops_are_those_of_the_layers_matrices(tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    assert train_throughput.flops_per_token(str(tiny_base), recomputed=0.0) == 4 * matrices
    assert train_throughput.flops_per_token(str(tiny_base), recomputed=1.0) == 6 * matrices
    seven = train_throughput.flops_per_token(str(ROOT / "configs" / "shapes" / "llama-2-7b"), 0.0) / 4
    assert seven == pytest.approx(6.48e9, rel=0.01)
    assert AutoConfig.from_pretrained(tiny_base).num_key_value_heads == 2  # grouped heads are counted right above


def pretended(n, script, model, *words):
    """A run of `n` processes, as `scaling.ended` returns it, without running anything."""
    runs = Path(next(word for word in words if word.startswith("runs=")).removeprefix("runs="))
    run = runs / script
    run.mkdir(parents=True, exist_ok=True)
    loss = 2.0 if n == 1 else 2.004
    steps = [{"loss": loss, "questions": 8, "seconds": 9 + i / n} for i in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in [*steps, {"em": 1}]))
    same = n == 1 or "eval.parts=4" in words
    (run / "predictions.json").write_text(json.dumps({"a": "x", "b": "y" if same else "z"}))
    return {"run": str(run), "questions_per_s": 10.0 * n**0.5, "idle_share": 0.01 * n}


def test_scaling_is_measured_against_the_fewest_processes_and_what_differs_is_counted(tiny_config, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "ended", pretended)
    scaling.main([str(tiny_config), "--processes", "1", "2", "--questions", "8", "--parts", "4", "--rounds", "2"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[-6:] == [
        "| training, 8 questions a step | 1 | 8 | 100.0% | 1.0% | 0.00% of a loss |",
        "| training, 8 questions a step | 2 | 16 | 100.0% | 2.0% | 0.20% of a loss |",
        "| evaluation | 1 | 10 | 100.0% |  | 0 of 2 answers |",
        "| evaluation | 2 | 14.14 | 70.7% |  | 1 of 2 answers |",
        "| evaluation, eval.parts=4 | 1 | 10 | 100.0% |  | 0 of 2 answers |",
        "| evaluation, eval.parts=4 | 2 | 14.14 | 70.7% |  | 0 of 2 answers |",
    ]
    assert json.loads(last)["rows"][1]["losses_differ"] == pytest.approx(0.002)


def test_what_was_measured_before_a_run_failed_is_kept(tiny_config, tmp_path, monkeypatch):
    def ended(n, script, *words):
        if n == 2 and script == "eval_loop.py" and "eval.parts=4" in words:
            raise UserError("the last run failed")
        return pretended(n, script, *words)

    monkeypatch.setattr(scaling, "ended", ended)
    kept = tmp_path / "rows.json"
    with pytest.raises(UserError, match="the last run failed"):
        scaling.main(
            [str(tiny_config), "--processes", "1", "2", "--questions", "8", "--parts", "4", "--out", str(kept)]
        )
    rows = [(row["work"], row["processes"]) for row in json.loads(kept.read_text())]
    assert ("evaluation", 2) in rows
    assert ("evaluation, eval.parts=4", 2) not in rows


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "1"], "--steps 2"),
        (["--processes", "0"], "must be 1 or more"),
        (["lora=null"], "with a lora section"),
        (["adapter=here"], "no adapter"),
    ],
)
def test_scaling_says_what_it_cannot_measure(tiny_config, words, said):
    with pytest.raises(UserError, match=said):
        scaling.main([str(tiny_config), *words])


def test_a_run_that_fails_is_what_scaling_ends_with(monkeypatch):
    said = "error: a reason\nrank 1 of 2 ended with 2, and the others with it\n"
    failed = subprocess.CompletedProcess([], 2, stdout="", stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"common.runs.launch 2 eval_loop.py tiny: error: a reason$"):
        scaling.ended(2, "eval_loop.py", "tiny")
