"""Attention over the trees of a pack, for training, and over a KV cache, for decoding: dense parts without a mask.

A tree's attention has two dense parts: every prefix and every branch causally over itself, and the tree's branches over
its prefix. Outputs o [T, H, D] and log-sum-exps l [T, H] of two disjoint sets of keys join to those of their union:
    l = log(exp(l1) + exp(l2)),    o = exp(l1 - l) * o1 + exp(l2 - l) * o2
as in Hydragen (https://arxiv.org/abs/2402.05099) for decoding and ring attention (https://arxiv.org/abs/2310.01889) for
training. The backward pass of a part needs o and l of the union alone (https://arxiv.org/abs/2307.08691, algorithm 2).
Both parts are fused kernels where a GPU has them (`common.model.varlen`); elsewhere SDPA computes tree by tree.

T tokens; H query heads; G key heads, a divisor of H; heads of width D.
"""

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise

from common.model import varlen
from common.model.compiled import compiled
from common.torch_private import Sequences

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# for SDPA: queries, the blocks of keys that they attend to, and a mask [queries, keys] bool; None: causal
# `parts` of a pack: each prefix, then each tree's branches
Part = tuple[slice, list[slice], Tensor | None]


@dataclass(frozen=True)
class Spans:
    """Where the prefixes and branches of a pack are: cumulative lengths [n + 1] int32."""

    own: Tensor  # of every prefix, then of every branch
    prefix: Tensor  # of the prefixes
    branches: Tensor  # of each tree's branches together
    in_prefix: Tensor  # [T] bool
    in_branch: Tensor  # [T] bool; padding is in neither
    longest: tuple[int, ...]  # of `own`, `prefix` and `branches`, in tokens
    starts: tuple[list[int], ...]  # `own`, `prefix` and `branches` on the host, without padding

    @classmethod
    def of(cls, lengths: Sequence[int], branches: Sequence[int]) -> "Spans":
        """`lengths`: tokens of every prefix, then of every branch; `branches`: how many each tree has."""
        own, n = list(accumulate(lengths, initial=0)), len(branches)
        starts = own, own[: n + 1], [own[i] for i in accumulate(branches, initial=n)]
        in_prefix = torch.arange(own[-1]) < own[n]
        ends = [torch.tensor(x, dtype=torch.int32) for x in starts]
        return cls(ends[0], ends[1], ends[2], in_prefix, ~in_prefix, tuple(map(_longest, starts)), starts)

    @functools.cached_property
    def sequences(self) -> tuple[Sequences, Sequences]:
        """Every prefix and branch over itself; each tree's branches over its prefix."""
        own, prefix, branches = self.longest
        over_prefix = Sequences(self.branches, self.prefix, branches, prefix, causal=False)
        return Sequences(self.own, self.own, own, own, causal=True), over_prefix

    @functools.cached_property
    def parts(self) -> list[Part]:
        own, prefix, branches = self.starts
        parts: list[Part] = [(slice(a, b), [slice(a, b)], None) for a, b in pairwise(prefix)]
        for (p, p_end), (a, b) in zip(pairwise(prefix), pairwise(branches), strict=True):
            ends = own[own.index(a, len(prefix) - 1) : own.index(b) + 1]
            mask = _tree_mask(p_end - p, [_causal(y - x, y - x) for x, y in pairwise(ends)])
            parts.append((slice(a, b), [slice(p, p_end), slice(a, b)], mask.to(self.own.device)))
        return parts

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> "Spans":
        moved = {name: x.to(device) for name, x in self.tensors().items()}
        return Spans(**moved, longest=self.longest, starts=self.starts)


@dataclass(frozen=True)
class Reach:
    """The cached keys that T new tokens attend to: first those of new prefixes, then each tree's branches together.

    A prefix or branch has a block of the cache, which holds its `used` first tokens, the new ones included. A token
    attends to its own block up to itself, and in a branch to the block of the tree's prefix.
    """

    own: Tensor  # [S + 1] int32 cumulative new tokens of every prefix, then of every branch
    own_start: Tensor  # [S + 1] int32 slots where the blocks start; the last is not read
    own_used: Tensor  # [S] int32
    trees: Tensor  # [N + 1] int32 cumulative new tokens of each tree's branches, from the first branch's on
    prefix_start: Tensor  # [N + 1] int32 slots where the prefixes' blocks start; the last is not read
    prefix_used: Tensor  # [N] int32
    host: tuple[list[int], ...]  # the six tensors on the host
    first: int  # new tokens of prefixes, which come before those of branches

    @functools.cached_property
    def sequences(self) -> tuple[Sequences, Sequences]:
        """Every prefix and branch over its own block; each tree's branches over its prefix's."""
        own, _, used, trees, _, prefix_used = self.host
        branches, prefix = _longest(trees), max(prefix_used, default=0)
        over_prefix = Sequences(self.trees, self.prefix_start, branches, prefix, False, self.prefix_used)
        return Sequences(self.own, self.own_start, _longest(own), max(used), True, self.own_used), over_prefix

    @functools.cached_property
    def parts(self) -> list[Part]:
        own, start, used, trees, prefix, prefix_used = self.host
        new, n_prefixes = [b - a for a, b in pairwise(own)], sum(end <= self.first for end in own[1:])
        blocks = [slice(at, at + n) for at, n in zip(start, used, strict=False)]
        parts: list[Part] = []
        for i in range(n_prefixes):
            mask = None if new[i] == used[i] else _causal(new[i], used[i]).to(self.own.device)
            parts.append((slice(own[i], own[i + 1]), [blocks[i]], mask))
        for n, (a, b) in enumerate(pairwise(trees)):
            members = range(own.index(self.first + a, n_prefixes), own.index(self.first + b, n_prefixes))
            mask = _tree_mask(prefix_used[n], [_causal(new[i], used[i]) for i in members]).to(self.own.device)
            keys = [slice(prefix[n], prefix[n] + prefix_used[n]), *(blocks[i] for i in members)]
            parts.append((slice(self.first + a, self.first + b), keys, mask))
        return parts


def forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor | None]:
    """Output [T, H, D], 0 in padding, and the log-sum-exp [H, T] that `backward` takes, None where SDPA computes.

    Queries [T, H, D], keys and values [T, G, D].
    """
    if not (kernels := varlen.kernels(q.device, q.dtype)):
        return _by_parts(q, k, v, spans.parts), None
    (out, lse), (out_prefix, lse_prefix) = (kernels.forward(q, k, v, s) for s in spans.sequences)
    places = spans.in_branch[:, None], spans.in_prefix[:, None]
    out, joined = _join_branches(out, out_prefix, lse.T, lse_prefix.T, *places)
    return out, joined.T.contiguous()


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, spans: Spans
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, 0 in padding, given that of the output, and what `forward` returned."""
    kernels = varlen.kernels(q.device, q.dtype)
    if not kernels or lse is None:
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            d_q, d_k, d_v = torch.autograd.grad(_by_parts(q, k, v, spans.parts), (q, k, v), d_out)
        return d_q, d_k, d_v
    own, over_prefix = (kernels.backward(d_out, q, k, v, out, lse, s) for s in spans.sequences)
    return _add_gradients(*own, *over_prefix, spans.in_branch[:, None, None], spans.in_prefix[:, None, None])


def over_cache(q: Tensor, keys: Tensor, values: Tensor, reach: Reach) -> Tensor:
    """Output [T, H, D] of new tokens' queries [T, H, D] over a cache's keys and values [S, G, D]. Has no backward."""
    if not (kernels := varlen.kernels(q.device, q.dtype)):
        return _by_parts(q, keys, values, reach.parts)
    own, over_prefix = reach.sequences
    out, lse = kernels.forward(q, keys, values, own)
    if over_prefix.longest_q:
        branches = slice(reach.first, None)
        out_prefix, lse_prefix = kernels.forward(q[branches], keys, values, over_prefix)
        out[branches] = _join(out[branches], out_prefix, lse.T[branches], lse_prefix.T)
    return out


def _join_lse(out_1: Tensor, out_2: Tensor, lse_1: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] and log-sum-exp [T, H] over the union of two sets of keys."""
    lse = torch.logaddexp(lse_1, lse_2)
    out = out_1 * (lse_1 - lse).exp()[..., None] + out_2 * (lse_2 - lse).exp()[..., None]
    return out.to(out_1.dtype), lse


@compiled
def _join(out_1: Tensor, out_2: Tensor, lse_1: Tensor, lse_2: Tensor) -> Tensor:
    return _join_lse(out_1, out_2, lse_1, lse_2)[0]


@compiled
def _join_branches(
    out: Tensor, out_prefix: Tensor, lse: Tensor, lse_prefix: Tensor, in_branch: Tensor, in_prefix: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, joined in branches, unchanged in prefixes; the output is 0 in padding."""
    joined, lse_joined = _join_lse(out, out_prefix, lse, lse_prefix)
    out = torch.where(in_branch[..., None], joined, torch.where(in_prefix[..., None], out, 0))
    return out, torch.where(in_branch, lse_joined, lse)


@compiled
def _add_gradients(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, p_q: Tensor, p_k: Tensor, p_v: Tensor, in_branch: Tensor, in_prefix: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of gradients over oneself and over the prefix (p); 0 in padding, where kernels leave them uninitialised."""
    d_q = torch.where(in_branch, d_q + p_q, torch.where(in_prefix, d_q, 0))
    d_k, d_v = (torch.where(in_prefix, d + p, torch.where(in_branch, d, 0)) for d, p in ((d_k, p_k), (d_v, p_v)))
    return d_q, d_k, d_v


def _longest(ends: list[int]) -> int:
    """The longest of the sequences with cumulative lengths `ends`; 0 if there is none."""
    return max((b - a for a, b in pairwise(ends)), default=0)


def _causal(new: int, used: int) -> Tensor:
    """Mask [new, used] bool of a block's last `new` tokens, each over the block up to itself."""
    return torch.ones(new, used, dtype=torch.bool).tril(used - new)


def _tree_mask(prefix: int, blocks: list[Tensor]) -> Tensor:
    """Mask of branches over all `prefix` tokens of their prefix and, by the masks `blocks`, over their own blocks."""
    own = torch.block_diag(*blocks)
    return torch.cat([own.new_ones(len(own), prefix), own], dim=1)


def _by_parts(q: Tensor, keys: Tensor, values: Tensor, parts: list[Part]) -> Tensor:
    """Output [T, H, D] by SDPA, part by part; 0 in padding, which is in none.

    On a GPU by products and a softmax, because a part's scores are few, and fused kernels with a mask read out of
    bounds (torch 2.11, fp16, heads of 128, H100).
    """
    q, keys, values = (x.transpose(0, 1)[None] for x in (q, keys, values))  # [1, H, T, D]
    out = []
    with sdpa_kernel(SDPBackend.MATH) if q.is_cuda else nullcontext():
        for queries, blocks, mask in parts:
            k, v = (torch.cat([x[:, :, block] for block in blocks], dim=2) for x in (keys, values))
            x = q[:, :, queries]
            out.append(F.scaled_dot_product_attention(x, k, v, mask, is_causal=mask is None, enable_gqa=True))
    return torch.cat([*out, q[:, :, parts[-1][0].stop :] * 0], dim=2)[0].transpose(0, 1)
