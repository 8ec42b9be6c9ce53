"""Before anything is loaded: is what was typed right, can this machine run the system, may it have the weights?

`python -m common.runs.preflight SCRIPT …` answers the first question for a script's command line, in a second: `make`
asks it first. Torch is imported only for a system that needs a GPU.
"""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from common.arguments import parse
from common.config import Base, Config, Lora
from common.data import prompt, squad
from common.errors import UserError, one_line_errors
from common.files import beside
from common.runs import adapters

import huggingface_hub
from huggingface_hub import constants  # attributes of the package only once something has imported them
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

TRY = "To try everything on this machine: make demo"


def check(config: Config) -> Config:
    """The configuration, complete: the text of `prompt.shots` filled in from the train set.

    Raises `UserError` saying what stands in the way and what to do. Downloads no weights.
    """
    if not config.api:
        gpu(config.base, config.system)
        weights(config.base)
    if config.window.tokenizer:
        tokenizer(config.window.tokenizer)
    return with_shots(config)


def typed(script: str, argv: list[str]) -> None:
    """Raises `UserError` for a script's command line that names a key, value, file or adapter that is not there."""
    config, args = parse(script, adapters.newest_system(argv))
    if script == "train_loop":
        trainable(config)
        squad.locate(config.data.train, "train")
    if script == "export":
        new_folder(args.folder)
    if script != "ask":
        squad.locate(config.data.dev, "dev")
    if not config.api:
        _is_folder(config.base.path)
    if script != "train_loop":
        adapters.choose(config, args.given, args.force)


def new_folder(folder: Path) -> None:
    """Raises `UserError` where `folder` cannot be made."""
    if not folder.name:
        raise UserError("no folder to write is named: make export OUT=folder")
    for path in (folder, *beside(folder)):  # it is written beside itself, then renamed
        if path.exists():
            raise UserError(f"{path} is there already; move it away, or name another folder than {folder}")
    above = next(path for path in folder.absolute().parents if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"{above} is no folder to write to, so there can be no {folder}")


def with_shots(config: Config) -> Config:
    if not config.prompt.shots:
        return config
    return replace(config, prompt=prompt.fill(config.prompt, squad.load(config.data, "train").examples))


def trainable(config: Config) -> Lora:
    """The adapter's settings. Raises `UserError` for a system that cannot be trained."""
    if config.lora is None:
        raise UserError(
            f"{config.system} has no lora section, so there is nothing to train; try MODEL=qlora7b, or a copy of "
            "configs/qlora7b.yaml with another base.path"
        )
    if config.adapter:
        raise UserError(
            f"adapter={config.adapter}: a training makes its own; ADAPTER is of eval, bench, export and ask"
        )
    return config.lora


def tokenizer(path: str) -> None:
    """May `window.tokenizer` be had?"""
    if Path(path).is_dir() or path.startswith((".", "/", "~")):  # a folder that is not there says so when it is read
        return
    _named(path)
    if not isinstance(huggingface_hub.try_to_load_from_cache(path, "tokenizer.json"), str):
        _licence(Base(path), "window.tokenizer")


def gpu(base: Base, system: str) -> None:
    """Is there a GPU, and is it large enough?"""
    if not base.min_gpu_gib:
        return
    import torch  # takes seconds, and a mistake in what was typed is answered without it

    if not torch.cuda.is_available():
        raise UserError(f"No CUDA device. {system} needs one with ≥ {base.min_gpu_gib:g} GiB. {TRY}")
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    has = card.total_memory / 2**30
    if has < base.min_gpu_gib:
        raise UserError(f"{card.name} has {has:.1f} GiB. {system} needs ≥ {base.min_gpu_gib:g} GiB. {TRY}")


def weights(base: Base) -> str:
    """Where the weights (of random ones: the config) come from: "here", or "may be downloaded"."""
    if _is_folder(base.path) or _is_cached(base):
        return "here"
    _licence(base)
    if not base.random_weights:
        _disk(base)
    return "may be downloaded"


def _is_folder(path: str) -> bool:
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise UserError(f"{path}: this folder holds no config.json, so no model")
        return True
    if Path(path).is_file():
        raise UserError(f"base.path={path}: a file; it must be a model's folder, or a hub id")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        hint = "make smollm2 fetches it" if "smollm2" in path else "set base.path to a model folder or a hub id"
        raise UserError(f"{path}: no such model folder; {hint}")
    _named(path)
    return False


def _named(path: str) -> None:
    try:
        validate_repo_id(path)
    except HFValidationError as error:
        raise UserError(f"{path}: no such folder here, and no hub id looks like that") from error


def _is_cached(base: Base) -> bool:
    names = ("config.json", "model.safetensors", "model.safetensors.index.json")
    found = [
        isinstance(huggingface_hub.try_to_load_from_cache(base.path, n, revision=base.revision), str) for n in names
    ]
    return found[0] and (base.random_weights or any(found[1:]))


def _licence(base: Base, key: str = "base.path") -> None:
    page = f"https://huggingface.co/{base.path}"
    try:
        huggingface_hub.auth_check(base.path)
    except GatedRepoError as error:
        raise UserError(
            f"{key}={base.path} is gated: accept its licence at {page}, then set HF_TOKEN to a token of that account. "
            f"{TRY}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{key}={base.path}: the hub knows no such model, or HF_TOKEN may not see it") from error
    except Exception as error:  # its HTTP client has many kinds for a hub that is not there
        raise UserError(
            f"{key}={base.path} is not on this disk and the hub cannot be reached ({type(error).__name__}): "
            f"copy it here and set {key} to its folder. {TRY}"
        ) from error


def _disk(base: Base) -> None:
    try:
        info = huggingface_hub.model_info(base.path, revision=base.revision, files_metadata=True)
    except RevisionNotFoundError as error:
        raise UserError(f"base.revision={base.revision}: {base.path} has no such revision") from error
    need = sum(f.size or 0 for f in info.siblings or [] if f.rfilename.endswith(".safetensors"))
    cache = Path(constants.HF_HUB_CACHE)
    while not cache.exists():
        cache = cache.parent
    free = shutil.disk_usage(cache).free
    if free < need:
        raise UserError(
            f"{base.path} takes {need / 2**30:.1f} GiB and {cache} has {free / 2**30:.1f} GiB free: "
            "make room, or set HF_HOME to a larger disk"
        )


if __name__ == "__main__":
    with one_line_errors():
        typed(sys.argv[1], sys.argv[2:])
