"""Dropout masks are random numbers of their key alone, and the fused layers train under them as PEFT's modules do."""

import itertools
from dataclasses import replace

from common.model import llama
from common.model.llama import DOWN, GATE_UP, GROUPS, OUT, QKV
from common.model.pack import Pack, PadSizes, build_pack
from common.train import dropout
from common.train.dropout import drop, group_keys, pack_key
from common.train.fused import Fused
from tests.model.test_pack import gradient, lora_model, trees_of
from tests.train.test_fused import fused_gradient, loss_of, off, plain_loss

import pytest
import torch
from torch import Tensor

KEY = pack_key(0, 1, 2, 3)
ROWS, COLUMNS = 600, 500


def kept(key: Tensor, rate: float = 0.5) -> Tensor:
    """-1 where a number is dropped, else 1: [ROWS, COLUMNS] fp64."""
    return 2 * (drop(torch.ones(ROWS, COLUMNS), key, rate) != 0).double() - 1


def assert_independent(a: Tensor, b: Tensor) -> None:
    """Five standard deviations: a correct generator exceeds them once in two million pairs."""
    assert abs((a * b).mean().item()) < 5 / a.numel() ** 0.5


@pytest.mark.parametrize("rate", [1e-3, 0.05, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_the_share_that_is_dropped_is_the_rate(rate):
    for key in group_keys(KEY, 3).flatten(0, 1):
        dropped = (drop(torch.ones(ROWS, COLUMNS), key, rate) == 0).double()
        for part in (dropped, dropped[:60], dropped[:, :50]):
            assert abs(part.mean().item() - rate) < 5 * (rate * (1 - rate) / part.numel()) ** 0.5
        assert dropped.mean(0).std().item() == pytest.approx((rate * (1 - rate) / ROWS) ** 0.5, rel=0.2)
        assert dropped.mean(1).std().item() == pytest.approx((rate * (1 - rate) / COLUMNS) ** 0.5, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_is_divided_by_its_share_so_the_mean_stays(dtype):
    x, key = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype), group_keys(KEY, 1)[0, 0]
    found, mask = drop(x, key, 0.2), kept(key, 0.2) > 0
    assert found.dtype == dtype
    assert torch.equal(found[mask], (x[mask].double() / 0.8).to(dtype)), "rounded once"
    assert not found[~mask].any()
    ones = drop(torch.ones(ROWS, COLUMNS), key, 0.2)
    assert ones.mean().item() == pytest.approx(1, abs=5 * (0.2 / 0.8 / ones.numel()) ** 0.5)


def test_extreme_rates_drop_nothing_or_nearly_everything():
    x = torch.ones(ROWS, COLUMNS)
    assert torch.equal(drop(x, KEY, 1e-12), x)
    assert not drop(x, KEY, 1 - 1e-12).any()


def test_neighbours_are_independent():
    """In a mask: rows, columns, diagonals, and distances of a power of two. Between masks: groups and layers."""
    keys = group_keys(KEY, 4)
    mask = kept(keys[0, 0])
    for n in (1, 2, 3, 4, 8, 16, 32, 64, 128, 256):
        assert_independent(mask[n:], mask[:-n])
        assert_independent(mask[:, n:], mask[:, :-n])
        assert_independent(mask[n:, n:], mask[:-n, :-n])
        assert_independent(mask[n:, :-n], mask[:-n, n:])
    masks = [kept(key) for key in keys.flatten(0, 1)]
    assert len(masks) == 4 * len(GROUPS)
    for a, b in itertools.combinations(masks, 2):
        assert_independent(a, b)
        assert_independent(a[1:], b[:-1])


def test_seeds_steps_ranks_and_packs_have_masks_of_their_own():
    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 1, 1), (11, 1, 1, 1)]
    keys = [pack_key(*place) for place in places]
    assert len({tuple(key.tolist()) for key in keys}) == len(places)
    assert all((key.shape, key.dtype) == ((2,), torch.int32) for key in keys)
    for a, b in itertools.combinations([kept(group_keys(key, 1)[0, 0]) for key in keys], 2):
        assert_independent(a, b)
    assert torch.equal(pack_key(5, 6, 7, 8), pack_key(5, 6, 7, 8))


def test_both_words_of_a_key_count():
    masks = [kept(torch.tensor(words, dtype=torch.int32)) for words in ([3, 5, 0, 0], [4, 5, 0, 0], [3, 6, 0, 0])]
    for a, b in itertools.combinations(masks, 2):
        assert_independent(a, b)


def test_a_mask_depends_on_row_and_column_alone():
    """Padding adds rows, and a part of a row is no view of another length."""
    key, x = group_keys(KEY, 1)[0, 2], torch.ones(ROWS, COLUMNS)
    assert torch.equal(drop(x, key, 0.3)[:77], drop(x[:77], key, 0.3))
    assert torch.equal(drop(x.T.contiguous().T, key, 0.3), drop(x, key, 0.3))


