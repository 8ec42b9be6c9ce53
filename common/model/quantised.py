"""Bases as they were quantised, kept on disk: the next start reads a quarter of the bytes, and rounds nothing.

A copy is what transformers saves of a 4-bit model, so it holds the same bits. It lies under a hash of all that decides
them: the files' headers, sizes, times and sampled numbers, the settings, the device and the libraries.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from pathlib import Path

from common.config import Base
from common.device import describe_device
from common.errors import first_line
from common.files import ROOT, lock, replacing
from common.model.identity import identify, stored_file, stored_files

import torch
from transformers import PreTrainedModel

FOLDER = ROOT / ".cache" / "bases"
LEAST_BYTES = 2**27  # of a base's files, from which on a copy saves time
ROOM = 2  # a copy is kept where so many times its size are free
HEAD = 2**20  # bytes of a file that are hashed
LIBRARIES = ("bitsandbytes", "transformers", "torch", "accelerate", "safetensors")
CODE = [Path(__file__).with_name(name) for name in ("load.py", "quantised.py", "stored.py")]
SOURCE = "source.json"  # in a copy's folder: what it was made of


def find(base: Base, dtype: torch.dtype, device: torch.device) -> Path | None:
    """The folder of a base's copy; None if there is none."""
    with contextlib.suppress(Exception):  # what is wrong with a base, loading it says
        folder = _folder(base, dtype, device)
        return folder if folder and (folder / SOURCE).is_file() else None
    return None


def need_whole(model: PreTrainedModel, folder: Path) -> None:
    """Raises `ValueError` for a model that was loaded from a damaged copy."""
    if checksums(model) != json.loads((folder / SOURCE).read_text())["sums"]:
        raise ValueError(f"{folder}: other numbers than were written")


def keep(model: PreTrainedModel, base: Base, dtype: torch.dtype, device: torch.device) -> None:
    """Keep a copy of a base that was just quantised, if its files are large and there is room; drop those of no use.

    A copy that cannot be written is named, and nothing else fails.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":  # one of a machine's processes is enough
        return
    try:
        if not (folder := _folder(base, dtype, device)):
            return
        FOLDER.mkdir(parents=True, exist_ok=True)
        with (FOLDER / "lock").open("a") as file:
            if not lock(file):  # another process is at it
                return
            for old in FOLDER.iterdir():
                if old.is_dir() and _of_no_use(old):
                    shutil.rmtree(old, ignore_errors=True)
            size = sum(p.nbytes for p in model.parameters())
            if folder.exists() or shutil.disk_usage(FOLDER).free < ROOM * size:
                return
            with replacing(folder, sums=False) as partial:
                model.save_pretrained(partial)
                source = {"files": [_stamp(file) for file in stored_files(base)], "sums": checksums(model)}
                (partial / SOURCE).write_text(json.dumps(source) + "\n")
    except Exception as error:  # each library has kinds of its own
        print(f"note: no quantised copy of {base.path} is kept ({first_line(error)})", file=sys.stderr)


def drop(folder: Path) -> None:
    """Remove a copy that cannot be read, as far as that is possible."""
    shutil.rmtree(folder, ignore_errors=True)


def checksums(model: PreTrainedModel) -> list[int]:
    """The sum of each tensor's bytes, eight as one number, quantisation constants included: computed where they are."""
    sums = []
    for tensor in model.state_dict().values():
        data = tensor.detach().clone().view(-1).view(torch.uint8)
        whole = len(data) // 8 * 8
        sums.append(data[:whole].view(torch.int64).sum() + data[whole:].sum(dtype=torch.int64))
    return [total.item() for total in sums]  # of several devices: constants of a base on a GPU are on the host too


def _folder(base: Base, dtype: torch.dtype, device: torch.device) -> Path | None:
    """The folder of a base's copy; None for a base whose files are small."""
    files = stored_files(base)
    if sum(file.stat().st_size for file in files) < LEAST_BYTES:
        return None
    texts = [stored_file(base, name) for name in ("config.json", "generation_config.json")]
    decides = [
        [(_stamp(file), _head(file)) for file in files],
        [file and file.read_text() for file in texts],
        identify(base)["samples"],
        [base.quant, base.double_quant, str(dtype)],
        describe_device(device)["name"],
        [hashlib.sha256(file.read_bytes()).hexdigest() for file in CODE],
        [importlib.metadata.version(name) for name in LIBRARIES],
    ]
    return FOLDER / hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]


def _stamp(file: Path) -> list[object]:
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]


def _of_no_use(folder: Path) -> bool:
    """True for a copy that is not whole, or of files that have changed; files may be on a disk that is not there."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stamps = json.loads((folder / SOURCE).read_text())["files"]
        return any(Path(stamp[0]).is_file() and _stamp(Path(stamp[0])) != stamp for stamp in stamps)
    return True


def _head(file: Path) -> str:
    """A hash of a file's first bytes: what safetensors says of its tensors, and some of their numbers."""
    with file.open("rb") as opened:
        return hashlib.sha256(opened.read(HEAD)).hexdigest()
