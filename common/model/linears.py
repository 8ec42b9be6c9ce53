"""Frozen matrices that read the same input, as one: a layer's q, k and v, or its gate and up.

So one call dequantises them and one product computes them all. The linears' own weights become views of the one tensor:
nothing is stored twice, and PEFT's modules go on as ever. NF4 and FP4 are bitsandbytes' own: blocks of 64 numbers in a
row with one absmax each, so matrices of whole blocks may lie below each other. On GPUs that have Triton's kernels
(`common.model.nf4_kernels`) those read them, elsewhere bitsandbytes'.
"""

import math
from collections.abc import Sequence
from typing import Any

from common.device import has_flash_attention
from common.model.nf4 import NESTED, NF4Weight

import bitsandbytes as bnb
import torch
from torch import Tensor


class MergedLinear:
    """Of `linears` that share their input; calling it gives [rows of all, columns] in `dtype`."""

    def __init__(self, linears: Sequence[Any], dtype: torch.dtype):
        self.weights = [linear.weight for linear in linears]
        self.rows = [linear.out_features for linear in linears]
        self.shape = (sum(self.rows), linears[0].in_features)
        self.dtype = dtype
        self.whole: Tensor | None = None  # the weights as they are stored; None where they cannot be joined
        self.codes: NF4Weight | None = None  # the same where they are of 4 bits
        states: list[Any] = [getattr(w, "quant_state", None) for w in self.weights]
        self.four_bit = all(states)
        if self.four_bit and all(math.prod(state.shape) % state.blocksize == 0 for state in states):
            constants = _join_constants(states)
            self.whole = _join(self.weights)
            self.codes = NF4Weight(self.whole, states[0].code, states[0].quant_type, states[0].blocksize, *constants)
        elif not any(states) and len({w.dtype for w in self.weights}) == 1:
            self.whole = _join(self.weights)
        self.kernels = _kernels(self.codes, self.shape, dtype)

    def __call__(self) -> Tensor:
        if self.whole is None:
            return torch.cat([dense(w, self.dtype) for w in self.weights])
        if self.kernels:
            return self.kernels.dequantised(self.codes, self.shape, self.dtype)
        numbers = _dequantised(self.codes, self.shape[1], self.dtype) if self.codes else self.whole
        return numbers.to(self.dtype).view(self.shape)

    def products(
        self, x: Tensor, a: Tensor | None = None, b: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor:
        """x [T, columns] → [T, rows of all]: x @ (matrix + b @ a).T + add for T <= FEW, of 4-bit weights as they are.

        For one token bitsandbytes' own kernel is the faster one (`benchmarks/products.py`). Where there are no others,
        it may dequantise for more: it decides by the card.
        """
        if self.kernels and len(x) > 1:
            return self.kernels.products(x, self.codes, self.shape[0], a, b, add)
        parts = [bnb.matmul_4bit(x, w.data, w.quant_state) for w in self.weights]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if a is not None and b is not None:
            out.addmm_(x @ a.T, b.T)
        return out if add is None else out.add_(add)

    def apart(self) -> list[Tensor]:
        """The same, linear by linear."""
        return list(self().split(self.rows))


def _join_constants(states: list[Any]) -> tuple[Tensor, ...]:
    """Absmaxes; with absmaxes of their own, levels and offsets where every matrix has whole blocks of those too."""
    if not states[0].nested:
        return (_join_named(states, "absmax"),)
    if any(len(s.absmax) % s.state2.blocksize for s in states):
        whole = [bnb.functional.dequantize_blockwise(s.absmax, s.state2) + s.offset for s in states]
        return (torch.cat(whole),)
    absmax, absmax2 = _join_named(states, "absmax"), _join_named([s.state2 for s in states], "absmax")
    blocks = torch.tensor([len(s.state2.absmax) for s in states], device=absmax.device)
    offset = torch.stack([s.offset for s in states]).repeat_interleave(blocks)
    return absmax, absmax2, states[0].state2.code, offset


def _kernels(codes: NF4Weight | None, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    """Triton's, where they can read this matrix; else None."""
    if codes is None or not has_flash_attention(codes.numbers.device, dtype):
        return None

    from common.model import nf4_kernels  # torch for a CPU comes without Triton

    return nf4_kernels if nf4_kernels.readable(codes, shape) else None


def _dequantised(codes: NF4Weight, columns: int, dtype: torch.dtype) -> Tensor:
    absmax = codes.absmax.float()
    if codes.offset is not None:
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(
            codes.absmax, codes.absmax2, codes.levels2, NESTED, torch.float32
        )
        absmax.view(-1, NESTED).add_(codes.offset[:, None])
    # a CPU shares rows out to its cores, and a block must not lie in two
    row = columns if columns % codes.blocksize == 0 else codes.blocksize
    return torch.ops.bitsandbytes.dequantize_4bit(
        codes.numbers, absmax, codes.blocksize, codes.kind, [2 * len(codes.numbers) // row, row], dtype
    )


def _join(weights: list[Any]) -> Tensor:
    """All numbers in one tensor, of which the weights become views."""
    whole, start = torch.cat([w.data.reshape(-1) for w in weights]), 0
    for w in weights:
        w.data, start = whole[start : start + w.numel()].view(w.shape), start + w.numel()
    return whole


def _join_named(holders: list[Any], name: str) -> Tensor:
    whole, start = torch.cat([getattr(holder, name) for holder in holders]), 0
    for holder in holders:
        n = len(getattr(holder, name))
        setattr(holder, name, whole[start : start + n])
        start += n
    return whole


def dense(weight: Any, dtype: torch.dtype) -> Tensor:
    """A weight as a matrix of `dtype`, dequantised where it has 4 bits."""
    if getattr(weight, "quant_state", None) is not None:
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    return weight.data.to(dtype)
