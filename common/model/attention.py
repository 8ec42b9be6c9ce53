"""Attention over the trees of a pack, forward and backward apart, so that a layer may keep its output or not.

A pack lays all prefixes out first and then all branches (`common.model.pack`), so a tree's attention is two dense
parts: every prefix and every branch causally over itself, and a tree's branches over its prefix. The two are joined by
their log-sum-exps, as Hydragen (https://arxiv.org/abs/2402.05099) does in decoding and ring attention
(https://arxiv.org/abs/2310.01889) in training. No mask is needed, and the cost is that of the pairs that may look at
each other, whatever the size of the pack.

On a GPU with flash attention (sm80 and up, 16-bit) both parts are PyTorch's own varlen kernels. Elsewhere SDPA does
tree by tree what those do.

In decoding (`over_arena`) keys and values lie in an arena, where each prefix and each branch has a stretch of its own.
"""

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise

from common.device import has_flash_attention
from common.model.compiled import compiled

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Spans:
    """Where prefixes and branches begin and end: cumulative lengths [n + 1] int32, as varlen kernels take them."""

    own: Tensor  # of every prefix, then of every branch
    prefix: Tensor  # of the prefixes: the keys that a tree's branches share
    branches: Tensor  # of each tree's branches together
    shared: Tensor  # [T] bool: a prefix's token
    shares: Tensor  # [T] bool: a branch's token
    longest: tuple[int, int, int]  # longest of the first three, in tokens
    starts: tuple[list[int], list[int], list[int]]  # the first three, on the host

    @classmethod
    def of(cls, lengths: Sequence[int], branches: Sequence[int]) -> "Spans":
        """`lengths`: of every prefix, then of every branch, in tokens; `branches`: how many each tree has."""
        n = len(branches)
        ends = list(accumulate(branches, initial=n))
        together = [sum(lengths[a:b]) for a, b in pairwise(ends)]
        first = sum(lengths[:n])
        starts = (
            list(accumulate(lengths, initial=0)),
            list(accumulate(lengths[:n], initial=0)),
            list(accumulate(together, initial=first)),
        )
        own, prefix, parts = (torch.tensor(part, dtype=torch.int32) for part in starts)
        shared = torch.arange(starts[0][-1]) < first
        return cls(own, prefix, parts, shared, ~shared, (max(lengths), max(lengths[:n]), max(together)), starts)

    @functools.cached_property
    def masks(self) -> list[Tensor]:
        """For each tree, which of its prefix's and its branches' tokens the branches' tokens see: bool [B, P + B]."""
        own, prefix, branches = self.starts
        masks, at = [], len(prefix) - 1
        for (p, p_end), (a, b) in zip(pairwise(prefix), pairwise(branches), strict=True):
            lengths = []
            while own[at] < b:
                lengths.append(own[at + 1] - own[at])
                at += 1
            branch = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            same = (branch[:, None] == branch).tril()
            masks.append(torch.cat([same.new_ones(b - a, p_end - p), same], dim=1).to(self.own.device))
        return masks

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> "Spans":
        moved = {name: x.to(device) for name, x in self.tensors().items()}
        return Spans(**moved, longest=self.longest, starts=self.starts)