def lowbias32(x: int) -> int:
    """As its author has it, in C: https://nullprogram.com/blog/2018/07/31/."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_bits_are_those_of_the_published_function():
    unsigned = [n % 2**32 for n in KEY.tolist()]

    def bits(n: int, words: list[int]) -> int:
        return lowbias32(lowbias32(n ^ words[0]) ^ words[1])

    keys = group_keys(KEY, 2)
    assert [n % 2**32 for n in keys.flatten().tolist()] == [bits(n, unsigned) for n in range(2 * 4 * 4)]
    words = [n % 2**32 for n in keys[1, 3].tolist()]
    least = round(0.3 * 2**32)  # of unsigned numbers; int32 begins 2^31 lower
    expected = [[(bits(row * 7 + column, words) ^ 2**31) >= least for column in range(7)] for row in range(40)]
    assert (drop(torch.ones(40, 7), keys[1, 3], 0.3) != 0).tolist() == expected


class Masked(torch.nn.Module):
    """In place of PEFT's dropout of one linear: the mask of its layer's group."""

    def __init__(self, key: Tensor, rate: float):
        super().__init__()
        self.key, self.rate = key, rate

    def forward(self, x: Tensor) -> Tensor:
        return x * drop(torch.ones(x.shape[-2:]), self.key, self.rate)


def masked(model, key: Tensor, rate: float) -> None:
    """Give PEFT's modules the masks that the fused layers derive from a pack's `key`."""
    layers = llama.layers_of(model)
    for layer, keys in zip(layers, group_keys(key, len(layers)), strict=True):
        linears = dict(layer.self_attn.named_children()) | dict(layer.mlp.named_children())
        for number, group in enumerate(GROUPS):
            for name in group:
                linears[name].lora_dropout["default"] = Masked(keys[number], rate)


@pytest.fixture
def pack(tiny_base) -> Pack:
    return replace(build_pack(trees_of(tiny_base, 3)[0]), dropout_key=KEY)


def by_fused(base, pack: Pack, rate: float = 0.4, keep_layers: int = 0, quant: str = "none") -> tuple[float, Tensor]:
    """(loss, gradient) of a new model."""
    model = lora_model(base, quant, dropout=rate)
    fused = Fused(model, keep_layers)
    return loss_of(fused.logits, pack).item(), fused_gradient(model, fused)


@pytest.mark.parametrize("keep_layers", [0, 1, 2])
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_loss_and_gradients_are_those_of_the_modules_under_the_same_masks(tiny_base, pack, quant, keep_layers):
    model = lora_model(tiny_base, quant)
    undropped = plain_loss(model, pack).item()
    model.zero_grad()
    masked(model, KEY, 0.4)
    expected, truth = plain_loss(model, pack).item(), gradient(model)
    assert abs(expected - undropped) > 1e-4 * undropped, "the masks matter"
    loss, found = by_fused(tiny_base, pack, 0.4, keep_layers, quant)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert off(found, truth) < 1e-5


def test_layers_that_compute_again_derive_the_same_masks(tiny_base, pack):
    (loss, again), (kept_loss, all_kept) = (by_fused(tiny_base, pack, keep_layers=n) for n in (0, 2))
    assert loss == kept_loss
    assert torch.equal(again, all_kept)


@pytest.mark.parametrize("group", [QKV, OUT, GATE_UP, DOWN])
def test_every_group_is_dropped_by_a_mask_of_its_own_in_every_pass(tiny_base, pack, monkeypatch, group):
    """Forward, again, for A's gradient and for that of the input: four times a layer, of down three."""
    calls, right, keys = [], drop, group_keys(KEY, 2)[:, group]
    monkeypatch.setattr(dropout, "drop", lambda x, key, rate: calls.append((key, rate)) or right(x, key, rate))
    by_fused(tiny_base, pack)
    for key in keys:
        assert [rate for found, rate in calls if torch.equal(found, key)] == [0.4] * (3 if group == DOWN else 4)


def test_other_keys_are_other_gradients_and_the_same_key_the_same(tiny_base, pack):
    losses, gradients = zip(
        *(by_fused(tiny_base, replace(pack, dropout_key=pack_key(0, *place))) for place in ((0, 0, 0), (1, 0, 0))),
        strict=True,
    )
    assert losses[0] != losses[1]
    assert off(*gradients) > 0.05
    assert torch.equal(by_fused(tiny_base, pack)[1], by_fused(tiny_base, pack)[1])


@pytest.mark.parametrize("keep_layers", [0, 2])
def test_without_a_rate_or_a_key_nothing_is_dropped_to_the_bit(tiny_base, pack, monkeypatch, keep_layers):
    expected, truth = by_fused(tiny_base, replace(pack, dropout_key=None), 0.0, keep_layers)
    monkeypatch.setattr(dropout, "group_keys", lambda *_: pytest.fail("a kernel that nothing needs"))
    monkeypatch.setattr(dropout, "drop", lambda *_: pytest.fail("a kernel that nothing needs"))
    for rate, key in ((0.0, KEY), (0.4, None)):
        loss, found = by_fused(tiny_base, replace(pack, dropout_key=key), rate, keep_layers)
        assert loss == expected
        assert torch.equal(found, truth)


def test_a_packs_key_moves_and_is_padded_with_it_and_is_a_graphs_input(pack):
    keyless = replace(pack, dropout_key=None)
    padded = PadSizes.of([pack], most_tokens=2000).pad(pack)
    assert padded.dropout_key is KEY
    assert torch.equal(padded.to(torch.device("cpu")).dropout_key, KEY)
    assert any(x is KEY for x in padded.tensors())
    assert len(keyless.tensors()) == len(pack.tensors()) - 1
    assert keyless.shape != pack.shape
