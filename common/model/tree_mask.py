"""A pack's attention mask, for models that run by transformers' and PEFT's own modules, and attention under it."""

from collections.abc import Iterable
from typing import Any

from common.data.trees import Tree
from common.errors import UserError
from common.model.llama import Model
from common.model.pack import Layout, Pack

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "tree_sdpa"  # our name in transformers' tables
Trees = list[tuple[Tensor, Tensor]]  # per tree the indices of its queries and of its keys, int64


def need_plain_span(config: PreTrainedConfig, tokens: int) -> None:
    """Raises `UserError` where a text of so many tokens would be attended to otherwise than by all that is before."""
    own = config.get_text_config()
    window = getattr(own, "sliding_window", None) if getattr(own, "use_sliding_window", True) else None
    rope = getattr(own, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(own, "original_max_position_embeddings", None)
    stretched = original if rope.get("rope_type") == "longrope" else None
    for what, most in (("a sliding window", window), ("positions that longer texts stretch", stretched)):
        if most and tokens > most:
            raise UserError(f"{tokens} tokens of a prompt and its answer, and this model has {what} from {most} on")


def need_embedded(config: PreTrainedConfig, trees: Iterable[Tree]) -> None:
    """Raises `UserError` where the tokenizer made ids that the model has no embedding of."""
    rows = config.get_text_config().vocab_size
    for tree in trees:
        if (most := max(map(max, (tree.prefix_ids or (0,), *(b.prompt_ids for b in tree.branches))))) >= rows:
            raise UserError(f"the tokenizer has a token {most}, and the model embeds {rows}: they are not of one kind")


def registered() -> str:
    """The `attn_implementation` of attention under a pack's mask, which this registers with transformers."""
    AttentionInterface.register(ATTENTION, _tree_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION


def visible(query: Layout, key: Layout) -> Tensor:
    """The mask [1, 1, Q, K] bool of tokens at `query` [Q] over those at `key` [K]; True: attends."""
    on_path = (key.branch == 0) | (query.branch[:, None] == key.branch)
    return ((query.tree[:, None] == key.tree) & on_path & (key.position <= query.position[:, None]))[None, None]


def by_tree(query: Layout, key: Layout) -> Trees:
    return [((query.tree == t).nonzero()[:, 0], (key.tree == t).nonzero()[:, 0]) for t in query.tree.unique().tolist()]


def logits(
    model: Model, ids: Tensor, query: Layout, key: Layout, keep: Tensor | int = 0, cache: Cache | None = None
) -> Tensor:
    """Logits [K, V] at the indices `keep` [K] (0: all) of the tokens `ids` [Q] at `query` over those at `key`.

    `cache`: the keys and values of `key` without the last Q, which are added. The adapter computes in the base's dtype.
    """
    kind, dtype = ids.device.type, model.dtype
    trees = by_tree(query, key) if kind == "cpu" else None  # a GPU computes all trees in one call
    places = {"position_ids": query.position[None], "attention_mask": visible(query, key), "trees": trees}
    options = {"past_key_values": cache, "use_cache": cache is not None, "logits_to_keep": keep}
    with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        return model(input_ids=ids[None], **places, **options).logits[0]


def pack_logits(model: Model, pack: Pack, keep: Tensor, cache: Cache | None = None) -> Tensor:
    """Logits [K, V] of a pack at its indices `keep` [K]."""
    return logits(model, pack.input_ids, pack.layout, pack.layout, keep, cache)


def _tree_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **more: Any
) -> tuple[Tensor, None]:
    """SDPA under the pack's mask, tree by tree if `trees` is given: query [1, H, Q, D] → output [1, Q, H, D].

    transformers' own functions would be silently wrong here: without a mask SDPA infers packing from the positions, and
    eager attention adds a bool mask as if it were numbers.
    """
    trees: Trees | None = more.pop("trees", None)
    if trees is None or len(trees) == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    out = query.new_empty(query.shape).transpose(1, 2)
    for q, k in trees:
        mask = attention_mask[:, :, q][..., k]
        out[:, q], _ = sdpa_attention_forward(module, query[:, :, q], key[:, :, k], value[:, :, k], mask, **more)
    return out, None