@dataclass(frozen=True)
class Reach:
    """What T new tokens see of an arena: those of new prefixes come first, then each tree's branches together.

    Every prefix and branch sees what its own stretch of the arena holds, up to itself; a branch its tree's prefix too.
    Starts are those of stretches in the arena; `used` is how many tokens lie there, the new ones included.
    """

    own: Tensor  # [S + 1] int32 cumulative new tokens of every prefix, then of every branch
    own_start: Tensor  # [S + 1] int32; the last is not read
    own_used: Tensor  # [S] int32
    trees: Tensor  # [N + 1] int32 cumulative new tokens of each tree's branches, from the first branch's on
    prefix_start: Tensor  # [N + 1] int32; the last is not read
    prefix_used: Tensor  # [N] int32
    host: tuple[list[int], ...]  # the six above
    first: int  # new tokens of prefixes: where the branches' begin

    @functools.cached_property
    def longest(self) -> tuple[int, int, int, int]:
        """Of own queries, own keys, a tree's branches' queries, prefixes."""
        own, _, own_used, trees, _, prefix_used = self.host
        queries, over = (max((b - a for a, b in pairwise(ends)), default=0) for ends in (own, trees))
        return queries, max(own_used), over, max(prefix_used, default=0)

    @functools.cached_property
    def parts(self) -> list[tuple[slice, list[slice], Tensor | None]]:
        """The new tokens of each prefix, then of each tree's branches; the stretches that they see; who sees whom.

        That is a mask [new, keys] bool, None where it is plainly causal.
        """
        own, start, used, trees, prefix, prefix_used = self.host
        out: list[tuple[slice, list[slice], Tensor | None]] = []
        device, at = self.own.device, 0

        def seen(i: int) -> Tensor:
            """Of stretch i, by its own new tokens."""
            new = own[i + 1] - own[i]
            return torch.ones(new, used[i], dtype=torch.bool).tril(used[i] - new)

        while at < len(used) and own[at + 1] <= self.first:
            whole = used[at] == own[at + 1] - own[at]
            stretch = slice(start[at], start[at] + used[at])
            out.append((slice(own[at], own[at + 1]), [stretch], None if whole else seen(at).to(device)))
            at += 1
        for n, (a, b) in enumerate(pairwise(trees)):
            stretches, marks = [slice(prefix[n], prefix[n] + prefix_used[n])], []
            while at < len(used) and own[at] < self.first + b:
                stretches.append(slice(start[at], start[at] + used[at]))
                marks.append(seen(at))
                at += 1
            mask = torch.cat([torch.ones(b - a, prefix_used[n], dtype=torch.bool), torch.block_diag(*marks)], dim=1)
            out.append((slice(self.first + a, self.first + b), stretches, mask.to(device)))
        return out


def forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor | None]:
    """Queries [T, H, D] over keys and values [T, G, D], G dividing H → output [T, H, D], log-sum-exp [H, T] or None."""
    if not has_flash_attention(q.device, q.dtype):
        return _by_tree(q, k, v, spans), None
    own, longest = spans.own, spans.longest
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, own, own, longest[0], longest[0], 0.0, True, False)
    # rows that are in no span are not written: they hold what was in memory
    over, lse_over, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, spans.branches, spans.prefix, longest[2], longest[1], 0.0, False, False
    )
    out, joined = _join(out, over, lse.T, lse_over.T, spans.shares[:, None], spans.shared[:, None])
    return out, joined.T.contiguous()


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, spans: Spans
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. With the log-sum-exp over all keys, each part's gradient follows from that part alone."""
    if lse is None:
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            return torch.autograd.grad(_by_tree(q, k, v, spans), (q, k, v), d_out)  # type: ignore[return-value]
    own, longest = spans.own, spans.longest
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is none of
    d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
        d_out, q, k, v, out, lse, own, own, longest[0], longest[0], 0.0, True, seed, seed
    )
    over = torch.ops.aten._flash_attention_backward(
        d_out, q, k, v, out, lse, spans.branches, spans.prefix, longest[2], longest[1], 0.0, False, seed, seed
    )
    return _add_where(d_q, d_k, d_v, *over, spans.shares[:, None, None], spans.shared[:, None, None])


def over_arena(q: Tensor, keys: Tensor, values: Tensor, reach: Reach) -> Tensor:
    """Queries [T, H, D] of new tokens over an arena's keys and values [A, G, D] → output [T, H, D]. For inference."""
    if not has_flash_attention(q.device, q.dtype):
        return _over_arena_by_tree(q, keys, values, reach)
    queries, own, over, prefix = reach.longest
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, keys, values, reach.own, reach.own_start, queries, own, 0.0, True, False, seqused_k=reach.own_used
    )
    if not over:
        return out
    shared, lse_shared, *_ = torch.ops.aten._flash_attention_forward(
        q[reach.first :], keys, values, reach.trees, reach.prefix_start, over, prefix, 0.0, False, False,
        seqused_k=reach.prefix_used,
    )  # fmt: skip
    out[reach.first :] = _joined(out[reach.first :], shared, lse.T[reach.first :], lse_shared.T)
    return out


