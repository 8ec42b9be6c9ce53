"""Loads a frozen base (NF4, FP4 or plain; real or random weights) and a LoRA adapter on it, new or trained."""

import hashlib
import json
from pathlib import Path
from typing import Any

from common.config import Base, Config
from common.data.tokens import Tokenizer, Tokenizers
from common.device import out_of_memory
from common.errors import UserError, first_line
from common.files import read_json
from common.model import quantised
from common.model.adapter import add_lora, load_adapter
from common.model.identity import stored_file
from common.model.llama import Model, causal_of
from common.model.stored import is_quantized, need_finite, need_float_weights
from common.model.tree_mask import registered
from common.runs import adapters
from common.runs.results import Section

import bitsandbytes as bnb
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)

# a text with something of everything, for the fingerprints of tokenizers
PROBE = (
    "The 1,234th café — naïve “quotes”, don't; 3.14% of $5e-6!  Two spaces,\ttab\nline.\n\nContext: Ἀθῆναι Москва "
    "東京 القاهرة नई दिल्ली 🏛️ e\u0301 C++/x_y=[z]{w} <tag> #1 @home antidisestablishmentarianism\nAnswer:"
)
DERIVED = ("rotary_emb.inv_freq",)  # tensors that old checkpoints hold and models compute
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
    except Exception as error:  # each kind of damage to its files has an exception of its own
        raise UserError(f"{path}: no tokenizer could be loaded from there ({first_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no EOS token, which ends every answer")
    if not tokenizer.is_fast:
        raise UserError(f"{path}: its tokenizer has no tokenizer.json, which says where tokens lie in a text")
    tokenizer.backend_tokenizer.no_truncation()  # either may have been saved with it
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def load_base(base: Base, device: torch.device, copies: bool = True) -> PreTrainedModel:
    """The frozen base in eval mode, quantised as configured, with attention over packs (`common.model.tree_mask`).

    `copies`: a quantised copy that was kept is read in its place.

    Raises `UserError` for a model that is not there, not whole, too large, or that cannot attend over packs.
    """
    dtype, quantization = compute_dtype(base, device), None
    if base.quant != "none":
        kind = {"bnb_4bit_quant_type": base.quant, "bnb_4bit_use_double_quant": base.double_quant}
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **kind)
    options = {"dtype": dtype, "attn_implementation": registered(), "device_map": {"": device}}
    options["output_loading_info"] = True
    of_files = quantization is not None and not base.random_weights
    copy = quantised.find(base, dtype, device) if of_files and copies else None
    with out_of_memory(f"{base.path} does not fit with base.quant={base.quant}; nf4 takes the least"):
        try:
            if base.random_weights:  # by the loader of real weights, given numbers instead of a file
                model_class, config, weights = random_weights(base)
                options |= {"config": config, "state_dict": weights, "quantization_config": quantization}
                model, found = model_class.from_pretrained(None, **options)
            elif copy:
                model, found = _from_copy(copy, base, options)
            else:
                stored = is_quantized(base)  # then its own settings are read
                options |= {} if stored else {"quantization_config": quantization}
                model, found = AutoModelForCausalLM.from_pretrained(base.path, revision=base.revision, **options)
                if not stored:  # the files hold numbers, and are on this disk by now
                    need_float_weights(base)
            model.name_or_path = base.path
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as error:  # each kind of damage to its files has an exception of its own
            if copy and "DefaultCPUAllocator" not in str(error):
                quantised.drop(copy)
                return load_base(base, device, copies=False)
            raise UserError(f"{base.path}: no model could be loaded from there ({first_line(error)})") from error
    # transformers fills these with random numbers
    if lacks := sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}):
        more = f" and {len(lacks) - 1} more" if lacks[1:] else ""
        raise UserError(f"{base.path}: no whole model: {lacks[0]}{more} is missing, or has another shape")
    hint = "; fp16 cannot hold them: set base.dtype=bf16 or fp32" if dtype == torch.float16 else ""
    for name, p in model.named_parameters():
        need_finite(base.path, name, p, hint)
    if unused := sorted(key for key in found["unexpected_keys"] if not key.endswith(DERIVED)):
        more = f" and {len(unused) - 1} more" if unused[1:] else ""
        raise UserError(f"{base.path}: {unused[0]}{more} stands in its files and not in the model of its config.json")
    if getattr(model.config, "attn_logit_softcapping", None):  # transformers before 5.23 ignores it
        name = type(model).__name__
        raise UserError(f"{base.path}: {name} does not support attention over trees: it caps its scores")
    if base.tokenizer and len(load_tokenizer(base.tokenizer)) > model.config.vocab_size:
        raise UserError(f"base.tokenizer={base.tokenizer}: it has more tokens than {base.path} embeds")
    if file := stored_file(base, "generation_config.json"):
        read_json(file)  # of one that is damaged transformers takes nothing, without a word: no stop tokens
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            if module.weight.quant_state.shape != (module.out_features, module.in_features):
                raise UserError(f"{base.path}: no whole model: {name} has another shape than its config.json says")
            # On a CPU with AVX512-BF16 the first evaluation would repack the weights for good, and gradients of a
            # training that resumes after it would be wrong.
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype  # a stored one may name another
    if of_files and "quantization_config" in options:  # from the files' numbers, just now
        quantised.keep(model, base, dtype, device)
    return model.requires_grad_(False).eval()


