"""Load a frozen base (NF4, FP4 or plain; real or random weights), put a LoRA adapter on it, new or trained."""

import hashlib
import json
from pathlib import Path
from typing import Any

from common.config import Base, Config, Lora
from common.device import out_of_memory
from common.errors import UserError
from common.model.tree_mask import registered

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

PROBE = (
    "The 1,234th café — naïve “quotes”, don't; 3.14% of $5e-6!  Two spaces,\ttab\nline.\n\nContext: Ἀθῆναι Москва "
    "東京 القاهرة नई दिल्ली 🏛️ e\u0301 C++/x_y=[z]{w} <tag> #1 @home antidisestablishmentarianism\nAnswer:"
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_dtype(base: Base, device: torch.device) -> torch.dtype:
    """`auto`: bf16 where a GPU has it in hardware, else fp16; fp32 on a CPU."""
    if base.dtype != "auto":
        return DTYPES[base.dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_tokenizers(config: Config) -> tuple[Any, Any]:
    """(the system's own, the one that cuts the text to the window: the same unless `window.tokenizer` names another)"""
    base, window = config.base, config.window
    if config.api:  # its own is not known here
        cutter = load_tokenizer(str(window.tokenizer))
        return cutter, cutter
    own = load_tokenizer(base.tokenizer) if base.tokenizer else load_tokenizer(base.path, base.revision)
    return own, load_tokenizer(window.tokenizer) if window.tokenizer else own


def load_tokenizer(path: str, revision: str = "main") -> Any:
    """The tokenizer of a hub id or folder: a fast one, with EOS; it neither cuts nor pads."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer could be loaded from there ({_first_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no EOS token, which ends every answer")
    if not tokenizer.is_fast:
        raise UserError(f"{path}: its tokenizer has no tokenizer.json, which says where tokens lie in a text")
    tokenizer.backend_tokenizer.no_truncation()  # either may have been saved with it
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def load_base(base: Base, device: torch.device) -> Any:
    """The frozen base in eval mode, quantised as configured, attending over trees (`common.model.pack`)."""
    dtype = compute_dtype(base, device)
    quantization = None
    if base.quant != "none":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=base.quant,
            bnb_4bit_use_double_quant=base.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    options = {
        "dtype": dtype,
        "quantization_config": quantization,
        "attn_implementation": registered(),
        "device_map": {"": device},
        "output_loading_info": True,
    }
    with out_of_memory(f"{base.path} does not fit with base.quant={base.quant}; nf4 takes the least"):
        try:
            if base.random_weights:  # the same loader as for real ones, handed numbers in place of a file
                kind, config, weights = random_weights(base)
                model, found = kind.from_pretrained(None, config=config, state_dict=weights, **options)
                model.name_or_path = base.path
            else:
                model, found = AutoModelForCausalLM.from_pretrained(base.path, revision=base.revision, **options)
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # another shape is a RuntimeError
            raise UserError(f"{base.path}: no model could be loaded from there ({_first_line(error)})") from error
    lacks = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if lacks:  # transformers makes these up
        more = f" and {len(lacks) - 1} more" if lacks[1:] else ""
        raise UserError(f"{base.path}: no whole model: {lacks[0]}{more} is missing, or has another shape")
    if getattr(model.config, "attn_logit_softcapping", None):  # transformers before 5.23 leaves it out in silence
        raise UserError(
            f"{base.path}: {type(model).__name__} does not support attention over trees: it caps its scores"
        )
    if base.tokenizer and len(load_tokenizer(base.tokenizer)) > model.config.vocab_size:
        raise UserError(f"base.tokenizer={base.tokenizer}: it has more tokens than {base.path} embeds")
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            if module.weight.quant_state.shape != (module.out_features, module.in_features):
                raise UserError(f"{base.path}: no whole model: {name} has another shape than its config.json says")
            # On a CPU with AVX512-BF16 the first evaluation would repack the weights for good, and later training
            # would go on with wrong gradients.
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    return model.eval()


def random_weights(base: Base) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """(model class, its config, weights by name) of the shapes in `base.path`'s config.json.

    Matrices are windows into one buffer of normal(0, initializer_range) in bf16, so they take the memory of the
    largest alone; norms are one, biases zero.
    """
    config = AutoConfig.from_pretrained(base.path, revision=base.revision)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config)
    parameters = dict(shapes.named_parameters())  # a tied weight stands here once
    largest, spread = max(p.numel() for p in parameters.values()), 2**20
    numbers = torch.empty(largest + spread, dtype=torch.bfloat16)
    numbers.normal_(0, config.initializer_range, generator=torch.Generator().manual_seed(0))
    weights = {}
    for i, (name, p) in enumerate(parameters.items()):
        if p.dim() > 1:
            start = i * 7919 % spread  # another window for each, so that no two layers are the same
            weights[name] = numbers[start : start + p.numel()].view(p.shape)
        else:
            weights[name] = torch.full(p.shape, 0.0 if name.endswith("bias") else 1.0)
    return type(shapes), config, weights


def add_lora(model: Any, lora: Lora, seed: int) -> Any:
    """A new adapter on `model`: A random from `seed`, B zero, both fp32."""
    torch.manual_seed(seed)
    try:
        return get_peft_model(
            model,
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(lora.targets),
                bias="none",
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise UserError(f"lora.targets: {_first_line(error)}") from error


def load_adapter(model: Any, folder: Path, base: Base) -> Any:
    """A trained PEFT adapter on `model`, checked against the base that it is put on."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: not a whole adapter ({_first_line(error)}); train it anew") from error
    trained_on = str(config.base_model_name_or_path)
    if Path(trained_on).name != Path(base.path).name:
        raise UserError(f"{folder}: this adapter was trained on {trained_on}, not on {base.path}")
    try:
        peft_model = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}: this adapter does not fit {base.path} ({_first_line(error)})") from error
    load_weights(peft_model, weights, str(folder))
    return peft_model.eval()


