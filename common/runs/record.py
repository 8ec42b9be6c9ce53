"""Run folders and their records: what was run, on what, and what came out. Nothing is ever overwritten.

    runs/SYSTEM-sSEED-CONFIGHASH-KIND-NUMBER/
        config.yaml       as resolved from file and overrides
        record.json       written last: a folder without it is unfinished
        metrics.jsonl     train: a line per logged step and evaluation
        predictions.json  train (where EM selects), eval: {id: text}, the official format
        questions.jsonl   eval: a line per question
        transcript.jsonl  eval, bench of a hosted model: every request and its answer
        process-N.*       bench: what each process measured
        best/ last/       train: checkpoints

Imports no torch.
"""

import contextlib
import importlib.metadata
import json
import math
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

from common.config import Config, Data, Decode, EarlyStop, with_defaults, without_unset
from common.data import prompt, squad
from common.data.squad import Dataset
from common.errors import UserError
from common.files import ROOT, lock, write_text
from common.metrics import score
from common.runs.results import Record, Result, Section

import yaml

# fields of a question's row that not all answers have
OPTIONAL = ("token_ids", "span", "least", "nbest", "rest", "greedy", "confidence")
SCHEMA = 2  # before it a tokenizer was known by the hash of its file
BY_FILE = "file "
_claimed: dict[Path, TextIO] = {}  # kept open: closing one would release its lock
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "bitsandbytes", "numpy", "scipy", "triton")


def new_run(config: Config, kind: str) -> Path:
    """Make the next free run folder of this system, seed and configuration, with its `config.yaml`."""
    root = Path(config.runs)
    stem = _stem(config, kind)
    number = max((_number(path) for path in _runs(config, kind)), default=0) + 1
    while True:
        folder = root / f"{stem}-{number:03}"
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # another process took it meanwhile
            number += 1
        except OSError as error:
            raise UserError(f"runs={config.runs}: cannot make a folder there ({error})") from error
    write_text(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    return folder


def claim(run: Path) -> None:
    """Keep other processes out of an unfinished run while this one lives."""
    if run in _claimed:
        return
    file = (run / "config.yaml").open("r+")
    if not lock(file):
        raise UserError(f"{run}: another process works there; wait until it is done, or FRESH=1 starts anew")
    _claimed[run] = file


def release() -> None:
    """Let other processes at all runs that this one has claimed."""
    while _claimed:
        _claimed.popitem()[1].close()


def newest_run(config: Config, kind: str) -> Path | None:
    """The last run folder of exactly this configuration, finished or not; one that was never begun has no settings."""
    return max((run for run in _runs(config, kind) if (run / "config.yaml").exists()), key=_number, default=None)


def open_run(
    config: Config, kind: str, same: Callable[[Record], bool], fresh: bool = False
) -> tuple[Path | None, Result | None]:
    """(the newest run of this configuration, None where a new one is to be made; its result where it has ended).

    `same`: whether a record is of the same data as this run. A finished run of other data is left alone.
    """
    run = None if fresh else newest_run(config, kind)
    if run is None or not (run / "record.json").exists():
        return run, None
    finished = read_one(run / "record.json")
    return (run, finished["result"]) if same(finished) else (None, None)


def weights_of(base: Section) -> Section:
    """The keys of `base` that decide its numbers and ids: not its precision in computing, nor the memory it needs."""
    return {key: base[key] for key in ("path", "revision", "tokenizer", "random_weights", "quant", "double_quant")}


def write(
    folder: Path,
    config: Config,
    kind: str,
    data: Dataset,
    device: Section,
    result: Mapping[str, object],
    made_by: Section | None = None,
) -> Record:
    """Write `record.json` and return it; `made_by` says more of what made the result (engine, tokenizer, …).

    Of it, `cutter` is the sha256 of the tokenizer that cut the text: it stands in the window in place of a name.
    """
    commit, dirty = code()
    made = dict(made_by or {})
    record: Record = {
        "schema": SCHEMA,
        "kind": kind,
        "system": config.system,
        "random_weights": config.base.random_weights,
        "seed": config.seed,
        "folder": str(folder),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "must_match": must_match(decoded_by(config, kind), data, made.pop("cutter", None)),
        "may_differ": {
            "data_source": data.source,
            "fixed_offsets": data.fixed_offsets,
            "config_hash": config.hash(kind),
            "commit": commit,
            "dirty": dirty,
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)},
            "device": device,
            **made,
        },
        "config": config.to_dict(),
        "result": cast(Result, result),
    }
    write_text(folder / "record.json", json.dumps(record, indent=1) + "\n")
    return record


def decoded_by(config: Config, kind: str) -> Config:
    """The configuration that a run of `kind` decodes by: a training evaluates freely."""
    return replace(config, decode=Decode()) if kind == "train" else config


def must_match(config: Config, data: Dataset, window_tokenizer_sha256: str | None) -> Section:
    """The facts that two records must share to be compared."""
    return {
        "data": data.sha256,
        "questions": len(data.examples),
        "prompt": prompt.fingerprint(config.prompt),
        "scorer": score.VERSION,
        "window": cut_by(without_unset(config.window), window_tokenizer_sha256),
        **({"decoding": decoding} if (decoding := without_unset(config.decode)) else {}),  # none: free and greedy
    }


