"""The fused layers are held against PEFT's modules on one small tree, which changes nothing."""

from common.data.trees import Tree
from common.model import first_use as kept
from common.model import llama
from common.train import first_use, fused
from tests.model.test_pack import lora_model, trees_of
from tests.train.test_fused import adapter_weights

import pytest
import torch


@pytest.fixture
def trees(tiny_base):
    return trees_of(tiny_base, 4)[0]


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_layers_that_agree_are_near_and_the_model_is_left_as_it_was(tiny_base, trees, quant):
    model, as_made = lora_model(tiny_base, quant), lora_model(tiny_base, quant)
    found = first_use.compare(model, trees[0])
    assert found.distance < 1e-4
    assert found.ours == pytest.approx(found.expected, rel=1e-5)
    assert found.expected > 1
    assert found.most == 0.01
    weights, expected = adapter_weights(model), adapter_weights(as_made)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert all(p.requires_grad and p.grad is None for p in weights)
    assert lora_model(tiny_base, quant, "bf16").dtype == torch.bfloat16
    assert first_use.compare(lora_model(tiny_base, quant, "bf16"), trees[0]).most == 0.3


def test_nothing_is_dropped_on_either_side_and_dropout_is_on_again_afterwards(tiny_base, trees, monkeypatch):
    model = lora_model(tiny_base, dropout=0.5).train()
    model.get_base_model().model.layers[1].mlp.down_proj.lora_dropout.eval()
    before = {name: module.training for name, module in model.named_modules()}
    found = first_use.compare(model, trees[0])
    assert found.distance < 1e-4
    assert found.ours == first_use.compare(lora_model(tiny_base), trees[0]).ours
    assert {name: module.training for name, module in model.named_modules()} == before

    def fail(*args):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(fused, "_swiglu_back", fail)
    with pytest.raises(RuntimeError, match="no kernel image"):
        first_use.compare(model, trees[0])
    assert {name: module.training for name, module in model.named_modules()} == before


def test_gradients_of_both_matrices_are_compared_though_a_new_b_is_zero(tiny_base, trees, monkeypatch):
    model = lora_model(tiny_base)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    assert first_use.compare(model, trees[0]).distance < 1e-4
    assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    right = fused._scaled
    monkeypatch.setattr(fused, "_scaled", lambda x, scale: right(x, scale) * (1 if x.requires_grad else 1.5))
    assert first_use.compare(model, trees[0]).distance > 0.05


@pytest.mark.parametrize("broken", ["swiglu", "turn", "norm"])
def test_a_kernel_that_computes_something_else_is_far(tiny_base, trees, monkeypatch, broken):
    model, right = lora_model(tiny_base), getattr(llama, broken)

    def wrong(*args):
        out = right(*args)
        return (out[0] * 1.1, *out[1:]) if isinstance(out, tuple) else out * 1.1

    monkeypatch.setattr(llama, broken, wrong)
    assert not first_use.compare(model, trees[0]).distance <= 0.01


def test_nan_is_far_and_a_kernel_that_fails_leaves_the_model_as_it_was(tiny_base, trees, monkeypatch):
    model, right = lora_model(tiny_base), fused._swiglu_back
    monkeypatch.setattr(fused, "_swiglu_back", lambda *args: tuple(x * float("nan") for x in right(*args)))
    found = first_use.compare(model, trees[0])
    assert not found.distance <= 1e9
    assert found.expected == found.expected

    def fail(*args):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(fused, "_swiglu_back", fail)
    with pytest.raises(RuntimeError, match="no kernel image"):
        first_use.compare(model, trees[0])
    assert all(p.requires_grad and p.grad is None for p in adapter_weights(model))


def test_modules_that_overflow_expect_nothing(tiny_base, trees):
    model = lora_model(tiny_base)
    weight = next(p for name, p in model.named_parameters() if "down_proj.base_layer" in name)
    weight.data.fill_(torch.finfo(torch.float32).max)
    found = first_use.compare(model, trees[0])
    assert found.expected != found.expected


def test_a_small_tree_that_branches_is_taken_and_three_questions_of_it(tiny_base, trees, monkeypatch):
    asked = []
    monkeypatch.setattr(first_use, "compare", lambda model, tree: asked.append(tree) or "found")
    monkeypatch.setattr(kept, "mismatch", lambda model, way, compare: (way, compare()))
    many = [Tree(tree.prefix_ids, tree.branches * 2) for tree in trees]
    alone = Tree(trees[0].prefix_ids[:5], trees[0].branches[:1])
    pair = Tree(trees[0].prefix_ids[:9], trees[0].branches[:2])
    model = lora_model(tiny_base)
    assert first_use.mismatch(model, [alone, *many]) == ("training", "found")
    smallest = min(many, key=len)
    assert asked == [Tree(smallest.prefix_ids, smallest.branches[:3])]
    first_use.mismatch(model, [alone, *many, pair])
    first_use.mismatch(model, [alone])
    assert asked[1:] == [pair, alone]
