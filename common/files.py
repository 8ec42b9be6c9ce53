"""Files that are written whole or not at all, locks, checksums, and the place of the repository."""

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SUMS = "SHA256SUMS"
GZIP = b"\x1f\x8b"  # RFC 1952's first bytes
_PACK = "unpack it, or pack it with gzip"
SIGNATURES = {  # first bytes of files that are given for JSON
    b"PK\x03\x04": "a zip archive; unzip it, and name the JSON file that was in it",
    b"BZh": f"compressed by bzip2; {_PACK}",
    b"\xfd7zXZ": f"compressed by xz; {_PACK}",
    b"\x28\xb5\x2f\xfd": f"compressed by zstd; {_PACK}",
    b"7z\xbc\xaf": f"a 7z archive; {_PACK}",
    b"PAR1": "a Parquet table; write it as JSON",
    b"version https://git-lfs": "a Git LFS pointer, not the file; git lfs pull fetches that",
}
_COMPLETE = "; is the file complete?"


@contextmanager
def atomic(path: Path, suffix: str = ".partial") -> Iterator[Path]:
    """Yield a file beside `path` to write; on success it takes the place of `path`, on an error it is removed.

    Its mode is 0666 less the umask, whoever wrote it.
    """
    partial = path.with_name(path.name + suffix)
    try:
        yield partial
        if partial.is_file():
            _open_to_others(partial)
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
def replacing(folder: Path, sums: bool = True) -> Iterator[Path]:
    """Yield a new folder to fill; on success it takes the place of `folder`, on an error `folder` stays as it was.

    `sums`: it gets a file of checksums.

    Modes are 0666 less the umask for files, 0777 for folders, whoever wrote them: safetensors writes 0600.
    """
    partial, old = beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        if sums:
            (partial / SUMS).write_text("".join(f"{sha256(path)}  {path.relative_to(partial)}\n" for path in files))
            files.append(partial / SUMS)
        for path in (partial, *partial.rglob("*")):
            _open_to_others(path)
        for path in files:
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


def _open_to_others(path: Path) -> None:
    """Give a file or folder the mode that a new one has. Links are left alone, and file systems that refuse."""
    mask = os.umask(0o077)  # it cannot be read without being set
    os.umask(mask)
    with contextlib.suppress(PermissionError):
        if not path.is_symlink():
            inherited = path.stat().st_mode & stat.S_ISGID  # by folders of a group
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask | inherited)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_text(path: Path) -> str:
    """The content of a text file in UTF-8, plain or gzipped. Raises `UserError` that names what the file is instead."""
    return _decoded(path, _read(path))


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw.startswith(GZIP) else raw
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: a folder; name a file in it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}){_COMPLETE * (not error.errno)}") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}){_COMPLETE}") from error


def _decoded(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start} ({raw[error.start]:#x}) is not UTF-8"
        raise UserError(f"{path}: {where}, perhaps Latin-1: iconv -f LATIN1 -t UTF-8 converts it") from error


def read_json(path: Path) -> object:
    """The content of a JSON file in UTF-8, plain or gzipped. Raises `UserError` that names what the file is instead."""
    raw = _read(path)
    for signature, what in SIGNATURES.items():
        if raw.startswith(signature):
            raise UserError(f"{path}: {what}")
    if raw[257:262] == b"ustar":
        raise UserError(f"{path}: a tar archive; unpack it, and name the JSON file that was in it")
    encoding = json.detect_encoding(raw)  # by a byte order mark, or zeros among the first four bytes
    if (raw and not raw.strip(b"\0")) or (raw.endswith(b"\0") and encoding.startswith("utf-8")):
        raise UserError(f"{path}: ends in zero bytes{_COMPLETE}")
    if not encoding.startswith("utf-8"):
        raise UserError(f"{path}: text in {encoding.upper()}; UTF-8 is read: iconv -f {encoding.upper()[:6]} -t UTF-8")
    text = _decoded(path, raw)
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: {_unlike_json(text, error)}") from error
    except ValueError as error:
        raise UserError(f"{path}{_line_of_number(text)}: {error}") from error
    except (LookupError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON. Raises `LookupError` where a key stands twice with two values: json keeps the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                values = " and ".join(json.dumps(v)[:40] for v in (value, found[key]))
                raise LookupError(f'"{key}" stands twice in an object, with two values: {values}')
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is none of JSON's numbers")


def _line_of_number(text: str) -> str:
    """ ":line" of the first number that is none of JSON's, whether Python's reader takes it or not; "" without one."""
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"|(NaN|-?Infinity|\d{4301,})', text):
        if found[1]:
            return f":{text.count(chr(10), 0, found.start()) + 1}"
    return ""


def _unlike_json(text: str, error: json.JSONDecodeError) -> str:
    """What a text that is no JSON seems to be."""
    start, first = text.lstrip()[:1], text.lstrip().partition("\n")[0]
    if not start:
        return "the file is empty"
    if start == "<":
        return "a web page or XML, not JSON; was the page saved in place of the file?"
    if error.msg == "Extra data" and start in "{[" and text[: error.pos].count("\n") <= 1:
        return "JSON lines, a document a line; one JSON document is expected"
    if start not in "{[" and any(mark in first for mark in ",;\t"):
        return "CSV or a table of another kind, not JSON"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return f"not valid JSON ({error.msg}){_COMPLETE}"
    return f"not valid JSON ({error.msg}, at column {error.colno})"
