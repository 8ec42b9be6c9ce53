"""A Llama's forward pass for decoding: new tokens of many prefixes and branches in one row, over a KV cache.

Launching a pass kernel by kernel takes the host as long as a GPU computes a thousand tokens of a 7B model. Passes of up
to `capture_tokens` are therefore padded to a few sizes, and CUDA graphs replay the kernels between the attentions of
two layers, which depend on the size alone. Attention is launched, because its shapes hardly ever repeat.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from common.data.tokens import Ids
from common.decode.kv_cache import Block
from common.decode.spans import Quotes
from common.model import attention, llama
from common.model.nf4 import MATMUL_TOKENS

import torch
from torch import Tensor

# tokens: as many as NF4 products take, then four sizes per octave, so that padding adds a quarter at most
CAPTURE_SIZES = (MATMUL_TOKENS, *(n * 2**k for k in range(1, 12) for n in (16, 20, 24, 28)))
_REACH = ("own", "own_start", "own_used", "trees", "prefix_start", "prefix_used")


@dataclass(frozen=True)
class Pass:
    """T new tokens, K of which get a next token. All tensors int32, on the device."""

    ids: Tensor  # [T]
    previous_row: Tensor  # [T] row of the previous pass whose next token replaces the id; -1: none does
    position: Tensor  # [T] along the token's own path
    slot: Tensor  # [T] of the KV cache
    keep: Tensor  # [K] tokens of which logits are computed
    forced: Tensor  # [K] next token whatever the logits are; -1: the most probable
    reach: attention.Reach


class Batch:
    """A pass that is being built on the host: one list per tensor of `Pass` and of its `Reach`."""

    def __init__(self) -> None:
        self.ids, self.previous_row, self.position, self.slot = Ids(), Ids(), Ids(), Ids()
        self.keep, self.forced, self.own_used, self.prefix_used = Ids(), Ids(), Ids(), Ids()
        self.own, self.own_start, self.trees, self.prefix_start = [0], [0], [0], [0]

    def add(self, ids: Ids, start: int, position: int = 0, cached: int = 0, row: int = -1) -> None:
        """Appends tokens to the block at slot `start`, behind the `cached` tokens that it holds.

        `position`: of the block's first token. `row`: of the previous pass, whose next token replaces `ids`.
        """
        used = cached + len(ids)
        self.ids += ids
        self.previous_row += [row] * len(ids)
        self.position += range(position + cached, position + used)
        self.slot += range(start + cached, start + used)
        self.own.append(len(self.ids))
        self.own_start[-1:] = [start, 0]
        self.own_used.append(used)

    def flatten(self) -> Tensor:
        """All lists as one int32 tensor on the host, so that one transfer moves them."""
        return torch.tensor([n for values in vars(self).values() for n in values], dtype=torch.int32)

    def split(self, flat: Tensor) -> Pass:
        """The pass whose tensors are views of `flat`: `flatten`'s result, moved to the device."""
        tensors = dict(zip(vars(self), flat.split([len(values) for values in vars(self).values()]), strict=True))
        reach = {name: tensors.pop(name) for name in _REACH}
        host, first = tuple(vars(self)[name] for name in _REACH), self.own[-1] - self.trees[-1]
        return Pass(**tensors, reach=attention.Reach(**reach, host=host, first=first))

    def to(self, device: torch.device) -> Pass:
        flat = self.flatten()
        return self.split(flat.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else flat)


class NextTokens(NamedTuple):
    """The next tokens of a pass, on the device."""

    token: Tensor  # [K] int64
    logprob: Tensor  # [K] fp32, natural log, among all tokens
    tie: Tensor  # [K] bool: another token that could be chosen has the same logit
    state: Tensor | None = None  # [K, N] of `Quotes`; it stays on the device

    def to_host(self, wait: bool = True) -> "NextTokens":
        """`wait=False`: the copy may still be in flight; an event recorded now marks its end."""
        return NextTokens(*(x.to("cpu", non_blocking=not wait) for x in self[:3]))


def choose(logits: Tensor, forced: Tensor | None = None, quotes: Quotes | None = None) -> NextTokens:
    """The most probable next token of each row of `logits` [K, V], of `quotes` of those that go on there.

    `forced` [K]: the token to take instead, or -1. This is the one place that chooses.
    """
    logits, state = logits.float(), None
    if quotes:
        token, tie, state = quotes.choose(logits, forced)
    else:
        best = logits.topk(2).values
        token, tie = logits.argmax(-1), best[:, 0] == best[:, 1]
        token = token if forced is None else torch.where(forced >= 0, forced, token)
    logprob = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)
    return NextTokens(token, logprob, tie, state)