def _from_copy(folder: Path, base: Base, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """(model, transformers' report) of a quantised copy, which names the base as the base's own files do."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, **options)
    quantised.need_whole(model, folder)
    config = AutoConfig.from_pretrained(base.path, revision=base.revision)
    model.config._commit_hash = getattr(config, "_commit_hash", None)
    return model, found


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
        matrix, constant = numbers[i * STRIDE % STARTS :][: p.numel()], 0.0 if name.endswith("bias") else 1.0
        weights[name] = matrix.view(p.shape) if p.dim() > 1 else torch.full(p.shape, constant)
    return type(model), config, weights


def load_system(config: Config, adapter: Path | None, device: torch.device, force: bool = False) -> Model:
    """A system's model in eval mode. A LoRA system without `adapter` (random weights) gets a new one."""
    model = load_base(config.base, device)
    if config.lora is None:
        return model
    if adapter is None:
        return add_lora(model, config.lora, config.seed).eval()
    was = (adapters.trained_with(adapter) or {}).get("tokenizer_sha256")
    if was and was != tokenizer_sha256(load_tokenizers(config).own) and not force:
        here = config.base.tokenizer or config.base.path
        raise UserError(f"{adapter} was trained with another tokenizer than that of {here}; FORCE=1 takes it")
    return load_adapter(model, adapter, config.base, force)


def eos_ids(own: int, settings: GenerationConfig | None) -> list[int]:
    """The tokens that end an answer, as in transformers' `generate`: the tokenizer's and the generation settings'."""
    more = settings.eos_token_id if settings else None
    ids = [own, *(more if isinstance(more, list) else [] if more is None else [more])]
    if not all(isinstance(id_, int) for id_ in ids):
        raise UserError(
            f"generation_config.json: eos_token_id is {more!r}; it must be a token's number, or a list of them"
        )
    return sorted(set(ids))


def sources(model: Model | None, tokenizers: Tokenizers) -> Section:
    """For records: hashes of both tokenizers, EOS, and the base's commit if a hub named one; `model=None`: hosted."""
    hashes = {"tokenizer": tokenizer_sha256(tokenizers.own), "cutter": tokenizer_sha256(tokenizers.window)}
    settings = causal_of(model).generation_config if model else None
    own = {"eos_ids": eos_ids(tokenizers.own.eos_token_id, settings)} if settings else {}
    return {**hashes, "base_commit": getattr(model.config, "_commit_hash", None) if model else None, **own}


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
