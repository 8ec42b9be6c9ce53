"""Where the repository is."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


SUMS = "SHA256SUMS"


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
