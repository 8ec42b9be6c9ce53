"""Before a model is loaded its sizes are known, and about how long an epoch takes."""

from dataclasses import asdict

from common.config import CONFIGS, Base, Lora, load
from common.errors import UserError
from common.model import estimate, memory
from common.model.adapter import add_lora
from common.model.llama import adapter_size
from common.model.load import load_base
from common.model.memory import GIB, Shapes
from tests.model.test_pack import CPU, lora_model

import pytest
import torch
from transformers import AutoConfig

GPU = torch.device("cuda")


@pytest.mark.parametrize(("fixture", "dropout"), [("tiny_base", 0.0), ("tiny_base", 0.1), ("smollm2_base", 0.0)])
def test_shapes_without_a_model_are_those_of_the_model(request, fixture, dropout):
    """But for absmaxes of blocks that are not whole, and their tables."""
    folder = request.getfixturevalue(fixture)
    model = lora_model(folder, "nf4", dropout=dropout)
    expected, lora = Shapes.of(model, adapter_size(model)), Lora(rank=4, dropout=dropout)
    found = estimate.shapes_of(AutoConfig.from_pretrained(folder), lora, 4)
    assert asdict(found) | {"base_bytes": 0} == asdict(expected) | {"base_bytes": 0}
    assert found.base_bytes == pytest.approx(expected.base_bytes, rel=0.01)


def test_few_targets_are_fewer_weights(tiny_base):
    config = AutoConfig.from_pretrained(tiny_base)
    lora = Lora(rank=8, targets=("q_proj", "v_proj"))
    model = add_lora(load_base(Base(str(tiny_base)), CPU), lora, 0)
    assert estimate.shapes_of(config, lora, 2).lora == adapter_size(model)


@pytest.fixture
def on_a_card(monkeypatch):
    """`on_a_card(GiB)`: the plan of qlora7b and an epoch's minutes, where products reach 100 TFLOP/s."""

    def plan(gib: float):
        monkeypatch.setattr(memory, "limit_bytes", lambda budget, device: gib * GIB)
        monkeypatch.setattr(memory, "usable_bytes", lambda limit, device: int(limit))
        monkeypatch.setattr(estimate, "compute_dtype", lambda base, device: torch.bfloat16)
        monkeypatch.setattr(estimate, "products_per_second", lambda device, dtype: 100e12)
        return estimate.training(load("qlora7b"), GPU)

    return plan


def test_more_memory_is_less_time_and_no_less_than_two_passes_of_all_weights(on_a_card):
    (small, slow), (large, fast) = on_a_card(6.5), on_a_card(22.5)
    assert small.keep_layers < large.keep_layers == 32
    passes = 2 * 2 * 6.476e9 * estimate.TOKENS / (estimate.REACHED * 100e12) / 60
    assert passes < fast < 1.2 * passes < slow < 2 * passes


def test_a_products_speed_is_of_the_second_of_two_equal_times(monkeypatch):
    """A clock that goes on by a quarter of a second at each look: two rounds of eight products each time."""
    looks = iter(i / 4 for i in range(99))
    waited, made, randn = [], [], torch.randn
    monkeypatch.setattr(estimate.gauges, "now", lambda device: waited.append(device) or next(looks))
    monkeypatch.setattr(torch, "randn", lambda *shape, **how: made.append((shape, how)) or randn(3, 3))
    # the first look begins, the second and third see less than 0.7 s, the fourth 0.75 s
    assert estimate.products_per_second(CPU, torch.bfloat16, n=3, seconds=0.7) == 16 * 2 * 27 / 0.75
    assert made == [((3, 3), {"dtype": torch.bfloat16, "device": CPU})]
    assert waited == [CPU] * 8


def test_a_card_that_is_too_small_is_refused(on_a_card):
    with pytest.raises(UserError, match="packs of 512 tokens take about"):
        on_a_card(4)


def test_the_shapes_named_are_those_at_hand():
    assert (
        AutoConfig.from_pretrained(CONFIGS / "shapes" / estimate.SHAPES[load("qlora7b").base.path]).hidden_size == 4096
    )
