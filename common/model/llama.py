"""What training and decoding share of a Llama: the supported models, adapters, norms, rotary positions and SwiGLU.

T tokens; x [T, hidden]. References: LoRA https://arxiv.org/abs/2106.09685, RMSNorm https://arxiv.org/abs/1910.07467,
rotary positions https://arxiv.org/abs/2104.09864, SwiGLU https://arxiv.org/abs/2002.05202.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

from common.model.compiled import compiled
from common.model.linears import MergedLinear

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

Model: TypeAlias = PreTrainedModel | PeftModel
Rope = tuple[Tensor, Tensor]  # cos, sin [T, D]
# per group: the stacked As [R, K] of its adapted linears, then B [N, r] of each, r = 0 if not adapted; [] if none is
Lora = list[list[Tensor]]
# A layer's seven linears, grouped by shared input. A group is one merged linear, and its As are stacked into one.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
QKV, OUT, GATE_UP, DOWN = range(4)


def unsupported_reason(model: Model) -> str | None:
    """Why `train.fused` and `decode.forward` cannot compute this model's layers; None if they can."""
    config = model.config
    if config.model_type != "llama" or config.hidden_act != "silu":
        return f"{config.model_type} is not a Llama with SiLU"
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") in ("dynamic", "longrope"):
        return "its rotary positions change with the longest text of a pass"
    linears = [linear for layer in layers_of(model) for linear in _linears(layer).values()]
    adapted = [linear for linear in linears if isinstance(linear, LoraLayer)]
    adapters = getattr(model, "peft_config", {}).values()
    biased = any(_base(linear).bias is not None for linear in linears)
    if biased or any(adapter.use_dora or adapter.bias != "none" for adapter in adapters):
        return "biases or DoRA"
    if len({scale for linear in adapted for scale in linear.scaling.values()}) > 1:
        return "its adapters are scaled differently"
    ours = {id(p) for linear in adapted for p in (linear.lora_A.default.weight, linear.lora_B.default.weight)}
    if any(id(p) not in ours for name, p in model.named_parameters() if "lora_" in name or "modules_to_save" in name):
        return "something else than the seven projections is adapted"
    if layers_of(model)[0].self_attn.head_dim % 8:
        return "its heads are not a multiple of 8 wide"
    return None


@dataclass(frozen=True)
class Adapter:
    """The layout of a layer's LoRA weights in a flat tensor."""

    shapes: list[list[tuple[int, ...]]]  # as `Lora`
    scale: float  # alpha / r

    @property
    def sizes(self) -> list[int]:
        """Weights of each matrix."""
        return [math.prod(shape) for group in self.shapes for shape in group]

    def views(self, flat: Tensor) -> Lora:
        """The matrices as views of `flat`, this layer's part of the flat tensor."""
        parts = iter(flat.split(self.sizes))
        return [[next(parts).view(shape) for shape in group] for group in self.shapes]


def adapter_of(layer: LlamaDecoderLayer) -> tuple[Adapter, list[tuple[list[Tensor], list[Tensor]]]]:
    """A layer's adapter, and per group PEFT's As, and its Bs as in `Lora`."""
    linears, weights, scale = _linears(layer), [], 1.0
    shapes: list[list[tuple[int, ...]]] = []
    for group in GROUPS:
        members = [linears[name] for name in group]
        lora = [m if isinstance(m, LoraLayer) else None for m in members]
        a = [m.lora_A.default.weight for m in lora if m]
        rows = [m.out_features for m in members if a]
        b = [m.lora_B.default.weight if m else a[0].new_empty(n, 0) for m, n in zip(lora, rows, strict=False)]
        scale = next((m.scaling["default"] for m in lora if m), scale)
        weights.append((a, b))
        shapes.append([(sum(map(len, a)), a[0].shape[1]), *(x.shape for x in b)] if a else [])
    return Adapter(shapes, scale), weights


def adapter_size(model: Model) -> int:
    """The number of weights of all LoRA adapters."""
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def merged_linears(layer: LlamaDecoderLayer, dtype: torch.dtype) -> list[MergedLinear]:
    """A layer's merged linears by group, which the first call makes and keeps in the layer."""
    if not hasattr(layer, "merged_linears"):
        linears = _linears(layer)
        layer.merged_linears = [MergedLinear([_base(linears[name]) for name in group], dtype) for group in GROUPS]
    return layer.merged_linears


def causal_of(model: Model) -> PreTrainedModel:
    """The causal language model: PEFT's base, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers_of(model: Model) -> list[LlamaDecoderLayer]:
    return list(causal_of(model).model.layers)


def _linears(layer: LlamaDecoderLayer) -> dict[str, torch.nn.Linear | LoraLayer]:
    attention, mlp = layer.self_attn, layer.mlp
    return {name: getattr(attention, name, None) or getattr(mlp, name) for group in GROUPS for name in group}


def _base(linear: torch.nn.Linear | LoraLayer) -> torch.nn.Linear:
    return linear.base_layer if isinstance(linear, LoraLayer) else linear


def _rms(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight * x * r [T, hidden], rounded where transformers rounds, and r = 1 / sqrt(mean(x²) + eps) [T, 1] fp32."""
    wide = x.float()
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * r).to(x.dtype), r


norm = compiled(_rms)


@compiled
def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + y, and `norm` of it."""
    x = x + y
    return x, *_rms(x, weight, eps)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [T, H, D] by the angles of cos, sin [T, D]; -sin rotates back."""
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]


@compiled
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return turn(q, cos, sin), turn(k, cos, sin)


@compiled
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all [T, intermediate]."""
    return F.silu(gate) * up
