"""A LoRA adapter on a frozen base: a new one, or a trained one in PEFT's format, whoever wrote it.

Any of PEFT's adapters that treats each token alone is loaded (`TOKENWISE`), by PEFT. What an adapter's files say beyond
what PEFT knows is refused.
"""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

from common.config import Base, Lora
from common.config_file import shown
from common.errors import UserError, first_line
from common.files import read_json
from common.model.identity import differs, identify, model_name
from common.model.stored import need_finite, need_floats
from common.runs import adapters
from common.runs.results import Section
from common.words import nearest

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel

# PEFT's adapters that treat each token alone, so packs and trees change nothing; compared with PEFT's answers in tests
TOKENWISE = ("LORA", "ADALORA", "IA3", "VERA", "LOHA", "LOKR", "OFT", "HRA", "LN_TUNING", "TRAINABLE_TOKENS")
WANTED = {"bool": "true or false", "int": "a number", "float": "a number"}


def add_lora(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """`model` with a new adapter: A random from `seed`, B zero, both fp32."""
    sizes = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    options = LoraConfig(**sizes, target_modules=list(lora.targets), bias="none", task_type="CAUSAL_LM")
    need_targets(model, lora)
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, options)
    except ValueError as error:
        raise UserError(f"lora.targets: {first_line(error)}") from error


def need_targets(model: torch.nn.Module, lora: Lora) -> None:
    """Raises `UserError` for a target that is no linear layer of the model: PEFT would train the others alone."""
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            known = sorted({name.rpartition(".")[2] for name in linears})
            hint = nearest(target, known)
            raise UserError(f"lora.targets: the base has no linear layer {target}{hint}; it has {', '.join(known)}")


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
    _need_known(folder / "adapter_config.json", config, force)
    _need_agreement(folder, config)
    if config.peft_type is None:
        raise UserError(f"{folder}: not a whole adapter (its configuration names no peft_type)")
    if config.peft_type not in TOKENWISE or getattr(config, "alora_invocation_tokens", None):
        kind = "aLoRA" if config.peft_type == "LORA" else getattr(config.peft_type, "value", config.peft_type)
        raise UserError(f"{folder}: {kind} is no adapter of single tokens; merge it into its base, then MODEL=folder")
    if other := another_base(folder, config.base_model_name_or_path, base):
        if not force:
            raise UserError(f"{folder}: {other}; base.path=… names its base, FORCE=1 takes this one all the same")
        print(f"note: {folder}: {other}; FORCE=1 takes this one all the same", file=sys.stderr)
    if str(getattr(config, "init_lora_weights", "")).startswith("pissa_niter"):
        raise UserError(f"{folder}: its base is changed by a random SVD at each load; convert it to plain LoRA by PEFT")
    try:
        peft_model = get_peft_model(model, config)
    except Exception as error:  # what a configuration may say wrongly has many kinds
        raise UserError(f"{folder}: this adapter does not fit {base.path} ({first_line(error)})") from error
    load_weights(peft_model, weights, str(folder))
    return peft_model.eval()


def _need_known(file: Path, config: PeftConfig, force: bool) -> None:
    """Raises `UserError` for a setting that PEFT would ignore, or a switch or number that it would take for another.

    `force` leaves out what is not known, unless it is a slip of the pen.
    """
    known, version = vars(config), importlib.metadata.version("peft")
    kinds = {f.name: str(getattr(f.type, "__name__", f.type)) for f in dataclasses.fields(config)}
    for key, value in cast(Section, read_json(file)).items():
        if key not in known and value:  # newer versions write their own keys; empty ones change nothing
            slip = difflib.get_close_matches(key, known, 1, cutoff=0.85)
            if not force or slip:
                hint = f' — did you mean "{slip[0]}"?' if slip else "; FORCE=1 leaves it out, if it changes no answer"
                raise UserError(f"{file}: {shown(key)} is nothing that PEFT {version} knows{hint}")
            print(f"note: {file}: {shown(key)} is left out", file=sys.stderr)
        switch, number = isinstance(value, bool), isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not {"bool": switch, "int": number, "float": number}.get(kinds.get(key, ""), True):
            raise UserError(f"{file}: {key} is {json.dumps(value)[:40]}, and takes {WANTED[kinds[key]]}")


def _need_agreement(folder: Path, config: PeftConfig) -> None:
    """Raises `UserError` where an adapter of ours has other LoRA settings than it was trained with."""
    trained = adapters.trained_with(folder)
    if trained is None:
        return
    lora = trained["lora"]
    plain = LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["targets"])
    keys = ("peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    for key in keys:
        if getattr(config, key, None) != getattr(plain, key):
            found = f"{key} is {getattr(config, key, None)}, and {adapters.SETTINGS} says {getattr(plain, key)}"
            raise UserError(f"{folder}/adapter_config.json: {found}; one of them was changed after the training")


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
    recorded = recorded if isinstance(recorded, str) else None
    settings = adapters.trained_with(folder)
    trained, here = (settings or {}).get("identity"), identify(base)
    if trained is None and recorded and (Path(recorded) / "config.json").is_file():
        with contextlib.suppress(Exception):  # a folder that is damaged says nothing
            trained = identify(replace(base, path=recorded))
    if trained and (how := differs(trained, here)):
        name = trained.get("name") if isinstance(trained, dict) else "unknown"
        return f"it was trained on another base, {shown(str(name))}: {how}"
    name = (trained or {}).get("name") or recorded
    certain = bool(trained and trained["samples"].keys() & here["samples"].keys())
    if not certain and name and model_name(name) != model_name(base.path):
        return f"it was trained on {shown(name)}, not on {base.path}"
    if not certain and name != base.path:
        named = f"is recorded as {shown(name)}" if name else "is not recorded"
        print(f"note: the base of {folder} {named}; {base.path} is taken for it", file=sys.stderr)
    elif model_name(name or "") != model_name(base.path):
        print(f"note: {base.path} is the base of {folder}, which knows it as {shown(str(name))}", file=sys.stderr)
    return None


def load_weights(model: PeftModel, weights: dict[str, torch.Tensor], origin: str) -> None:
    """Copies an adapter's weights in. Raises `UserError`, which names `origin`, unless they are exactly the model's."""
    misfit = f"{origin}: the adapter does not fit this base"
    for name, weight in weights.items():
        need_floats(origin, name, weight.dtype)
        need_finite(origin, name, weight)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    more = weights.keys() - wanted.keys() - own  # embeddings of the base may be stored beside adapters
    if odd := sorted((wanted.keys() - weights.keys()) | more):
        where = "is not in its file" if odd[0] in wanted else "is none of the model's"
        raise UserError(f"{misfit} (first odd weight: {odd[0]} {where})")
    for name, weight in wanted.items():
        if weight.shape != weights[name].shape:
            shapes = f"{list(weights[name].shape)}, {list(weight.shape)} is wanted"
            raise UserError(f"{misfit} ({name} has the shape {shapes})")
    try:
        set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise UserError(f"{misfit} ({first_line(error)})") from error
