"""The engine chooses layers, packs and graphs once, and each pack's gradient is the loss's. GPUs are made up."""

import functools
import math
import random
from dataclasses import replace
from types import SimpleNamespace

from common.config import Base, Config, EarlyStop, Eval, Lora, Train
from common.data.plan import Plan
from common.data.trees import Branch, Tree
from common.errors import UserError
from common.model import memory
from common.model.pack import IGNORED
from common.model.tree_mask import pack_logits
from common.runs.signals import Stopped
from common.train import engine as module
from common.train.dropout import pack_key
from common.train.engine import Engine
from tests.model.test_pack import CPU, lora_model, rows_loss, trees_of

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

GIB = 2**30


class Captured:
    """In place of `CapturedPacks`: computes, and notes what it was made with."""

    def __init__(self, work, weights, pads, example):
        self.work, self.weights, self.pads, self.example, self.seen = work, weights, pads, example, []

    def release(self):
        self.seen.append("released")

    def capture(self):
        self.seen.append("captured")

    def __call__(self, pack, weight):
        self.seen.append(pack)
        return self.work(pack, torch.full((), weight))


@pytest.fixture
def make(tiny_base, monkeypatch):
    """Engines of the tiny model; `free`: bytes on a GPU that is made up; None: a CPU."""
    trees, _ = trees_of(tiny_base, 8)

    def make(
        free: int | None = None,
        kernels: bool = True,
        rank: int = 0,
        ranks: int = 1,
        dev=(),
        pass_tokens=None,
        dropout: float = 0.0,
        seed: int = 0,
        **train,
    ) -> Engine:
        monkeypatch.setattr(module, "_limit", lambda train, device: free if device == CPU else pytest.fail("which?"))
        gpu = free is not None and kernels
        found = SimpleNamespace(kernels=lambda device, dtype: "some" if gpu and dtype == torch.float32 else None)
        monkeypatch.setattr(module, "varlen", found)
        monkeypatch.setattr(module, "CapturedPacks", Captured)
        options = Train(**{"questions_per_step": 8, **train})
        evaluation, lora = Eval(pass_tokens=pass_tokens), Lora(rank=4, dropout=dropout)
        config = Config("some", Base("tiny"), seed=seed, train=options, eval=evaluation, lora=lora)
        plan, model = Plan(trees, options, 0), lora_model(tiny_base, dropout=dropout)
        return Engine(model, plan, config, dev, torch.Tensor.backward, rank, ranks)

    return make


def test_graphs_are_captured_where_there_is_fused_attention_and_released_for_an_evaluation(make, monkeypatch):
    plain = make()
    assert (plain.pads, plain.planned, plain._captured) == (None, None, None)
    assert "CUDA graphs" not in plain.description
    with plain.released():
        pass
    graphs = make(free=8 * GIB)
    assert isinstance(graphs._captured, Captured)
    assert graphs.description.startswith("fused layers, ")
    assert graphs.description.endswith(", CUDA graphs")
    with graphs.released():
        assert graphs._captured.seen == ["released"]
    assert graphs._captured.seen == ["released", "captured"]

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs._captured, "capture", full)
    with pytest.raises(UserError, match=r"^out of GPU memory; lower train\.pack_tokens"), graphs.released():
        pass
    without = make(free=8 * GIB, kernels=False)
    assert without._captured is None
    assert "CUDA graphs" not in without.description


def test_sizes_are_of_the_packs_of_32_steps():
    assert module.SAMPLE_STEPS == 32


def test_layers_that_are_not_fused_recompute_without_reentrant_backward(make, monkeypatch):
    """Reentrant checkpoints need gradients of the inputs, which frozen embeddings have none of."""
    asked = []
    monkeypatch.setattr(LlamaForCausalLM, "gradient_checkpointing_enable", lambda self, **how: asked.append(how))
    make(fused=False)
    assert asked == [{"gradient_checkpointing_kwargs": {"use_reentrant": False}}]


def test_layers_hold_as_many_matrices_as_memory_allows(make, monkeypatch):
    given, fused, choose = [], module.Fused, memory.choose
    monkeypatch.setattr(module, "Fused", lambda *args: given.append(args[1:]) or fused(*args))
    monkeypatch.setattr(memory, "choose", lambda *args: choose(*args)._replace(keep_layers=1, hold_layers=2))
    make(free=8 * GIB)
    assert given == [(1, 2)]


