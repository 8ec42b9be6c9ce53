"""Attention over trees is attention under the tree mask, whatever the shape of the trees."""

from contextlib import contextmanager
from itertools import pairwise

from common.data.trees import Branch, Tree
from common.model import attention, varlen
from common.model.pack import PadSizes, build_pack
from common.model.tree_mask import visible

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

sizes = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 6), min_size=1, max_size=4)), min_size=1, max_size=4
)


def trees_of(shapes) -> list[Tree]:
    """Prefixes and branches of these lengths."""
    return [
        Tree([1] * prefix, tuple(Branch(f"{t}.{b}", [2] * n, []) for b, n in enumerate(branches)))
        for t, (prefix, branches) in enumerate(shapes)
    ]


def heads(tokens: int, n: int) -> torch.Tensor:
    return torch.randn(tokens, n, 8, dtype=torch.float64, requires_grad=True)


@given(sizes)
def test_output_and_gradients_are_those_of_the_mask(shapes):
    batch = build_pack(trees_of(shapes))
    torch.manual_seed(0)
    n = len(batch.input_ids)
    q, k, v, d_out = heads(n, 4), heads(n, 2), heads(n, 2), torch.randn(n, 4, 8, dtype=torch.float64)
    mask = visible(batch.layout, batch.layout)
    wide = (x.transpose(0, 1)[None] for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    out, lse = attention.forward(q, k, v, batch.spans)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(expected, (q, k, v), d_out)
    found = attention.backward(d_out, q, k, v, out, lse, batch.spans)
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@given(sizes)
def test_spans_are_where_the_tokens_are(shapes):
    batch = build_pack(trees_of(shapes))
    spans, layout = batch.spans, batch.layout
    assert spans.starts == tuple(x.tolist() for x in (spans.own, spans.prefix, spans.branches))
    assert spans.in_prefix.tolist() == (layout.branch == 0).tolist() == (~spans.in_branch).tolist()
    for starts, key in ((spans.own, layout.tree * 1000 + layout.branch), (spans.branches, layout.tree)):
        for a, b in pairwise(starts):
            assert len(key[a:b].unique()) == 1
    assert spans.longest == tuple(int(x.diff().max()) for x in (spans.own, spans.prefix, spans.branches))


@st.composite
def cached_trees(draw):
    """Trees: tokens of the prefix, how many of them are new, and for each branch tokens before and new ones."""
    trees = []
    for _ in range(draw(st.integers(1, 4))):
        branches = st.tuples(st.integers(0, 5), st.integers(1, 4))
        prefix = draw(st.integers(1, 9))
        new = draw(st.sampled_from([0, 0, prefix, draw(st.integers(1, prefix))]))
        trees.append((prefix, new, draw(st.lists(branches, min_size=0 if new else 1, max_size=3))))
    return trees


def reach_of(trees) -> tuple[attention.Reach, torch.Tensor, torch.Tensor]:
    """(reach, the slot [T] of every new token, whether it attends to each slot [T, S] of the cache); gaps between."""
    at, places = 3, []  # tree: start, then each branch's
    for prefix, _, branches in trees:
        starts = [at]
        for before, new in [(0, prefix), *branches]:
            at += before + new + 2
            starts.append(at)
        places.append(starts)
    own, start, used, slots, seen = [0], [], [], [], []

    def put(begin: int, before: int, new: int, prefix: range) -> None:
        own.append(own[-1] + new)
        start.append(begin)
        used.append(before + new)
        for i in range(before, before + new):
            slots.append(begin + i)
            seen.append([slot in prefix or begin <= slot <= begin + i for slot in range(at)])

    for (prefix, new, _), (begin, *_) in zip(trees, places, strict=True):
        if new:
            put(begin, prefix - new, new, range(0))
    first, over, prefix_start, prefix_used = own[-1], [0], [], []
    for (prefix, _, branches), (begin, *starts) in zip(trees, places, strict=True):
        if not branches:
            continue
        for (before, new), where in zip(branches, starts, strict=False):
            put(where, before, new, range(begin, begin + prefix))
        over.append(own[-1] - first)
        prefix_start.append(begin)
        prefix_used.append(prefix)
    host = (own, [*start, 0], used, over, [*prefix_start, 0], prefix_used)
    tensors = (torch.tensor(x, dtype=torch.int32) for x in host)
    return attention.Reach(*tensors, host, first), torch.tensor(slots), torch.tensor(seen)


def check_over_cache(trees) -> None:
    reach, slots, seen = reach_of(trees)
    torch.manual_seed(0)
    keys, values = (torch.randn(seen.shape[1], 2, 8, dtype=torch.float64) for _ in range(2))
    q = torch.randn(len(slots), 4, 8, dtype=torch.float64)
    wide = (x.transpose(0, 1)[None] for x in (q, keys, values))
    expected = F.scaled_dot_product_attention(*wide, attn_mask=seen[None, None], enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(attention.over_cache(q, keys, values, reach), expected)


@given(cached_trees())
def test_new_tokens_attend_to_their_own_block_and_their_prefix(trees):
    check_over_cache(trees)


# ---- the varlen calls of a GPU, in place of which a CPU computes what they are documented to -----------------------


def by_sequence(q, k, v, sequences, d_out=None, out=None, lse=None):
    """`torch_private.flash_attention`, and with `d_out` its backward; rows of no sequence are NaN."""
    group, nan = q.shape[1] // k.shape[1], float("nan")
    if d_out is None:
        found = [torch.full_like(q, nan), torch.full((q.shape[1], len(q)), nan, dtype=q.dtype)]
    else:
        found = [torch.full_like(x, nan) for x in (q, k, v)]
    for i, (a, b) in enumerate(pairwise(sequences.q_starts.tolist())):
        start = int(sequences.k_starts[i])
        keys = slice(
            start, start + int(sequences.k_used[i]) if sequences.k_used is not None else int(sequences.k_starts[i + 1])
        )
        assert b - a <= sequences.longest_q
        assert keys.stop - start <= sequences.longest_k
        mine, ours, theirs = (x.transpose(0, 1) for x in (q[a:b], k[keys], v[keys]))  # [heads, tokens, D]
        ours, theirs = (x.repeat_interleave(group, 0) for x in (ours, theirs))
        scores = mine @ ours.transpose(1, 2) * q.shape[2] ** -0.5
        if sequences.causal:
            mask = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
            scores = scores.masked_fill(~mask, -torch.inf)
        if d_out is None:
            found[0][a:b] = (scores.softmax(-1) @ theirs).transpose(0, 1)
            found[1][:, a:b] = scores.logsumexp(-1)
            continue
        d, o = d_out[a:b].transpose(0, 1), out[a:b].transpose(0, 1)
        p = (scores - lse[:, a:b, None]).exp()
        d_scores = p * (d @ theirs.transpose(1, 2) - (d * o).sum(-1, keepdim=True)) * q.shape[2] ** -0.5
        found[0][a:b] = (d_scores @ ours).transpose(0, 1)
        for x, per_head in ((found[1], d_scores.transpose(1, 2) @ mine), (found[2], p.transpose(1, 2) @ d)):
            x[keys] = per_head.unflatten(0, (-1, group)).sum(1).transpose(0, 1)
    return tuple(found)


def efficient(q, k, v, sequences):
    """`torch_private.efficient_attention`: rows of the log-sum-exp beyond a sequence are NaN."""
    assert q.shape[1] == k.shape[1]
    out, lse = by_sequence(q, k, v, sequences)
    longest = -(-min(sequences.longest_q, len(q)) // 32) * 32
    rows = lse.new_full((len(sequences.q_starts) - 1, q.shape[1], longest), float("nan"))
    for i, (a, b) in enumerate(pairwise(sequences.q_starts.tolist())):
        rows[i, :, : b - a] = lse[:, a:b]
    return out, rows


def efficient_backward(d_out, q, k, v, out, lse, sequences):
    assert q.shape[1] == k.shape[1]
    assert lse.isfinite().all()
    assert lse.shape[2] % 32 == 0
    joined = lse.new_full((q.shape[1], len(q)), float("nan"))
    for i, (a, b) in enumerate(pairwise(sequences.q_starts.tolist())):
        joined[:, a:b] = lse[i, :, : b - a]
    return by_sequence(q, k, v, sequences, d_out, out, joined)


@contextmanager
def kernels(way: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, f"has_{way}_attention", lambda device, dtype: True)
        patch.setattr(varlen, "flash_attention", by_sequence)
        patch.setattr(
            varlen,
            "flash_attention_backward",
            lambda d_out, q, k, v, out, lse, sequences: by_sequence(q, k, v, sequences, d_out, out, lse),
        )
        patch.setattr(varlen, "efficient_attention", efficient)
        patch.setattr(varlen, "efficient_attention_backward", efficient_backward)
        yield


WAYS = pytest.mark.parametrize("way", ["flash", "efficient"])


@WAYS
@given(shapes=sizes)
def test_varlen_calls_and_their_join_are_attention_under_the_mask(way, shapes):
    batch = build_pack(trees_of(shapes))
    padded = PadSizes.of([batch], 200).pad(batch)
    torch.manual_seed(0)
    n, total = batch.n_tokens, len(padded.input_ids)
    q, k, v, d_out = heads(total, 4), heads(total, 2), heads(total, 2), torch.randn(total, 4, 8, dtype=torch.float64)
    wide = (x[:n].transpose(0, 1)[None] for x in (q, k, v))
    mask = visible(batch.layout, batch.layout)
    expected = F.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    gradients = torch.autograd.grad(expected, (q, k, v), d_out[:n])
    with torch.no_grad(), kernels(way):
        out, lse = attention.forward(q, k, v, padded.spans)
        found = attention.backward(d_out, q, k, v, out, lse, padded.spans)
    torch.testing.assert_close(out[:n], expected)
    assert not out[n:].any(), "padding"
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@WAYS
@given(trees=cached_trees())
def test_varlen_calls_over_a_cache_attend_to_the_own_block_and_the_prefix(way, trees):
    with kernels(way):
        check_over_cache(trees)


def halves() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Attention over some keys, over the others, their log-sum-exps; and over all."""
    q, k, v = (torch.randn(2, 5, 8, dtype=torch.float64) for _ in range(3))  # [H, T, D]
    scores = q @ k.transpose(1, 2)
    parts = (slice(2), slice(2, 5))
    out = [(scores[..., s].softmax(-1) @ v[:, s]).transpose(0, 1) for s in parts]
    lse = [scores[..., s].logsumexp(-1).T for s in parts]
    return [*out, *lse], (scores.softmax(-1) @ v).transpose(0, 1), scores.logsumexp(-1).T


def test_two_sets_of_keys_join_to_the_whole():
    parts, whole, _ = halves()
    torch.testing.assert_close(attention._join(*parts), whole)


def test_two_parts_join_to_the_whole():
    """`_join_branches` with the log-sum-exps of each part is attention over both."""
    parts, whole, whole_lse = halves()
    some = torch.tensor([True, True, False, True, False])[:, None]
    in_prefix = torch.tensor([False, False, True, False, False])[:, None]
    joined, both = attention._join_branches(*parts, some, in_prefix)
    torch.testing.assert_close(joined[some[:, 0]], whole[some[:, 0]])
    torch.testing.assert_close(both[some[:, 0]], whole_lse[some[:, 0]])
    torch.testing.assert_close(joined[2], parts[0][2])
    assert (joined[4] == 0).all(), "padding"


@pytest.mark.parametrize("where", ["d_q", "d_k"])
def test_what_was_in_memory_under_padding_goes_nowhere(where):
    garbage = torch.full((3, 1, 2), torch.nan)
    good = torch.ones(3, 1, 2)
    in_branch, in_prefix = (torch.tensor(x)[:, None, None] for x in ([False, True, False], [True, False, False]))
    own = torch.where(in_branch | in_prefix, good, garbage)
    over_q, over_k = torch.where(in_branch, good, garbage), torch.where(in_prefix, good, garbage)
    d_q, d_k, _ = attention._add_gradients(own, own, own, over_q, over_k, over_k, in_branch, in_prefix)
    expected = {"d_q": [1, 2, 0], "d_k": [2, 1, 0]}[where]
    assert {"d_q": d_q, "d_k": d_k}[where][:, 0, 0].tolist() == expected
