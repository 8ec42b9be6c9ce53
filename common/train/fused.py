"""A Llama's decoder layers, in training each one autograd function: less memory, fewer launches, the same numbers.

What the layer modules of transformers and PEFT compute, written out with its own backward, so that
- the frozen 4-bit weights are dequantised once per pass and get no gradient, nor a graph;
- q, k and v (gate and up) share one product with their A matrices, and no LoRA update makes a tensor of its own;
- a layer keeps all that its backward needs, or its input alone and computes the rest again, but never its last product;
- all LoRA weights are one fp32 tensor (`flatten`): one cast, one gradient, one optimizer call.

What is between the matrix products is plain PyTorch, which `torch.compile` fuses on a GPU. Decoding has
the forward pass alone (`common.decode.forward`).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from common.model import attention
from common.model.attention import Spans
from common.model.compiled import compiled
from common.model.llama import (
    Adapter,
    Rope,
    adapter_of,
    add_norm,
    causal_of,
    layers_of,
    matrices_of,
    norm,
    rotate,
    scaled,
    swiglu,
    turn,
    unsupported_reason,
)
from common.model.pack import Pack

import torch
from torch import Tensor

Lora = list[list[Tensor]]  # per group [A, B, B, ...]
# q [T, H, D], k and v [T, G, D] → (attention's output [T, H, D], log-sum-exps [H, T] where the backward needs them)
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def untrainable_reason(model: Any) -> str | None:
    """Why this PEFT model has to be trained the plain way; None where the fused one computes the same."""
    if reason := unsupported_reason(model):
        return reason
    if any(adapter.lora_dropout for adapter in model.peft_config.values()):
        return "lora.dropout > 0"
    if any(p.requires_grad != ("lora_" in name) for name, p in model.named_parameters()):
        return "something else than the seven projections is trained"
    return None


# ---- LoRA weights as one tensor ------------------------------------------------------------------------------------


def flatten(model: Any) -> tuple[torch.nn.Parameter, list[Adapter]]:
    """Move all LoRA weights of a PEFT model into one fp32 parameter; the model's own become views of it.

    What the optimizer does to the one tensor is seen by PEFT's layers, which go on to serve saving. They no longer ask
    for gradients themselves.
    """
    found = [adapter_of(layer) for layer in layers_of(model)]
    parts = [p for _, groups in found for a, b in groups for p in (*a, *b)]
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in parts]).float())
    start = 0
    for p in parts:
        p.requires_grad_(False)
        p.data = flat.data[start : start + p.numel()].view(p.shape)
        start += p.numel()
    return flat, [adapter for adapter, _ in found]


# ---- one layer, forward and backward -------------------------------------------------------------------------------
# T tokens, x [T, hidden]. A group's update is h @ B.T with h = scale * x @ A.T [T, R].


def _project(x: Tensor, weights: Sequence[Tensor], lora: Sequence[Tensor], adapter: Adapter, g: int) -> Any:
    """(h or None, the products of group `g` with x, LoRA updates included)."""
    if not lora:
        return None, *(x @ w.T for w in weights)
    h = scaled(x @ lora[0].T, adapter.scale)
    out, rank, bs = [], 0, iter(lora[1:])
    for w, adapted in zip(weights, adapter.adapted[g], strict=True):
        if adapted:
            b = next(bs)
            out.append((h[:, rank : rank + b.shape[1]] @ b.T).addmm_(x, w.T))
            rank += b.shape[1]
        else:
            out.append(x @ w.T)
    return h, *out


def _project_back(
    d_out: Sequence[Tensor], h: Tensor | None, weights: Sequence[Tensor], lora: Sequence[Tensor],
    gradients: Sequence[Tensor], adapter: Adapter, g: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(gradient of x, of x @ A.T); the Bs' gradients are written into `gradients`."""
    if h is None:
        d_h, d_x = None, d_out[0] @ weights[0]
    else:
        d_h, rank = torch.empty_like(h), 0
        adapted = [d for d, yes in zip(d_out, adapter.adapted[g], strict=True) if yes]
        for d, b, d_b in zip(adapted, lora[1:], gradients[1:], strict=True):
            mine = slice(rank, rank + b.shape[1])
            torch.mm(d.T, h[:, mine], out=d_b)
            torch.mm(d, b, out=d_h[:, mine])
            rank += b.shape[1]
        d_h = scaled(d_h, adapter.scale)
        d_x = (d_h @ lora[0]).addmm_(d_out[0], weights[0])
    for d, w in zip(d_out[1:], weights[1:], strict=True):
        d_x.addmm_(d, w)
    return d_x, d_h


