"""Shared-prefix packs: several paragraphs, each once, with all their questions as branches, in one row of tokens.

Token i sees token j iff they are of the same tree, j lies in the tree's prefix or in i's own branch, and j is not after
i. Positions of every branch start at the prefix's length. So each question computes exactly what it would in a row of
its own, and the paragraph is computed once.

    [prefix 1][prefix 2] ... [branch 1a][branch 1b][branch 2c] ...

All prefixes come first, so that attention is two calls without a mask: every prefix and branch over itself, and the
branches of every tree over its prefix (`common.model.attention`).
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from common.data.trees import Tree
from common.model.attention import Spans

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that asks for nothing
SIZES = 12  # that packs are padded to, at most


@dataclass(frozen=True)
class Layout:
    """Where each of N tokens stands; enough to say who sees whom."""

    tree: Tensor  # [N] int64
    branch: Tensor  # [N] int64; 0: the tree's prefix; else the branch's number, unique in the pack
    position: Tensor  # [N] int64, from the start of the tree's prefix along the token's own path

    def __getitem__(self, index: Tensor) -> "Layout":
        return Layout(*(x[index] for x in vars(self).values()))

    def then(self, other: "Layout") -> "Layout":
        return Layout(*(torch.cat(pair) for pair in zip(vars(self).values(), vars(other).values(), strict=True)))

    def next(self) -> "Layout":
        """The places right after these, along the same paths."""
        return Layout(self.tree, self.branch, self.position + 1)


@dataclass(frozen=True)
class Pack:
    input_ids: Tensor  # [T]
    layout: Layout  # of the T tokens
    spans: Spans
    prompt_ends: Tensor  # [B] index of each branch's last prompt token: its logits are the answer's first
    target_index: Tensor  # [A] indices whose logits predict an answer token or EOS
    target_ids: Tensor  # [A] what they must predict
    target_share: Tensor  # [A] fp32: of the answer that it belongs to, which has them sum to one
    ids: list[str]  # [B] question ids

    @property
    def n_tokens(self) -> int:
        """T without padding."""
        return self.spans.starts[0][-1]

    @property
    def shape(self) -> tuple[Any, ...]:
        """All that a graph is recorded for."""
        return (*(x.shape for x in self.tensors()), self.spans.longest)

    def tensors(self) -> list[Tensor]:
        """All that is computed with."""
        own = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return [*own, *vars(self.layout).values(), *self.spans.tensors().values()]

    def to(self, device: torch.device) -> "Pack":
        move = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor | Spans)}
        layout = Layout(*(v.to(device) for v in vars(self.layout).values()))
        return Pack(**{**vars(self), **move, "layout": layout})


def build_pack(trees: Sequence[Tree]) -> Pack:
    """Lay `trees` out in one row."""
    ids: list[int] = []
    questions: list[str] = []
    ends: list[int] = []
    target_index: list[int] = []
    target_ids: list[int] = []
    target_share: list[float] = []
    spans: list[tuple[int, int, int, int]] = []  # tree, branch, position of the first token, length
    for t, tree in enumerate(trees):
        ids += tree.prefix_ids
        spans.append((t, 0, 0, len(tree.prefix_ids)))
    for t, tree in enumerate(trees):
        for branch in tree.branches:
            questions.append(branch.id)
            # the last answer token (EOS) is predicted and never read, so it is not in the row
            spans.append((t, len(questions), len(tree.prefix_ids), len(branch.prompt_ids + branch.answer_ids[:-1])))
            ids += branch.prompt_ids
            ends.append(len(ids) - 1)
            target_index += range(len(ids) - 1, len(ids) - 1 + len(branch.answer_ids))
            target_ids += branch.answer_ids
            target_share += [1 / len(branch.answer_ids) for _ in branch.answer_ids]
            ids += branch.answer_ids[:-1]
    columns = torch.tensor(spans)
    lengths = columns[:, 3]
    tree_of, branch_of, begins = columns[:, :3].repeat_interleave(lengths, dim=0).T.contiguous()
    position = torch.arange(len(ids)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths) + begins
    index, targets = torch.tensor(target_index, dtype=torch.long), torch.tensor(target_ids, dtype=torch.long)
    return Pack(
        torch.tensor(ids), Layout(tree_of, branch_of, position),
        Spans.of(lengths.tolist(), [len(tree.branches) for tree in trees]),
        torch.tensor(ends), index, targets, torch.tensor(target_share), questions,
    )  # fmt: skip


@dataclass(frozen=True)
class PadSizes:
    """Sizes that packs are padded to, so that a graph recorded for one fits others (`common.train.cuda_graphs`)."""

    tokens: tuple[int, ...]  # rising
    trees: int
    spans: int  # prefixes and branches
    answers: int  # answer tokens
    longest: tuple[int, int, int]  # as in `Spans`

    @classmethod
    def of(cls, packs: Sequence[Pack], most_tokens: int) -> "PadSizes":
        """Enough for these packs, and for others like them of up to `most_tokens`."""

        def ample(values: Iterable[int], step: int) -> int:
            return step * math.ceil(1.15 * max(values) / step)

        lengths = {most_tokens, *(len(p.input_ids) for p in packs)}
        grain = next(g for g in itertools.count(128, 128) if len({-(-n // g) for n in lengths}) <= SIZES)
        longest = [ample((p.spans.longest[i] for p in packs), 64) for i in range(3)]
        return cls(
            tuple(sorted({-(-n // grain) * grain for n in lengths})),
            ample((len(p.spans.prefix) - 1 for p in packs), 8),
            ample((len(p.spans.own) - 1 for p in packs), 8),
            ample((len(p.target_ids) for p in packs), 64),
            (longest[0], longest[1], longest[2]),
        )

    def packs(self, trees: Sequence[Tree]) -> list[Pack]:
        """`trees` in one padded pack, or in several where one does not hold them; a tree too large is not padded."""
        whole = build_pack(trees)
        padded = self.pad(whole)
        if padded or len(trees) == 1:
            return [padded or whole]
        return self.packs(trees[::2]) + self.packs(trees[1::2])

    def pad(self, pack: Pack, size: int | None = None) -> Pack | None:
        """The pack with tokens that no other sees and no loss asks for; None where it does not fit in here.

        `size`: of the result, in tokens; else the least of `tokens`. For training only: `prompt_ends` is left empty.
        """
        spans, layout, length = pack.spans, pack.layout, len(pack.input_ids)
        size = size or next((n for n in self.tokens if n >= length), 0)
        more, trees, own, answers = (
            size - length, self.trees + 1 - len(spans.prefix), self.spans + 1 - len(spans.own),
            self.answers - len(pack.target_ids),
        )  # fmt: skip
        if min(more, trees, own, answers) < 0 or any(a > b for a, b in zip(spans.longest, self.longest, strict=True)):
            return None
        padded = Spans(
            F.pad(spans.own, (0, own), value=int(spans.own[-1])),
            F.pad(spans.prefix, (0, trees), value=int(spans.prefix[-1])),
            F.pad(spans.branches, (0, trees), value=int(spans.branches[-1])),
            F.pad(spans.shared, (0, more)),
            F.pad(spans.shares, (0, more)),
            self.longest,
            spans.starts,
        )
        return Pack(
            F.pad(pack.input_ids, (0, more)),
            Layout(F.pad(layout.tree, (0, more), value=-1),
                   *(F.pad(x, (0, more)) for x in (layout.branch, layout.position))),
            padded,
            pack.prompt_ends[:0],
            F.pad(pack.target_index, (0, answers)),
            F.pad(pack.target_ids, (0, answers), value=IGNORED),
            F.pad(pack.target_share, (0, answers)),
            pack.ids,
        )  # fmt: skip
