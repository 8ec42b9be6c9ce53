"""What training and decoding both need of a Llama: which models fit, its parts, norms, rotary positions, SwiGLU."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common.model.compiled import compiled
from common.model.linears import MergedLinear

import torch
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cos, sin [T, D]
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # by shared input


def unsupported_reason(model: Any) -> str | None:
    """Why these layers cannot stand for this model's, PEFT's or a plain one; None where they compute the same."""
    config = model.config
    if config.model_type != "llama" or config.hidden_act != "silu":
        return f"{config.model_type} is not a Llama with SiLU"
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") in ("dynamic", "longrope"):
        return "its rotary positions change with the longest text of a pass"
    linears = [linear for layer in layers_of(model) for linear in _linears(layer).values()]
    wrapped = [linear for linear in linears if hasattr(linear, "lora_A")]
    if any(_base(linear).bias is not None for linear in linears) or any(
        adapter.use_dora or adapter.bias != "none" for adapter in getattr(model, "peft_config", {}).values()
    ):
        return "biases or DoRA"
    if len({scale for linear in wrapped for scale in linear.scaling.values()}) > 1:
        return "its adapters are scaled differently"
    ours = {id(p) for linear in wrapped for p in (linear.lora_A.default.weight, linear.lora_B.default.weight)}
    if any(id(p) not in ours for name, p in model.named_parameters() if "lora_" in name or "modules_to_save" in name):
        return "something else than the seven projections is adapted"
    if layers_of(model)[0].self_attn.head_dim % 8:
        return "its heads are not a multiple of 8 wide"
    return None


@dataclass(frozen=True)
class Adapter:
    """One layer's part of the flat tensor, per group: A [R, K] of all its linears, then B [N, r] of each."""

    shapes: tuple[tuple[tuple[int, int], ...], ...]  # per group: A's shape, then B's shapes; () where none is adapted
    adapted: tuple[tuple[bool, ...], ...]  # per group and linear
    scale: float  # alpha / r

    @property
    def size(self) -> int:
        return sum(rows * columns for group in self.shapes for rows, columns in group)

    def views(self, flat: Tensor) -> Iterator[list[Tensor]]:
        """[A, B, B, ...] of each group, as views of this layer's part."""
        start = 0
        for group in self.shapes:
            out = []
            for rows, columns in group:
                out.append(flat[start : start + rows * columns].view(rows, columns))
                start += rows * columns
            yield out


def adapter_of(layer: Any) -> tuple[Adapter, list[tuple[list[Tensor], list[Tensor]]]]:
    """A decoder layer's adapter, and per group the As and Bs of PEFT's modules; none where there are none."""
    linears, groups = _linears(layer), []
    shapes: list[tuple[tuple[int, int], ...]] = []
    adapted, scale = [], 1.0
    for group in GROUPS:
        has = tuple(hasattr(linears[name], "lora_A") for name in group)
        lora = [linears[name] for name, yes in zip(group, has, strict=True) if yes]
        a, b = ([getattr(m, kind).default.weight for m in lora] for kind in ("lora_A", "lora_B"))
        scale = next((m.scaling["default"] for m in lora), scale)
        shapes.append(((sum(map(len, a)), a[0].shape[1]), *((x.shape[0], x.shape[1]) for x in b)) if lora else ())
        adapted.append(has)
        groups.append((a, b))
    return Adapter(tuple(shapes), tuple(adapted), scale), groups


def adapter_size(model: Any) -> int:
    """How many weights all LoRA adapters have together."""
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x.mul_(scale)


def _rms(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMS norm as transformers rounds it; also 1 / rms [T, 1]."""
    wide = x.float()
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * r).to(x.dtype), r


norm = compiled(_rms)


@compiled
def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x = x + y
    return x, *_rms(x, weight, eps)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [T, H, D] by cos, sin [T, D]. Turned back by -sin."""
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]


@compiled
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return turn(q, cos, sin), turn(k, cos, sin)


@compiled
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def matrices_of(layer: Any, dtype: torch.dtype) -> list[MergedLinear]:
    """A decoder layer's, by group; made at the first call."""
    if not hasattr(layer, "matrices"):
        linears = _linears(layer)
        layer.matrices = [MergedLinear([_base(linears[name]) for name in group], dtype) for group in GROUPS]
    return layer.matrices


def causal_of(model: Any) -> Any:
    """The causal language model within a PEFT model; itself where it is none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers_of(model: Any) -> Any:
    return causal_of(model).model.layers


def _linears(layer: Any) -> dict[str, Any]:
    children = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}
    return {name: children[name] for group in GROUPS for name in group}


def _base(linear: Any) -> Any:
    return linear.base_layer if hasattr(linear, "base_layer") else linear
