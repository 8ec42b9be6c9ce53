"""The loop: it learns, stops, saves, goes on where it was, and refuses what would spoil a run."""

import contextlib
import io
import itertools
import json
import math
import os
import random
import resource
import signal
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import eval_loop
import train_loop
from common.config import load
from common.data import plan, squad
from common.data.trees import Branch, Trees, build_trees
from common.decode import plain, predict
from common.decode.answers import stop_tokens
from common.errors import UserError
from common.files import SUMS, sha256
from common.model.adapter import add_lora, load_weights
from common.model.identity import identify
from common.model.load import load_base, load_tokenizer, tokenizer_sha256
from common.model.pack import build_pack
from common.runs import checkpoint, gauges, ranks
from common.train import engine
from common.train.early_stopping import Evaluation
from tests.conftest import answering_yaml, same, squad_file
from tests.model.test_pack import rows_loss

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def only_run(tmp_path, pattern: str = "*-train-*"):
    (run,) = (tmp_path / "runs").glob(pattern)
    return run


def interrupt_at_evaluation(monkeypatch, n: int) -> None:
    """As a power cut would: the n-th evaluation never ends."""
    calls = []
    answer_trees = predict.answer_trees

    def cut(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt
        return answer_trees(*args, **kwargs)

    monkeypatch.setattr(predict, "answer_trees", cut)


def test_a_run_learns_and_leaves_a_whole_folder(tiny_config, tmp_path, capsys):
    train_loop.main([str(tiny_config), "train.epochs=8"])
    result, run = last_json(capsys), only_run(tmp_path)
    losses = [row["loss"] for row in metrics(run) if "loss" in row]
    assert len(losses) == 32  # 32 questions at 8 a step, 8 epochs
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    evaluations = [row for row in metrics(run) if "em" in row]
    assert [row["step"] for row in evaluations] == list(range(2, 33, 2))
    assert result["em"] == max(row["em"] for row in evaluations)
    names = {path.name for path in run.iterdir()}
    assert names == {"config.yaml", "record.json", "metrics.jsonl", "predictions.json", "best", "last"}
    for folder in ("best", "last"):
        checkpoint.verify(run / folder)
        assert (run / folder / "adapter_config.json").exists()
    assert json.loads((run / "record.json").read_text())["result"] == result


def test_evaluation_scores_the_kept_adapter_as_training_did(tiny_config, tmp_path, capsys):
    train_loop.main([str(tiny_config)])
    trained = last_json(capsys)
    eval_loop.main([str(tiny_config)])
    evaluated = last_json(capsys)
    assert (evaluated["em"], evaluated["f1"], evaluated["n"]) == (trained["em"], trained["f1"], trained["n"])
    assert evaluated["adapter"] == f"{trained['run']}/best"
    kept = json.loads((only_run(tmp_path) / "predictions.json").read_text())
    assert json.loads((only_run(tmp_path, "*-eval-*") / "predictions.json").read_text()) == kept


@pytest.mark.parametrize(
    "how",
    [
        "lora.dropout=0.1",
        "lora.dropout=0.5 train.fused=false",
        "train.fused=false",
        "train.fused=true",
        "train.average=0.7",
        "seed=1",
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_end(tiny_config, tmp_path, monkeypatch, how):
    often = how == "seed=1"  # saved after every step, not only with evaluations
    monkeypatch.setattr(train_loop, "SAVE_SECONDS", -1 if often else 600)
    arguments = [str(tiny_config), *how.split(), "train.epochs=2"]
    train_loop.main([*arguments, f"runs={tmp_path / 'whole'}"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at_evaluation(patch, 3)  # steps 5 and 6 are done, and lost
        train_loop.main([*arguments, f"runs={tmp_path / 'cut'}"])
    (cut,) = (tmp_path / "cut").iterdir()
    assert not (cut / "record.json").exists()
    assert checkpoint.load_state(cut / "last").step == (5 if often else 4)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # the cut fell in the middle of a line
    (cut / "best").rename(cut / "best.old")  # and between the renames that replace a folder
    train_loop.main([*arguments, f"runs={tmp_path / 'cut'}"])
    (whole,) = (tmp_path / "whole").iterdir()
    assert (cut / "record.json").exists()
    assert without_clock(metrics(cut)) == without_clock(metrics(whole))
    for kept in ("last", "best"):
        ours, theirs = (load_file(run / kept / "adapter_model.safetensors") for run in (cut, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("fused", ["train.fused=false", "train.fused=true"])
def test_shared_prefixes_train_as_rows_do_with_fewer_tokens(tiny_config, tmp_path, fused):
    for name in ("true", "false"):
        train_loop.main([str(tiny_config), fused, f"train.share_prefixes={name}", f"runs={tmp_path / name}"])
    shared, rows = (metrics(next((tmp_path / name).iterdir())) for name in ("true", "false"))
    steps = [(a, b) for a, b in zip(shared, rows, strict=True) if "loss" in a]
    assert all(a["questions"] == b["questions"] for a, b in steps)
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-3) for a, b in steps)
    assert sum(b["tokens"] for _, b in steps) > 2 * sum(a["tokens"] for a, _ in steps)


@pytest.mark.parametrize("mean", ["token", "question"])
def test_the_loss_is_the_mean_that_was_asked_for(tiny_config, tmp_path, mean):
    train_loop.main([str(tiny_config), f"train.loss={mean}", "train.max_steps=1", "train.eval_every=1"])
    config = load(str(tiny_config))
    model = add_lora(load_base(config.base, torch.device("cpu")), config.lora, config.seed)
    examples = squad.load(config.data, "train").examples
    built = build_trees(examples, same(load_tokenizer(config.base.path)), config.window, train=True)
    trees = plan.bounded(built.trees, config.train.questions_per_step)
    rows = [row for tree in plan.epoch(trees, 0, 0, 8)[0] for row in tree.split(max_questions=1)]
    losses = [rows_loss(model, [row]).item() for row in rows]
    tokens = [len(row.branches[0].answer_ids) for row in rows]
    assert len(set(tokens)) > 1
    expected = {
        "token": sum(losses) / sum(tokens),
        "question": statistics.mean(a / b for a, b in zip(losses, tokens, strict=True)),
    }
    assert expected["token"] != pytest.approx(expected["question"], rel=1e-3)
    assert metrics(only_run(tmp_path))[0]["loss"] == pytest.approx(expected[mean], rel=1e-4)


@pytest.mark.parametrize("fused", ["train.fused=false", "train.fused=true"])
def test_smoothed_labels_give_all_tokens_their_share(tiny_config, tmp_path, fused):
    few = [str(tiny_config), fused, "train.max_steps=1", "train.eval_every=1"]
    for share in (0, 0.2):
        train_loop.main([*few, f"train.label_smoothing={share}", f"runs={tmp_path / str(share)}"])
    sharp, smooth = (metrics(next((tmp_path / str(share)).iterdir()))[0]["loss"] for share in (0, 0.2))
    assert smooth > sharp  # against all tokens alike the mean is higher than against the right one


@pytest.mark.parametrize("fused", ["train.fused=false", "train.fused=true"])
def test_the_running_mean_is_kept_while_training_goes_on_with_the_last(tiny_config, tmp_path, fused):
    few = [str(tiny_config), fused, "train.max_steps=2", "train.eval_every=2"]
    train_loop.main([*few, f"runs={tmp_path / 'plain'}"])
    train_loop.main([*few, "train.average=0.9", f"runs={tmp_path / 'mean'}"])
    (plain,), (mean,) = ((tmp_path / name).iterdir() for name in ("plain", "mean"))
    last, same, kept = (
        load_file(folder / "adapter_model.safetensors") for folder in (plain / "last", mean / "last", mean / "best")
    )
    assert all(torch.equal(last[key], same[key]) for key in last)
    b = [key for key in last if "lora_B" in key]  # from zero
    assert all(0 < kept[key].norm() < last[key].norm() for key in b)


@pytest.mark.parametrize(
    ("number", "code", "where"), [(signal.SIGTERM, 143, "step"), (signal.SIGINT, 130, "evaluation")]
)
def test_a_signal_saves_at_the_steps_end_and_the_run_goes_on(tiny_config, tmp_path, monkeypatch, number, code, where):
    arguments = [str(tiny_config), "train.pack_tokens=10000"]  # one pack a step
    train_loop.main([*arguments, f"runs={tmp_path / 'whole'}"])
    module, name, nth = (engine.F, "cross_entropy", 3) if where == "step" else (predict.Decoder, "forward", 2)
    original, calls = getattr(module, name), []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(module, name, signalled)
        train_loop.main([*arguments, f"runs={tmp_path / 'cut'}"])
    assert stop.value.code == code
    (cut,) = (tmp_path / "cut").iterdir()
    state = checkpoint.load_state(cut / "last")
    assert (state.step, state.evaluated) == ((3, 2) if where == "step" else (2, 0))
    assert not (cut / "record.json").exists()
    train_loop.main([*arguments, f"runs={tmp_path / 'cut'}"])
    assert without_clock(metrics(cut)) == without_clock(metrics(next((tmp_path / "whole").iterdir())))


@pytest.mark.parametrize(("fused", "knob"), [("true", "memory_budget_gib"), ("false", "gradient_checkpointing=true")])
def test_running_out_of_memory_names_the_knob_to_turn(tiny_config, monkeypatch, fused, knob):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.F, "cross_entropy", full)
        with pytest.raises(UserError, match=rf"lower train\.pack_tokens \(now 256\), or set train\.{knob}"):
            train_loop.main([str(tiny_config), f"train.fused={fused}"])
    monkeypatch.setattr(predict.Decoder, "forward", full)
    with pytest.raises(UserError, match=r"^out of GPU memory; free the GPU$"):
        train_loop.main([str(tiny_config)])
    with pytest.raises(UserError, match=r"lower eval\.memory_budget_gib or, in a training, .* \(now 12\)"):
        train_loop.main([str(tiny_config), "train.memory_budget_gib=null"])
    monkeypatch.setattr(plain, "greedy", full)
    with pytest.raises(UserError, match=r"lower eval\.pass_tokens \(now 8192\)"):
        train_loop.main([str(tiny_config), "eval.engine=plain"])


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tiny_config, tmp_path, monkeypatch):
    """The limit on a file's size stands for the disk: the writes are real, and really fail."""
    arguments = [str(tiny_config), "lora.rank=32", "train.fused=false"]  # small tensors have state of 32 bits
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at_evaluation(patch, 2)
        train_loop.main(arguments)
    run = only_run(tmp_path)
    before = (run / "last" / SUMS).read_text()
    adapter_bytes = (run / "last" / "adapter_model.safetensors").stat().st_size
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (adapter_bytes // 2, adapter_bytes + 100):  # no room for the adapter; none for the optimizer
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        try:
            with pytest.raises(UserError, match=r"could not be saved .*make room"):
                train_loop.main(arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        checkpoint.verify(run / "last")
        assert (run / "last" / SUMS).read_text() == before
        assert not [path for path in run.iterdir() if path.suffix in (".partial", ".old")]
    train_loop.main(arguments)
    assert (run / "record.json").exists()


def test_the_record_says_what_best_has_where_only_best_was_saved(answering_config, tmp_path, monkeypatch, capsys):
    arguments = [str(answering_config), "train.eval_every=4"]
    save, saved = checkpoint.save, []

    def full_disk(folder, *rest):
        saved.append(folder.name)
        if len(saved) == 4:  # best, last, best, and then
            raise UserError("full")
        save(folder, *rest)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="full"):
        patch.setattr(checkpoint, "save", full_disk)
        train_loop.main(arguments)
    assert saved == ["best", "last", "best", "last"]
    run = only_run(tmp_path)
    states = (checkpoint.load_state(run / kept) for kept in ("best", "last"))
    (best, before), (last, early) = ((state.best_em, state.best_step) for state in states)
    assert (before, early) == (8, 4)
    assert best > last
    # a GPU does not repeat itself exactly: this time nothing is learned, and the weights of step 8 are gone
    monkeypatch.setattr(train_loop, "learning_rate", lambda *args: 0.0)
    train_loop.main(arguments)
    result, kept = last_json(capsys), checkpoint.load_state(run / "best")
    assert (result["em"], result["best_step"]) == (kept.best_em, kept.best_step) == (last, 8)
    assert [row["em"] for row in metrics(run) if "em" in row] == [last] * 4


def test_evaluation_refuses_an_adapter_that_is_replaced_while_it_is_loaded(tiny_config, tmp_path, monkeypatch):
    train_loop.main([str(tiny_config), "train.epochs=1"])
    best, load_system = only_run(tmp_path) / "best", eval_loop.load_system

    def replaced(*args):
        model = load_system(*args)
        (best / "adapter_model.safetensors").write_bytes((best / "adapter_model.safetensors").read_bytes()[::-1])
        return model

    monkeypatch.setattr(eval_loop, "load_system", replaced)
    with pytest.raises(UserError, match="best: replaced while it was read"):
        eval_loop.main([str(tiny_config), "train.epochs=1"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        eval_loop.main([str(tiny_config), f"adapter={tmp_path / 'empty'}"])
    assert not list((tmp_path / "runs").glob("*-eval-*"))


def test_tensorboard_gets_what_the_metrics_file_has(tiny_config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_loop.main([str(tiny_config), "tracker=tensorboard"])
    run = only_run(tmp_path)
    events = EventAccumulator(str(run / "squad-qlora"))
    events.Reload()
    for key in ("loss", "lr", "em", "f1"):
        written = [(row["step"], row[key]) for row in metrics(run) if key in row]
        assert len(written) > 3
        assert [(e.step, e.value) for e in events.Scalars(key)] == [pytest.approx(pair, rel=1e-6) for pair in written]
    (parameters,) = (run / "squad-qlora").glob("*/hparams.yml")
    assert "lora.rank: 4" in parameters.read_text()


@pytest.mark.parametrize(("tracker", "words"), [("tensorbord", "tensorboard"), ("comet_ml", "not installed")])
def test_a_tracker_that_is_not_there_is_named(tiny_config, tmp_path, tracker, words):
    with pytest.raises(UserError, match=f"tracker={tracker}: .*{words}"):
        train_loop.main([str(tiny_config), f"tracker={tracker}"])
    assert not (tmp_path / "runs").exists()


def test_how_a_step_is_cut_into_packs_changes_nothing(tiny_config, tmp_path):
    rows = []
    for pack_tokens in (100_000, 64):
        runs = tmp_path / str(pack_tokens)
        train_loop.main([str(tiny_config), f"train.pack_tokens={pack_tokens}", "train.max_steps=1", f"runs={runs}"])
        rows += [row for row in metrics(next(runs.iterdir())) if "loss" in row]
    whole, cut = rows
    assert whole["tokens"] < cut["tokens"]  # prefixes are repeated in the split trees
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_every_epoch_runs_in_an_order_of_its_own(tiny_config, tmp_path, monkeypatch):
    packed = []
    monkeypatch.setattr(
        engine, "build_pack", lambda trees: packed.append(sorted(t.branches[0].id for t in trees)) or build_pack(trees)
    )
    train_loop.main([str(tiny_config), "seed=3", "train.epochs=3", "train.eval_every=99", "train.pack_tokens=10000"])
    config = load(str(tiny_config))
    examples = squad.load(config.data, "train").examples
    trees = build_trees(examples, same(load_tokenizer(config.base.path)), config.window, train=True).trees
    steps = [step for epoch in range(3) for step in plan.epoch(trees, 3, epoch, 8)]
    assert packed == [sorted(tree.branches[0].id for tree in step) for step in steps]
    assert packed[:4] != packed[4:8] != packed[8:]


@pytest.mark.parametrize("most", [0.01, 0.5, 1000.0])
def test_the_gradient_that_the_optimizer_gets_is_clipped_to_the_norm_that_was_asked_for(
    tiny_config, tmp_path, monkeypatch, most
):
    norms, optimizer = [], train_loop.bnb.optim.PagedAdamW8bit
    step = optimizer.step

    def seen(self, *args):
        norms.append(math.hypot(*(p.grad.norm().item() for group in self.param_groups for p in group["params"])))
        return step(self, *args)

    monkeypatch.setattr(optimizer, "step", seen)
    train_loop.main([str(tiny_config), f"train.max_grad_norm={most}", "train.max_steps=2"])
    whole = [row["grad_norm"] for row in metrics(only_run(tmp_path)) if "loss" in row]
    assert all(0.5 < norm < 1000 for norm in whole)
    assert norms == pytest.approx([min(norm, most) for norm in whole], rel=1e-4)


def test_rate_decay_and_start_are_those_that_were_asked_for(tiny_config, tmp_path, monkeypatch):
    made, optimizer = [], train_loop.bnb.optim.PagedAdamW8bit

    class Seen(optimizer):
        def __init__(self, weights, **how):
            made.append(how)
            super().__init__(weights, **how)

    monkeypatch.setattr(train_loop.bnb.optim, "PagedAdamW8bit", Seen)
    words = [
        "train.lr=1e-12",
        "train.weight_decay=0.25",
        "train.warmup=0.25",
        "train.max_steps=8",
        "train.eval_every=9",
    ]
    starts = []
    for seed in (0, 0, 1):
        runs = tmp_path / str(len(starts))
        train_loop.main([str(tiny_config), *words, f"seed={seed}", f"runs={runs}"])
        starts.append(load_file(next(runs.glob("*/last")) / "adapter_model.safetensors"))
    assert made == [{"lr": 1e-12, "weight_decay": 0.25}] * 3
    rates = [row["lr"] / 1e-12 for row in metrics(next(runs.iterdir())) if "loss" in row]
    assert rates == pytest.approx([0.5, 1, *((1 + math.cos(math.pi * i / 6)) / 2 for i in range(6))])
    a = [key for key in starts[0] if "lora_A" in key]
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in a)
    assert not any(torch.equal(starts[0][key], starts[2][key]) for key in a)


def test_times_are_of_what_they_say(tiny_config, tmp_path, monkeypatch, capsys):
    """A clock that moves by 1 s with each pack's loss, by 2 with each update, by 10 with each evaluation."""
    clock = SimpleNamespace(now=100.0)

    def takes(seconds, function):
        def timed(*args, **kwargs):
            clock.now += seconds
            return function(*args, **kwargs)

        return timed

    for name in ("now", "mark"):
        monkeypatch.setattr(gauges, name, lambda device: clock.now)
    monkeypatch.setattr(train_loop.time, "perf_counter", lambda: 59.9876)  # when the script began
    monkeypatch.setattr(engine.F, "cross_entropy", takes(1.0004567, engine.F.cross_entropy))
    monkeypatch.setattr(train_loop.bnb.optim.PagedAdamW8bit, "step", takes(2, train_loop.bnb.optim.PagedAdamW8bit.step))
    answer_trees = predict.answer_trees
    monkeypatch.setattr(predict, "answer_trees", takes(10, answer_trees))
    # 32 questions of 8 paragraphs: 4 steps of one pack each, an evaluation after two and after four of them
    words = [str(tiny_config), "train.epochs=1", "train.pack_tokens=10000"]
    train_loop.main(words)
    said = capsys.readouterr().out
    result = json.loads(said.splitlines()[-1])
    assert (result["seconds"], result["evaluation_seconds"], result["start_seconds"]) == (4 * 3 + 2 * 10, 20, 40.0)
    assert (result["questions"], result["questions_per_s"]) == (32, round(32 / 12, 2))
    assert result["idle_share"] == round(1 - 4 * 1.0004567 / (12 + 4 * 0.0004567), 4)
    assert "evaluations took 62% of 32 s" in said
    assert f"; {32 / 12:.2f} questions/s; " in said
    seconds = [(row["step"], row["seconds"]) for row in metrics(only_run(tmp_path)) if "loss" in row]
    assert seconds == [(1, 3), (2, 6.001), (3, 19.001), (4, 22.002)]  # in milliseconds
    # cut off in the second evaluation, then resumed: two steps and an evaluation are from before
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at_evaluation(patch, 2)
        train_loop.main([*words, f"runs={tmp_path / 'cut'}"])
    clock.now = 5000.0
    train_loop.main([*words, f"runs={tmp_path / 'cut'}"])
    again = last_json(capsys)
    timed = ("seconds", "evaluation_seconds", "questions", "questions_per_s")
    assert [again[key] for key in timed] == [result[key] for key in timed]
    assert [(r["step"], r["seconds"]) for r in metrics(next((tmp_path / "cut").iterdir())) if "loss" in r] == seconds


def test_fused_layers_take_the_steps_of_the_modules(tiny_config, tmp_path, capsys):
    rows = []
    for fused in ("false", "true"):
        runs = tmp_path / fused
        train_loop.main([str(tiny_config), f"train.fused={fused}", "train.max_steps=3", f"runs={runs}"])
        rows.append([row for row in metrics(next(runs.iterdir())) if "loss" in row])
    said = capsys.readouterr().out
    assert "layers by transformers and PEFT (train.fused=false)" in said
    assert "fused layers, 2 of 2 keep their activations" in said
    for by_modules, fused in zip(*rows, strict=True):
        assert fused["loss"] == pytest.approx(
            by_modules["loss"], rel=1e-2
        )  # the optimizer's 8-bit blocks lie elsewhere
    assert rows[1][0]["loss"] == pytest.approx(rows[0][0]["loss"], rel=1e-6)
    assert rows[1][0]["grad_norm"] == pytest.approx(rows[0][0]["grad_norm"], rel=1e-5)


def test_a_budget_that_nothing_would_heed_is_refused(tiny_config):
    with pytest.raises(
        UserError, match=r"memory_budget_gib needs the fused layers; not with train.fused=false: set .*=null"
    ):
        train_loop.main([str(tiny_config), "train.memory_budget_gib=8", "train.fused=false"])


def test_a_finished_run_is_not_trained_twice_unless_fresh(tiny_config, tmp_path, capsys):
    train_loop.main([str(tiny_config), "train.max_steps=1"])
    first = last_json(capsys)
    train_loop.main([str(tiny_config), "train.max_steps=1"])
    again = capsys.readouterr().out
    assert "FRESH=1" in again
    assert json.loads(again.splitlines()[-1]) == first
    train_loop.main([str(tiny_config), "train.max_steps=1", "--fresh"])
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_finished_run_on_other_data_does_not_stand_in_for_this_one(tiny_config, train_file, tmp_path, capsys):
    train_loop.main([str(tiny_config), "train.max_steps=1"])
    first = last_json(capsys)
    squad_file(train_file, paragraphs=9, questions=4)
    train_loop.main([str(tiny_config), "train.max_steps=1"])
    assert last_json(capsys)["run"] != first["run"]


def stops_at(ems: list[float], patience: int, min_delta: float) -> tuple[int, int]:
    """(evaluation whose weights are kept, last evaluation), from 0, by the rule as the README has it."""
    kept = last = 0
    for last, em in enumerate(ems):
        kept = last if em - ems[kept] >= min_delta and em > ems[kept] else kept
        if last - kept == patience:
            break
    return kept, last


@pytest.fixture(scope="module")
def course(tmp_path_factory, answering_base):
    """A whole training of the model that answers: its YAML, EM of each evaluation, run folder and result."""
    folder = tmp_path_factory.mktemp("course")
    config = answering_yaml(folder, answering_base)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        train_loop.main([str(config)])
    result = json.loads(out.getvalue().splitlines()[-1])
    run = only_run(folder)
    return SimpleNamespace(
        config=config,
        run=run,
        result=result,
        said=out.getvalue(),
        shown=err.getvalue().replace("\r", "\n"),
        ems=[row["em"] for row in metrics(run) if "em" in row],
    )


def test_em_rises_and_falls_and_the_best_weights_are_kept(course):
    best = max(course.ems)
    assert course.ems[0] < best - 20
    assert course.ems[-1] < best, "or nothing is asked of `best/`"
    assert (course.result["em"], course.result["best_step"]) == (best, 2 * (1 + course.ems.index(best)))
    kept, last = (checkpoint.load_state(course.run / name) for name in ("best", "last"))
    assert (kept.step, kept.best_em, kept.best_f1) == (course.result["best_step"], best, course.result["f1"])
    assert (last.step, last.best_step, last.best_em) == (16, kept.step, best)
    assert last.waited == 7 - course.ems.index(best)
    assert f"best EM {best:.2f} F1 {course.result['f1']:.2f} at step {kept.step}" in course.said
    # a line for each evaluation, on stderr, where the bar is
    lines = [line for line in course.shown.splitlines() if line.startswith("step ")]
    assert len(lines) == 8
    assert lines[0].startswith(f"step 2: EM {course.ems[0]:.2f} F1 ")
    assert f" on {course.result['n']} (dev), best so far" in lines[0]
    assert [line.endswith("best so far") for line in lines].count(True) == len(
        [i for i, em in enumerate(course.ems) if em > max([-1.0, *course.ems[:i]])]
    )
    with contextlib.redirect_stdout(io.StringIO()) as out:
        eval_loop.main([str(course.config)])
    again = json.loads(out.getvalue().splitlines()[-1])
    assert (again["em"], again["f1"]) == (best, course.result["f1"])
    predictions = [json.loads((folder / "predictions.json").read_text()) for folder in (course.run, Path(again["run"]))]
    assert predictions[0] == predictions[1]


def test_a_result_says_what_was_trained_on_what_and_for_how_long(course):
    words = json.loads((course.config.parent / "runs" / course.run.name / "record.json").read_text())
    assert words["result"] == course.result
    result, vocabulary = (
        course.result,
        json.loads(Path(words["config"]["base"]["path"], "config.json").read_text())["vocab_size"],
    )
    # rank 4 on q, o [64, 64], k, v [32, 64], gate, up [128, 64], down [64, 128], of two layers
    trained = 2 * 4 * (2 * (64 + 64) + 2 * (32 + 64) + 3 * (128 + 64))
    frozen = 2 * 64 * vocabulary + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64) + 64
    assert (result["trained_weights"], result["frozen_weights"]) == (trained, frozen) == (8192, frozen)
    asked = [row["questions"] for row in metrics(course.run) if "loss" in row]
    assert (result["steps"], result["questions"], result["n"], result["processes"]) == (16, sum(asked), 48, 1)
    assert (len(asked), sum(asked[:12])) == (16, 96), "an epoch, and four steps of the next"
    assert (result["stopped_early"], result["selected_on"], result["random_weights"]) == (False, "dev", False)
    again = (
        (64 + 2 * 32) * 64 + 64 * 64 + 2 * 128 * 64
    )  # all products of a layer but down's, which is as large as q, k, v
    assert (result["pack_tokens"], result["kept_layers"]) == (512, 0)
    assert result["recomputed"] == pytest.approx(again / (again + 64 * 128))
    assert (result["counted_bytes"], result["peak"]["allocated_bytes"]) == (None, None)
    counts = {"questions": 96, "truncated": 0, "dropped_outside": 0, "dropped_long": 0}
    assert result["window_counts"] == counts
    train, dev = (squad.read(words["config"]["data"][split], split).sha256 for split in ("train", "dev"))
    assert result["identity"] == {"config": load(str(course.config)).hash("train"), "train": train, "dev": dev}
    assert words["must_match"]["data"] == dev
    said = course.said.splitlines()
    assert said[0].startswith("answering on CPU")
    assert said[0].endswith(f"torch.float32: trains 8,192 weights beside {frozen:,} frozen ones ({8192 / frozen:.3%})")
    assert f"{counts}, 0 offsets fixed, " in said[1]
    assert said[2] == f"16 steps of ~8 questions; every 2 steps EM on 48 questions of dev; run {course.run}"
    kept = "0 of 2 keep their activations and 2 their dequantised matrices"
    assert said[3] == f"fused layers, {kept}, packs of 512 tokens"
    assert said[-2].endswith(f"adapter in {course.run}/best")


def test_other_dev_data_is_another_training_too(tiny_config, dev_file, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at_evaluation(patch, 2)
        train_loop.main([str(tiny_config)])
    before = dev_file.read_text()
    squad_file(dev_file, paragraphs=5, questions=3, seed=1)
    with pytest.raises(UserError, match=r"data has changed.*FRESH=1"):
        train_loop.main([str(tiny_config)])
    dev_file.write_text(before)
    train_loop.main([str(tiny_config)])
    first = last_json(capsys)["run"]
    squad_file(dev_file, paragraphs=5, questions=3, seed=1)
    train_loop.main([str(tiny_config)])
    assert last_json(capsys)["run"] != first


def test_a_paragraph_of_more_questions_than_a_step_has_is_split(tiny_config, tmp_path):
    train_loop.main([str(tiny_config), "train.questions_per_step=3", "train.epochs=1", "train.eval_every=99"])
    rows = [row["questions"] for row in metrics(only_run(tmp_path)) if "loss" in row]
    assert sum(rows) == 32
    assert len(rows) == 32 // 3
    assert max(rows) <= 2 * 3


@pytest.mark.parametrize(("budget", "expected"), [("null", 7.0), ("5", 5.0)])
def test_an_evaluation_keeps_to_the_budget_of_the_training_that_it_interrupts(
    tiny_config, monkeypatch, budget, expected
):
    seen, answer_trees = [], predict.answer_trees
    monkeypatch.setattr(predict, "answer_trees", lambda *args, **how: seen.append(args) or answer_trees(*args, **how))
    words = [f"train.memory_budget_gib={budget}", "eval.memory_budget_gib=7", "eval.parts=3", "train.max_steps=1"]
    train_loop.main([str(tiny_config), *words])
    _, _, trees, stops, limit, options, *_ = seen[0]
    assert (options.memory_budget_gib, options.parts, limit, len(trees)) == (expected, 3, 32, 4)
    assert stops == stop_tokens(load_tokenizer(load(str(tiny_config)).base.path))


@pytest.mark.parametrize(("patience", "min_delta"), [(1, 0.0), (2, 0.0), (2, 22.0), (3, 100.0)])
def test_patience_and_the_smallest_gain_decide_what_is_kept_and_when_it_ends(
    course, tmp_path, capsys, patience, min_delta
):
    words = [f"early_stop.patience={patience}", f"early_stop.min_delta={min_delta}", f"runs={tmp_path}"]
    train_loop.main([str(course.config), *words])
    result, (run,) = last_json(capsys), tmp_path.iterdir()
    kept, last = stops_at(course.ems, patience, min_delta)
    assert [row["em"] for row in metrics(run) if "em" in row] == course.ems[: last + 1]
    assert (result["best_step"], result["em"], result["steps"]) == (2 * kept + 2, course.ems[kept], 2 * last + 2)
    assert result["stopped_early"] == (last < 7)


def loss_of(config, run, kept: str) -> float:
    """Mean loss per answer token of dev's first golds, by transformers' and PEFT's modules, each question a row."""
    model = add_lora(load_base(config.base, torch.device("cpu")), replace(config.lora, dropout=0.0), config.seed)
    load_weights(model, load_file(run / kept / "adapter_model.safetensors"), kept)
    dev = squad.load(config.data, "dev").examples
    trees = build_trees(dev, same(load_tokenizer(config.base.path)), config.window, train=True).trees
    tokens = sum(len(branch.answer_ids) for tree in trees for branch in tree.branches)
    return rows_loss(model, trees).item() / tokens


@pytest.mark.parametrize(
    "how",
    [
        "train.lr=2e-2",
        "early_stop.patience=1 early_stop.min_delta=100",
        "train.fused=false train.label_smoothing=0.2 train.loss=question",
        "train.average=0.8",
        "lora.dropout=0.3",
    ],
)
def test_the_weights_of_the_least_loss_are_kept(course, tmp_path, monkeypatch, capsys, how):
    monkeypatch.setattr(predict, "answer_trees", lambda *args, **how: pytest.fail("nothing is decoded"))
    words = [*how.split(), "early_stop.by=loss", f"runs={tmp_path}"]
    train_loop.main([str(course.config), *words])
    out, err = capsys.readouterr()
    result, (run,), config = json.loads(out.splitlines()[-1]), tmp_path.iterdir(), load(str(course.config), words)
    rows = [row for row in metrics(run) if "dev_loss" in row]
    losses = [row["dev_loss"] for row in rows]
    kept, last = stops_at([-loss for loss in losses], config.early_stop.patience, 0.0)
    if how in ("train.lr=2e-2", "early_stop.patience=1 early_stop.min_delta=100"):
        assert kept < last, "or nothing is asked of `best/`"
    assert rows == [{"step": 2 * i + 2, "dev_loss": loss, "n": 48} for i, loss in enumerate(losses)]
    assert len(losses) == last + 1 == (8 if config.early_stop.patience > 1 else kept + 2)
    assert (result["em"], result["f1"], result["dev_loss"]) == (None, None, losses[kept])
    assert (result["best_step"], result["steps"], result["n"]) == (2 * kept + 2, 2 * last + 2, 48)
    assert result["selected_on"] == "dev"
    assert losses[kept] == min(losses) == pytest.approx(loss_of(config, run, "best"), rel=1e-5)
    if not config.train.average:
        assert losses[last] == pytest.approx(loss_of(config, run, "last"), rel=1e-5)
    assert not (run / "predictions.json").exists()
    assert "every 2 steps the loss on 48 questions of dev; " in out
    assert f": least loss {min(losses):.4f} at step {2 * kept + 2}; " in out
    assert f"step 2: loss {losses[0]:.4f} on 48 (dev), best so far" in err
    assert checkpoint.load_state(run / "best").best == min(losses)


@pytest.mark.parametrize("average", [0.0, 0.8])
def test_without_a_selection_the_last_weights_are_kept_and_nothing_is_evaluated(
    tiny_config, tmp_path, monkeypatch, capsys, average
):
    for module, name in ((predict, "answer_trees"), (engine.Engine, "loss")):
        monkeypatch.setattr(module, name, lambda *args, **how: pytest.fail("nothing is evaluated"))
    arguments = [str(tiny_config), "early_stop.by=none", f"train.average={average}", "early_stop.patience=1"]
    train_loop.main([*arguments, "train.epochs=4", "early_stop.split=heldout", "early_stop.heldout_share=0.3"])
    out, err = capsys.readouterr()
    result, run = json.loads(out.splitlines()[-1]), only_run(tmp_path)
    assert (result["steps"], result["best_step"], result["stopped_early"]) == (result["best_step"], 4, False)
    figures = [result[key] for key in ("em", "f1", "dev_loss", "selected_on", "n")]
    assert figures == [None, None, None, None, 0]
    assert result["window_counts"]["questions"] == 12, "articles are held out all the same"
    assert all("loss" in row for row in metrics(run))
    assert {path.name for path in run.iterdir()} == {"config.yaml", "record.json", "metrics.jsonl", "best", "last"}
    last, best = (load_file(run / name / "adapter_model.safetensors") for name in ("last", "best"))
    assert all(torch.equal(last[key], best[key]) for key in last) == (not average)
    assert "; no evaluation, the last weights are kept; run " in out
    assert ": not evaluated, kept at step 4; " in out
    assert "best" not in err
    states = [checkpoint.load_state(run / name) for name in ("last", "best")]
    assert [(state.step, state.best_step, state.best) for state in states] == [(4, 4, None)] * 2


@pytest.mark.parametrize("by", ["loss", "none"])
@pytest.mark.parametrize("where", ["step", "evaluation", "save"])
def test_a_run_that_is_cut_off_keeps_what_a_whole_one_does(tiny_config, tmp_path, monkeypatch, by, where):
    monkeypatch.setattr(train_loop, "SAVE_SECONDS", -1)
    arguments = [str(tiny_config), f"early_stop.by={by}", "train.average=0.5"]  # 8 steps, an evaluation every 2
    train_loop.main([*arguments, f"runs={tmp_path / 'whole'}"])
    module, name, nth = {
        "step": (train_loop.bnb.optim.PagedAdamW8bit, "step", 6),
        "evaluation": (train_loop, "evaluate", 3 if by == "loss" else 1),
        "save": (checkpoint, "load_state", 0),
    }[where]
    original, calls = getattr(module, name), []

    def cut(*args, **how):
        calls.append(1)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return original(*args, **how)

    save, bests = checkpoint.save, []

    def cut_between_saves(folder, *rest):
        bests.append(folder.name)
        if bests[-1] == "last" and len([1 for name in bests if name == "best"]) == (2 if by == "loss" else 1):
            raise KeyboardInterrupt
        save(folder, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, cut)
        if where == "save":
            patch.setattr(checkpoint, "save", cut_between_saves)
        train_loop.main([*arguments, f"runs={tmp_path / 'cut'}"])
    train_loop.main([*arguments, f"runs={tmp_path / 'cut'}"])
    (whole,), (again,) = ((tmp_path / name).iterdir() for name in ("whole", "cut"))
    assert without_clock(metrics(again)) == without_clock(metrics(whole))
    results = [json.loads((run / "record.json").read_text())["result"] for run in (whole, again)]
    assert len({json.dumps([r[key] for key in ("em", "dev_loss", "best_step", "steps")]) for r in results}) == 1
    for kept in ("last", "best"):
        ours, theirs = (load_file(run / kept / "adapter_model.safetensors") for run in (again, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_signal_in_an_evaluation_by_loss_saves_and_the_run_goes_on(tiny_config, tmp_path, monkeypatch):
    arguments, loss = [str(tiny_config), "early_stop.by=loss", "train.max_steps=4"], engine.Engine.loss
    train_loop.main([*arguments, f"runs={tmp_path / 'whole'}"])

    def signalled(self, check):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, check)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(engine.Engine, "loss", signalled)
        train_loop.main([*arguments, f"runs={tmp_path / 'cut'}"])
    assert stop.value.code == 143
    (cut,) = (tmp_path / "cut").iterdir()
    state = checkpoint.load_state(cut / "last")
    assert (state.step, state.evaluated, state.best) == (2, 0, None)
    train_loop.main([*arguments, f"runs={tmp_path / 'cut'}"])
    assert without_clock(metrics(cut)) == without_clock(metrics(next((tmp_path / "whole").iterdir())))


def test_the_course_tells_one_rule_of_stopping_from_another(course):
    assert len({stops_at(course.ems, patience, 0.0) for patience in (1, 2, 99)}) == 3
    assert stops_at(course.ems, 99, 22.0) != stops_at(course.ems, 99, 0.22), "points, not a share"
    assert len({stops_at(course.ems, 99, delta) for delta in (0.0, 22.0, 100.0)}) == 3


def test_a_loss_that_is_not_finite_stops_and_nothing_of_its_step_is_kept(tiny_config, tmp_path, monkeypatch):
    cross_entropy = engine.F.cross_entropy
    calls = []

    def broken(*args, **kwargs):
        calls.append(1)
        return cross_entropy(*args, **kwargs) * (math.nan if len(calls) > 9 else 1)

    monkeypatch.setattr(engine.F, "cross_entropy", broken)
    with pytest.raises(UserError, match=r"step \d+: loss nan.*what .* holds is whole.*p\dq\d"):
        train_loop.main([str(tiny_config)])
    run = only_run(tmp_path)
    checkpoint.verify(run / "last")
    assert all(weight.isfinite().all() for weight in load_file(run / "last" / "adapter_model.safetensors").values())
    assert not (run / "record.json").exists()


def test_data_that_changed_under_an_unfinished_run_is_refused(tiny_config, train_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at_evaluation(patch, 2)
        train_loop.main([str(tiny_config)])
    squad_file(train_file, paragraphs=9, questions=4)
    with pytest.raises(UserError, match=r"data has changed.*FRESH=1"):
        train_loop.main([str(tiny_config)])


def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(tiny_config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at_evaluation(patch, 2)
        train_loop.main([str(tiny_config)])
    weights = only_run(tmp_path) / "last" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"last: adapter_model.safetensors is damaged.*FRESH=1"):
        train_loop.main([str(tiny_config)])
    assert weights.exists()


def test_weights_of_another_adapter_in_a_checkpoint_are_refused_by_its_name(tiny_config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at_evaluation(patch, 2)
        train_loop.main([str(tiny_config)])
    last = only_run(tmp_path) / "last"
    weights = load_file(last / "adapter_model.safetensors")
    before = sha256(last / "adapter_model.safetensors")
    save_file({f"other.{name}": weight for name, weight in weights.items()}, last / "adapter_model.safetensors")
    sums = (last / SUMS).read_text().replace(before, sha256(last / "adapter_model.safetensors"))
    (last / SUMS).write_text(sums)
    with pytest.raises(UserError, match=rf"^{last}: the adapter does not fit this base \(first odd weight: "):
        train_loop.main([str(tiny_config)])


def test_what_stands_in_the_way_is_said_before_anything_is_made(tiny_config, tmp_path, monkeypatch):
    def refuse(config):
        raise UserError(f"no GPU for {config.system}")

    monkeypatch.setattr(train_loop.preflight, "check", refuse)
    with pytest.raises(UserError, match=r"^no GPU for "):
        train_loop.main([str(tiny_config)])
    assert not (tmp_path / "runs").exists()


def test_a_window_that_leaves_nothing_to_train_on_is_said(tiny_config, train_file, monkeypatch):
    counts = {"questions": 32, "dropped_long": 32}
    monkeypatch.setattr(train_loop.cache, "build_trees", lambda *args, **kw: Trees([], counts))
    with pytest.raises(UserError) as caught:
        train_loop.main([str(tiny_config)])
    assert str(caught.value) == f"{train_file}: no question is left to train on ({counts})"


def test_the_next_steps_packs_are_laid_out_before_the_optimizers_step(tiny_config, monkeypatch):
    """On a GPU that is while it computes."""
    done, prepare, step = [], engine.Engine.prepare, train_loop.bnb.optim.PagedAdamW8bit.step
    monkeypatch.setattr(engine.Engine, "prepare", lambda self, n: done.append(n) or prepare(self, n))
    optimizer = train_loop.bnb.optim.PagedAdamW8bit
    monkeypatch.setattr(optimizer, "step", lambda self, *args: done.append("step") or step(self, *args))
    train_loop.main([str(tiny_config), "train.max_steps=3", "train.eval_every=3"])
    assert done == [0, 1, "step", 2, "step", "step"]


def test_held_out_articles_are_neither_trained_on_nor_taken_from_dev(tiny_config, tmp_path, capsys):
    train_loop.main([str(tiny_config), "early_stop.split=heldout", "early_stop.heldout_share=0.3", "train.max_steps=1"])
    result, run = last_json(capsys), only_run(tmp_path)
    assert result["selected_on"] == "heldout"
    assert result["n"] + result["window_counts"]["questions"] == 32
    held = json.loads((run / "predictions.json").read_text())
    assert len(held) == result["n"]
    train_loop.main([str(tiny_config), "train.max_steps=1", f"runs={tmp_path}/all"])
    adapter = f"adapter={last_json(capsys)['run']}/best"
    with pytest.raises(UserError, match=r"best was trained on all articles, without early_stop\.split=heldout"):
        eval_loop.main([str(tiny_config), adapter, "data.split=heldout"])
    adapter = f"adapter={run}/best"
    eval_loop.main([str(tiny_config), adapter, "data.split=heldout", "early_stop.heldout_share=0.1"])
    asked = last_json(capsys)
    assert json.loads((Path(asked["run"]) / "predictions.json").read_text()).keys() == held.keys()


@pytest.mark.parametrize("unit", ["article", "question"])
def test_a_share_of_the_questions_is_trained_on_and_named_beside_the_weights(tiny_config, tmp_path, capsys, unit):
    words = [str(tiny_config), "data.train_share=0.3", f"data.train_unit={unit}", "train.max_steps=1"]
    train_loop.main(words)
    result, run = last_json(capsys), only_run(tmp_path)
    data = load(str(tiny_config)).data
    whole = squad.load(data, "train")
    some = replace(whole, examples=squad.part(whole.examples, 0.3, unit))
    assert result["window_counts"]["questions"] == len(some.examples) == {"article": 12, "question": 10}[unit]
    assert result["identity"]["train"] == whole.sha256
    settings = json.loads((run / "best" / "trained_with.json").read_text())
    assert settings["data_sha256"] == some.sha256 != whole.sha256
    assert (settings["data"]["train_share"], settings["data"]["train_unit"]) == (0.3, unit)


def test_another_seed_trains_another_adapter_and_the_same_seed_the_same(tiny_config, tmp_path):
    for seed, runs in ((0, "a"), (0, "b"), (1, "c")):
        train_loop.main([str(tiny_config), f"seed={seed}", "train.max_steps=2", f"runs={tmp_path / runs}"])
    a, b, c = (load_file(next((tmp_path / r).glob("*/last")) / "adapter_model.safetensors") for r in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_a_system_without_an_adapter_cannot_be_trained(tiny_config):
    with pytest.raises(UserError, match="nothing to train"):
        train_loop.main([str(tiny_config), "lora=null"])


def test_an_adapter_to_start_from_is_refused(tiny_config, tmp_path):
    with pytest.raises(UserError, match="a training makes its own"):
        train_loop.main([str(tiny_config), f"adapter={tmp_path}"])


def test_nothing_is_left_behind_where_a_run_could_not_begin(tiny_config, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        train_loop.main([str(tiny_config), "data.train=absent.json"])
    assert not (tmp_path / "runs").exists()


def test_the_rate_rises_then_falls_to_nothing():
    rates = [train_loop.learning_rate(step, total=100, warmup=0.1, peak=1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] < 0.001
    assert train_loop.learning_rate(0, total=1, warmup=0.0, peak=1.0) == 1.0


class Scaler:
    """fp16's loss scale, at its least or above it."""

    def __init__(self, scale: float):
        self.least = scale

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def get_scale(self) -> float:
        return self.least

    def step(self, *_) -> None:
        """Skips the optimizer's step, as after an overflow."""

    def update(self) -> None:
        pass

    def state_dict(self) -> dict:
        return {}


@pytest.mark.parametrize(("scale", "ends"), [(0.5, True), (1.0, False)])
def test_a_step_that_fp16_skips_is_none_of_ours_to_stop_until_no_scale_helps(
    tiny_config, tmp_path, monkeypatch, scale, ends
):
    make = ranks.accelerator

    def accelerator(*args):
        made = make(*args)
        made.clip_grad_norm_ = lambda *_: torch.tensor(math.inf)  # the scaler's to notice
        made.scaler = Scaler(scale)
        return made

    monkeypatch.setattr(ranks, "accelerator", accelerator)
    words = [str(tiny_config), "train.max_steps=2", "train.eval_every=2"]
    if ends:
        with pytest.raises(UserError, match=r"^step 1: gradients overflow fp16 at any scale; try base.dtype=bf16 or"):
            train_loop.main(words)
    else:
        train_loop.main(words)
        rows = [row for row in metrics(only_run(tmp_path)) if "loss" in row]
        assert [row["grad_norm"] for row in rows] == [None, None]


def test_a_norm_that_is_not_finite_stops_where_nothing_scales_the_loss(tiny_config, monkeypatch):
    make = ranks.accelerator

    def accelerator(*args):
        made = make(*args)
        made.clip_grad_norm_ = lambda *_: torch.tensor(math.inf)
        return made

    monkeypatch.setattr(ranks, "accelerator", accelerator)
    with pytest.raises(UserError, match=r"^step 1: loss \d+\.\d+, gradient norm inf; stopped"):
        train_loop.main([str(tiny_config)])


def test_progress_is_of_steps_and_evaluations_have_a_row(tiny_config, tmp_path, capsys):
    train_loop.main([str(tiny_config), "train.max_steps=2", "train.eval_every=1", "early_stop.questions=5"])
    said = capsys.readouterr().err
    assert "train: 100%" in said
    assert "step/s" in said or "s/step" in said
    rows = [row for row in metrics(only_run(tmp_path)) if "em" in row]
    assert [(row["step"], row["n"], sorted(row)) for row in rows] == [(s, 5, ["em", "f1", "n", "step"]) for s in (1, 2)]


def test_trackers_are_ended_whether_a_training_ends_or_is_stopped(tiny_config, tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(Accelerator, "end_training", lambda self: ended.append("ended"))
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda self: ended.append("waited"))
    train_loop.main([str(tiny_config), "train.max_steps=1"])
    assert ended == ["ended"]

    def signalled(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(*_)

    learning_rate = train_loop.learning_rate
    monkeypatch.setattr(train_loop, "learning_rate", signalled)
    with pytest.raises(SystemExit):
        train_loop.main([str(tiny_config), "train.max_steps=2", f"runs={tmp_path / 'stopped'}"])
    assert ended == ["ended", "waited", "ended"]


def test_the_bar_begins_where_a_resumed_run_does_and_shows_loss_and_best_em(tiny_config, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at_evaluation(patch, 2)
        train_loop.main([str(tiny_config), "train.eval_every=1", "train.max_steps=3"])
    made, shown = [], []

    class Bar(train_loop.Bar):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append((self.n, self.total))

        def set_postfix(self, **kwargs):
            shown.append(kwargs)

    monkeypatch.setattr(train_loop, "Bar", Bar)
    train_loop.main([str(tiny_config), "train.eval_every=1", "train.max_steps=3"])
    assert made == [(1, 3)]
    assert all(kwargs["loss"] == f"{float(kwargs['loss']):.3f}" and kwargs["best_em"] == 0.0 for kwargs in shown)
    assert len(shown) == 2


def test_dropout_is_drawn_by_seed_step_and_rank_and_is_said(tiny_config, monkeypatch, capsys):
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    words = [str(tiny_config), "seed=3", "train.max_steps=2", "train.eval_every=2"]
    train_loop.main([*words, "lora.dropout=0.1", "train.fused=false"])
    said = capsys.readouterr().out
    assert "branches share one dropout mask" in said
    assert "linears that share an input" not in said
    assert [random.Random(f"3 {step} 0").getrandbits(63) for step in range(2)] == [n for n in seeds if n > 2**32]
    train_loop.main([*words, "lora.dropout=0.1"])
    said = capsys.readouterr().out
    assert "fused layers, " in said
    assert "branches share one dropout mask" in said
    assert "linears that share an input share its dropout mask" in said
    train_loop.main(words)
    assert "dropout mask" not in capsys.readouterr().out
    assert len([n for n in seeds if n > 2**32]) == 2, "the fused layers' masks have keys"


def test_a_record_says_which_tokenizers_and_a_crash_costs_ten_minutes_at_most(tiny_config, tmp_path):
    train_loop.main([str(tiny_config), "train.max_steps=1"])
    about = json.loads((only_run(tmp_path) / "record.json").read_text())
    assert len(about["may_differ"]["tokenizer"]) == 64
    assert about["must_match"]["window"]["tokenizer"] == about["may_differ"]["tokenizer"][:12]
    assert train_loop.SAVE_SECONDS == 600


def test_predictions_keep_the_letters_of_the_data(tiny_config, tmp_path, monkeypatch):
    answers = predict.by_all_ranks

    def odd(*args):
        return {id_: replace(answer, text="Zürich") for id_, answer in answers(*args).items()}

    monkeypatch.setattr(predict, "by_all_ranks", odd)
    train_loop.main([str(tiny_config), "train.max_steps=1", "early_stop.questions=2"])
    text = (only_run(tmp_path) / "predictions.json").read_bytes()
    assert text.count("Zürich".encode()) == 2


def test_random_weights_have_a_loss_and_no_accuracy(tiny_config, capsys):
    train_loop.main([str(tiny_config), "base.random_weights=true", "train.max_steps=1", "early_stop.by=loss"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert (result["em"], result["f1"], result["random_weights"]) == (None, None, True)
    assert f"(random weights): least loss {result['dev_loss']:.4f} at step 1; " in out


def test_random_weights_are_said_to_have_no_accuracy_and_a_resumed_run_to_go_on(tiny_config, monkeypatch, capsys):
    words = [str(tiny_config), "base.random_weights=true", "train.max_steps=3", "train.eval_every=1"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at_evaluation(patch, 3)
        train_loop.main(words)
    capsys.readouterr()
    train_loop.main(words)
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert (result["em"], result["f1"]) == (None, None)
    assert out.splitlines()[0] == f"{result['run']}: going on after step 2"
    assert f"(random weights): no accuracy at step {result['best_step']}; " in out
    assert "step 3: EM" not in err


def test_an_adapter_that_never_stops_is_said_to_at_its_evaluation():
    def line(cut: float, better: bool = False) -> str:
        return train_loop.evaluated(7, Evaluation(12.345, {"em": 12.345, "f1": 23.456, "n": 3}, "", cut), "dev", better)

    assert line(0.5) == "step 7: EM 12.35 F1 23.46 on 3 (dev)"
    assert line(2 / 3, better=True) == (
        "step 7: EM 12.35 F1 23.46 on 3 (dev), best so far; 67% of the answers never stop by themselves"
    )
    told = train_loop.evaluated(7, Evaluation(0.98765, {"dev_loss": 0.98765, "n": 3}), "heldout", True)
    assert told == "step 7: loss 0.9877 on 3 (heldout), best so far"


@pytest.mark.parametrize(
    ("step", "dtype", "advice"),
    [
        (1, torch.float16, "set base.dtype=bf16 or fp32, for fp16 overflows, or look at these questions: q1, q2"),
        (9, torch.float16, "set base.dtype=bf16 or fp32, for fp16 overflows, or lower train.lr, or look at"),
        (1, torch.bfloat16, "from before it; look at these questions: q1, q2"),
        (2, torch.float32, "from before it; lower train.lr, or look at these questions: q1, q2"),
    ],
)
def test_what_to_do_about_a_loss_that_is_not_finite(tmp_path, step, dtype, advice):
    branches = [Branch(id_, [1], [2]) for id_ in ("q1", "q2")]
    error = str(train_loop.not_finite(step, math.nan, 2.0, tmp_path, branches, dtype))
    assert error.startswith(f"step {step}: loss nan, gradient norm 2.0; stopped, and what {tmp_path} holds is whole")
    assert advice in error


def test_an_adapter_carries_what_it_was_trained_with(tiny_config, tmp_path):
    train_loop.main([str(tiny_config), "train.max_steps=1", "early_stop.questions=2", "prompt.order=question"])
    run = only_run(tmp_path)
    config = load(str(tiny_config), ["train.max_steps=1", "early_stop.questions=2", "prompt.order=question"])
    for name in ("best", "last"):
        settings = json.loads((run / name / "trained_with.json").read_text())
        mine = config.to_dict()
        for key in ("system", "seed", "base", "lora", "prompt", "window", "train", "early_stop", "data"):
            assert settings[key] == mine[key], key
        assert settings["identity"] == identify(config.base)
        assert settings["tokenizer_sha256"] == tokenizer_sha256(load_tokenizer(config.base.path))
        assert settings["data_sha256"] == squad.load(config.data, "train").sha256