def load_weights(peft_model: Any, weights: dict[str, torch.Tensor], origin: str) -> None:
    """Copy adapter weights in; every one of them must be there and fit."""
    try:
        result = set_peft_model_state_dict(peft_model, weights)
    except RuntimeError as error:
        raise UserError(f"{origin}: the adapter does not fit this base (its shapes differ)") from error
    missing = [key for key in result.missing_keys if "lora_" in key]
    if missing or result.unexpected_keys:
        odd = (missing + result.unexpected_keys)[0]
        raise UserError(f"{origin}: the adapter does not fit this base (first odd weight: {odd})")


def load_system(config: Config, adapter: Path | None, device: torch.device) -> Any:
    """The model of a system, ready to answer. A LoRA system without `adapter` (random weights) gets a new one."""
    model = load_base(config.base, device)
    if config.lora is None:
        return model
    return load_adapter(model, adapter, config.base) if adapter else add_lora(model, config.lora, config.seed).eval()


def sources(model: Any, tokenizer: Any, cutter: Any) -> dict[str, Any]:
    """For records: which tokenizers (the system's, the window's) and which commit of the base, where a hub gave one.

    Without a model, of one that is elsewhere.
    """
    commit = getattr(model.config, "_commit_hash", None) if model else None
    return {"tokenizer": tokenizer_sha256(tokenizer), "cutter": tokenizer_sha256(cutter), "base_commit": commit}


def tokenizer_sha256(tokenizer: Any) -> str:
    """Of the vocabulary, and of how a text with something of everything is split and put together again.

    Not of its file: that has another form in another version of transformers, and answers are the same.
    """
    ids = tokenizer(PROBE).input_ids
    does = [sorted(tokenizer.get_vocab().items()), ids, tokenizer.decode(ids), tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(does).encode()).hexdigest()


def parameter_counts(model: Any) -> tuple[int, int]:
    """(trained, frozen) weights; a 4-bit weight counts as one, not as half a byte."""
    trained = frozen = 0
    for p in model.parameters():
        n = p.quant_state.shape.numel() if getattr(p, "quant_state", None) is not None else p.numel()
        trained += n if p.requires_grad else 0
        frozen += 0 if p.requires_grad else n
    return trained, frozen


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
