"""The private calls into torch that this repository makes, each checked at its first use.

torch may change a private function in any release. The check compares its parameters with those that are passed here,
so that such a release fails in one line that names it, and not within a kernel.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from common.errors import UserError

import torch
from torch import Tensor

FORWARD = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask"
BACKWARD = "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused"
EFFICIENT = (
    "query key value bias cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p custom_mask_type "
    "compute_log_sumexp"
)
EFFICIENT_BACKWARD = (
    "grad_out_ query key value bias out cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k logsumexp dropout_p "
    "philox_seed philox_offset custom_mask_type bias_requires_grad"
)
NO_MASK, CAUSAL_FROM_LAST = 0, 2  # `custom_mask_type`


class Sequences(NamedTuple):
    """n sequences of queries and keys that lie in one row. Tensors are int32, on the device; lengths in tokens."""

    q_starts: Tensor  # [n + 1] cumulative lengths of the queries
    k_starts: Tensor  # [n + 1] starts of the keys
    longest_q: int  # upper bounds of the lengths
    longest_k: int
    causal: bool  # a query attends to no keys beyond its own, counted from the last of both
    k_used: Tensor | None = None  # [n] lengths of the keys; None: each up to the next start


def flash_attention(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Output [T, H, D], and the log-sum-exp [H, T] fp32 of the scores; uninitialised in rows of no sequence.

    Queries [T, H, D], keys and values [S, G, D], G a divisor of H, all of 16 bits on a GPU. FlashAttention-2:
    https://arxiv.org/abs/2307.08691
    """
    call, (*lengths, causal, k_used) = _checked("ops.aten._flash_attention_forward", FORWARD, "seqused_k"), sequences
    return call(q, k, v, *lengths, 0.0, causal, False, seqused_k=k_used)[:2]


def flash_attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given that of the output, and what `flash_attention` returned."""
    call, (*lengths, causal, _) = _checked("ops.aten._flash_attention_backward", BACKWARD), sequences
    state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of the random numbers of dropout, whose rate is 0
    return call(d_out, q, k, v, out, lse, *lengths, 0.0, causal, state, state)


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Output [T, H, D], and the log-sum-exp [n, H, L] fp32 of each sequence; L is the longest, rounded up to 32.

    Queries [T, H, D], keys and values [S, H, D]. Runs from compute capability 5.0 on, in bf16 from 8.0 on.
    https://arxiv.org/abs/2112.05682
    """
    call = _checked("ops.aten._efficient_attention_forward", EFFICIENT, "seqlen_k")
    lengths, mask = _bounds(q, k, sequences), CAUSAL_FROM_LAST if sequences.causal else NO_MASK
    q, k, v = (x[None] for x in (q, k, v))
    out, lse = call(q, k, v, None, *lengths, 0.0, mask, True, seqlen_k=sequences.k_used)[:2]
    return out[0], lse


def efficient_attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given that of the output and what `efficient_attention` returned; `lse` all finite."""
    call = _checked("ops.aten._efficient_attention_backward", EFFICIENT_BACKWARD, "num_splits_key")
    lengths, mask = _bounds(q, k, sequences), CAUSAL_FROM_LAST if sequences.causal else NO_MASK
    state = torch.empty(0, dtype=torch.int64)  # of the random numbers of dropout, whose rate is 0
    d_out, q, k, v, out = (x.contiguous()[None] for x in (d_out, q, k, v, out))
    options = lse, 0.0, state, state, mask, False
    # one split of the keys, because several would add to the gradient of q in any order
    return tuple(x[0] for x in call(d_out, q, k, v, None, out, *lengths, *options, num_splits_key=1)[:3])


def _bounds(q: Tensor, k: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor, int, int]:
    """Starts of queries and keys; upper bounds of their lengths that no tensor is shorter than."""
    q_starts, k_starts, longest_q, longest_k, *_ = sequences
    return q_starts, k_starts, min(longest_q, len(q)), min(longest_k, len(k))


def mark_dynamic(x: Tensor) -> None:
    """Lets `torch.compile` compile once for all lengths of the first dimension."""
    _checked("_dynamo.maybe_mark_dynamic", "t index")(x, 0)


def default_store() -> "torch.distributed.Store":
    """The key-value store by which the ranks of `torch.distributed` found each other."""
    return _checked("distributed.distributed_c10d._get_default_store", "")()


@functools.cache
def _checked(path: str, by_position: str, *by_name: str) -> Callable[..., Any]:
    """torch's function at `path`. Raises `UserError` unless it takes these parameters, and needs no others."""
    where, fix = f"torch {torch.__version__}: torch.{path}", "install the torch of requirements.lock"
    try:
        found: Any = functools.reduce(getattr, path.split("."), torch)
    except AttributeError:
        raise UserError(f"{where} is gone; {fix}") from None
    if path.startswith("ops."):
        found = found.default  # of the operator's overloads
        needed = {x.name: not x.has_default_value() for x in found._schema.arguments}
    else:
        needed = {x.name: x.default is x.empty for x in inspect.signature(found).parameters.values()}
    ours = by_position.split()
    used = [name for name in needed if needed[name] or name in (*ours, *by_name)]
    if used != [*ours, *by_name] or list(needed)[: len(ours)] != ours:
        raise UserError(f"{where} takes other arguments: {', '.join(needed)}; {fix}")
    return found