@compiled
def _norm_back(d: Tensor, x: Tensor, r: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """Gradient of the norm's input, plus `residual`, that of the path around it."""
    unit, d_unit = x.float() * r, d.float() * weight.float()
    d_x = r * (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True))
    return (d_x + residual.float()).to(x.dtype)


@compiled
def _rotate_back(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return turn(q, cos, -sin), turn(k, cos, -sin)


@compiled
def _swiglu_back(gate: Tensor, up: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the product again, gradients of gate and up)."""
    g, u, d = gate.float(), up.float(), d.float()
    s = torch.sigmoid(g)
    silu = g * s
    return (silu * u).to(gate.dtype), (d * u * (s + silu * (1 - s))).to(gate.dtype), (d * silu).to(gate.dtype)


class Kept(NamedTuple):
    """What a layer's backward needs beside its input."""

    h_qkv: Tensor | None  # [T, R]; None where nothing of the group is adapted
    q: Tensor  # [T, H, D], rotated
    k: Tensor  # [T, G, D], rotated
    v: Tensor  # [T, G, D]
    out: Tensor  # [T, H, D] attention's output
    lse: Tensor | None  # [H, T]
    h_o: Tensor | None
    mid: Tensor  # [T, hidden] between attention and MLP
    h_mlp: Tensor | None
    gate: Tensor  # [T, intermediate]
    up: Tensor


class Layer:
    """One decoder layer. Its matrices and norms are frozen; its LoRA weights come with each call."""

    def __init__(self, module: Any, adapter: Adapter, dtype: torch.dtype):
        self.matrices = matrices_of(module, dtype)
        self.norms = (module.input_layernorm.weight, module.post_attention_layernorm.weight)
        self.eps = module.input_layernorm.variance_epsilon
        self.head_dim = module.self_attn.head_dim
        self.adapter = adapter
        self.held: list[list[Tensor]] | None = None

    def weights(self) -> list[list[Tensor]]:
        """Per group the matrices [N, K] in the compute dtype."""
        return self.held or [matrix.apart() for matrix in self.matrices]

    def begin(self, x: Tensor, lora: Lora, rope: Rope, attend: Attend, w: list[list[Tensor]]) -> Kept:
        """Attention, and the MLP up to its last product."""
        n, _ = norm(x, self.norms[0], self.eps)
        h_qkv, *qkv = _project(n, w[0], lora[0], self.adapter, 0)
        q, k, v = (y.view(len(x), -1, self.head_dim) for y in qkv)
        q, k = rotate(q, k, *rope)
        out, lse = attend(q, k, v)
        h_o, y = _project(out.flatten(1), w[1], lora[1], self.adapter, 1)
        mid, n, _ = add_norm(x, y, self.norms[1], self.eps)
        h_mlp, gate, up = _project(n, w[2], lora[2], self.adapter, 2)
        return Kept(h_qkv, q, k, v, out, lse, h_o, mid, h_mlp, gate, up)

    def end(self, kept: Kept, lora: Lora, w: list[list[Tensor]]) -> tuple[Tensor | None, Tensor]:
        """(h of the last product, the layer's output)."""
        h, y = _project(swiglu(kept.gate, kept.up), w[3], lora[3], self.adapter, 3)
        return h, y.add_(kept.mid)

    def backward(
        self, d: Tensor, x: Tensor, kept: Kept, h_down: Tensor | None, lora: Lora, gradients: Lora, rope: Rope,
        spans: Spans, w: list[list[Tensor]], wants_x: bool,
    ) -> Tensor | None:  # fmt: skip
        """Gradient of x, where it is wanted; the LoRA weights' are written into `gradients`."""

        def back(g: int, h: Tensor | None, *d_out: Tensor) -> tuple[Tensor, Tensor | None]:
            return _project_back(d_out, h, w[g], lora[g], gradients[g], self.adapter, g)

        def back_a(g: int, d_h: Tensor | None, x: Tensor) -> None:
            if d_h is not None:
                torch.mm(d_h.T, x, out=gradients[g][0])

        d_product, d_h = back(3, h_down, d)
        product, d_gate, d_up = _swiglu_back(kept.gate, kept.up, d_product)
        back_a(3, d_h, product)
        del product, d_product
        d_n, d_h = back(2, kept.h_mlp, d_gate, d_up)
        n, r = norm(kept.mid, self.norms[1], self.eps)
        back_a(2, d_h, n)
        d_mid = _norm_back(d_n, kept.mid, r, self.norms[1], d)
        del d_gate, d_up
        d_out, d_h = back(1, kept.h_o, d_mid)
        back_a(1, d_h, kept.out.flatten(1))
        d_q, d_k, d_v = attention.backward(d_out.view_as(kept.q), kept.q, kept.k, kept.v, kept.out, kept.lse, spans)
        d_q, d_k = _rotate_back(d_q, d_k, *rope)
        d_n, d_h = back(0, kept.h_qkv, d_q.flatten(1), d_k.flatten(1), d_v.flatten(1))
        n, r = norm(x, self.norms[0], self.eps)
        back_a(0, d_h, n)
        return _norm_back(d_n, x, r, self.norms[0], d_mid) if wants_x else None


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Tensor, layer: Layer, rope: Rope, spans: Spans, keep: bool) -> Tensor:
        w, lora = layer.weights(), list(layer.adapter.views(part))
        kept = layer.begin(x, lora, rope, functools.partial(attention.forward, spans=spans), w)
        h, y = layer.end(kept, lora, w)
        ctx.save_for_backward(x, part, *rope, h, *(kept if keep else ()))
        ctx.layer, ctx.spans = layer, spans
        return y

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, part, cos, sin, h, *saved = ctx.saved_tensors
        layer, spans, rope = ctx.layer, ctx.spans, (cos, sin)
        w, lora = layer.weights(), list(layer.adapter.views(part))
        attend = functools.partial(attention.forward, spans=spans)
        kept = Kept(*saved) if saved else layer.begin(x, lora, rope, attend, w)
        gradient = torch.empty_like(part)
        gradients = list(layer.adapter.views(gradient))
        d_x = layer.backward(d, x, kept, h, lora, gradients, rope, spans, w, ctx.needs_input_grad[0])
        return d_x, gradient, None, None, None, None