def cut_by(window: Section, tokenizer_sha256: str | None) -> Section:
    """A window as two records of it must have alike."""
    return {**window, "tokenizer": tokenizer_sha256 and tokenizer_sha256[:12]}


def read_all(root: Path) -> list[Record]:
    """Every finished run's record below `root`, oldest first."""
    found = (read_one(path) for path in root.glob("*/record.json") if path.is_file())
    return sorted(found, key=lambda r: (r["created"], r["folder"]))


def read_one(path: Path) -> Record:
    """A `record.json`; its `folder` is where it is now, moved or not, and its `config` has all of today's keys."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        must = found["must_match"]
        if found["schema"] < SCHEMA:
            own = found["may_differ"].pop("tokenizer", None)
            cut = must["window"].get("tokenizer") or own  # before windows said what cut the text, it was the own one
            must["window"] = {**must["window"], "tokenizer": cut and BY_FILE + cut[:12]}
        config, created = with_defaults(found["config"]), found["created"]
        return cast(Record, {**found, "config": config, "created": created, "folder": str(path.parent)})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a readable record ({error}); move the folder away") from error


def read_questions(evaluation: Record) -> dict[str, dict[str, Any]]:
    """Rows by question id. In evaluations older than articles, each question is its own article."""
    path = Path(evaluation["folder"]) / "questions.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
        n = evaluation["result"]["n"]
        if len(rows) != n:
            raise ValueError(f"{len(rows)} lines for {n} questions")
        for r in rows:
            r |= {"article": r.get("article", r["id"]), "logprob": r.get("logprob")}
        kept = ("text", "em", "f1", "hit_limit", "article", "logprob")
        return {r["id"]: {key: r[key] for key in kept} | {key: r[key] for key in OPTIONAL if key in r} for r in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); evaluate that system again") from error


def questions_of(evaluation: Record) -> Dataset:
    """The questions of an evaluation, by its file or where its configuration says.

    Raises `UserError` where they are not to be had any more.
    """
    where, source = evaluation["config"]["data"], evaluation["may_differ"]["data_source"]
    path = source.removesuffix(squad.HELD_OUT)
    if Path(path).is_file():
        where = {**where, "train" if where["split"] == "heldout" else "dev": path}
    found = squad.evaluated(Data(**where), EarlyStop(**evaluation["config"]["early_stop"]))
    if found.sha256 != evaluation["must_match"]["data"]:
        raise UserError(f"{source}: not the questions of {evaluation['folder']} any more; evaluate again")
    return found


class Metrics:
    """Appends rows to a run's `metrics.jsonl`, on the first rank alone, and hands them to a tracker (`forward`).

    A number that is not finite is written as null.
    """

    def __init__(self, run: Path, write: bool, forward: Callable[[dict[str, Any], int], None]):
        self.path, self.write, self.forward = run / "metrics.jsonl", write, forward

    def __enter__(self) -> "Metrics":
        self.file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def log(self, row: dict[str, Any]) -> None:
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        if self.write:
            print(json.dumps(row), file=self.file, flush=True)
        self.forward({key: value for key, value in row.items() if value is not None}, row["step"])


def cut_metrics(run: Path, step: int, evaluated: int) -> None:
    """Drop rows of steps and evaluations after these: a resumed training computes them again."""
    kept = [row for row in read_metrics(run) if row["step"] <= (step if "loss" in row else evaluated)]
    write_text(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))


def questions_trained(run: Path) -> int:
    return sum(row.get("questions", 0) for row in read_metrics(run))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, none where there is no file; a line that a crash cut short is left out."""
    path = run / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _runs(config: Config, kind: str) -> list[Path]:
    """All run folders of this configuration; a copy under a name of its own (`….bak`) is none."""
    stem = _stem(config, kind)
    return [p for p in Path(config.runs).glob(f"{stem}-*") if re.fullmatch(f"{stem}-[0-9]+", p.name)]


def _number(run: Path) -> int:
    return int(run.name.rpartition("-")[2])


def _stem(config: Config, kind: str) -> str:
    return f"{config.system}-s{config.seed}-{config.hash(kind)}-{kind}"


def mismatch(a: Record, b: Record) -> dict[str, tuple[object, object]]:
    """The facts of `must_match` in which two records differ, of both; empty if they may be compared."""
    mine, other = a["must_match"], b["must_match"]
    cut = [m["window"]["tokenizer"] for m in (mine, other)]
    if None in cut or len({name.startswith(BY_FILE) for name in cut}) > 1:  # an older one does not say, or not so
        mine, other = ({**m, "window": cut_by(m["window"], None)} for m in (mine, other))
    keys = {**mine, **other}
    return {key: (mine.get(key), other.get(key)) for key in keys if mine.get(key) != other.get(key)}


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:  # Triton, on a CPU
        return False


def code() -> tuple[str | None, bool | None]:
    """(commit of this code, whether the tree differs from it); (None, None) outside a git checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None
