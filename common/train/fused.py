"""A Llama's decoder layers for training, each one autograd function: less memory, fewer launches, the same numbers.

They compute what the layer modules of transformers and PEFT compute, with a backward pass of their own:
- The frozen 4-bit weights are dequantised once per pass. They have no gradient and no graph.
- q, k and v (gate and up) share one product with their stacked As. No LoRA update is a tensor of its own.
- A layer keeps all that its backward pass needs, or its input alone (https://arxiv.org/abs/1604.06174); then its
  backward pass computes all but the last product again.
- All LoRA weights are one fp32 tensor (`flatten`): one cast, one gradient, one optimizer call.
- Linears that share an input share its dropout mask (`common.train.dropout`); PEFT draws one for each linear.

T tokens; x [T, K] is the input of a group of linears with merged weights w [N, K] and stacked As [R, K]:
    h = scale * x @ A.T,    y = x @ w.T + h @ B.T
    d_h = scale * d_y @ B,    d_x = d_y @ w + d_h @ A,    d_A = d_h.T @ x,    d_B = d_y.T @ h
With dropout:
    h = scale * drop(x) @ A.T,    d_x = d_y @ w + drop(d_h @ A),    d_A = d_h.T @ drop(x)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from common.model import attention, llama
from common.model.attention import Spans
from common.model.compiled import compiled
from common.model.llama import DOWN, GATE_UP, OUT, QKV, Adapter, Lora, Rope
from common.model.pack import Pack
from common.train import dropout

import torch
from peft import PeftModel
from torch import Tensor


def untrainable_reason(model: PeftModel) -> str | None:
    """Why transformers' and PEFT's modules must train this model; None if these layers compute the same."""
    if reason := llama.unsupported_reason(model):
        return reason
    more = any(p.requires_grad != ("lora_" in name) for name, p in model.named_parameters())
    return "something else than the seven projections is trained" if more else None


def flatten(model: PeftModel) -> tuple[torch.nn.Parameter, list[Adapter]]:
    """All LoRA weights in one fp32 parameter, and each layer's layout in it; PEFT's weights become views of it."""
    found = [llama.adapter_of(layer) for layer in llama.layers_of(model)]
    weights = [p for _, groups in found for a, b in groups for p in (*a, *b)]
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in weights]).float())
    for p, part in zip(weights, flat.data.split([p.numel() for p in weights]), strict=True):
        p.requires_grad_(False)
        p.data = part.view(p.shape)
    return flat, [adapter for adapter, _ in found]


class Call(NamedTuple):
    """What a layer computes with, beside its input."""

    lora: Lora
    rope: Rope
    spans: Spans
    weights: list[list[Tensor]]  # per group, of each linear [N, K] in the compute dtype
    keys: Tensor | None  # [groups, WORDS] of this layer's dropout masks; None: nothing is dropped


class Kept(NamedTuple):
    """What a layer's backward pass needs beside its input."""

    h_qkv: Tensor | None  # [T, R]; None where nothing of the group is adapted
    q: Tensor  # [T, H, D], rotated
    k: Tensor  # [T, G, D], rotated
    v: Tensor  # [T, G, D]
    out: Tensor  # [T, H, D] of the attention
    lse: Tensor | None  # [H, T]
    h_out: Tensor | None
    mid: Tensor  # [T, hidden] between attention and MLP
    h_gate_up: Tensor | None
    gate: Tensor  # [T, intermediate]
    up: Tensor  # [T, intermediate]


