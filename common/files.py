"""Files that are written whole or not at all, locks, checksums, and the place of the repository."""

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SUMS = "SHA256SUMS"


@contextmanager
def atomic(path: Path, suffix: str = ".partial") -> Iterator[Path]:
    """Yield a file beside `path` to write; on success it takes the place of `path`, on an error it is removed."""
    partial = path.with_name(path.name + suffix)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def lock(file: IO) -> bool:
    """True if `file` is locked for this process, until it is closed; False if another process has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a new folder to fill; on success it takes the place of `folder`, on an error `folder` stays as it was."""
    partial, old = beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        (partial / SUMS).write_text("".join(f"{sha256(path)}  {path.relative_to(partial)}\n" for path in files))
        for path in (*files, partial / SUMS):
            _flush(path)
        recover(folder)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        recover(folder)
        raise


def recover(folder: Path) -> None:
    """After a crash between the two renames: the previous folder gets its name back."""
    _, old = beside(folder)
    if old.exists():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def beside(folder: Path) -> tuple[Path, Path]:
    """Where `replacing` fills a folder, and where it keeps the one before for the time of two renames."""
    return folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_json(path: Path) -> object:
    """The content of a JSON file, plain or gzipped. Raises `UserError` with file and, for bad JSON, line."""
    try:
        raw = path.read_bytes()
        return json.loads(gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw)  # RFC 1952's first bytes
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); is the file complete?") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); is the file complete?") from error
