"""Triton kernels over the edges of automata (`common.decode.spans`): a program a row, with any number of edges.

Rows of a pass differ in their edges by a factor of ten, so that padded tensors would be mostly padding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(1024)  # edges per step
NONE = tl.constexpr(2**31 - 1)  # more than any token


def best(logits: Tensor, edges: Tensor, start: Tensor, count: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The highest logit, the least token with it and the greatest, of each row's tokens on edges out of its state.

    `logits` [K, V] fp32, `edges` [3, E] int32 of which row k has `count`[k] from `start`[k] on, `state` [K, N] bool →
    [K] fp32, int32, int32. A row without such edges has -inf, `NONE` and -1.
    """
    k, (logits, state) = len(logits), (logits.contiguous(), state.contiguous())
    score = logits.new_empty(k)
    least, greatest = (torch.empty(k, dtype=torch.int32, device=logits.device) for _ in range(2))
    sizes = logits.shape[1], edges.shape[1], state.shape[1]
    _best[(k,)](logits, edges, start, count, state.view(torch.uint8), score, least, greatest, *sizes)
    return score, least, greatest


def advance(edges: Tensor, start: Tensor, count: Tensor, state: Tensor, token: Tensor) -> Tensor:
    """The states [K, N] bool behind the tokens [K] int64; the rest as of `best`."""
    state = state.contiguous()
    after = torch.zeros_like(state)
    inputs = start, count, state.view(torch.uint8), token, after.view(torch.uint8)
    _advance[(len(state),)](edges, *inputs, edges.shape[1], state.shape[1])
    return after


@triton.jit(do_not_specialize=["E", "N"])
def _best(logits_ptr, edges_ptr, start_ptr, count_ptr, state_ptr, score_ptr, least_ptr, greatest_ptr, V, E, N):
    """Each of BLOCK lanes keeps the best of its edges; in the end the lanes are compared."""
    row = tl.program_id(0).to(tl.int64)
    first, count = edges_ptr + tl.load(start_ptr + row), tl.load(count_ptr + row)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    least = tl.full((BLOCK,), NONE, tl.int32)
    greatest = tl.full((BLOCK,), -1, tl.int32)
    for begin in range(0, count, BLOCK):
        edge = begin + tl.arange(0, BLOCK)
        source = tl.load(first + edge, mask=edge < count, other=0)
        token = tl.load(first + E + edge, mask=edge < count, other=0)
        there = tl.load(state_ptr + row * N + source, mask=edge < count, other=0) != 0
        score = tl.load(logits_ptr + row * V + token, mask=there, other=float("-inf"))
        better, equal = score > best, (score == best) & there
        least = tl.where(better, token, tl.where(equal, tl.minimum(least, token), least))
        greatest = tl.where(better, token, tl.where(equal, tl.maximum(greatest, token), greatest))
        best = tl.maximum(best, score)
    of_all = tl.max(best, axis=0)
    tl.store(score_ptr + row, of_all)
    tl.store(least_ptr + row, tl.min(tl.where(best == of_all, least, NONE), axis=0))
    tl.store(greatest_ptr + row, tl.max(tl.where(best == of_all, greatest, -1), axis=0))


@triton.jit(do_not_specialize=["E", "N"])
def _advance(edges_ptr, start_ptr, count_ptr, state_ptr, token_ptr, after_ptr, E, N):
    row = tl.program_id(0).to(tl.int64)
    first, count, chosen = edges_ptr + tl.load(start_ptr + row), tl.load(count_ptr + row), tl.load(token_ptr + row)
    for begin in range(0, count, BLOCK):
        edge = begin + tl.arange(0, BLOCK)
        inside = edge < count
        source = tl.load(first + edge, mask=inside, other=0)
        token = tl.load(first + E + edge, mask=inside, other=0)
        target = tl.load(first + 2 * E + edge, mask=inside, other=0)
        there = tl.load(state_ptr + row * N + source, mask=inside, other=0) != 0
        tl.store(after_ptr + row * N + target, 1, mask=there & (token == chosen))