class Layer(llama.Layer):
    """A decoder layer's forward pass. Linears with the same input share both LoRA products: B is block-diagonal."""

    def __init__(self, module: llama.LlamaDecoderLayer, dtype: torch.dtype):
        super().__init__(module, dtype)
        own, groups = llama.adapter_of(module)
        # per group: A [R, K] and B [N, R] of all its linears
        self.lora = [
            (torch.cat(a).to(dtype), (torch.block_diag(*b) * own.scale).to(dtype)) if a else None for a, b in groups
        ]

    def before(self, x: Tensor, rope: llama.Rope, keys: Tensor, values: Tensor, slot: Tensor) -> Tensor:
        """[T, hidden] → queries [T, H, D]; writes keys and values [A, G, D] of the cache at `slot` [T] int64."""
        n, _ = llama.norm(x, self.norms[0], self.eps)
        qkv = self._project(n, 0).view(len(x), -1, self.head_dim)
        q, k, v = qkv.split([rows // self.head_dim for rows in self.linears[0].rows], dim=1)
        q, k = llama.rotate(q, k, *rope)
        keys.index_copy_(0, slot, k)
        values.index_copy_(0, slot, v)
        return q

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's input [T, hidden] and its attention's output [T, H, D] → its output [T, hidden]."""
        x, n, _ = llama.add_norm(x, self._project(out.flatten(1), 1), self.norms[1], self.eps)
        gate, up = self._project(n, 2).chunk(2, dim=1)
        return self._project(llama.swiglu(gate, up), 3, x)

    def _project(self, x: Tensor, g: int, add: Tensor | None = None) -> Tensor:
        linear, lora = self.linears[g], self.lora[g]
        if linear.four_bit and x.is_cuda and len(x) <= MATMUL_TOKENS:
            a, b = lora or (None, None)
            return linear.matmul(x, a, b, add)
        w = linear.dense()
        out = x @ w.T if lora is None else (x @ lora[0].T @ lora[1].T).addmm_(x, w.T)
        return out if add is None else out.add_(add)


class Layers:
    """A model's decoder layers, and their KV cache: keys and values [layers, `cache_tokens`, G, D]."""

    def __init__(self, model: llama.Model, cache_tokens: int):
        self.model, dtype, self.device = llama.causal_of(model).model, model.dtype, next(model.parameters()).device
        self.layers = [Layer(module, dtype) for module in llama.layers_of(model)]
        shape = (len(self.layers), cache_tokens, model.config.num_key_value_heads, self.layers[0].head_dim)
        self.keys, self.values = (torch.empty(shape, dtype=dtype, device=self.device) for _ in range(2))

    def __call__(self, ids: Tensor, new: Pass) -> Tensor:
        """The last layer's output [T, hidden]."""
        (x, rope), slot = llama.begin(self.model, ids, new.position), new.slot.long()
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            q = layer.before(x, rope, keys, values, slot)
            x = layer.after(x, attention.over_cache(q, keys, values, new.reach))
        return x


class Captured:
    """`layers` for passes of up to `most` tokens, padded to sizes whose CUDA graphs are captured at their second pass.

    A size's first pass compiles its kernels. Padding writes to the cache's last slot, which no token attends to.
    """

    def __init__(self, layers: Layers, most: int):
        self.layers, self.most, self.sizes = layers, most, [*(n for n in CAPTURE_SIZES if n < most), most]
        first, cache = layers.layers[0], layers.keys
        heads = first.linears[0].rows[0] // first.head_dim

        def buffer(*shape: int, dtype: torch.dtype = cache.dtype) -> Tensor:
            return torch.zeros(most, *shape, dtype=dtype, device=cache.device)

        self.ids, self.position, self.slot = (buffer(dtype=t) for t in (torch.int32, torch.int32, torch.int64))
        self.x, self.rope = buffer(first.linears[0].shape[1]), (buffer(first.head_dim), buffer(first.head_dim))
        self.q, self.out = buffer(heads, first.head_dim), buffer(heads, first.head_dim)
        self.graphs: dict[int, list[torch.cuda.CUDAGraph]] = {}  # by size: before, between and after the attentions
        self.pool = torch.cuda.graph_pool_handle() if cache.is_cuda else None
        self.seen: set[int] = set()  # sizes

    def __call__(self, ids: Tensor, new: Pass) -> Tensor:
        """The last layer's output [T, hidden], T <= `most`; valid until the next call."""
        t = len(ids)
        n = next(size for size in self.sizes if size >= t)
        self.ids[:t], self.position[:t], self.slot[:t] = ids, new.position, new.slot
        self.slot[t:n] = self.layers.keys.shape[1] - 1
        if n in self.seen and n not in self.graphs and ids.is_cuda:
            self._capture(n)
        self.seen.add(n)
        graphs, last = self.graphs.get(n), len(self.layers.layers)
        for i in range(last + 1):
            if graphs:
                graphs[i].replay()
            else:
                self._segment(i, n)
            if i < last:
                self.out[:t] = attention.over_cache(self.q[:t], self.layers.keys[i], self.layers.values[i], new.reach)
        return self.x[:t]

    def _segment(self, i: int, n: int) -> None:
        """Computes `n` tokens from after attention i - 1 up to attention i."""
        layers, x, rope = self.layers, self.x[:n], (self.rope[0][:n], self.rope[1][:n])
        if i == 0:
            first, (cos, sin) = llama.begin(layers.model, self.ids[:n], self.position[:n])
            for kept, value in zip((x, *rope), (first, cos, sin), strict=True):
                kept.copy_(value)
        else:
            x.copy_(layers.layers[i - 1].after(x, self.out[:n]))
        if i < len(layers.layers):
            self.q[:n] = layers.layers[i].before(x, rope, layers.keys[i], layers.values[i], self.slot[:n])

    def _capture(self, n: int) -> None:
        """Captures all segments of `n` tokens. `torch.cuda.graph` would synchronise and empty the cache for each."""
        torch.cuda.empty_cache()  # a capture cannot use memory that the allocator caches for launched kernels
        graphs = []
        with torch.cuda.stream(_capture_stream(self.x.device)):
            for i in range(len(self.layers.layers) + 1):
                graphs.append(torch.cuda.CUDAGraph())
                graphs[-1].capture_begin(self.pool, capture_error_mode="thread_local")
                try:
                    self._segment(i, n)
                finally:
                    graphs[-1].capture_end()
        self.graphs[n] = graphs


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures, because cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream(device)


class Decoder:
    """Passes of one model over a KV cache of `cache_tokens`; those of up to `capture_tokens` by CUDA graphs.

    The adapter is copied. Raises `ValueError` for a model that is no plain Llama (`llama.unsupported_reason`).
    """

    def __init__(self, model: llama.Model, cache_tokens: int, capture_tokens: int = 0):
        if reason := llama.unsupported_reason(model):
            raise ValueError(reason)
        self.base, self.cache_tokens = llama.causal_of(model), cache_tokens
        self.layers = Layers(model, cache_tokens + (1 if capture_tokens else 0))
        self.device, self.dtype = self.layers.device, self.layers.keys.dtype
        self.captured = Captured(self.layers, capture_tokens) if capture_tokens else None

    @torch.no_grad()
    def forward(self, new: Pass, previous: Tensor | None = None, quotes: Quotes | None = None) -> NextTokens:
        """The next tokens of `new.keep`. `previous`: those of the pass before, for `new.previous_row`."""
        return choose(self.logits(new, previous), new.forced, quotes)

    def copy(self, source: Block, targets: Sequence[Block], n: int) -> None:
        """Copies the first `n` slots of a block of the KV cache to the beginning of others."""
        for keys_or_values in (self.layers.keys, self.layers.values):
            for target in targets:
                keys_or_values[:, target.start : target.start + n] = keys_or_values[:, source.start : source.start + n]

    @torch.no_grad()
    def logits(self, new: Pass, previous: Tensor | None = None) -> Tensor:
        """[K, V], in the compute dtype."""
        ids = new.ids
        if previous is not None:
            ids = torch.where(new.previous_row >= 0, previous[new.previous_row.clamp(min=0)], ids)
        layers = self.captured if self.captured and len(ids) <= self.captured.most else self.layers
        return self.base.lm_head(self.base.model.norm(layers(ids, new)[new.keep]))
