"""Before the first step on a new card the fused layers are held against PEFT's modules; what differs is not used."""

import json

from common.data.trees import Tree
from common.model import llama
from common.train import first_use, fused
from tests.conftest import ROOT
from tests.model.test_pack import lora_model, trees_of
from tests.train.test_fused import adapter_weights

import pytest
import torch

DEFAULT = first_use.FOLDER  # before the tests change it


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(first_use, "FOLDER", tmp_path / "checked")
    return tmp_path / "checked"


@pytest.fixture
def trees(tiny_base):
    return trees_of(tiny_base, 4)[0]


def test_layers_that_agree_are_used_and_the_model_is_left_as_it_was(tiny_base, trees, folder, capsys):
    model, as_made = lora_model(tiny_base, "nf4"), lora_model(tiny_base, "nf4")
    assert first_use.mismatch(model, trees) is None
    weights, expected = adapter_weights(model), adapter_weights(as_made)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert all(p.requires_grad and p.grad is None for p in weights)
    assert not torch.equal(weights[0], torch.zeros_like(weights[0]))
    kept = json.loads(next(folder.iterdir()).read_text())
    assert kept["mismatch"] is None
    decides = {"device", "versions", "code", "dtype", "quantised", "layers", "heads", "adapter"}
    assert kept.keys() == {"mismatch", "said", *decides}
    assert DEFAULT == ROOT / ".cache" / "checked"
    assert kept["dtype"] == "torch.float32"
    assert "gradients 0.0" in kept["said"]
    assert kept["said"] in capsys.readouterr().err


def test_gradients_of_both_matrices_are_compared_though_a_new_b_is_zero(tiny_base, trees):
    model = lora_model(tiny_base)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    found = first_use.compare(model, trees[0])
    assert found.near(1e-4)
    assert found.expected > 1
    assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("broken", ["swiglu", "turn", "norm"])
def test_a_kernel_that_computes_something_else_is_named_and_found_again_without_computing(
    tiny_base, trees, monkeypatch, capsys, broken
):
    model, right = lora_model(tiny_base), getattr(llama, broken)

    def wrong(*args):
        out = right(*args)
        return (out[0] * 1.1, *out[1:]) if isinstance(out, tuple) else out * 1.1

    monkeypatch.setattr(llama, broken, wrong)
    said = first_use.mismatch(model, trees)
    assert "the fused layers compute something else: loss " in said
    assert "CPU" in said
    assert said.rpartition("else: ")[2] in capsys.readouterr().err
    monkeypatch.setattr(first_use, "compare", lambda *args: pytest.fail("it was known"))
    assert first_use.mismatch(model, trees) == said


def test_a_kernel_that_fails_is_not_used_and_memory_that_is_short_says_nothing(tiny_base, trees, monkeypatch, folder):
    model = lora_model(tiny_base)

    def fails(error: Exception):
        def fail(*args):
            raise error

        monkeypatch.setattr(fused, "_swiglu_back", fail)
        return first_use.mismatch(model, trees)

    assert fails(torch.OutOfMemoryError("CUDA out of memory")) is None
    assert not folder.exists()
    assert fails(RuntimeError("no kernel image\nmore")).endswith("the fused layers fail: no kernel image")
    assert all(p.requires_grad for p in adapter_weights(model))


@pytest.mark.parametrize(
    ("loss", "distance", "fine"),
    [(100.9, 0.009, True), (101.1, 0.0, False), (100, 0.011, False), (100, float("nan"), False)],
)
def test_what_counts_as_far(tiny_base, trees, monkeypatch, loss, distance, fine):
    monkeypatch.setattr(first_use, "compare", lambda *args: first_use.Found(loss, 100.0, distance))
    assert (first_use.mismatch(lora_model(tiny_base), trees) is None) == fine


def test_modules_that_overflow_themselves_tell_nothing(tiny_base, trees, folder):
    model = lora_model(tiny_base)
    weight = next(p for name, p in model.named_parameters() if "down_proj.base_layer" in name)
    weight.data.fill_(torch.finfo(torch.float32).max)
    assert first_use.mismatch(model, trees) is None
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}"])
def test_another_version_precision_or_a_damaged_answer_is_checked_again(tiny_base, trees, monkeypatch, folder, damage):
    model, asked = lora_model(tiny_base), []
    monkeypatch.setattr(first_use, "compare", lambda *args: asked.append(args) or first_use.Found(1.0, 1.0, 0.0))
    first_use.mismatch(model, trees)
    first_use.mismatch(model, trees)
    assert len(asked) == 1
    next(folder.iterdir()).write_text(damage)
    first_use.mismatch(model, trees)
    assert len(asked) == 2
    monkeypatch.setattr(first_use, "_version", lambda package: "another")
    first_use.mismatch(model, trees)
    first_use.mismatch(lora_model(tiny_base, dtype="bf16"), trees)
    first_use.mismatch(lora_model(tiny_base, "nf4"), trees)
    assert len(asked) == 5
    assert len(asked[0][1].branches) in (2, 3), "a small tree that branches"
    first_use.mismatch(lora_model(tiny_base, "fp4"), [Tree(trees[0].prefix_ids, trees[0].branches * 4)])
    assert len(asked) == 6
    assert len(asked[5][1].branches) == 3


@pytest.mark.parametrize(("file", "counts"), [("model/a.py", True), ("train/b.py", True), ("data/c.py", False)])
def test_other_code_of_the_layers_is_checked_again(tiny_base, tmp_path, monkeypatch, file, counts):
    for wing in ("model", "train", "data"):
        (tmp_path / "common" / wing).mkdir(parents=True)
    monkeypatch.setattr(first_use, "ROOT", tmp_path)
    model = lora_model(tiny_base)
    before = first_use._decides(model)
    (tmp_path / "common" / file).write_text("x = 1")
    assert (first_use._decides(model) != before) == counts


def test_a_folder_that_cannot_be_written_is_no_reason(tiny_base, trees, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(first_use, "FOLDER", tmp_path / "file" / "in it")
    assert first_use.mismatch(lora_model(tiny_base), trees) is None
