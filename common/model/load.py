"""Loads a frozen base (NF4, FP4 or plain; real or random weights) and a LoRA adapter on it, new or trained."""

import hashlib
import json
from pathlib import Path
from typing import Any

from common.config import Base, Config, Lora
from common.data.tokens import Tokenizer, Tokenizers
from common.device import out_of_memory
from common.errors import UserError, first_line
from common.model.llama import Model
from common.model.tree_mask import registered

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

# a text with something of everything, for the fingerprints of tokenizers
PROBE = (
    "The 1,234th café — naïve “quotes”, don't; 3.14% of $5e-6!  Two spaces,\ttab\nline.\n\nContext: Ἀθῆναι Москва "
    "東京 القاهرة नई दिल्ली 🏛️ e\u0301 C++/x_y=[z]{w} <tag> #1 @home antidisestablishmentarianism\nAnswer:"
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# random matrices start at multiples of a prime modulo a power of two, in numbers: no two start at the same place
STARTS, STRIDE = 2**20, 7919


def compute_dtype(base: Base, device: torch.device) -> torch.dtype:
    """The configured dtype. `auto`: fp32 on a CPU; on a GPU bf16 if its hardware has it, else fp16."""
    if base.dtype != "auto":
        return DTYPES[base.dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_tokenizers(config: Config) -> Tokenizers:
    """The tokenizers of a system; `window` is its own unless `window.tokenizer` names another."""
    base, window = config.base, config.window
    if config.api:  # a host does not hand its own out
        given = load_tokenizer(str(window.tokenizer))
        return Tokenizers(given, given)
    own = load_tokenizer(base.tokenizer) if base.tokenizer else load_tokenizer(base.path, base.revision)
    return Tokenizers(own, load_tokenizer(window.tokenizer) if window.tokenizer else own)


def load_tokenizer(path: str, revision: str = "main") -> Tokenizer:
    """The tokenizer of a hub id or folder, without truncation and padding. Raises `UserError` if it cannot be used."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer could be loaded from there ({first_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no EOS token, which ends every answer")
    if not tokenizer.is_fast:
        raise UserError(f"{path}: its tokenizer has no tokenizer.json, which says where tokens lie in a text")
    tokenizer.backend_tokenizer.no_truncation()  # either may have been saved with it
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def load_base(base: Base, device: torch.device) -> PreTrainedModel:
    """The frozen base in eval mode, quantised as configured, with attention over packs (`common.model.tree_mask`).

    Raises `UserError` for a model that is not there, not whole, too large, or that cannot attend over packs.
    """
    dtype, quantization = compute_dtype(base, device), None
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
            if base.random_weights:  # by the loader of real weights, given numbers instead of a file
                kind, config, weights = random_weights(base)
                model, found = kind.from_pretrained(None, config=config, state_dict=weights, **options)
                model.name_or_path = base.path
            else:
                model, found = AutoModelForCausalLM.from_pretrained(base.path, revision=base.revision, **options)
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # another shape is a RuntimeError
            raise UserError(f"{base.path}: no model could be loaded from there ({first_line(error)})") from error
    lacks = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if lacks:  # transformers fills these with random numbers
        more = f" and {len(lacks) - 1} more" if lacks[1:] else ""
        raise UserError(f"{base.path}: no whole model: {lacks[0]}{more} is missing, or has another shape")
    if getattr(model.config, "attn_logit_softcapping", None):  # transformers before 5.23 ignores it
        name = type(model).__name__
        raise UserError(f"{base.path}: {name} does not support attention over trees: it caps its scores")
    if base.tokenizer and len(load_tokenizer(base.tokenizer)) > model.config.vocab_size:
        raise UserError(f"base.tokenizer={base.tokenizer}: it has more tokens than {base.path} embeds")
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            if module.weight.quant_state.shape != (module.out_features, module.in_features):
                raise UserError(f"{base.path}: no whole model: {name} has another shape than its config.json says")
            # On a CPU with AVX512-BF16 the first evaluation would repack the weights for good, and gradients of a
            # training that resumes after it would be wrong.
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False).eval()


def random_weights(base: Base) -> tuple[type[PreTrainedModel], Any, dict[str, torch.Tensor]]:
    """The model class, config, and random weights by name, of the shapes in `base.path`'s config.json.

    Matrices are parts of one buffer of normal(0, initializer_range) in bf16, so they take little more memory than the
    largest. Norms are one, biases zero.
    """
    config = AutoConfig.from_pretrained(base.path, revision=base.revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = dict(model.named_parameters())  # tied weights once
    numbers = torch.empty(STARTS + max(p.numel() for p in parameters.values()), dtype=torch.bfloat16)
    numbers.normal_(0, config.initializer_range, generator=torch.Generator().manual_seed(0))
    weights = {}
    for i, (name, p) in enumerate(parameters.items()):
        if p.dim() > 1:
            start = i * STRIDE % STARTS
            weights[name] = numbers[start : start + p.numel()].view(p.shape)
        else:
            weights[name] = torch.full(p.shape, 0.0 if name.endswith("bias") else 1.0)
    return type(model), config, weights


def add_lora(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """`model` with a new adapter: A random from `seed`, B zero, both fp32."""
    options = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, options)
    except ValueError as error:
        raise UserError(f"lora.targets: {first_line(error)}") from error


def load_adapter(model: PreTrainedModel, folder: Path, base: Base) -> PeftModel:
    """`model` with a trained adapter in PEFT's format, in eval mode. Raises `UserError` if they do not fit."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: not a whole adapter ({first_line(error)}); train it anew") from error
    trained_on = str(config.base_model_name_or_path)
    if Path(trained_on).name != Path(base.path).name:
        raise UserError(f"{folder}: this adapter was trained on {trained_on}, not on {base.path}")
    try:
        peft_model = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}: this adapter does not fit {base.path} ({first_line(error)})") from error
    load_weights(peft_model, weights, str(folder))
    return peft_model.eval()


def load_weights(model: PeftModel, weights: dict[str, torch.Tensor], origin: str) -> None:
    """Copies an adapter's weights in. Raises `UserError`, which names `origin`, unless they are exactly the model's."""
    misfit = f"{origin}: the adapter does not fit this base"
    try:
        result = set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise UserError(f"{misfit} (its shapes differ)") from error
    odd = [key for key in result.missing_keys if "lora_" in key] + result.unexpected_keys
    if odd:
        raise UserError(f"{misfit} (first odd weight: {odd[0]})")


def load_system(config: Config, adapter: Path | None, device: torch.device) -> Model:
    """A system's model in eval mode. A LoRA system without `adapter` (random weights) gets a new one."""
    model = load_base(config.base, device)
    if config.lora is None:
        return model
    return load_adapter(model, adapter, config.base) if adapter else add_lora(model, config.lora, config.seed).eval()


def sources(model: Model | None, tokenizers: Tokenizers) -> dict[str, str | None]:
    """For records: hashes of both tokenizers, and the base's commit where a hub named one; `model=None`: hosted."""
    commit = getattr(model.config, "_commit_hash", None) if model else None
    own, window = tokenizer_sha256(tokenizers.own), tokenizer_sha256(tokenizers.window)
    return {"tokenizer": own, "cutter": window, "base_commit": commit}


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """SHA-256 of the vocabulary, EOS, and how `PROBE` is split and joined again.

    It is not that of the file, whose form depends on the version of transformers.
    """
    ids = tokenizer(PROBE).input_ids
    does = [sorted(tokenizer.get_vocab().items()), ids, tokenizer.decode(ids), tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(does).encode()).hexdigest()


def parameter_counts(model: Model) -> tuple[int, int]:
    """The numbers of trained and of frozen weights; a 4-bit weight counts as one."""
    counts = {True: 0, False: 0}
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        counts[p.requires_grad] += p.numel() if state is None else state.shape.numel()
    return counts[True], counts[False]
