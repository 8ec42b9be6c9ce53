"""Before anything is downloaded: can this machine run the system, and may it have the weights? Imports no torch
unless a system asks for a GPU."""

import shutil
from pathlib import Path

from common.config import Base, Config
from common.errors import UserError

import huggingface_hub
from huggingface_hub import constants  # attributes of the package only once something has imported them
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

TRY = "To try everything on this machine: make demo"


def check(config: Config) -> None:
    """Raises `UserError` saying what stands in the way and what to do. Downloads nothing."""
    if not config.api:
        gpu(config.base, config.system)
        weights(config.base)
    if config.window.tokenizer:
        tokenizer(config.window.tokenizer)


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
