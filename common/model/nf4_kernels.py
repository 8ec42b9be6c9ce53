"""Triton kernels for 4-bit weights: numbers of 16 bits, on GPUs of compute capability 8.0 and up.

Dequantisation, bit for bit that of bitsandbytes (fp32, rounded once to 16 bits), with b = (n * K + k) // 64:
    w[n, k] = code[nibble[n, k]] * absmax[b]
    absmax[b] = code2[absmax8[b]] * absmax2[b // 256] + offset[b // 256]    (double quantisation)
For T <= 16 tokens, the product with a LoRA-adapted weight plus a residual, without a 16-bit copy of the weight:
    y = x @ (w + b @ a).T + add,    x [T, K], w [N, K], a [R, K], b [N, R], add and y [T, N]
Several programs divide a row's columns among them and a second kernel adds up (https://arxiv.org/abs/2402.00025).

A byte holds two weights: high nibble = even column, low nibble = odd. The product multiplies even and odd columns
separately instead of interleaving the weights. `benchmarks/products.py` compares it with bitsandbytes' own kernels.
"""

from common.model.nf4 import ABSMAX_BLOCK, MATMUL_TOKENS, NF4Weight

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(64)  # weights per absmax, and columns per step: bitsandbytes' default
BLOCK_BYTES = tl.constexpr(32)  # of a block of weights; also the int32s that hold 64 numbers of 16 bits in pairs
NESTED = tl.constexpr(ABSMAX_BLOCK)
TOKENS = tl.constexpr(MATMUL_TOKENS)
TILE_ROWS = tl.constexpr(64)  # rows of w, or of a, per program: the fastest of 351 variants on an H100 (docs/log.md)
SPLITS = 8  # programs that divide a row, at most: 4,096 rows alone are too few programs for an H100 (docs/log.md)
SUM_ROWS = tl.constexpr(32)  # rows of w per program that adds up
RANK_STEP = tl.constexpr(32)  # columns of b per step of that program; a matrix product needs 16 at least
DEQUANTISE_BLOCKS = tl.constexpr(32)  # blocks per program


def supports(w: NF4Weight, shape: tuple[int, int]) -> bool:
    """True if the kernels take this weight [N, K]: whole tiles, and bitsandbytes' default block size."""
    return w.blocksize == BLOCK.value and shape[0] % TILE_ROWS.value == 0 and shape[1] % BLOCK.value == 0


