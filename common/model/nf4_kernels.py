"""Weights of 4 bits, and products with them, in Triton: for GPUs of compute capability 8.0 and up.

bitsandbytes' kernels are made for one token, or dequantise for a product of its own. These compute from the same
numbers: a level times its block's absmax in fp32, rounded once to 16 bits. `benchmarks/products.py` shows the gain.

Two numbers are in a byte, and a sum has no order: the upper halves meet the even columns of x, the lower ones the odd.
"""

from common.model.nf4 import FEW, NESTED, NF4Weight

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # numbers with one absmax; what a program reads of a row at once
ROWS = 64  # of a program
PARTS = 8  # programs share a row's columns, so that a card has enough of them


def readable(w: NF4Weight, shape: tuple[int, int]) -> bool:
    return w.blocksize == BLOCK and shape[0] % ROWS == 0 and shape[1] % BLOCK == 0


def dequantised(w: NF4Weight, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """[N, K] in a 16-bit `dtype`."""
    out = torch.empty(shape, dtype=dtype, device=w.numbers.device)
    blocks = out.numel() // BLOCK
    _dequantise[(triton.cdiv(blocks, 32),)](*_tensors(w), out, blocks, w.offset is not None, NESTED, 32, num_warps=2)
    return out


def products(
    x: Tensor, w: NF4Weight, rows: int, a: Tensor | None = None, b: Tensor | None = None, add: Tensor | None = None
) -> Tensor:
    """x @ (w + b @ a).T + add: x [T, K] of T <= FEW tokens, w [N, K], a [R, K], b [N, R], add [T, N] → [T, N].

    N is `rows`. First each program sums up its part of the columns, then another kernel all parts.
    """
    tokens, columns = x.shape
    rank = 0 if a is None else len(a)
    steps = triton.cdiv(columns // BLOCK, PARTS)
    parts = triton.cdiv(columns // BLOCK, steps)
    sums = x.new_empty(parts, tokens, rows + rank, dtype=torch.float32)
    pairs = x.contiguous().view(torch.int32)
    _sum_parts[(rows // ROWS + triton.cdiv(rank, ROWS), parts)](
        pairs, *_tensors(w), pairs if a is None else a.view(torch.int32), sums, tokens, rows, rank, columns, steps,
        w.offset is not None, NESTED, x.dtype == torch.bfloat16, FEW, ROWS, num_warps=2, num_stages=1,
    )  # fmt: skip
    out = x.new_empty(tokens, rows)
    _sum_all[(rows // 32,)](
        sums, out if b is None else b, out if add is None else add, out, tokens, rows, rank, parts, add is not None,
        FEW, 32, num_warps=2,
    )  # fmt: skip
    return out


def _tensors(w: NF4Weight) -> tuple[Tensor | None, ...]:
    """As kernels take them; where absmaxes are not quantised, three are not read."""
    rest = (w.absmax,) * 3 if w.offset is None else (w.absmax2, w.levels2, w.offset)
    return w.numbers, w.levels, w.absmax, *rest


@triton.jit
def _absmax_of(block, inside, absmax, absmax2, levels2, offset, nested: tl.constexpr, NESTED: tl.constexpr):
    if nested:
        level = tl.load(levels2 + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
        scale = tl.load(absmax2 + block // NESTED, mask=inside, other=0.0)
        return level * scale + tl.load(offset + block // NESTED, mask=inside, other=0.0)
    else:
        return tl.load(absmax + block, mask=inside, other=0.0)


@triton.jit
def _numbers(byte, scale, levels, dtype: tl.constexpr):
    """Of the upper and of the lower halves [n, m]; scale [n]."""
    upper, lower = tl.load(levels + (byte >> 4).to(tl.int32)), tl.load(levels + (byte & 15).to(tl.int32))
    return (upper * scale[:, None]).to(dtype), (lower * scale[:, None]).to(dtype)


@triton.jit
def _columns(pair, dtype: tl.constexpr):
    """Of two 16-bit numbers in an int32 each: the even ones, the odd ones."""
    return (pair & 0xFFFF).to(tl.int16).to(dtype, bitcast=True), (pair >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _dequantise(
    numbers, levels, absmax, absmax2, levels2, offset, out, blocks,
    nested: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    scale = _absmax_of(block, inside, absmax, absmax2, levels2, offset, nested, NESTED)
    at = block.to(tl.int64)[:, None]
    byte = tl.load(numbers + at * 32 + tl.arange(0, 32)[None, :], mask=inside[:, None], other=0)
    upper, lower = _numbers(byte, scale, levels, out.dtype.element_ty)
    tl.store(out + at * 64 + tl.arange(0, 64)[None, :], tl.interleave(upper, lower), mask=inside[:, None])


@triton.jit(do_not_specialize=["T"])
def _sum_parts(
    x, numbers, levels, absmax, absmax2, levels2, offset, a, sums, T, N, R,
    K: tl.constexpr, STEPS: tl.constexpr, nested: tl.constexpr, NESTED: tl.constexpr, bf16: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """sums [parts, T, N + R], each over STEPS blocks of columns: of the rows of w, then of those of a.

    x and a are int32, two columns each.
    """
    dtype: tl.constexpr = tl.bfloat16 if bf16 else tl.float16
    n, t = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    word = tl.arange(0, 32)[None, :]  # of 64 columns: bytes of w, int32s of x and a
    first = tl.program_id(1) * STEPS  # block of the row
    x_at = x + t[:, None] * (K // 2) + word
    total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    if tl.program_id(0) * ROWS < N:
        block = n * (K // 64) + first
        inside = n < N
        # the next block is on its way while this one is multiplied
        byte = tl.load(numbers + block[:, None] * 32 + word)
        scale = _absmax_of(block, inside, absmax, absmax2, levels2, offset, nested, NESTED)
        for step in range(STEPS):
            upper, lower = _numbers(byte, scale, levels, dtype)
            inside = n < tl.where(first + step + 1 < K // 64, N, 0)
            byte = tl.load(numbers + (block + step + 1)[:, None] * 32 + word, mask=inside[:, None], other=0)
            scale = _absmax_of(block + step + 1, inside, absmax, absmax2, levels2, offset, nested, NESTED)
            mine = (t < tl.where(first + step < K // 64, T, 0))[:, None]
            even, odd = _columns(tl.load(x_at + (first + step) * 32, mask=mine, other=0), dtype)
            total = tl.dot(even, tl.trans(upper), total)
            total = tl.dot(odd, tl.trans(lower), total)
    else:
        a_at = a + (n - N)[:, None] * (K // 2) + word
        for step in range(STEPS):
            inside = first + step < K // 64
            mine, rows = (t < tl.where(inside, T, 0))[:, None], (n - N < tl.where(inside, R, 0))[:, None]
            even, odd = _columns(tl.load(x_at + (first + step) * 32, mask=mine, other=0), dtype)
            a_even, a_odd = _columns(tl.load(a_at + (first + step) * 32, mask=rows, other=0), dtype)
            total = tl.dot(even, tl.trans(a_even), total)
            total = tl.dot(odd, tl.trans(a_odd), total)
    to = sums + (tl.program_id(1) * T + t[:, None]) * (N + R) + n[None, :]
    tl.store(to, total, mask=(t < T)[:, None] & (n < N + R)[None, :])


@triton.jit(do_not_specialize=["T"])
def _sum_all(
    sums, b, add, out, T, N, R: tl.constexpr, PARTS: tl.constexpr, adds: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    n, t, rank = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS), tl.arange(0, 32)
    mine = (t < T)[:, None]
    at = sums + t[:, None] * (N + R)
    total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for part in range(PARTS):
        total += tl.load(at + part * T * (N + R) + n[None, :], mask=mine, other=0.0)
    for r in range(0, R, 32):
        inside = r + rank < R
        h = tl.zeros((TOKENS, 32), dtype=tl.float32)
        for part in range(PARTS):
            h += tl.load(at + part * T * (N + R) + N + r + rank[None, :], mask=mine & inside[None, :], other=0.0)
        rows = tl.load(b + n[None, :] * R + (r + rank)[:, None], mask=inside[:, None], other=0.0)
        total = tl.dot(h.to(out.dtype.element_ty), rows, total)
    if adds:
        total += tl.load(add + t[:, None] * N + n[None, :], mask=mine, other=0.0).to(tl.float32)
    tl.store(out + t[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=mine)