def test_sizes_are_of_the_packs_of_the_first_steps_and_the_example_is_the_smallest(make, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_STEPS", 2)
    made = make(free=8 * GIB)
    unpadded = make()
    packs = [pack for step in range(2) for pack in unpadded.prepare(step)[1]]
    assert made.pads == module.PadSizes.of(packs, made.pack_tokens)
    assert made._captured.pads == made.pads
    assert made._captured.weights is made.weights
    assert made._captured.example.n_tokens == min(pack.n_tokens for pack in packs)
    trees, (padded, *_) = made.prepare(0)
    assert trees == unpadded.prepare(0)[0]
    assert len(padded.input_ids) in made.pads.tokens
    assert len(padded.input_ids) > padded.n_tokens


def test_a_rank_without_a_share_takes_the_sizes_of_the_first(make):
    first, last = (make(free=8 * GIB, rank=rank, ranks=64, questions_per_step=4) for rank in (0, 63))
    assert first.prepare(0)[1]
    assert last.prepare(0)[1] == []
    assert last.pads.tokens
    assert last._captured.example.n_tokens > 0


@pytest.mark.parametrize("loss", ["token", "question"])
def test_padded_or_not_a_steps_loss_and_gradient_are_the_same(make, loss):
    found = []
    for free in (None, 8 * GIB):
        made = make(free=free, loss=loss, label_smoothing=0.1)
        total = sum(made(pack, 0.25).item() for pack in made.prepare(0)[1])
        found.append((total, made.weights[0].grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert (found[0][1] - found[1][1]).norm() < 1e-5 * found[0][1].norm()


def test_layers_that_are_not_fused_have_packs_by_device_or_as_asked(make):
    given, checked = make(fused=False, pack_tokens=512), make(fused=False)
    assert (given.pack_tokens, checked.pack_tokens) == (512, 1024)
    assert (checked.keep_layers, checked.recomputed) == (0, 1.0)
    kept = make(fused=False, gradient_checkpointing=False)
    assert (kept.keep_layers, kept.recomputed) == (2, 0.0)
    assert checked.memory_advice == "lower train.pack_tokens (now 1024)"
    assert kept.memory_advice == "lower train.pack_tokens (now 1024), or set train.gradient_checkpointing=true"
    assert checked.description == "layers by transformers and PEFT (train.fused=false), packs of 1024 tokens"
    assert make(fused=False, memory_budget_gib="auto").keep_layers == 0, "what is free is no budget of theirs"
    by_hand = "set train.memory_budget_gib=null, and train.pack_tokens and train.gradient_checkpointing by hand"
    says = rf"needs the fused layers; not with train\.fused=false: {by_hand}$"
    with pytest.raises(UserError, match=says):
        make(fused=False, memory_budget_gib=8.0)


def test_the_advice_names_the_setting_that_holds_the_memory(make):
    tokens = make().pack_tokens
    assert make().memory_advice == f"lower train.pack_tokens (now {tokens}), or set train.memory_budget_gib"
    budgeted = make(memory_budget_gib=8.0).memory_advice
    assert budgeted == f"lower train.pack_tokens (now {tokens}), or lower train.memory_budget_gib"


@pytest.mark.parametrize("free", [None, 8 * GIB])
def test_every_pack_has_a_key_of_its_own_by_seed_step_rank_and_number(make, free):
    made = make(free=free, dropout=0.1, rank=1, ranks=2, seed=5, pack_tokens=300)
    assert "linears that share an input share its dropout mask (PEFT: a mask each)" in made.description
    for step in (0, 1):
        packs = made.prepare(step)[1]
        assert len(packs) > 1
        assert [p.dropout_key.tolist() for p in packs] == [pack_key(5, step, 1, i).tolist() for i in range(len(packs))]
    if free:
        assert made._captured.example.dropout_key is not None, "a graph's input"
    plain = make(free=free)
    assert all(pack.dropout_key is None for pack in plain.prepare(0)[1])
    assert "dropout" not in plain.description
    assert all(pack.dropout_key is None for pack in make(fused=False, dropout=0.1).prepare(0)[1])


def test_a_packs_key_decides_its_loss_and_gradient(make):
    found = []
    for step in (0, 0, 1):
        made = make(dropout=0.3)
        pack, other = made.prepare(0)[1][0], made.prepare(step)[1][0]
        loss = made(replace(pack, dropout_key=other.dropout_key), 1.0)
        found.append((loss.item(), made.weights[0].grad))
    assert found[0][0] == found[1][0] != found[2][0]
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], found[2][1])


def test_modules_alone_are_seeded_and_only_for_dropout(make, monkeypatch):
    seeds = []
    modules, *others = make(fused=False, dropout=0.1, seed=5, rank=1, ranks=2), make(dropout=0.1), make(fused=False)
    bare = make(fused=False)
    bare.config = replace(bare.config, lora=None)
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for made in (modules, *others, bare):
        made.seed_modules(7)
    assert seeds == [random.Random("5 7 1").getrandbits(63)]


def test_the_record_gets_what_was_chosen(make):
    made = make(free=8 * GIB)
    result = made.result()
    assert result.keys() == {
        "pack_tokens",
        "kept_layers",
        "recomputed",
        "counted_bytes",
        "planned_bytes",
        "trained_weights",
        "frozen_weights",
    }
    assert (result["counted_bytes"], result["planned_bytes"]) == (None, None)
    made.planned = memory.Planned({"base": 3}, {"layer inputs": 4}, 5, 6)
    result = made.result()
    assert (result["counted_bytes"], result["planned_bytes"]) == ({"base": 3, "layer inputs": 4}, 8)
    assert result["trained_weights"] == sum(map(torch.numel, made.weights))


@pytest.mark.parametrize("how", [{"fused": True}, {"fused": False}, {"free": 8 * GIB}, {"loss": "question"}])
def test_the_loss_of_an_evaluation_is_a_mean_over_answer_tokens_that_changes_nothing(make, tiny_base, how):
    dev, model = trees_of(tiny_base, 8)[0][3:], lora_model(tiny_base)
    made = make(**how, dev=dev, label_smoothing=0.3, pack_tokens=200)
    before = [None if p.grad is None else p.grad.clone() for p in made.weights]
    tokens = sum(len(branch.answer_ids) for tree in dev for branch in tree.branches)
    assert made.loss() == pytest.approx(rows_loss(model, dev).item() / tokens, rel=1e-5)
    assert made.model.training
    assert made.n_dev == sum(len(tree.branches) for tree in dev)
    after = [p.grad for p in made.weights]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_ranks_sum_their_parts_of_a_loss_and_one_that_is_stopped_stops_all(make, tiny_base, monkeypatch):
    dev = trees_of(tiny_base, 8)[0]
    parts, own = [], make(dev=dev).loss()
    engines = [make(dev=dev, rank=rank, ranks=2) for rank in range(2)]
    monkeypatch.setattr(module, "gather_object", lambda mine: parts.extend(mine) or mine)
    for made in engines:
        made.loss()
    monkeypatch.setattr(module, "gather_object", lambda mine: parts)
    assert made.loss() == pytest.approx(own, rel=1e-6)
    parts[1] = None
    assert made.loss() is None
    monkeypatch.setattr(module, "gather_object", lambda mine: mine)

    def stop():
        raise Stopped

    assert made.loss(stop) is None
    assert made.model.training


def test_a_loss_that_is_not_finite_or_of_no_question_selects_nothing(make, tiny_base, monkeypatch):
    made = make(dev=trees_of(tiny_base, 8)[0])
    monkeypatch.setattr(module.F, "cross_entropy", lambda *args, **how: torch.tensor(math.nan))
    with pytest.raises(UserError, match=r"^an evaluation's loss is nan; set base\.dtype=bf16 or fp32, or lower"):
        made.loss()
    config = Config("some", Base("tiny"), early_stop=EarlyStop(by="loss"))
    with pytest.raises(UserError, match="no question that selects has its first gold answer in the window"):
        Engine(lora_model(tiny_base), made.plan, config, [], torch.Tensor.backward)


def test_a_step_is_shared_out_by_tokens(make):
    ranks = [make(rank=rank, ranks=2) for rank in range(2)]
    whole = {branch.id for tree in ranks[0].prepare(1)[0] for branch in tree.branches}
    parts = [{id_ for pack in made.prepare(1)[1] for id_ in pack.ids} for made in ranks]
    assert functools.reduce(set.union, parts) == whole
    assert not parts[0] & parts[1]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("loss", ["token", "question"])
def test_a_packs_loss_is_the_sum_over_its_answer_tokens_or_its_questions_means(make, tiny_base, fused, loss):
    made, model = make(fused=fused, loss=loss, label_smoothing=0.1), lora_model(tiny_base)
    pack = made.prepare(0)[1][0]
    logits = pack_logits(model, pack, pack.target_index)
    by_token = cross_entropy(
        logits, pack.target_ids, reduction="none", ignore_index=IGNORED, label_smoothing=0.1
    ).tolist()
    shares = pack.target_share.tolist() if loss == "question" else [1.0] * len(by_token)
    expected = 0.25 * sum(value * share for value, share in zip(by_token, shares, strict=True))
    assert made(pack, 0.25).item() == pytest.approx(expected, rel=1e-5)
    assert all(weight.grad is not None for weight in made.weights)


def test_memory_is_counted_for_this_plan_this_device_and_an_evaluation(make, monkeypatch):
    choose, asked = memory.choose, []
    monkeypatch.setattr(memory, "choose", lambda *args: asked.append(args) or choose(*args))
    made = make(free=8 * GIB, ranks=2)
    ((train, shapes, device, step_tokens, answer_share, free, evaluation),) = asked
    trees = made.plan.trees
    tokens = sum(len(tree) for tree in trees)
    answers = sum(len(branch.answer_ids) for tree in trees for branch in tree.branches)
    assert (train, device, free) == (made.train, CPU, 8 * GIB)
    assert step_tokens == pytest.approx(tokens / made.plan.steps_per_epoch / 2)
    assert answer_share == pytest.approx(answers / tokens)
    assert evaluation == shapes.decoding_bytes(512, 1536)


@pytest.mark.parametrize(("pass_tokens", "longest", "tokens"), [(None, 1000, 1536), (700, 1600, 1632)])
def test_an_evaluation_needs_the_cache_of_its_longest_question(make, monkeypatch, pass_tokens, longest, tokens):
    """A question of 1,600 tokens, and 32 of its answer, in passes of as many as are asked for."""
    choose, asked = memory.choose, []
    monkeypatch.setattr(memory, "choose", lambda *args: asked.append(args) or choose(*args))
    dev = [Tree([1] * (longest - 7), (Branch("a", [2] * 3, []), Branch("b", [2] * 7, [])))]
    make(free=8 * GIB, dev=dev, pass_tokens=pass_tokens)
    ((_, shapes, *_, evaluation),) = asked
    assert evaluation == shapes.decoding_bytes(pass_tokens or 512, tokens)


@pytest.mark.parametrize(("budget", "limit"), [("auto", 70), (8.0, 70), (None, None)])
def test_a_gpus_allocator_is_kept_to_the_budget(monkeypatch, budget, limit):
    gpu, done = SimpleNamespace(type="cuda"), []
    monkeypatch.setattr(memory, "keep_to", lambda n, device: done.append(n) if device is gpu else None)
    monkeypatch.setattr(memory, "limit_bytes", lambda given, device: 77 if (given, device) == (budget, gpu) else None)
    monkeypatch.setattr(memory, "usable_bytes", lambda n, device: n - 7 if device is gpu else None)
    assert module._limit(Train(memory_budget_gib=budget), gpu) == limit
    assert done == ([77] if budget else [])
    assert module._limit(Train(memory_budget_gib=budget), CPU) is None


def test_a_gpu_has_larger_packs_for_layers_that_are_not_fused():
    made = Engine.__new__(Engine)
    made.train, made.device = Train(gradient_checkpointing=False), SimpleNamespace(type="cuda")
    made.plan = SimpleNamespace(trees=[Tree([1] * 9, (Branch("a", [2], [3]),))])
    config = LlamaConfig(num_hidden_layers=3, sliding_window=None)
    made._use_modules(SimpleNamespace(config=config, parameters=lambda: []), "a reason")
    assert (made.pack_tokens, made.keep_layers) == (4096, 3)


def test_what_does_not_fit_while_graphs_are_captured_says_what_to_lower(make, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Captured, "__init__", full)
    with pytest.raises(UserError, match=r"^out of GPU memory; lower train\.pack_tokens \(now "):
        make(free=8 * GIB)


def test_each_rank_takes_sizes_of_its_own_packs(make):
    mine = make(free=8 * GIB, rank=1, ranks=2)
    unpadded = make(rank=1, ranks=2)
    steps = range(min(32, unpadded.plan.steps_per_epoch))
    packs = [pack for step in steps for pack in unpadded.prepare(step)[1]]
    assert mine._captured.example.n_tokens == min(pack.n_tokens for pack in packs)
    assert mine.pads == module.PadSizes.of(packs, mine.pack_tokens)


@pytest.mark.parametrize("reasons", [["it is wrong"], [None, "it is wrong"]])
def test_layers_that_any_rank_finds_wrong_at_first_use_are_not_used_budget_or_not(make, monkeypatch, reasons):
    asked = []
    monkeypatch.setattr(module.first_use, "mismatch", lambda model, trees: asked.append(trees) or reasons[0])
    monkeypatch.setattr(module, "gather_object", lambda mine: reasons if mine == reasons[:1] else pytest.fail("whose?"))
    made = make(free=8 * GIB, memory_budget_gib=8.0)
    assert made.description.startswith("layers by transformers and PEFT (it is wrong)")
    assert asked == [made.plan.trees]
    pack = made.prepare(0)[1][0]
    assert made(pack, 1.0) > 0
    assert any(p.grad is not None for p in made.weights)