def dequantise(w: NF4Weight, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in a 16-bit `dtype`."""
    out = torch.empty(shape, dtype=dtype, device=w.packed.device)
    blocks = out.numel() // BLOCK.value
    grid = (triton.cdiv(blocks, DEQUANTISE_BLOCKS.value),)
    _dequantise[grid](*_tensors(w), out, blocks, w.offset is not None, num_warps=2)
    return out


def matmul(
    x: Tensor, w: NF4Weight, rows: int, a: Tensor | None = None, b: Tensor | None = None, add: Tensor | None = None
) -> Tensor:
    """x @ (w + b @ a).T + add: x [T, K] of T <= 16 tokens, w [`rows`, K], a [R, K], b [rows, R], add → [T, rows]."""
    (tokens, columns), rank = x.shape, 0 if a is None else len(a)
    steps = triton.cdiv(columns // BLOCK.value, SPLITS)
    splits = triton.cdiv(columns // BLOCK.value, steps)
    sums = x.new_empty(splits, tokens, rows + rank, dtype=torch.float32)
    pairs = x.contiguous().view(torch.int32)
    a_pairs = pairs if a is None else a.view(torch.int32)  # one that is not read, if there is none
    sizes = tokens, rows, rank, columns, steps, w.offset is not None, x.dtype == torch.bfloat16
    grid = rows // TILE_ROWS.value + triton.cdiv(rank, TILE_ROWS.value), splits
    _partial_products[grid](pairs, *_tensors(w), a_pairs, sums, *sizes, num_warps=2, num_stages=1)
    out = x.new_empty(tokens, rows)
    inputs = sums, out if b is None else b, out if add is None else add
    _add_up[(rows // SUM_ROWS.value,)](*inputs, out, tokens, rows, rank, splits, add is not None, num_warps=2)
    return out


def _tensors(w: NF4Weight) -> tuple[Tensor | None, ...]:
    """In the kernels' order; without double quantisation the last three are not read."""
    nested = (w.absmax,) * 3 if w.offset is None else (w.absmax2, w.code2, w.offset)
    return w.packed, w.code, w.absmax, *nested


@triton.jit
def _absmax(block, inside, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, double_quant: tl.constexpr):
    """absmax [n] fp32 of the blocks `block` [n]; not read where `inside` [n] is false."""
    if double_quant:
        code2 = tl.load(code2_ptr + tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32))
        absmax2 = tl.load(absmax2_ptr + block // NESTED, mask=inside, other=0.0)
        return code2 * absmax2 + tl.load(offset_ptr + block // NESTED, mask=inside, other=0.0)
    else:
        return tl.load(absmax_ptr + block, mask=inside, other=0.0)


@triton.jit
def _weights(packed, absmax, code_ptr, dtype: tl.constexpr):
    """Even and odd columns, each [n, m], of the bytes `packed` [n, m]; absmax [n]."""
    high, low = tl.load(code_ptr + (packed >> 4).to(tl.int32)), tl.load(code_ptr + (packed & 15).to(tl.int32))
    return (high * absmax[:, None]).to(dtype), (low * absmax[:, None]).to(dtype)


@triton.jit
def _even_odd(pair, dtype: tl.constexpr):
    """Even and odd columns of numbers that lie in pairs in an int32, the even one low."""
    return (pair & 0xFFFF).to(tl.int16).to(dtype, bitcast=True), (pair >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _dequantise(
    packed_ptr, code_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, out_ptr, blocks, double_quant: tl.constexpr
):
    """out [blocks, 64]; a program writes DEQUANTISE_BLOCKS rows of it."""
    block = tl.program_id(0) * DEQUANTISE_BLOCKS + tl.arange(0, DEQUANTISE_BLOCKS)
    inside = block < blocks
    absmax = _absmax(block, inside, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, double_quant)
    row = block.to(tl.int64)[:, None]
    packed = tl.load(packed_ptr + row * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)[None, :], mask=inside[:, None], other=0)
    even, odd = _weights(packed, absmax, code_ptr, out_ptr.dtype.element_ty)
    out = out_ptr + row * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out, tl.interleave(even, odd), mask=inside[:, None])


@triton.jit(do_not_specialize=["T"])
def _partial_products(
    x_ptr,
    packed_ptr,
    code_ptr,
    absmax_ptr,
    absmax2_ptr,
    code2_ptr,
    offset_ptr,
    a_ptr,
    sums_ptr,
    T,
    N,
    R,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    double_quant: tl.constexpr,
    bf16: tl.constexpr,
):
    """sums [splits, T, N + R] fp32 = x @ [w; a].T over STEPS blocks of columns each; x and a are int32 pairs.

    A program takes one split, and TILE_ROWS rows of w or of a.
    """
    dtype: tl.constexpr = tl.bfloat16 if bf16 else tl.float16
    n, t = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS), tl.arange(0, TOKENS)
    word = tl.arange(0, BLOCK_BYTES)[None, :]  # within a block: bytes of w, int32s of x and a
    first = tl.program_id(1) * STEPS  # block of the row
    x_at = x_ptr + t[:, None] * (K // 2) + word
    total = tl.zeros((TOKENS, TILE_ROWS), dtype=tl.float32)
    if tl.program_id(0) * TILE_ROWS < N:
        block = n * (K // BLOCK) + first
        inside = n < N
        # the next block is loaded while this one is multiplied
        packed = tl.load(packed_ptr + block[:, None] * BLOCK_BYTES + word)
        absmax = _absmax(block, inside, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, double_quant)
        for step in range(STEPS):
            w_even, w_odd = _weights(packed, absmax, code_ptr, dtype)
            inside = n < tl.where(first + step + 1 < K // BLOCK, N, 0)
            following = (block + step + 1)[:, None] * BLOCK_BYTES
            packed = tl.load(packed_ptr + following + word, mask=inside[:, None], other=0)
            absmax = _absmax(block + step + 1, inside, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, double_quant)
            tokens = (t < tl.where(first + step < K // BLOCK, T, 0))[:, None]
            even, odd = _even_odd(tl.load(x_at + (first + step) * BLOCK_BYTES, mask=tokens, other=0), dtype)
            total = tl.dot(even, tl.trans(w_even), total)
            total = tl.dot(odd, tl.trans(w_odd), total)
    else:
        a_at = a_ptr + (n - N)[:, None] * (K // 2) + word
        for step in range(STEPS):
            inside = first + step < K // BLOCK
            tokens, rows = (t < tl.where(inside, T, 0))[:, None], (n - N < tl.where(inside, R, 0))[:, None]
            even, odd = _even_odd(tl.load(x_at + (first + step) * BLOCK_BYTES, mask=tokens, other=0), dtype)
            a_even, a_odd = _even_odd(tl.load(a_at + (first + step) * BLOCK_BYTES, mask=rows, other=0), dtype)
            total = tl.dot(even, tl.trans(a_even), total)
            total = tl.dot(odd, tl.trans(a_odd), total)
    sums = sums_ptr + (tl.program_id(1) * T + t[:, None]) * (N + R) + n[None, :]
    tl.store(sums, total, mask=(t < T)[:, None] & (n < N + R)[None, :])


@triton.jit(do_not_specialize=["T"])
def _add_up(sums_ptr, b_ptr, add_ptr, out_ptr, T, N, R: tl.constexpr, SPLITS: tl.constexpr, has_add: tl.constexpr):
    """out [T, N] = sums of w + (sums of a) @ b.T + add, with sums [SPLITS, T, N + R] added up; SUM_ROWS a program."""
    n, t, rank = tl.program_id(0) * SUM_ROWS + tl.arange(0, SUM_ROWS), tl.arange(0, TOKENS), tl.arange(0, RANK_STEP)
    tokens = (t < T)[:, None]
    sums = sums_ptr + t[:, None] * (N + R)
    total = tl.zeros((TOKENS, SUM_ROWS), dtype=tl.float32)
    for split in range(SPLITS):
        total += tl.load(sums + split * T * (N + R) + n[None, :], mask=tokens, other=0.0)
    for r in range(0, R, RANK_STEP):
        inside = r + rank < R
        h = tl.zeros((TOKENS, RANK_STEP), dtype=tl.float32)
        for split in range(SPLITS):
            at = sums + split * T * (N + R) + N + r + rank[None, :]
            h += tl.load(at, mask=tokens & inside[None, :], other=0.0)
        b = tl.load(b_ptr + n[None, :] * R + (r + rank)[:, None], mask=inside[:, None], other=0.0)
        total = tl.dot(h.to(out_ptr.dtype.element_ty), b, total)
    if has_add:
        total += tl.load(add_ptr + t[:, None] * N + n[None, :], mask=tokens, other=0.0).to(tl.float32)
    tl.store(out_ptr + t[:, None] * N + n[None, :], total.to(out_ptr.dtype.element_ty), mask=tokens)
