"""Triton's kernels compute what dequantise-and-multiply does; in Triton's interpreter, which needs no GPU."""

import os

from common.model.linears import MergedLinear
from common.model.nf4 import MATMUL_TOKENS
from tests.model.test_linears import linears_of, numbers_of

import pytest
import torch

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def kernels():
    assert os.environ.get("TRITON_INTERPRET") == "1", "run these by `make test-kernels`"
    from common.model import nf4_kernels

    return nf4_kernels


# one part of the columns; parts of other lengths, more ranks than a tile has; rows and columns as SmolLM2 has them
CASES = [(64, 64, 5, "nf4"), (128, 1088, 80, "nf4 double"), (192, 576, 16, "fp4 double")]


@pytest.mark.parametrize(("rows", "columns", "rank", "kind"), CASES)
def test_kernels_dequantise_to_the_bit_and_multiply(kernels, rows, columns, rank, kind):
    linears = linears_of(kind, [rows], columns)
    weight, (truth,) = MergedLinear(linears, torch.float32).nf4, numbers_of(linears)
    assert kernels.supports(weight, (rows, columns))
    dense = kernels.dequantise(weight, (rows, columns), torch.float16)
    assert torch.equal(dense, truth.half())
    # the interpreter has no bf16: it cuts fp32 off where a GPU rounds, and multiplies wrongly (so `make test-gpu` does)
    assert torch.equal(kernels.dequantise(weight, (rows, columns), torch.bfloat16), cut_off(truth))
    a, b = (torch.randn(*shape).half() / 8 for shape in ((rank, columns), (rows, rank)))
    for tokens in (1, 3, MATMUL_TOKENS):
        x, add = torch.randn(tokens, columns).half(), torch.randn(tokens, rows).half()
        expected = x.float() @ dense.float().T
        assert off(kernels.matmul(x, weight, rows), expected) < 0.004
        expected += (x.float() @ a.float().T).half().float() @ b.float().T + add.float()
        assert off(kernels.matmul(x, weight, rows, a, b, add), expected) < 0.004


def cut_off(numbers: torch.Tensor) -> torch.Tensor:
    return (numbers.view(torch.int32) & -(2**16)).view(torch.float32).bfloat16()


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("shape", "fits"), [((64, 64), True), ((32, 64), False), ((64, 96), False)])
def test_matrices_of_other_sizes_are_left_to_bitsandbytes(kernels, shape, fits):
    weight = MergedLinear(linears_of("nf4", [64], 64), torch.float32).nf4
    assert kernels.supports(weight, shape) == fits
