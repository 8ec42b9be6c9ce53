"""Attention over many sequences that lie in one row, by the fused kernels that a GPU has.

Flash attention from compute capability 8.0 on; on older GPUs memory-efficient attention, in fp16. By one contract:
queries [T, H, D], keys and values [S, G, D], G a divisor of H → output [T, H, D] and log-sum-exp [H, T] fp32, both
uninitialised in rows of no sequence. Memory-efficient attention takes as many key heads as query heads, so it computes
the queries of a key head one after the other; its log-sum-exp has a row for each sequence.
"""

from collections.abc import Callable
from typing import NamedTuple

from common.device import has_efficient_attention, has_flash_attention
from common.torch_private import (
    Sequences,
    efficient_attention,
    efficient_attention_backward,
    flash_attention,
    flash_attention_backward,
)

import torch
from torch import Tensor

ROWS = 32  # memory-efficient attention's log-sum-exp of a sequence is a multiple of it long


class Kernels(NamedTuple):
    forward: Callable[[Tensor, Tensor, Tensor, Sequences], tuple[Tensor, Tensor]]  # q, k, v → output, log-sum-exp
    # d_out, q, k, v, output and log-sum-exp over all keys → gradients of q, k, v
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Sequences], tuple[Tensor, Tensor, Tensor]]


def kernels(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """The kernels of a device for numbers of `dtype`; None if it has none."""
    if has_flash_attention(device, dtype):
        return Kernels(flash_attention, flash_attention_backward)
    return Kernels(_forward, _backward) if has_efficient_attention(device, dtype) else None


def _forward(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    parts = [efficient_attention(x, k, v, sequences) for x in _by_key_head(q, k)]
    lse = torch.stack([lse for _, lse in parts], dim=2).flatten(1, 2)  # [n, H, L]
    sequence, place = _places(sequences.q_starts, len(q))
    return _joined([out for out, _ in parts]), lse[sequence, :, place.clamp(0, lse.shape[2] - 1)].T


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor, Tensor]:
    rows = -(-min(sequences.longest_q, len(q)) // ROWS) * ROWS
    index = sequences.q_starts[:-1, None] + torch.arange(rows, device=q.device)  # [n, L]
    inside = index < sequences.q_starts[1:, None]
    # whatever stands beyond a sequence is multiplied by zeros, so it must be finite
    by_sequence = torch.where(inside, lse[:, index.clamp(max=len(q) - 1)], 0).transpose(0, 1)  # [n, H, L]
    parts = zip(*(_by_key_head(x, k) for x in (d_out, q, out)), _by_key_head(by_sequence, k), strict=True)
    found = [efficient_attention_backward(d, x, k, v, o, rows_.contiguous(), sequences) for d, x, o, rows_ in parts]
    d_q, d_k, d_v = zip(*found, strict=True)
    return _joined(d_q), sum(d_k[1:], d_k[0]), sum(d_v[1:], d_v[0])


def _by_key_head(x: Tensor, k: Tensor) -> list[Tensor]:
    """[T, H, …] → one [T, G, …] for each of the H / G query heads that share a key head."""
    return list(x.unflatten(1, (k.shape[1], -1)).unbind(2))


def _joined(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """[T, H, …] of the parts that `_by_key_head` returns."""
    return parts[0] if len(parts) == 1 else torch.stack(parts, dim=2).flatten(1, 2)


def _places(starts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(sequence [n], place in it [n]) of each of `n` rows; of rows that are in none, any sequence."""
    rows = torch.arange(n, dtype=starts.dtype, device=starts.device)
    sequence = torch.searchsorted(starts, rows, right=True).sub_(1).clamp_(0, len(starts) - 2)
    return sequence, rows - starts[sequence]
