"""A pack's mask, and transformers' attention under it: for models that run by transformers' and PEFT's own modules."""

from typing import Any

from common.model.pack import Layout, Pack

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "tree_sdpa"  # our name in transformers' tables


def registered() -> str:
    """What to pass as `attn_implementation`: attention under a pack's mask, which is in transformers' tables then."""
    AttentionInterface.register(ATTENTION, _tree_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION


def visible(query: Layout, key: Layout) -> Tensor:
    """Who sees whom: [1, 1, Q, K] bool, True = may look."""
    same_tree = query.tree[:, None] == key.tree
    on_path = (key.branch == 0) | (query.branch[:, None] == key.branch)
    return (same_tree & on_path & (key.position <= query.position[:, None]))[None, None]


def by_tree(query: Layout, key: Layout) -> list[tuple[Tensor, Tensor]]:
    """For each tree the indices of its queries and of its keys."""
    return [
        ((query.tree == tree).nonzero()[:, 0], (key.tree == tree).nonzero()[:, 0])
        for tree in query.tree.unique().tolist()
    ]


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
    out = query.new_empty(query.shape).transpose(1, 2)
    for q, k in trees:
        mask = attention_mask[:, :, q][..., k]
        out[:, q], _ = sdpa_attention_forward(module, query[:, :, q], key[:, :, k], value[:, :, k], mask, **kwargs)
    return out, None
