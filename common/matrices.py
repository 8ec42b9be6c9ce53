"""Frozen matrices that read the same input, as one: a layer's q, k and v, or its gate and up.

So one call dequantises them and one product computes them all. The linears' own weights become views of the one tensor:
nothing is stored twice, and PEFT's modules go on as ever. NF4 and FP4 are bitsandbytes' own: blocks of 64 numbers in a
row with one absmax each, so matrices of whole blocks may lie below each other.
"""

import math
from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor


class Matrix:
    """Of `linears` that share their input; calling it gives [rows of all, columns] in `dtype`."""

    def __init__(self, linears: Sequence[Any], dtype: torch.dtype):
        self.weights = [linear.weight for linear in linears]
        self.rows = [linear.out_features for linear in linears]
        self.shape = (sum(self.rows), linears[0].in_features)
        self.dtype = dtype
        self.whole: Tensor | None = None  # the weights as they are stored; None where they cannot be joined
        states: list[Any] = [getattr(w, "quant_state", None) for w in self.weights]
        self.four_bit = all(states)
        if self.four_bit and all(math.prod(state.shape) % state.blocksize == 0 for state in states):
            self._join_constants(states)
            self.whole = _join(self.weights)
        elif not any(states) and len({w.dtype for w in self.weights}) == 1:
            self.whole = _join(self.weights)

    def __call__(self) -> Tensor:
        if self.whole is None:
            return torch.cat([_alone(w, self.dtype) for w in self.weights])
        numbers = self.whole if self.whole.is_floating_point() else self._dequantised(self.whole)
        return numbers.to(self.dtype).view(self.shape)

    def products(self, x: Tensor) -> Tensor:
        """x [T, columns] → [T, rows of all], by bitsandbytes' own choice for so many tokens; of 4-bit weights."""
        out = [bnb.matmul_4bit(x, w.data, w.quant_state) for w in self.weights]
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)

    def apart(self) -> list[Tensor]:
        """The same, linear by linear."""
        return list(self().split(self.rows))

    def _join_constants(self, states: list[Any]) -> None:
        """One absmax for each block; kept in 8 bits where every matrix has whole blocks of those too."""
        self.state, self.offset = states[0], None
        if not self.state.nested:
            self.absmax = _join_named(states, "absmax")
        elif any(len(s.absmax) % s.state2.blocksize for s in states):
            self.absmax = torch.cat(
                [bnb.functional.dequantize_blockwise(s.absmax, s.state2) + s.offset for s in states]
            )
        else:
            self.absmax = _join_named(states, "absmax")
            self.absmax2 = _join_named([s.state2 for s in states], "absmax")
            blocks = torch.tensor([len(s.state2.absmax) for s in states], device=self.absmax.device)
            self.offset = torch.stack([s.offset for s in states]).repeat_interleave(blocks)[:, None]

    def _dequantised(self, codes: Tensor) -> Tensor:
        absmax, state = self.absmax, self.state
        if self.offset is not None:
            second = state.state2
            absmax = torch.ops.bitsandbytes.dequantize_blockwise(
                absmax, self.absmax2, second.code, second.blocksize, torch.float32
            )
            absmax.view(-1, second.blocksize).add_(self.offset)
        # a CPU shares rows out to its cores, and a block must not lie in two
        row = self.shape[1] if self.shape[1] % state.blocksize == 0 else state.blocksize
        return torch.ops.bitsandbytes.dequantize_4bit(
            codes, absmax.float(), state.blocksize, state.quant_type, [2 * len(codes) // row, row], self.dtype
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


def _alone(weight: Any, dtype: torch.dtype) -> Tensor:
    if getattr(weight, "quant_state", None) is not None:
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    return weight.data.to(dtype)
