"""Loads a frozen base (NF4, FP4 or plain; real or random weights) and a LoRA adapter on it, new or trained."""

import contextlib
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import Base, Config, Lora
from common.data.tokens import Tokenizer, Tokenizers
from common.device import out_of_memory
from common.errors import UserError, first_line
from common.model.identity import differs, identify, model_name
from common.model.llama import Model, causal_of
from common.model.tree_mask import registered
from common.runs import adapters
from common.runs.results import Section

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
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
# PEFT's adapters that treat each token alone, so packs and trees change nothing; compared with PEFT's answers in tests
TOKENWISE = ("LORA", "ADALORA", "IA3", "VERA", "LOHA", "LOKR", "OFT", "HRA", "LN_TUNING", "TRAINABLE_TOKENS")
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


def load_base(base: Base, device: torch.device) -> PreTrainedModel:
    """The frozen base in eval mode, quantised as configured, with attention over packs (`common.model.tree_mask`).

    Raises `UserError` for a model that is not there, not whole, too large, or that cannot attend over packs.
    """
    dtype, quantization = compute_dtype(base, device), None
    if base.quant != "none":
        kind = {"bnb_4bit_quant_type": base.quant, "bnb_4bit_use_double_quant": base.double_quant}
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **kind)
    options = {"dtype": dtype, "quantization_config": quantization, "attn_implementation": registered()}
    options |= {"device_map": {"": device}, "output_loading_info": True}
    with out_of_memory(f"{base.path} does not fit with base.quant={base.quant}; nf4 takes the least"):
        try:
            if base.random_weights:  # by the loader of real weights, given numbers instead of a file
                model_class, config, weights = random_weights(base)
                model, found = model_class.from_pretrained(None, config=config, state_dict=weights, **options)
                model.name_or_path = base.path
            else:
                if _is_stored_quantized(base):
                    del options["quantization_config"]  # it is read from there
                model, found = AutoModelForCausalLM.from_pretrained(base.path, revision=base.revision, **options)
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as error:  # each kind of damage to its files has an exception of its own
            raise UserError(f"{base.path}: no model could be loaded from there ({first_line(error)})") from error
    # transformers fills these with random numbers
    if lacks := sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}):
        more = f" and {len(lacks) - 1} more" if lacks[1:] else ""
        raise UserError(f"{base.path}: no whole model: {lacks[0]}{more} is missing, or has another shape")
    hint = "; fp16 cannot hold them: set base.dtype=bf16 or fp32" if dtype == torch.float16 else ""
    for name, p in model.named_parameters():
        _need_finite(base.path, name, p, hint)
    if unused := sorted(key for key in found["unexpected_keys"] if not key.endswith(DERIVED)):
        more = f" and {len(unused) - 1} more" if unused[1:] else ""
        raise UserError(f"{base.path}: {unused[0]}{more} stands in its files and not in the model of its config.json")
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
            module.compute_dtype = dtype  # a stored one may name another
    return model.requires_grad_(False).eval()


def _is_stored_quantized(base: Base) -> bool:
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
    if (quant, double) != (base.quant, base.double_quant):
        fit = f"base.quant={quant} base.double_quant={str(double).lower()}"
        raise UserError(f"{base.path} is stored in 4-bit {quant} by bitsandbytes: set {fit}")
    return True


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


