"""Merged linears have the numbers of their linears, which are stored once, and the modules work as before."""

from common.model.linears import MergedLinear

import bitsandbytes as bnb
import pytest
import torch

KINDS = ["nf4", "nf4 double", "fp4 double", "plain"]


def linears_of(kind: str, rows: list[int], columns: int) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    out = []
    for n in rows:
        weight = torch.randn(n, columns)
        if kind == "plain":
            linear = torch.nn.Linear(columns, n, bias=False)
            linear.weight.data = weight
        else:
            options = {"quant_type": kind[:3], "compress_statistics": "double" in kind}
            linear = bnb.nn.Linear4bit(columns, n, bias=False, compute_dtype=torch.float32, **options)
            linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options)
            linear = linear.to("cpu")
        out.append(linear)
    return out


def numbers_of(linears) -> list[torch.Tensor]:
    def numbers(weight: torch.Tensor) -> torch.Tensor:
        state = getattr(weight, "quant_state", None)
        return bnb.functional.dequantize_4bit(weight.data, state) if state else weight.data

    return [numbers(m.weight) for m in linears]


# whole blocks of both kinds; of the first alone; of neither
@pytest.mark.parametrize(("rows", "columns"), [([256, 128, 64], 256), ([6, 3, 2], 64), ([3, 5, 7], 34)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_numbers_are_those_of_each(kind, rows, columns):
    linears = linears_of(kind, rows, columns)
    before = numbers_of(linears)
    merged = MergedLinear(linears, torch.float32)
    assert merged.shape == (sum(rows), columns)
    assert torch.equal(merged.dense(), torch.cat(before))
    for mine, after, was in zip(merged.split(), numbers_of(linears), before, strict=True):
        assert torch.equal(mine, was)
        assert torch.equal(after, was)
    assert merged.dense().dtype == torch.float32
    assert MergedLinear(linears, torch.bfloat16).dense().dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_stored_twice(kind):
    linears = linears_of(kind, [256, 128, 64], 256)
    merged = MergedLinear(linears, torch.float32)
    whole = merged.stored.untyped_storage()
    assert all(m.weight.data.untyped_storage().data_ptr() == whole.data_ptr() for m in linears)
    if "double" in kind:
        assert merged.nf4.absmax.dtype == torch.uint8, "the second quantisation stays"
        states = [m.weight.quant_state for m in linears]
        assert len({s.absmax.untyped_storage().data_ptr() for s in states}) == 1
        assert len({s.state2.absmax.untyped_storage().data_ptr() for s in states}) == 1
    x = torch.randn(3, 256)
    torch.testing.assert_close(torch.cat([m(x) for m in linears], dim=1), x @ merged.dense().T, atol=1e-4, rtol=1e-4)
    assert merged.four_bit == (kind != "plain")
    if merged.four_bit:
        a, b, add = torch.randn(5, 256), torch.randn(448, 5), torch.randn(3, 448)
        torch.testing.assert_close(merged.matmul(x), x @ merged.dense().T, atol=1e-4, rtol=1e-4)
        expected = x @ (merged.dense() + b @ a).T + add
        torch.testing.assert_close(merged.matmul(x, a, b, add), expected, atol=1e-2, rtol=1e-4)
