"""The fused layers compute what transformers' and PEFT's modules compute, loss and every gradient."""

import json
import re
from pathlib import Path

from common.config import Base, Lora
from common.data.trees import Tree
from common.model import tree_mask
from common.model.adapter import add_lora
from common.model.load import load_base
from common.model.pack import IGNORED, Pack, PadSizes, build_pack
from common.train.fused import Fused, flatten, untrainable_reason
from tests.model.test_pack import CPU, gradient, lora_model, trees_of

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy


def loss_of(logits_of, batch: Pack) -> torch.Tensor:
    logits = logits_of(batch, batch.target_index)
    loss = cross_entropy(logits.float(), batch.target_ids, reduction="sum", ignore_index=IGNORED)
    loss.backward()
    return loss.detach()


def plain_loss(model, batch: Pack) -> torch.Tensor:
    return loss_of(lambda pack, keep: tree_mask.pack_logits(model, pack, keep), batch)


def adapter_weights(model) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lora_" in name]


def fused_gradient(model, fused: Fused) -> torch.Tensor:
    """In the order of the model's own parameters, as `gradient` has it."""
    start = fused.flat.data_ptr()
    spots = [((w.data_ptr() - start) // 4, w.numel()) for w in adapter_weights(model)]
    return torch.cat([fused.flat.grad[a : a + n] for a, n in spots])


def off(found: torch.Tensor, truth: torch.Tensor) -> float:
    assert truth.norm() > 0
    return ((found - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(("keep_layers", "hold_layers"), [(0, 0), (1, 2), (2, 1)])
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_loss_and_gradients_are_those_of_the_modules(tiny_base, quant, keep_layers, hold_layers):
    trees, _ = trees_of(tiny_base, 3)
    model, batch = lora_model(tiny_base, quant), build_pack(trees)
    loss, truth = plain_loss(model, batch), gradient(model)
    fused = Fused(model, keep_layers, hold_layers)
    assert loss_of(fused.logits, batch).item() == pytest.approx(loss.item(), rel=1e-6)
    assert off(fused_gradient(model, fused), truth) < 1e-5


@pytest.mark.parametrize(
    "targets", [("q_proj",), ("k_proj", "v_proj"), ("o_proj", "up_proj"), ("gate_proj", "down_proj"), ("down_proj",)]
)
def test_layers_without_an_adapter_are_left_as_they_are(tiny_base, targets):
    trees, _ = trees_of(tiny_base, 2)
    model = add_lora(load_base(Base(str(tiny_base), dtype="fp32"), CPU), Lora(3, alpha=8, targets=targets), seed=0)
    for p in adapter_weights(model):
        torch.nn.init.normal_(p, std=0.1)
    batch = build_pack(trees)
    loss, truth = plain_loss(model, batch), gradient(model)
    fused = Fused(model)
    assert loss_of(fused.logits, batch).item() == pytest.approx(loss.item(), rel=1e-6)
    assert off(fused_gradient(model, fused), truth) < 1e-5


def first_layers(base: Path, folder: Path, n: int) -> Path:
    """A real model cut down to its first layers: the same ids and shapes, a fraction of the time."""
    folder.mkdir(exist_ok=True)
    for path in base.iterdir():
        if path.name not in ("config.json", "model.safetensors") and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": n}))
    weights = load_file(base / "model.safetensors")
    layer = re.compile(r"model\.layers\.(\d+)\.")
    kept = {name: w for name, w in weights.items() if not (m := layer.match(name)) or int(m[1]) < n}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_real_weights_too(smollm2_base, tmp_path):
    (tree,), _ = trees_of(smollm2_base, 1)
    model = lora_model(first_layers(smollm2_base, tmp_path, 3), "nf4")
    batch = build_pack([Tree(tree.prefix_ids, tree.branches[:2])])
    loss, truth = plain_loss(model, batch), gradient(model)
    fused = Fused(model, keep_layers=1, hold_layers=2)
    assert loss_of(fused.logits, batch).item() == pytest.approx(loss.item(), rel=1e-5)
    assert off(fused_gradient(model, fused), truth) < 1e-5


def test_padding_changes_nothing(tiny_base):
    trees, _ = trees_of(tiny_base, 3)
    model, batch = lora_model(tiny_base), build_pack(trees)
    padded = PadSizes.of([batch], most_tokens=2000).pad(batch)
    assert len(padded.input_ids) > len(batch.input_ids)
    assert len(padded.target_ids) > len(batch.target_ids)
    fused = Fused(model)
    loss, truth = loss_of(fused.logits, batch), fused_gradient(model, fused)
    fused.flat.grad = None
    assert loss_of(fused.logits, padded).item() == pytest.approx(loss.item(), rel=1e-6)
    assert off(fused_gradient(model, fused), truth) < 1e-6


def test_what_fits_no_graph_in_one_is_split_and_adds_up(tiny_base):
    trees, _ = trees_of(tiny_base, 4)
    model = lora_model(tiny_base)
    pads, fused = PadSizes.of([build_pack(trees[:1])], most_tokens=len(build_pack(trees[:1]).input_ids)), Fused(model)
    whole, packs = build_pack(trees), pads.packs(trees)
    assert len(packs) >= 3
    assert sum(p.n_tokens for p in packs) == whole.n_tokens == len(whole.input_ids)
    padded = [p for p in packs if len(p.input_ids) > p.n_tokens]
    assert len({p.shape for p in padded}) == 1
    loss, truth = loss_of(fused.logits, whole), fused_gradient(model, fused)
    fused.flat.grad = None
    assert sum(loss_of(fused.logits, p).item() for p in packs) == pytest.approx(loss.item(), rel=1e-6)
    assert off(fused_gradient(model, fused), truth) < 1e-6


def test_the_modules_weights_are_views_of_the_flat_one(tiny_base):
    model = lora_model(tiny_base)
    before = [w.detach().clone() for w in adapter_weights(model)]
    flat, adapters = flatten(model)
    assert flat.numel() == sum(w.numel() for w in before) == sum(sum(adapter.sizes) for adapter in adapters)
    assert all(torch.equal(a, b) for a, b in zip(before, adapter_weights(model), strict=True))
    assert not any(w.requires_grad for w in model.parameters())
    with torch.no_grad():
        flat += 1
    assert all(torch.equal(a + 1, b) for a, b in zip(before, adapter_weights(model), strict=True))


def test_one_optimizer_tensor_trains_as_many_do(tiny_base):
    """Not bit for bit: blocks of 8-bit state lie elsewhere, and small tensors have state of 32 bits when alone."""
    trees, _ = trees_of(tiny_base, 3)
    losses = []
    for flat in (False, True):
        model, batch = lora_model(tiny_base), build_pack(trees)
        fused = Fused(model) if flat else None
        weights = [fused.flat] if fused else [p for p in model.parameters() if p.requires_grad]
        optimizer = bnb.optim.PagedAdamW8bit(weights, lr=1e-2)
        mine = []
        for _ in range(4):
            mine.append((loss_of(fused.logits, batch) if fused else plain_loss(model, batch)).item())
            optimizer.step()
            optimizer.zero_grad()
        losses.append(mine)
    many, one = losses
    assert many[-1] < 0.9 * many[0]
    assert one == [pytest.approx(x, rel=0.02) for x in many]


def test_micro_batches_add_up(tiny_base):
    trees, _ = trees_of(tiny_base, 4)
    model = lora_model(tiny_base)
    fused = Fused(model, keep_layers=1)
    loss_of(fused.logits, build_pack(trees))
    whole = fused.flat.grad.clone()
    fused.flat.grad.zero_()
    for part in (trees[:2], trees[2:]):
        loss_of(fused.logits, build_pack(part))
    assert off(fused.flat.grad, whole) < 1e-5


def test_dropout_is_trained_too(tiny_base):
    model = lora_model(tiny_base, dropout=0.3)
    assert untrainable_reason(model) is None
    assert Fused(model).dropout == 0.3
    assert Fused(lora_model(tiny_base)).dropout == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m.peft_config["default"], "use_dora", True), "its LoRA has use_dora"),
        (lambda m: setattr(m.config, "model_type", "gemma"), "gemma"),
        (lambda m: m.config.rope_parameters.update(rope_type="dynamic"), "rotary"),
        (lambda m: m.get_base_model().lm_head.weight.requires_grad_(True), "something else"),
        (lambda m: m.get_base_model().model.layers[0].self_attn.q_proj.scaling.update(default=3.0), "scaled"),
    ],
)
def test_what_it_cannot_compute_goes_the_plain_way(tiny_base, change, reason):
    model = lora_model(tiny_base)
    assert untrainable_reason(model) is None
    change(model)
    assert reason in untrainable_reason(model)