class Fused:
    """The training forward of a PEFT Llama (`unfit` says which); its LoRA weights are `flat` from here on.

    `keep_layers`: how many layers, counted from the last, keep all activations; the others keep their input alone.
    `hold_layers`: how many layers dequantise their matrices once and for all; the others do it in every pass.
    """

    def __init__(self, model: Any, keep_layers: int = 0, hold_layers: int = 0):
        assert not untrainable_reason(model)
        self.base = causal_of(model)
        self.flat, self.adapters = flatten(model)
        self.layers = [Layer(m, a, self.base.dtype) for m, a in zip(layers_of(model), self.adapters, strict=True)]
        self.keep_layers = keep_layers
        for layer in self.layers[:hold_layers]:
            layer.held = layer.weights()

    @property
    def recomputed(self) -> float:
        """Share of the layers' matrix products that a backward pass computes again: never the last of a layer."""
        *again, last = [math.prod(matrix.shape) for matrix in self.layers[0].matrices]
        return sum(again) / (sum(again) + last) * (1 - self.keep_layers / len(self.layers))

    def logits(self, pack: Pack, keep: Tensor) -> Tensor:
        """Logits [K, V] of a pack at its row indices `keep` [K]: `packing.pack_logits` for this model."""
        x = self.base.model.embed_tokens(pack.input_ids)
        cos, sin = self.base.model.rotary_emb(x[None], pack.layout.position[None])
        parts = self.flat.to(x.dtype).split([adapter.size for adapter in self.adapters])
        first_kept = len(self.layers) - self.keep_layers
        for i, (layer, part) in enumerate(zip(self.layers, parts, strict=True)):
            x = _LayerFunction.apply(x, part, layer, (cos[0], sin[0]), pack.spans, i >= first_kept)
        return self.base.lm_head(self.base.model.norm(x.index_select(0, keep)))