class Layer(llama.Layer):
    """One decoder layer. Its weights and norms are frozen; its LoRA weights come with each call."""

    def __init__(self, module: llama.LlamaDecoderLayer, adapter: Adapter, dtype: torch.dtype, rate: float):
        super().__init__(module, dtype)
        self.adapter, self.rate = adapter, rate
        self.held: list[list[Tensor]] | None = None  # dequantised weights, if they are held

    def call(self, lora: Tensor, rope: Rope, spans: Spans, keys: Tensor | None) -> Call:
        """`lora`: this layer's part of the flat tensor."""
        weights = self.held or [linear.split() for linear in self.linears]
        return Call(self.adapter.views(lora), rope, spans, weights, keys)

    def begin(self, x: Tensor, call: Call) -> Kept:
        """Attention, and the MLP up to its last product: x [T, hidden]."""
        n, _ = llama.norm(x, self.norms[0], self.eps)
        h_qkv, *qkv = self._project(QKV, n, call)
        q, k, v = (y.view(len(x), -1, self.head_dim) for y in qkv)
        q, k = llama.rotate(q, k, *call.rope)
        out, lse = attention.forward(q, k, v, call.spans)
        h_out, y = self._project(OUT, out.flatten(1), call)
        mid, n, _ = llama.add_norm(x, y, self.norms[1], self.eps)
        h_gate_up, gate, up = self._project(GATE_UP, n, call)
        return Kept(h_qkv, q, k, v, out, lse, h_out, mid, h_gate_up, gate, up)

    def end(self, kept: Kept, call: Call) -> tuple[Tensor | None, Tensor]:
        """h [T, R] of the last product, and the layer's output [T, hidden]."""
        h, y = self._project(DOWN, llama.swiglu(kept.gate, kept.up), call)
        return h, y.add_(kept.mid)

    def backward(
        self, d: Tensor, x: Tensor, kept: Kept, h_down: Tensor | None, call: Call, lora: Tensor, wants_x: bool
    ) -> Tensor | None:
        """Gradient of x, if it is wanted, given that of the output; those of the LoRA weights are written to `lora`."""
        gradients = self.adapter.views(lora)

        def back_a(g: int, d_h: Tensor | None, x: Tensor) -> None:
            if d_h is not None:
                torch.mm(d_h.T, self._dropped(g, x, call), out=gradients[g][0])

        d_product, d_h = self._project_back(DOWN, h_down, call, gradients, d)
        product, d_gate, d_up = _swiglu_back(kept.gate, kept.up, d_product)
        back_a(DOWN, d_h, product)
        del product, d_product
        d_n, d_h = self._project_back(GATE_UP, kept.h_gate_up, call, gradients, d_gate, d_up)
        n, r = llama.norm(kept.mid, self.norms[1], self.eps)
        back_a(GATE_UP, d_h, n)
        d_mid = _norm_back(d_n, kept.mid, r, self.norms[1], d)
        del d_gate, d_up
        d_out, d_h = self._project_back(OUT, kept.h_out, call, gradients, d_mid)
        back_a(OUT, d_h, kept.out.flatten(1))
        inputs = kept.q, kept.k, kept.v, kept.out, kept.lse
        d_q, d_k, d_v = attention.backward(d_out.view_as(kept.q), *inputs, call.spans)
        d_q, d_k = _rotate_back(d_q, d_k, *call.rope)
        d_qkv = (x.flatten(1) for x in (d_q, d_k, d_v))
        d_n, d_h = self._project_back(QKV, kept.h_qkv, call, gradients, *d_qkv)
        n, r = llama.norm(x, self.norms[0], self.eps)
        back_a(QKV, d_h, n)
        return _norm_back(d_n, x, r, self.norms[0], d_mid) if wants_x else None

    def _project(self, g: int, x: Tensor, call: Call) -> tuple[Any, ...]:
        """(h [T, R] or None, then y [T, N] of each linear of group `g`)."""
        weights, lora = call.weights[g], call.lora[g]
        if not lora:
            return None, *(x @ w.T for w in weights)
        h = _scaled(self._dropped(g, x, call) @ lora[0].T, self.adapter.scale)
        parts = zip(weights, lora[1:], h.split([b.shape[1] for b in lora[1:]], dim=1), strict=True)
        return h, *((part @ b.T).addmm_(x, w.T) if b.shape[1] else x @ w.T for w, b, part in parts)

    def _project_back(
        self, g: int, h: Tensor | None, call: Call, gradients: Lora, *d_out: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of x and of x @ A.T; those of the Bs are written to `gradients`."""
        weights, lora = call.weights[g], call.lora[g]
        if h is None:
            d_h, d_x = None, d_out[0] @ weights[0]
        else:
            d_h, ranks = torch.empty_like(h), [b.shape[1] for b in lora[1:]]
            parts = h.split(ranks, dim=1), d_h.split(ranks, dim=1)
            for d, b, d_b, h_part, d_part in zip(d_out, lora[1:], gradients[g][1:], *parts, strict=True):
                torch.mm(d.T, h_part, out=d_b)
                torch.mm(d, b, out=d_part)
            d_h = _scaled(d_h, self.adapter.scale)
            d_x = self._dropped(g, d_h @ lora[0], call).addmm_(d_out[0], weights[0])
        for d, w in zip(d_out[1:], weights[1:], strict=True):
            d_x.addmm_(d, w)
        return d_x, d_h

    def _dropped(self, g: int, x: Tensor, call: Call) -> Tensor:
        """x [T, K] under the dropout mask of group `g`; x itself without dropout."""
        return x if call.keys is None else dropout.drop(x, call.keys[g], self.rate)


def _scaled(x: Tensor, scale: float) -> Tensor:
    """x * scale, in place."""
    return x if scale == 1 else x.mul_(scale)


@compiled
def _norm_back(d: Tensor, x: Tensor, r: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """Gradient of a norm's input x, plus `residual`, that of the path around the norm; r [T, 1] as of `llama.norm`."""
    unit, d_unit = x.float() * r, d.float() * weight.float()
    d_x = r * (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True))
    return (d_x + residual.float()).to(x.dtype)


