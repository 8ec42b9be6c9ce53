"""A Llama's forward pass for decoding: new tokens of many prefixes and branches in one row, beside those read before.

Keys and values lie in an arena [A] per layer, where every prefix and every branch has a stretch of its own; who sees
what of it is the pass's `Reach`. Each pass dequantises each layer's matrices once, for all new tokens together. The
layers are those of training (`common.fused`), so nothing is computed in two ways.
"""

from dataclasses import dataclass, fields
from typing import Any

from common import attention
from common.attention import Reach
from common.fused import Layer, adapter_of, causal_of, layers_of, unreadable

import torch
from torch import Tensor

_MOVED = (
    "ids", "drawn", "position", "slot", "keep", "forced",
    "own", "own_start", "own_used", "trees", "prefix_start", "prefix_used",
)  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """T new tokens, and the K of them whose next token is asked for. All tensors int32, on the device."""

    ids: Tensor  # [T]
    drawn: Tensor  # [T] or the row of the pass before whose token this is; -1: `ids` says
    position: Tensor  # [T] along the token's own path
    slot: Tensor  # [T] where in the arena its key and value go
    reach: Reach
    keep: Tensor  # [K] the tokens of which logits are wanted, rising
    forced: Tensor  # [K] the token to draw whatever the model says; -1: the most probable

    @classmethod
    def lay_out(
        cls, device: torch.device, first: int, *, ids: list[int], drawn: list[int], position: list[int],
        slot: list[int], keep: list[int], forced: list[int], reach: tuple[list[int], ...],
    ) -> "Pass":  # fmt: skip
        """From lists on the host, by one transfer. `reach`: the six lists of a `Reach`."""
        parts = [ids, drawn, position, slot, keep, forced, *reach]
        flat = torch.tensor([n for part in parts for n in part], dtype=torch.int32)
        if device.type == "cuda":
            flat = flat.pin_memory().to(device, non_blocking=True)
        moved = dict(zip(_MOVED, flat.split([len(part) for part in parts]), strict=True))
        spans = Reach(**{name: moved.pop(name) for name in _MOVED[6:]}, host=reach, first=first)
        return cls(**moved, reach=spans)


@dataclass(frozen=True)
class Drawn:
    """What a pass says of its K tokens, on the device."""

    token: Tensor  # [K] int64
    logprob: Tensor  # [K] fp32, natural log
    tie: Tensor  # [K] bool: another token had the same logit, so the choice was the order's

    def to(self, device: str) -> "Drawn":
        return Drawn(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


class Reader:
    """The passes of one model, PEFT's or a plain one, over an arena of `arena_tokens`.

    An adapter's weights are copied in the compute dtype: what changes them later is not seen. Raises `ValueError` for a
    model that is no plain Llama (`fused.unreadable`).
    """

    def __init__(self, model: Any, arena_tokens: int):
        if reason := unreadable(model):
            raise ValueError(reason)
        self.base = causal_of(model)
        dtype, self.device = self.base.dtype, next(model.parameters()).device
        self.layers, self.lora = [], []
        for module in layers_of(model):
            adapter, groups = adapter_of(module)
            self.layers.append(Layer(module, adapter, dtype))
            self.lora.append([[torch.cat(a).to(dtype), *(x.to(dtype) for x in b)] if a else [] for a, b in groups])
        shape = (len(self.layers), arena_tokens, self.base.config.num_key_value_heads, self.layers[0].head_dim)
        self.keys, self.values = (torch.empty(shape, dtype=dtype, device=self.device) for _ in range(2))
        self.arena_tokens = arena_tokens

    @torch.no_grad()
    def read(self, new: Pass, before: Tensor | None = None) -> Drawn:
        """Read the new tokens, keep their keys and values, draw the next token of `keep`. `before`: the last draw's."""
        ids = new.ids
        if before is not None:
            ids = torch.where(new.drawn >= 0, before[new.drawn.clamp(min=0)], ids)
        x = self.base.model.embed_tokens(ids)
        cos, sin = self.base.model.rotary_emb(x[None], new.position[None])
        slot = new.slot.long()
        for layer, lora, keys, values in zip(self.layers, self.lora, self.keys, self.values, strict=True):

            def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor = keys, values: Tensor = values) -> Any:
                keys.index_copy_(0, slot, k)
                values.index_copy_(0, slot, v)
                return attention.over_arena(q, keys, values, new.reach), None

            w = layer.weights()
            _, x = layer.end(layer.begin(x, lora, (cos[0], sin[0]), attend, w), lora, w)
        logits = self.base.lm_head(self.base.model.norm(x[new.keep])).float()
        token = torch.where(new.forced >= 0, new.forced, logits.argmax(-1))
        best = logits.topk(2).values
        logprob = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)
        return Drawn(token, logprob, best[:, 0] == best[:, 1])