def add_lora(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """`model` with a new adapter: A random from `seed`, B zero, both fp32."""
    sizes = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    options = LoraConfig(**sizes, target_modules=list(lora.targets), bias="none", task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, options)
    except ValueError as error:
        raise UserError(f"lora.targets: {first_line(error)}") from error


def load_adapter(model: PreTrainedModel, folder: Path, base: Base, force: bool = False) -> PeftModel:
    """`model` with a trained adapter in PEFT's format, in eval mode.

    Raises `UserError` if they do not fit, or the adapter was trained on another base (unless `force`).
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights = adapter_weights(folder)
    except UserError:
        raise
    except Exception as error:  # each kind of damage to its files has an exception of its own
        raise UserError(f"{folder}: not a whole adapter ({first_line(error)})") from error
    if config.peft_type is None:
        raise UserError(f"{folder}: not a whole adapter (its configuration names no peft_type)")
    if config.peft_type not in TOKENWISE or getattr(config, "alora_invocation_tokens", None):
        kind = "aLoRA" if config.peft_type == "LORA" else getattr(config.peft_type, "value", config.peft_type)
        raise UserError(f"{folder}: {kind} is no adapter of single tokens; merge it into its base, then MODEL=folder")
    if other := another_base(folder, config.base_model_name_or_path, base):
        if not force:
            raise UserError(f"{folder}: {other}; base.path=… names its base, FORCE=1 takes this one all the same")
        print(f"note: {folder}: {other}; FORCE=1 takes this one all the same", file=sys.stderr)
    unknown = sorted(json.loads((folder / "adapter_config.json").read_text()).keys() - vars(config).keys())
    if unknown:
        print(f"note: {folder}/adapter_config.json sets what is not known here: {', '.join(unknown)}", file=sys.stderr)
    if str(getattr(config, "init_lora_weights", "")).startswith("pissa_niter"):
        raise UserError(f"{folder}: its base is changed by a random SVD at each load; convert it to plain LoRA by PEFT")
    try:
        peft_model = get_peft_model(model, config)
    except Exception as error:  # what a configuration may say wrongly has many kinds
        raise UserError(f"{folder}: this adapter does not fit {base.path} ({first_line(error)})") from error
    load_weights(peft_model, weights, str(folder))
    return peft_model.eval()


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file by name, on the host."""
    file = next((folder / name for name in adapters.WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: it holds none of {' and '.join(adapters.WEIGHTS)}, so no weights")
    found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    if not (isinstance(found, dict) and all(isinstance(weight, torch.Tensor) for weight in found.values())):
        raise UserError(f"{file}: not a dict of tensors by name")
    return found


def another_base(folder: Path, recorded: str | None, base: Base) -> str | None:
    """Why an adapter's base is another one than `base`; None if they are the same, with a note if that is uncertain.

    Shapes and sampled numbers decide if the adapter carries them, or its recorded base is on this disk; else the name.
    """
    settings = adapters.trained_with(folder)
    trained, here = (settings or {}).get("identity"), identify(base)
    if trained is None and recorded and (Path(recorded) / "config.json").is_file():
        with contextlib.suppress(Exception):  # a folder that is damaged says nothing
            trained = identify(replace(base, path=recorded))
    if trained and (how := differs(trained, here)):
        name = trained.get("name") if isinstance(trained, dict) else "unknown"
        return f"it was trained on another base, {name}: {how}"
    name = (trained or {}).get("name") or recorded
    certain = bool(trained and trained["samples"].keys() & here["samples"].keys())
    if not certain and name and model_name(name) != model_name(base.path):
        return f"it was trained on {name}, not on {base.path}"
    if not certain and name != base.path:
        named = f"is recorded as {name}" if name else "is not recorded"
        print(f"note: the base of {folder} {named}; {base.path} is taken for it", file=sys.stderr)
    elif model_name(name or "") != model_name(base.path):
        print(f"note: {base.path} is the base of {folder}, which knows it as {name}", file=sys.stderr)
    return None


def load_weights(model: PeftModel, weights: dict[str, torch.Tensor], origin: str) -> None:
    """Copies an adapter's weights in. Raises `UserError`, which names `origin`, unless they are exactly the model's."""
    misfit = f"{origin}: the adapter does not fit this base"
    for name, weight in weights.items():
        _need_finite(origin, name, weight)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    more = weights.keys() - wanted - own  # embeddings of the base may be stored beside adapters
    if odd := sorted((wanted - weights.keys()) | more):
        where = "is not in its file" if odd[0] in wanted else "is none of the model's"
        raise UserError(f"{misfit} (first odd weight: {odd[0]} {where})")
    try:
        set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise UserError(f"{misfit} (its shapes differ)") from error


def load_system(config: Config, adapter: Path | None, device: torch.device, force: bool = False) -> Model:
    """A system's model in eval mode. A LoRA system without `adapter` (random weights) gets a new one."""
    model = load_base(config.base, device)
    if config.lora is None:
        return model
    if adapter is None:
        return add_lora(model, config.lora, config.seed).eval()
    return load_adapter(model, adapter, config.base, force)


def _need_finite(origin: str, name: str, tensor: torch.Tensor, hint: str = "") -> None:
    """Raises `UserError` if a tensor, or a 4-bit weight's constants, hold NaN or infinity, which a sum then is too."""
    state = getattr(tensor, "quant_state", None)
    parts = [tensor] if state is None else [state.state2.absmax, state.offset] if state.nested else [state.absmax]
    if not all(part.sum(dtype=torch.float32).isfinite() for part in parts if part.is_floating_point()):
        raise UserError(f"{origin}: {name} holds numbers that are not finite (nan or inf){hint}")


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