@compiled
def _rotate_back(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return llama.turn(q, cos, -sin), llama.turn(k, cos, -sin)


@compiled
def _swiglu_back(gate: Tensor, up: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate) * up again, and the gradients of gate and up."""
    g, u, d = gate.float(), up.float(), d.float()
    s = torch.sigmoid(g)
    silu = g * s
    return (silu * u).to(gate.dtype), (d * u * (s + silu * (1 - s))).to(gate.dtype), (d * silu).to(gate.dtype)


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora: Tensor, layer: Layer, rope: Rope, spans: Spans, keys: Tensor | None, keep: bool
    ) -> Tensor:
        call = layer.call(lora, rope, spans, keys)
        kept = layer.begin(x, call)
        h, y = layer.end(kept, call)
        ctx.save_for_backward(x, lora, *rope, keys, h, *(kept if keep else ()))
        ctx.layer, ctx.spans = layer, spans
        return y

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, lora, cos, sin, keys, h, *saved = ctx.saved_tensors
        layer, gradient = ctx.layer, torch.empty_like(lora)
        call = layer.call(lora, (cos, sin), ctx.spans, keys)
        kept = Kept(*saved) if saved else layer.begin(x, call)
        d_x = layer.backward(d, x, kept, h, call, gradient, ctx.needs_input_grad[0])
        return d_x, gradient, None, None, None, None, None


class Fused:
    """The training forward pass of a PEFT Llama without `untrainable_reason`; its LoRA weights become `flat`.

    `keep_layers`: layers, counted from the last, that keep all activations; the others keep their input alone.
    `hold_layers`: layers that hold their weights dequantised; the others dequantise them in every pass.
    """

    def __init__(self, model: PeftModel, keep_layers: int = 0, hold_layers: int = 0):
        assert not untrainable_reason(model)
        self.base, self.keep_layers = llama.causal_of(model), keep_layers
        self.dropout = next(iter(model.peft_config.values())).lora_dropout
        self.flat, self.adapters = flatten(model)
        modules = zip(llama.layers_of(model), self.adapters, strict=True)
        self.layers = [Layer(module, adapter, self.base.dtype, self.dropout) for module, adapter in modules]
        for layer in self.layers[:hold_layers]:
            layer.held = [linear.split() for linear in layer.linears]

    @property
    def recomputed(self) -> float:
        """Share of the layers' matrix products that the backward pass computes again: never the last of a layer."""
        *again, last = [rows * columns for rows, columns in (linear.shape for linear in self.layers[0].linears)]
        return sum(again) / (sum(again) + last) * (1 - self.keep_layers / len(self.layers))

    def logits(self, pack: Pack, keep: Tensor) -> Tensor:
        """Logits [K, V] of a pack at its indices `keep` [K], as `tree_mask.pack_logits` returns them.

        Nothing is dropped if the pack has no key.
        """
        x, rope = llama.begin(self.base.model, pack.input_ids, pack.layout.position)
        parts = self.flat.to(x.dtype).split([sum(adapter.sizes) for adapter in self.adapters])
        keys: Sequence[Tensor | None] = [None] * len(self.layers)
        if self.dropout and pack.dropout_key is not None:
            keys = dropout.group_keys(pack.dropout_key, len(self.layers)).unbind()
        for i, (layer, part, key) in enumerate(zip(self.layers, parts, keys, strict=True), self.keep_layers):
            x = _LayerFunction.apply(x, part, layer, rope, pack.spans, key, i >= len(self.layers))
        return self.base.lm_head(self.base.model.norm(x.index_select(0, keep)))
