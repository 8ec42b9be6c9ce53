"""What the files of a base and of an adapter hold: finite numbers in 16 or 32 bits, or a base in 4 by bitsandbytes."""

import zipfile
from collections.abc import Iterable
from pathlib import Path

from common.config import Base
from common.config_file import shown
from common.errors import UserError
from common.model.identity import stored_files

import torch
from safetensors import safe_open
from transformers import AutoConfig

# as torch and safetensors call them
FLOATS = {"float64", "float32", "float16", "bfloat16", "F64", "F32", "F16", "BF16"}


def need_finite(origin: str, name: str, tensor: torch.Tensor, hint: str = "") -> None:
    """Raises `UserError` if a tensor, or a 4-bit weight's constants, hold NaN or infinity, which a sum then is too."""
    state = getattr(tensor, "quant_state", None)
    parts = [tensor] if state is None else [state.state2.absmax, state.offset] if state.nested else [state.absmax]
    if not all(part.sum(dtype=torch.float32).isfinite() for part in parts if part.is_floating_point()):
        raise UserError(f"{origin}: {name} holds numbers that are not finite (nan or inf){hint}")


def is_quantized(base: Base) -> bool:
    """True if a checkpoint is quantised already. Raises `UserError` if otherwise than `base.quant` says."""
    stored = getattr(AutoConfig.from_pretrained(base.path, revision=base.revision), "quantization_config", None)
    if not stored:
        return False
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    if not settings.get("load_in_4bit"):
        method = settings.get("quant_method") or "a method that it does not name"
        raise UserError(
            f"{base.path} is quantised already, by {method}; base.path takes weights in 16 or 32 bits, or in 4"
        )
    quant, double = settings.get("bnb_4bit_quant_type", "fp4"), bool(settings.get("bnb_4bit_use_double_quant"))
    if quant not in ("nf4", "fp4"):
        raise UserError(
            f"{base.path}: its config.json names a 4-bit kind that bitsandbytes has not: {shown(str(quant))}"
        )
    if (quant, double) != (base.quant, base.double_quant):
        fit = f"base.quant={quant} base.double_quant={str(double).lower()}"
        raise UserError(f"{base.path} is stored in 4-bit {quant} by bitsandbytes: set {fit}")
    return True


def need_floats(origin: str, name: str, dtype: object) -> None:
    """Raises `UserError` for a tensor of integers or 8 bits, which without its scale says no numbers."""
    word = str(dtype).removeprefix("torch.")
    if word not in FLOATS:
        raise UserError(f"{origin}: {name} is stored as {word}, and nothing says what numbers these are")


def need_float_weights(base: Base) -> None:
    """`need_floats` for the weights in a base's files that are on this disk."""
    for file in stored_files(base):
        for name, dtype in _dtypes(file):
            if name.endswith(".weight"):  # buffers may be masks or positions
                need_floats(str(file), name, dtype)


def _dtypes(file: Path) -> Iterable[tuple[str, object]]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            return [(name, tensors.get_slice(name).get_dtype()) for name in tensors.keys()]  # noqa: SIM118
    tensors = torch.load(file, "meta", weights_only=True, mmap=zipfile.is_zipfile(file))
    return [(name, tensor.dtype) for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)]