def _weighted(out: Tensor, over: Tensor, lse: Tensor, lse_over: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.logaddexp(lse, lse_over)
    joined = out * (lse - both).exp()[..., None] + over * (lse_over - both).exp()[..., None]
    return joined.to(out.dtype), both


@compiled
def _joined(out: Tensor, over: Tensor, lse: Tensor, lse_over: Tensor) -> Tensor:
    """Outputs [T, H, D] over two sets of keys made one, by their log-sum-exps [T, H]."""
    return _weighted(out, over, lse, lse_over)[0]


@compiled
def _join(
    out: Tensor, over: Tensor, lse: Tensor, lse_over: Tensor, shares: Tensor, shared: Tensor
) -> tuple[Tensor, Tensor]:
    """`out` [T, H, D] and `lse` [T, H] over some keys, made those over these and the other keys where `shares`."""
    joined, both = _weighted(out, over, lse, lse_over)
    out = torch.where(shares[..., None], joined, torch.where(shared[..., None], out, 0))
    return out, torch.where(shares, both, lse)


@compiled
def _add_where(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, q: Tensor, k: Tensor, v: Tensor, shares: Tensor, shared: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of two parts' gradients; where neither is, in padding, zero in place of what was in memory."""
    d_q = torch.where(shares, d_q + q, torch.where(shared, d_q, 0))
    d_k, d_v = (torch.where(shared, own + over, torch.where(shares, own, 0)) for own, over in ((d_k, k), (d_v, v)))
    return d_q, d_k, d_v


def _over_arena_by_tree(q: Tensor, keys: Tensor, values: Tensor, reach: Reach) -> Tensor:
    q, keys, values = (x.transpose(0, 1)[None] for x in (q, keys, values))  # [1, H, T, D]

    def attend(new: slice, stretches: list[slice], mask: Tensor | None) -> Tensor:
        k, v = (torch.cat([x[:, :, s] for s in stretches], dim=2) for x in (keys, values))
        return F.scaled_dot_product_attention(q[:, :, new], k, v, mask, is_causal=mask is None, enable_gqa=True)

    with sdpa_kernel(SDPBackend.MATH) if q.is_cuda else nullcontext():
        out = [attend(*part) for part in reach.parts]
    # padding attends to nothing
    return torch.cat([*out, q[:, :, reach.host[0][-1] :] * 0], dim=2)[0].transpose(0, 1)


def _by_tree(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """The same by SDPA: each prefix over itself; each tree's branches under a mask over prefix and branches.

    On a GPU by products and a softmax: a tree's scores are few, and fused kernels with a mask read memory that is not
    theirs (torch 2.11, fp16, heads of 128, H100).
    """
    if q.is_cuda:
        with sdpa_kernel(SDPBackend.MATH):
            return _tree_by_tree(q, k, v, spans)
    return _tree_by_tree(q, k, v, spans)


def _tree_by_tree(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    own, prefix, branches = spans.starts
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T, D]

    def causal(a: int, b: int) -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True, enable_gqa=True)

    out = [causal(a, b) for a, b in pairwise(prefix)]
    for (p, p_end), (a, b), mask in zip(pairwise(prefix), pairwise(branches), spans.masks, strict=True):
        keys, values = (torch.cat([x[:, :, p:p_end], x[:, :, a:b]], dim=2) for x in (k, v))
        out.append(F.scaled_dot_product_attention(q[:, :, a:b], keys, values, attn_mask=mask, enable_gqa=True))
    return torch.cat([*out, q[:, :, own[-1] :] * 0], dim=2)[0].transpose(0, 1)  # padding attends to nothing
