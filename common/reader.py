"""A Llama's forward pass for decoding: new tokens of many prefixes and branches in one row, beside those read before.

Keys and values lie in an arena [A] per layer, where every prefix and every branch has a stretch of its own; who sees
what of it is the pass's `Reach`. A pass dequantises every matrix once, for all new tokens.
"""

from dataclasses import dataclass, fields
from typing import Any

from common import attention
from common.attention import Reach
from common.fused import (
    Rope,
    adapter_of,
    add_norm,
    causal_of,
    layers_of,
    matrices_of,
    norm,
    rotate,
    swiglu,
    unreadable,
)
from common.matrices import FEW

import torch
from torch import Tensor

_OWN = ("ids", "drawn", "position", "slot", "keep", "forced")
_OF_REACH = ("own", "own_start", "own_used", "trees", "prefix_start", "prefix_used")


@dataclass(frozen=True)
class Pass:
    """T new tokens, and the K of them whose next token is asked for. All tensors int32, on the device."""

    ids: Tensor  # [T]
    drawn: Tensor  # [T] or the row of the pass before whose token this is; -1: `ids` says
    position: Tensor  # [T] along the token's own path
    slot: Tensor  # [T] where in the arena its key and value go
    reach: Reach
    keep: Tensor  # [K] the tokens of which logits are wanted
    forced: Tensor  # [K] the token to draw whatever the model says; -1: the most probable

    @staticmethod
    def flat(lists: dict[str, list[int]]) -> Tensor:
        """Lists by name, those of a `Reach` too, as one tensor on the host: what one transfer moves."""
        return torch.tensor([n for name in (*_OWN, *_OF_REACH) for n in lists[name]], dtype=torch.int32)

    @classmethod
    def of(cls, flat: Tensor, lists: dict[str, list[int]], first: int) -> "Pass":
        """`flat`, moved to the device, as a pass; `lists` says where each begins, and what there is to know of the
        reach on the host."""
        parts = dict(zip((*_OWN, *_OF_REACH), flat.split([len(lists[n]) for n in (*_OWN, *_OF_REACH)]), strict=True))
        host = tuple(lists[name] for name in _OF_REACH)
        reach = Reach(**{name: parts.pop(name) for name in _OF_REACH}, host=host, first=first)
        return cls(**parts, reach=reach)

    @classmethod
    def on(cls, device: torch.device, lists: dict[str, list[int]], first: int) -> "Pass":
        flat = cls.flat(lists)
        return cls.of(flat.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else flat, lists, first)


@dataclass(frozen=True)
class Drawn:
    """What a pass says of its K tokens, on the device."""

    token: Tensor  # [K] int64
    logprob: Tensor  # [K] fp32, natural log
    tie: Tensor  # [K] bool: another token had the same logit, so the choice was the order's

    def to_host(self, wait: bool = True) -> "Drawn":
        """`wait=False`: the copy may still be under way; an event recorded now says when it is done."""
        return Drawn(*(getattr(self, f.name).to("cpu", non_blocking=not wait) for f in fields(self)))


class Layer:
    """One decoder layer, forward; its adapter's weights are copied in the compute dtype.

    Linears that share their input share both LoRA products too, their Bs, scaled, being blocks of one matrix.
    """

    def __init__(self, module: Any, dtype: torch.dtype):
        self.matrices = matrices_of(module, dtype)
        self.norms = (module.input_layernorm.weight, module.post_attention_layernorm.weight)
        self.eps = module.input_layernorm.variance_epsilon
        self.head_dim = module.self_attn.head_dim
        adapter, groups = adapter_of(module)
        self.lora: list[Any] = []  # by group: A [R, K], B [N, R] of all its linears; or None, None
        for (a, b), adapted, rows in zip(groups, adapter.adapted, (m.rows for m in self.matrices), strict=True):
            if not a:
                self.lora.append((None, None))
                continue
            bs = iter(b)
            blocks = [next(bs) if yes else a[0].new_empty(n, 0) for yes, n in zip(adapted, rows, strict=True)]
            self.lora.append((torch.cat(a).to(dtype), (torch.block_diag(*blocks) * adapter.scale).to(dtype)))

    def __call__(self, x: Tensor, rope: Rope, keys: Tensor, values: Tensor, slot: Tensor, reach: Reach) -> Tensor:
        """[T, hidden] → [T, hidden]; keys and values [A, G, D] take in the new tokens' at `slot` [T]."""
        n, _ = norm(x, self.norms[0], self.eps)
        qkv = self._project(n, 0).view(len(x), -1, self.head_dim)
        q, k, v = qkv.split([rows // self.head_dim for rows in self.matrices[0].rows], dim=1)
        q, k = rotate(q, k, *rope)
        keys.index_copy_(0, slot, k)
        values.index_copy_(0, slot, v)
        out = attention.over_arena(q, keys, values, reach)
        x, n, _ = add_norm(x, self._project(out.flatten(1), 1), self.norms[1], self.eps)
        gate, up = self._project(n, 2).chunk(2, dim=1)
        return self._project(swiglu(gate, up), 3, x)

    def _project(self, x: Tensor, g: int, add: Tensor | None = None) -> Tensor:
        matrix, (a, b) = self.matrices[g], self.lora[g]
        if matrix.four_bit and x.is_cuda and len(x) <= FEW:
            return matrix.products(x, a, b, add)
        out = x @ matrix().T if a is None else (x @ a.T @ b.T).addmm_(x, matrix().T)
        return out if add is None else out.add_(add)


class Reader:
    """The passes of one model, PEFT's or a plain one, over an arena of `arena_tokens`.

    What changes the adapter's weights later is not seen. Raises `ValueError` for a model that is no plain Llama
    (`fused.unreadable`).
    """

    def __init__(self, model: Any, arena_tokens: int):
        if reason := unreadable(model):
            raise ValueError(reason)
        self.base = causal_of(model)
        dtype, self.device = self.base.dtype, next(model.parameters()).device
        self.layers = [Layer(module, dtype) for module in layers_of(model)]
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
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            x = layer(x, (cos[0], sin[0]), keys, values, slot, new.reach)
        logits = self.base.lm_head(self.base.model.norm(x[new.keep])).float()
        token = torch.where(new.forced >= 0, new.forced, logits.argmax(-1))
        best = logits.topk(2).values
        logprob = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)
        return Drawn(token, logprob, best[:, 0] == best[:, 1])
