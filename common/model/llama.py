"""What training and decoding share of a Llama: the supported models, adapters, norms, rotary positions and SwiGLU.

T tokens; x [T, hidden]. References: LoRA https://arxiv.org/abs/2106.09685, RMSNorm https://arxiv.org/abs/1910.07467,
rotary positions https://arxiv.org/abs/2104.09864, SwiGLU https://arxiv.org/abs/2002.05202.
"""

import math
from dataclasses import fields
from typing import NamedTuple, TypeAlias

from common.model.compiled import compiled
from common.model.linears import MergedLinear

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
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
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # whose angles depend on a token's position alone
# LoraConfig's settings that decide sizes, scales and places of A and B, and nothing else
LORA = {
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "runtime_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
LORA_LINEARS = (LoraLinear, Linear4bit, Linear8bitLt)


def beyond_lora(model: Model) -> str | None:
    """What an adapter has beside plain LoRA, which is A and B alone, on linears; None if nothing, or no adapter.

    Settings that are not known here count, if they are not at their default, so that what PEFT adds next does too.
    """
    adapters = list(getattr(model, "peft_config", {}).values())
    if not adapters:
        return None
    if len(adapters) > 1 or type(adapters[0]) is not LoraConfig:
        kinds = ", ".join(str(getattr(a.peft_type, "value", a.peft_type)) for a in adapters)
        return f"its adapter is {kinds}, not one of LoRA"
    plain, settings = LoraConfig(), adapters[0]
    unknown = (f.name for f in fields(plain) if f.name not in LORA)
    # tools write false, null or nothing for what is off
    odd = [name for name in unknown if (getattr(settings, name) or None) != (getattr(plain, name) or None)]
    if odd:
        return f"its LoRA has {', '.join(odd)}"
    others = {type(m).__name__ for m in model.modules() if isinstance(m, LoraLayer) and type(m) not in LORA_LINEARS}
    return f"its LoRA is on {', '.join(sorted(others))}, not on linears alone" if others else None


def unsupported_reason(model: Model) -> str | None:
    """Why `train.fused` and `decode.forward` cannot compute this model's layers; None if they can."""
    config = model.config
    if config.model_type != "llama" or config.hidden_act != "silu":
        return f"{config.model_type} is not a Llama with SiLU"
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") not in ROPE_TYPES:
        return "its rotary positions change with the longest text of a pass"
    if reason := beyond_lora(model):
        return reason
    linears = [linear for layer in layers_of(model) for linear in _linears(layer).values()]
    adapted = [linear for linear in linears if isinstance(linear, LoraLayer)]
    biased = any(getattr(linear, "base_layer", linear).bias is not None for linear in linears)
    everywhere = sum(isinstance(module, LoraLayer) for module in model.modules())
    reasons = {
        "its linears have biases": biased,
        "its adapters are scaled differently": len({x for m in adapted for x in m.scaling.values()}) > 1,
        "something else than the seven projections is adapted": everywhere > len(adapted),
        "its heads are not a multiple of 8 wide": layers_of(model)[0].self_attn.head_dim % 8,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class Adapter(NamedTuple):
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
    for group in GROUPS:
        members = [linears[name] for name in group]
        lora = [m for m in members if isinstance(m, LoraLayer)]
        a = [m.lora_A.default.weight for m in lora]
        empty = [a[0].new_empty(m.out_features, 0) for m in members if a]
        b = [m.lora_B.default.weight if isinstance(m, LoraLayer) else e for m, e in zip(members, empty, strict=False)]
        scale = lora[0].scaling["default"] if lora else scale
        weights.append((a, b))
    shapes = [[(sum(map(len, a)), a[0].shape[1]), *(x.shape for x in b)] if a else [] for a, b in weights]
    return Adapter(shapes, scale), weights


def adapter_size(model: Model) -> int:
    """The number of weights of all LoRA adapters."""
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


class Layer:
    """The frozen parts of a decoder layer: linears merged by group, once and for all in `module`, and both norms."""

    def __init__(self, module: LlamaDecoderLayer, dtype: torch.dtype):
        if not hasattr(module, "merged_linears"):
            linears = {name: getattr(linear, "base_layer", linear) for name, linear in _linears(module).items()}
            module.merged_linears = [MergedLinear([linears[name] for name in group], dtype) for group in GROUPS]
        self.linears: list[MergedLinear] = module.merged_linears
        self.norms = (module.input_layernorm.weight, module.post_attention_layernorm.weight)
        self.eps, self.head_dim = module.input_layernorm.variance_epsilon, module.self_attn.head_dim


def causal_of(model: Model) -> PreTrainedModel:
    """The causal language model: PEFT's base, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers_of(model: Model) -> list[LlamaDecoderLayer]:
    return list(causal_of(model).model.layers)


def begin(model: PreTrainedModel, ids: Tensor, position: Tensor) -> tuple[Tensor, Rope]:
    """The first layer's input [T, hidden], and rotary positions for all layers, of `ids` [T] at `position` [T]."""
    x = model.embed_tokens(ids)
    cos, sin = model.rotary_emb(x[None], position[None])
    return x, (cos[0], sin[0])


def _linears(layer: LlamaDecoderLayer) -> dict[str, torch.nn.Linear | LoraLayer]:
    attention, mlp = layer.self_attn, layer.mlp
    return {name: getattr(attention, name, None) or getattr(mlp, name) for group in GROUPS for name in group}


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
    return torch.nn.functional.silu(gate) * up
