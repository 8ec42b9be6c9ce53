"""Shared-prefix packs: several paragraphs, each once, with all their questions as branches, in one row of tokens.

Token i sees token j iff they are of the same tree, j lies in the tree's prefix or in i's own branch, and j is not after
i. Positions of every branch start at the prefix's length. So each question computes exactly what it would in a row of
its own, and the paragraph is computed once.

    tree 1: [prefix][branch a][branch b]   tree 2: [prefix][branch c] ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.prompt import Tree

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "tree_sdpa"  # pass as attn_implementation


@dataclass(frozen=True)
class Layout:
    """Where each of N tokens stands; enough to say who sees whom."""

    tree: Tensor  # [N] int64
    branch: Tensor  # [N] int64; 0: the tree's prefix; else the branch's number, unique in the pack
    position: Tensor  # [N] int64, from the start of the tree's prefix along the token's own path

    def __getitem__(self, index: Tensor) -> "Layout":
        return Layout(self.tree[index], self.branch[index], self.position[index])

    def then(self, other: "Layout") -> "Layout":
        pairs = ((self.tree, other.tree), (self.branch, other.branch), (self.position, other.position))
        return Layout(*(torch.cat(pair) for pair in pairs))

    def next(self) -> "Layout":
        """The places right after these, along the same paths."""
        return Layout(self.tree, self.branch, self.position + 1)


@dataclass(frozen=True)
class Pack:
    input_ids: Tensor  # [T]
    layout: Layout  # of the T tokens
    prompt_ends: Tensor  # [B] index of each branch's last prompt token: its logits are the answer's first
    target_index: Tensor  # [A] indices whose logits predict an answer token or EOS
    target_ids: Tensor  # [A] what they must predict
    ids: list[str]  # [B] question ids

    def to(self, device: torch.device) -> "Pack":
        move = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        layout = Layout(*(v.to(device) for v in vars(self.layout).values()))
        return Pack(**{**vars(self), **move, "layout": layout})


def pack(trees: Sequence[Tree]) -> Pack:
    """Lay `trees` out in one row."""
    ids: list[int] = []
    tree_of: list[int] = []
    branch_of: list[int] = []
    position: list[int] = []
    ends: list[int] = []
    target_index: list[int] = []
    target_ids: list[int] = []
    questions: list[str] = []
    for t, tree in enumerate(trees):
        start, prefix = len(ids), len(tree.prefix_ids)
        ids += tree.prefix_ids
        branch_of += [0] * prefix
        position += range(prefix)
        for branch in tree.branches:
            questions.append(branch.id)
            ids += branch.prompt_ids
            ends.append(len(ids) - 1)
            # the last answer token (EOS) is predicted and never read, so it is not in the row
            target_index += range(len(ids) - 1, len(ids) - 1 + len(branch.answer_ids))
            target_ids += branch.answer_ids
            ids += branch.answer_ids[:-1]
            length = len(branch.prompt_ids) + len(branch.answer_ids[:-1])
            branch_of += [len(questions)] * length
            position += range(prefix, prefix + length)
        tree_of += [t] * (len(ids) - start)
    layout = Layout(torch.tensor(tree_of), torch.tensor(branch_of), torch.tensor(position))
    index, targets = torch.tensor(target_index, dtype=torch.long), torch.tensor(target_ids, dtype=torch.long)
    return Pack(torch.tensor(ids), layout, torch.tensor(ends), index, targets, questions)


def visible(query: Layout, key: Layout) -> Tensor:
    """Who sees whom: [1, 1, Q, K] bool, True = may look."""
    same_tree = query.tree[:, None] == key.tree
    on_path = (key.branch == 0) | (query.branch[:, None] == key.branch)
    return (same_tree & on_path & (key.position <= query.position[:, None]))[None, None]


def by_tree(query: Layout, key: Layout) -> list[tuple[slice, slice | Tensor]]:
    """For each tree: the queries [slice] and the keys [slice, or int64 indices where they are scattered] of it."""
    trees, counts = torch.unique_consecutive(query.tree, return_counts=True)
    out: list[tuple[slice, slice | Tensor]] = []
    start = 0
    for tree, count in zip(trees.tolist(), counts.tolist(), strict=True):
        index = (key.tree == tree).nonzero()[:, 0]
        first, last = int(index[0]), int(index[-1])
        contiguous = last - first + 1 == len(index)
        out.append((slice(start, start + count), slice(first, last + 1) if contiguous else index))
        start += count
    return out


def logits(
    model: Any, input_ids: Tensor, query: Layout, key: Layout, keep: Tensor | int = 0, cache: Any = None
) -> Tensor:
    """Logits [K, V] of the tokens `input_ids` [Q], which stand at `query` and see what `key` shows them.

    `keep`: indices [K] of the rows wanted (0: all Q). `cache` holds what came before in `key` and takes these in too.
    The adapter's fp32 weights compute in the base's dtype.
    """
    device, dtype = input_ids.device, model.dtype
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return model(
            input_ids=input_ids[None],
            position_ids=query.position[None],
            attention_mask=visible(query, key),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
            # a CPU attends tree by tree; a GPU does all trees in one call
            trees=by_tree(query, key) if device.type == "cpu" else None,
        ).logits[0]


def pack_logits(model: Any, pack: Pack, keep: Tensor, cache: Any = None) -> Tensor:
    """Logits [K, V] of a pack at its row indices `keep` [K]."""
    return logits(model, pack.input_ids, pack.layout, pack.layout, keep, cache)


def _tree_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA under the pack's mask, tree by tree where `trees` is given. Query [1, H, Q, D], out [1, Q, H, D].

    It stands in transformers' table of attention functions because its own choices would be silently wrong here: with
    no mask it infers packing from the positions, and eager attention adds a bool mask as if it were numbers.
    """
    trees = kwargs.pop("trees", None)
    if trees is None or len(trees) == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert attention_mask is not None
    out = [
        sdpa_attention_forward(
            module, query[:, :, q], key[:, :, k], value[:, :, k], attention_mask[:, :, q][..., k], **kwargs
        )[0]
        for q, k in trees
    ]
    return torch.cat(out, dim=1), None


AttentionInterface.register(ATTENTION, _tree_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
