"""Shared-prefix packs: paragraphs, each once, with all their questions as branches, in one row of tokens.

    [prefix 1][prefix 2] ... [branch 1a][branch 1b][branch 2c] ...

A token attends to the tokens of its tree that are in the prefix or in its own branch and not after it. The positions of
a branch continue those of its prefix. So a question computes what it would in a row of its own, and its paragraph is
computed once. Prefixes come first because attention is then two dense calls (`common.model.attention`).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.data.trees import Tree
from common.model.attention import Spans

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # target of no loss: the default `ignore_index` of torch's cross entropy
# padded sizes, at most: each is a CUDA graph that is captured before the first step
SIZES = 12
# padded sizes are multiples of a matrix product's tile, 128 rows, because a product computes whole tiles
# (https://docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication/index.html)
TILE = 128
# a margin over the packs of the first steps; a later pack beyond it is split, or computed without a graph
MARGIN = 1.15
# granularity of the other sizes: lengths and answers in tokens; trees, prefixes and branches in sequences
TOKEN_STEP, SEQUENCE_STEP = 64, 8


@dataclass(frozen=True)
class Layout:
    """The places of N tokens, from which follows which of them attend to which. All int64."""

    tree: Tensor  # [N]; -1: padding
    branch: Tensor  # [N] 0: the tree's prefix; else the branch's number, unique in the pack
    position: Tensor  # [N] from the start of the tree's prefix along the token's own path

    def __getitem__(self, index: Tensor) -> "Layout":
        return Layout(*(x[index] for x in vars(self).values()))

    def then(self, other: "Layout") -> "Layout":
        return Layout(*(torch.cat(pair) for pair in zip(vars(self).values(), vars(other).values(), strict=True)))

    def next(self) -> "Layout":
        """The places one token further, along the same paths."""
        return Layout(self.tree, self.branch, self.position + 1)


@dataclass(frozen=True)
class Pack:
    """T tokens with B branches and A answer tokens, EOS included; padding counts."""

    input_ids: Tensor  # [T]
    layout: Layout  # of the T tokens
    spans: Spans
    prompt_ends: Tensor  # [B] index of each branch's last prompt token: its logits are the answer's first
    target_index: Tensor  # [A] indices whose logits predict an answer token
    target_ids: Tensor  # [A] the answer tokens
    target_share: Tensor  # [A] fp32: 1 / tokens of the answer
    ids: list[str]  # [B] question ids
    dropout_key: Tensor | None = None  # [2] int32, of the fused layers' masks; None: nothing is dropped

    @property
    def n_tokens(self) -> int:
        """T without padding."""
        return self.spans.starts[0][-1]

    @property
    def shape(self) -> tuple[tuple[int, ...], ...]:
        """Equal for packs that one CUDA graph computes: all sizes of tensors, and the upper bounds of lengths."""
        return (*(x.shape for x in self.tensors()), self.spans.longest)

    def tensors(self) -> list[Tensor]:
        own = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return [*own, *vars(self.layout).values(), *self.spans.tensors().values()]

    def to(self, device: torch.device) -> "Pack":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor | Spans)}
        return Pack(**{**vars(self), **moved, "layout": Layout(*(v.to(device) for v in vars(self.layout).values()))})


def build_pack(trees: Sequence[Tree]) -> Pack:
    """`trees` in one row, on the host."""
    branches = [(t, branch) for t, tree in enumerate(trees) for branch in tree.branches]
    # tree, branch, position of the first token, ids; the last answer token (EOS) is a target and no input
    rows = [(t, 0, 0, tree.prefix_ids) for t, tree in enumerate(trees)]
    for number, (t, b) in enumerate(branches, 1):
        rows.append((t, number, len(trees[t].prefix_ids), b.prompt_ids + b.answer_ids[:-1]))
    lengths = torch.tensor([len(row[3]) for row in rows])
    starts = lengths.cumsum(0) - lengths
    tree, branch, begin = torch.tensor([row[:3] for row in rows]).repeat_interleave(lengths, dim=0).T.contiguous()
    position = torch.arange(len(tree)) - starts.repeat_interleave(lengths) + begin
    ends = starts[len(trees) :] + torch.tensor([len(b.prompt_ids) for _, b in branches]) - 1
    spans = Spans.of(lengths.tolist(), [len(tree.branches) for tree in trees])
    index = [end + i for end, (_, b) in zip(ends.tolist(), branches, strict=True) for i in range(len(b.answer_ids))]
    answers = [i for _, b in branches for i in b.answer_ids]
    target_index, target_ids = (torch.tensor(x, dtype=torch.long) for x in (index, answers))
    share = torch.tensor([1 / len(b.answer_ids) for _, b in branches for _ in b.answer_ids])
    ids, names = torch.tensor([i for row in rows for i in row[3]]), [b.id for _, b in branches]
    return Pack(ids, Layout(tree, branch, position), spans, ends, target_index, target_ids, share, names)


@dataclass(frozen=True)
class PadSizes:
    """The sizes that packs are padded to, so that one CUDA graph computes many packs (`common.train.cuda_graphs`)."""

    tokens: tuple[int, ...]  # rising
    trees: int
    spans: int  # prefixes and branches
    answers: int  # answer tokens
    longest: tuple[int, ...]  # as in `Spans`

    @classmethod
    def of(cls, packs: Sequence[Pack], most_tokens: int) -> "PadSizes":
        """Sizes that hold `packs`, with a margin, and packs like them of up to `most_tokens`."""
        lengths = {most_tokens, *(len(p.input_ids) for p in packs)}
        step = next(n for n in itertools.count(TILE, TILE) if len({-(-length // n) for length in lengths}) <= SIZES)
        tokens = tuple(sorted({-(-length // step) * step for length in lengths}))
        sizes = [(len(p.spans.prefix) - 1, len(p.spans.own) - 1, len(p.target_ids), *p.spans.longest) for p in packs]
        columns = zip((SEQUENCE_STEP,) * 2 + (TOKEN_STEP,) * 4, *sizes, strict=True)
        trees, spans, answers, *longest = (step * math.ceil(MARGIN * max(x) / step) for step, *x in columns)
        return cls(tokens, trees, spans, answers, tuple(longest))

    def packs(self, trees: Sequence[Tree]) -> list[Pack]:
        """`trees` in one padded pack, or in several if none holds all; a tree beyond the sizes is not padded."""
        whole = build_pack(trees)
        if (padded := self.pad(whole)) or len(trees) == 1:
            return [padded or whole]
        return self.packs(trees[::2]) + self.packs(trees[1::2])

    def pad(self, pack: Pack, size: int | None = None) -> Pack | None:
        """The pack with padding that no token attends to and that has no loss; None if it exceeds the sizes.

        The result has `size` tokens, else the least of `tokens` that suffices. `prompt_ends`, which training does not
        use, is left empty.
        """
        spans, length = pack.spans, len(pack.input_ids)
        size = size or next((n for n in self.tokens if n >= length), 0)
        tokens, answers = size - length, self.answers - len(pack.target_ids)
        trees, own = self.trees + 1 - len(spans.prefix), self.spans + 1 - len(spans.own)
        longer = any(a > b for a, b in zip(spans.longest, self.longest, strict=True))
        if min(tokens, trees, own, answers) < 0 or longer:
            return None

        def pad(x: Tensor, n: int, value: int = 0) -> Tensor:
            return F.pad(x, (0, n), value=value)

        return replace(
            pack,
            input_ids=pad(pack.input_ids, tokens),
            layout=Layout(*(pad(x, tokens, -1 if name == "tree" else 0) for name, x in vars(pack.layout).items())),
            spans=replace(
                spans,
                own=pad(spans.own, own, int(spans.own[-1])),
                prefix=pad(spans.prefix, trees, int(spans.prefix[-1])),
                branches=pad(spans.branches, trees, int(spans.branches[-1])),
                in_prefix=pad(spans.in_prefix, tokens),
                in_branch=pad(spans.in_branch, tokens),
                longest=self.longest,
            ),
            prompt_ends=pack.prompt_ends[:0],
            target_index=pad(pack.target_index, answers),
            target_ids=pad(pack.target_ids, answers, IGNORED),
            target_share=pad(pack.target_share, answers),
        )
