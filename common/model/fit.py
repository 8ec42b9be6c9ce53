"""What a base cannot take, said from its shapes before any weight is read."""

from common.config import CONFIGS, Config
from common.errors import UserError
from common.model.adapter import need_targets
from common.model.estimate import SHAPES
from common.model.stored import is_quantized

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def need_fit(config: Config) -> None:
    """Raises `UserError` for targets that are no layers of the base, or for a window that it has no positions for.

    A hub's base is checked where its shapes are known; all else that does not fit is said when it is loaded.
    """
    known = SHAPES.get(config.base.path)
    try:
        base = AutoConfig.from_pretrained(CONFIGS / "shapes" / known if known else config.base.path)
    except (OSError, ValueError):
        return
    if not known and not config.base.random_weights:
        is_quantized(config.base)
    text = base.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if most and config.window.tokens > most:
        raise UserError(f"window: {config.window.tokens} tokens, and the base has {most} positions")
    if config.lora:
        with torch.device("meta"):
            need_targets(AutoModelForCausalLM.from_config(base), config.lora)
