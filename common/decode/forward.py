"""A Llama's forward pass for decoding: new tokens of many prefixes and branches in one row, beside those read before.

Keys and values lie in an arena [A] per layer, where every prefix and every branch has a stretch of its own; who sees
what of it is the pass's `Reach`. A pass dequantises every matrix once, for all new tokens.

A host takes as long to launch a pass kernel by kernel as a GPU does to compute a thousand tokens of a 7B model. So
passes of up to `recorded_tokens` are padded to a few sizes, and what lies between the attentions of two layers, which
depends on the size alone, is replayed as a CUDA graph. Attention, whose shapes are hardly ever twice the same, is
launched.
"""

import functools
from dataclasses import dataclass, fields
from typing import Any

from common.model import attention
from common.model.attention import Reach
from common.model.llama import (
    Rope,
    adapter_of,
    add_norm,
    causal_of,
    layers_of,
    matrices_of,
    norm,
    rotate,
    swiglu,
    unsupported_reason,
)
from common.model.nf4 import FEW

import torch
from torch import Tensor

# tokens of a recorded pass: FEW, which the products with 4-bit numbers take, and from twice as many on four an octave
SIZES = tuple(n * 2**k for k in range(12) for n in ((16, 20, 24, 28) if k else (FEW,)))
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
class NextTokens:
    """What a pass says of its K tokens, on the device."""

    token: Tensor  # [K] int64
    logprob: Tensor  # [K] fp32, natural log
    tie: Tensor  # [K] bool: another token had the same logit, so the choice was the order's

    def to_host(self, wait: bool = True) -> "NextTokens":
        """`wait=False`: the copy may still be under way; an event recorded now says when it is done."""
        return NextTokens(*(getattr(self, f.name).to("cpu", non_blocking=not wait) for f in fields(self)))


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

    def before(self, x: Tensor, rope: Rope, keys: Tensor, values: Tensor, slot: Tensor) -> Tensor:
        """[T, hidden] → queries [T, H, D]; keys and values [A, G, D] take in the new tokens' at `slot` [T]."""
        n, _ = norm(x, self.norms[0], self.eps)
        qkv = self._project(n, 0).view(len(x), -1, self.head_dim)
        q, k, v = qkv.split([rows // self.head_dim for rows in self.matrices[0].rows], dim=1)
        q, k = rotate(q, k, *rope)
        keys.index_copy_(0, slot, k)
        values.index_copy_(0, slot, v)
        return q

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's input [T, hidden] and its attention's output [T, H, D] → its output [T, hidden]."""
        x, n, _ = add_norm(x, self._project(out.flatten(1), 1), self.norms[1], self.eps)
        gate, up = self._project(n, 2).chunk(2, dim=1)
        return self._project(swiglu(gate, up), 3, x)

    def _project(self, x: Tensor, g: int, add: Tensor | None = None) -> Tensor:
        matrix, (a, b) = self.matrices[g], self.lora[g]
        if matrix.four_bit and x.is_cuda and len(x) <= FEW:
            return matrix.products(x, a, b, add)
        out = x @ matrix().T if a is None else (x @ a.T @ b.T).addmm_(x, matrix().T)
        return out if add is None else out.add_(add)


class Layers:
    """What a model does to tokens [T], layer by layer; its arena: keys and values [layers, `arena_tokens`, G, D]."""

    def __init__(self, model: Any, arena_tokens: int):
        self.model, dtype, self.device = causal_of(model).model, model.dtype, next(model.parameters()).device
        self.layers = [Layer(module, dtype) for module in layers_of(model)]
        shape = (len(self.layers), arena_tokens, model.config.num_key_value_heads, self.layers[0].head_dim)
        self.keys, self.values = (torch.empty(shape, dtype=dtype, device=self.device) for _ in range(2))

    def begin(self, ids: Tensor, position: Tensor) -> tuple[Tensor, Rope]:
        """[T] int32 → the first layer's input [T, hidden], and rotary positions for all layers."""
        x = self.model.embed_tokens(ids)
        cos, sin = self.model.rotary_emb(x[None], position[None])
        return x, (cos[0], sin[0])

    def before(self, i: int, x: Tensor, rope: Rope, slot: Tensor) -> Tensor:
        """Layer i's input [T, hidden] → its queries [T, H, D]; keys and values go to `slot` [T] int64 of the arena."""
        return self.layers[i].before(x, rope, self.keys[i], self.values[i], slot)

    def attend(self, i: int, q: Tensor, reach: Reach) -> Tensor:
        """Layer i's queries over the arena → [T, H, D]."""
        return attention.over_arena(q, self.keys[i], self.values[i], reach)

    def __call__(self, ids: Tensor, new: Pass) -> Tensor:
        """The last layer's output [T, hidden]."""
        x, rope = self.begin(ids, new.position)
        slot = new.slot.long()
        for i, layer in enumerate(self.layers):
            x = layer.after(x, self.attend(i, self.before(i, x, rope, slot), new.reach))
        return x


class Captured:
    """What `layers` do, for passes of up to `most` tokens, padded to sizes that are recorded the second time they come.

    The first time compiles what a size needs. Padding's keys and values go to the arena's last slot; nobody reads it.
    """

    def __init__(self, layers: Layers, most: int):
        self.layers, self.sizes = layers, [*(n for n in SIZES if n < most), most]
        first, arena = layers.layers[0], layers.keys[0]
        heads = first.matrices[0].rows[0] // first.head_dim

        def buffer(*shape: int, dtype: torch.dtype = arena.dtype) -> Tensor:
            return torch.zeros(most, *shape, dtype=dtype, device=arena.device)

        self.ids, self.position, self.slot = (buffer(dtype=t) for t in (torch.int32, torch.int32, torch.int64))
        self.x, self.rope = buffer(first.matrices[0].shape[1]), (buffer(first.head_dim), buffer(first.head_dim))
        self.q, self.out = buffer(heads, first.head_dim), buffer(heads, first.head_dim)
        self.graphs: dict[int, list[torch.cuda.CUDAGraph]] = {}  # by size: what is before, between and after attentions
        self.pool: Any = None
        self.met: set[int] = set()

    def __call__(self, ids: Tensor, new: Pass) -> Tensor | None:
        """The last layer's output [T, hidden], until the next call; None for more tokens than are recorded."""
        t = len(ids)
        n = next((size for size in self.sizes if size >= t), None)
        if n is None:
            return None
        self.ids[:t], self.position[:t], self.slot[:t] = ids, new.position, new.slot
        self.slot[t:n] = self.layers.keys.shape[1] - 1
        if n in self.met and n not in self.graphs and ids.is_cuda:
            self._record(n)
        self.met.add(n)
        graphs, last = self.graphs.get(n), len(self.layers.layers)
        for i in range(last + 1):
            if graphs:
                graphs[i].replay()
            else:
                self._part(i, n)
            if i < last:
                self.out[:t] = self.layers.attend(i, self.q[:t], new.reach)
        return self.x[:t]

    def _part(self, i: int, n: int) -> None:
        """Of `n` tokens, what lies before layer i's attention and after the one of the layer before."""
        layers, x, rope = self.layers, self.x[:n], (self.rope[0][:n], self.rope[1][:n])
        if i == 0:
            first, (cos, sin) = layers.begin(self.ids[:n], self.position[:n])
            x.copy_(first)
            rope[0].copy_(cos)
            rope[1].copy_(sin)
        else:
            x.copy_(layers.layers[i - 1].after(x, self.out[:n]))
        if i < len(layers.layers):
            self.q[:n] = layers.before(i, x, rope, self.slot[:n])

    def _record(self, n: int) -> None:
        """By hand, since `torch.cuda.graph` waits for the device and gives all spare memory back, for each part.

        Once is enough, and needed: what is recorded cannot have the memory that launched work has left over.
        """
        torch.cuda.empty_cache()
        graphs = []
        with torch.cuda.stream(_side_stream(self.x.device)):
            for i in range(len(self.layers.layers) + 1):
                graphs.append(torch.cuda.CUDAGraph())
                graphs[-1].capture_begin(self.pool, capture_error_mode="thread_local")
                try:
                    self._part(i, n)
                finally:
                    graphs[-1].capture_end()
                self.pool = graphs[-1].pool()
        self.graphs[n] = graphs


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all that is recorded: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


class Decoder:
    """The passes of one model, PEFT's or a plain one, over an arena of `arena_tokens`; those of up to `recorded_tokens`
    padded and recorded.

    What changes the adapter's weights later is not seen. Raises `ValueError` for a model that is no plain Llama
    (`fused.unreadable`).
    """

    def __init__(self, model: Any, arena_tokens: int, recorded_tokens: int = 0):
        if reason := unsupported_reason(model):
            raise ValueError(reason)
        self.base, self.arena_tokens = causal_of(model), arena_tokens
        self.layers = Layers(model, arena_tokens + (1 if recorded_tokens else 0))
        self.device = self.layers.device
        self.recorded = Captured(self.layers, recorded_tokens) if recorded_tokens else None

    @torch.no_grad()
    def read(self, new: Pass, before: Tensor | None = None) -> NextTokens:
        """Read the new tokens, keep their keys and values, draw the next token of `keep`. `before`: the last draw's."""
        ids = new.ids
        if before is not None:
            ids = torch.where(new.drawn >= 0, before[new.drawn.clamp(min=0)], ids)
        x = self.recorded(ids, new) if self.recorded else None
        if x is None:
            x = self.layers(ids, new)
        logits = self.base.lm_head(self.base.model.norm(x[new.keep])).float()
        token = torch.where(new.forced >= 0, new.forced, logits.argmax(-1))
        best = logits.topk(2).values
        logprob = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)
        return NextTokens(token, logprob, best[:, 0] == best[:, 1])
