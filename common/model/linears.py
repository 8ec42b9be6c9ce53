"""Frozen linears that share their input, merged into one weight: a layer's q, k and v, or its gate and up.

One call dequantises a merged weight, and one product computes all its linears. The linears' own weights become views of
it, so nothing is stored twice and PEFT's modules work as before. Weights of whole 4-bit blocks (`common.model.nf4`) can
be concatenated. Triton kernels (`common.model.nf4_kernels`) compute where they run, bitsandbytes elsewhere.
"""

from collections.abc import Sequence
from types import ModuleType

from common.device import has_nf4_kernels
from common.model.nf4 import ABSMAX_BLOCK, NF4Weight

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor


class MergedLinear:
    """The weight [N, K] of `linears` that have the same K inputs, one below the other."""

    def __init__(self, linears: Sequence[torch.nn.Linear], dtype: torch.dtype):
        self.weights, self.dtype = [linear.weight for linear in linears], dtype
        self.rows = [linear.out_features for linear in linears]
        self.shape = (sum(self.rows), linears[0].in_features)
        self.stored: Tensor | None = None  # all weights in one tensor; None where they cannot be concatenated
        self.nf4: NF4Weight | None = None  # the same where they have 4 bits
        self.states: list[QuantState] = [getattr(w, "quant_state", None) for w in self.weights]
        self.four_bit = all(self.states)
        if self.four_bit and all(state.shape.numel() % state.blocksize == 0 for state in self.states):
            constants, first = _merge_constants(self.states), self.states[0]
            self.stored = _merge(self.weights, "data")
            self.nf4 = NF4Weight(self.stored, first.code, first.quant_type, first.blocksize, *constants)
        elif not any(self.states) and len({w.dtype for w in self.weights}) == 1:
            self.stored = _merge(self.weights, "data")
        self.kernels: ModuleType | None = None  # `common.model.nf4_kernels` if it computes with this weight
        if self.nf4 and has_nf4_kernels(self.nf4.packed.device, dtype):
            from common.model import nf4_kernels  # torch for a CPU comes without Triton

            self.kernels = nf4_kernels if nf4_kernels.supports(self.nf4, self.shape) else None

    def dense(self) -> Tensor:
        """The weight [N, K] in `dtype`, dequantised."""
        if self.stored is None:
            return torch.cat([dense(w, self.dtype) for w in self.weights])
        if self.nf4 is None:
            return self.stored.to(self.dtype).view(self.shape)
        if self.kernels:
            return self.kernels.dequantise(self.nf4, self.shape, self.dtype)
        w, columns, absmax = self.nf4, self.shape[1], self.nf4.absmax.float()
        if w.offset is not None:
            scales = w.absmax, w.absmax2, w.code2, ABSMAX_BLOCK
            absmax = torch.ops.bitsandbytes.dequantize_blockwise(*scales, torch.float32)
            absmax.view(-1, ABSMAX_BLOCK).add_(w.offset[:, None])
        # a CPU divides the rows among its cores, and no block may lie in two rows
        row = columns if columns % w.blocksize == 0 else w.blocksize
        shape = [2 * len(w.packed) // row, row]
        weight = torch.ops.bitsandbytes.dequantize_4bit(w.packed, absmax, w.blocksize, w.quant_type, shape, self.dtype)
        return weight.view(self.shape)

    def split(self) -> list[Tensor]:
        """The weight [N, K] of each linear in `dtype`, dequantised."""
        return list(self.dense().split(self.rows))

    def matmul(self, x: Tensor, a: Tensor | None = None, b: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        """x @ (w + b @ a).T + add: x [T, K], 4-bit w [N, K], a [R, K], b [N, R], add and the result [T, N].

        T is at most MATMUL_TOKENS. bitsandbytes' kernel is faster for one token (`benchmarks/products.py`).
        """
        if self.kernels and len(x) > 1:
            return self.kernels.matmul(x, self.nf4, self.shape[0], a, b, add)
        parts = [bnb.matmul_4bit(x, w.data, state) for w, state in zip(self.weights, self.states, strict=True)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if a is not None and b is not None:
            out.addmm_(x @ a.T, b.T)
        return out if add is None else out.add_(add)


def dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight [N, K] in `dtype`, dequantised if it has 4 bits."""
    state = getattr(weight, "quant_state", None)
    return (bnb.functional.dequantize_4bit(weight.data, state) if state else weight.data).to(dtype)


def _merge_constants(states: list[QuantState]) -> tuple[Tensor, ...]:
    """The fields of `NF4Weight` from `absmax` on; absmaxes in fp32 where their blocks are not whole in every weight."""
    if not states[0].nested:
        return (_merge(states, "absmax"),)
    if any(len(s.absmax) % s.state2.blocksize for s in states):
        return (torch.cat([bnb.functional.dequantize_blockwise(s.absmax, s.state2) + s.offset for s in states]),)
    absmax, absmax2 = _merge(states, "absmax"), _merge([s.state2 for s in states], "absmax")
    blocks = torch.tensor([len(s.state2.absmax) for s in states], device=absmax.device)
    offset = torch.stack([s.offset for s in states]).repeat_interleave(blocks)
    return absmax, absmax2, states[0].state2.code, offset


def _merge(owners: Sequence[object], name: str) -> Tensor:
    """The tensors that all owners have by `name`, in one flat tensor; theirs become views of it."""
    tensors = [getattr(owner, name) for owner in owners]
    merged = torch.cat([x.reshape(-1) for x in tensors])
    for owner, x, part in zip(owners, tensors, merged.split([x.numel() for x in tensors]), strict=True):
        setattr(owner, name, part.view(x.shape))
    return merged
