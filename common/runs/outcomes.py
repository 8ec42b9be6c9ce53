"""What a trained and scored run leaves for good: its two records, and EM and F1 of every question, in some 10 kB.

    docs/results/ablations/SYSTEM-sSEED-HASH.json

The hash is of what decides the answers: the training's configuration, and how answers are decoded. So runs of many days
and machines add up, without adapters and answers. Imports no torch.
"""

import base64
import hashlib
import itertools
import json
import lzma
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from common.config import Config, with_defaults, without_unset
from common.errors import UserError
from common.files import ROOT, write_text
from common.metrics.compare import Rows
from common.runs import record
from common.runs.results import Record, Section

FOLDER = ROOT / "docs" / "results" / "ablations"
SCHEMA = 1
PLACES = ("run", "adapter", "trained_with", "window_counts")  # of a result: files of the machine that it ran on


@dataclass(frozen=True)
class Outcome:
    name: str  # of its file, without .json
    train: Record | None  # None: a base as it is
    evaluation: Record
    rows: Rows  # empty for random weights

    @property
    def device(self) -> str:
        return self.evaluation["may_differ"]["device"]["name"]


def name_of(config: Config) -> str:
    """The name of the outcome of this configuration's training and evaluation."""
    decides = [config.hash("train"), without_unset(config.decode)]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return f"{config.system}-s{config.seed}-{digest[:8]}"


def keep(config: Config, train: Path | None, evaluation: Path, folder: Path) -> Path:
    """Write the outcome of two finished runs; returns its file."""
    scored = record.read_one(evaluation / "record.json")
    rows = {} if scored["random_weights"] else record.read_questions(scored)
    found = {
        "schema": SCHEMA,
        "train": train and _kept(record.read_one(train / "record.json")),
        "eval": _kept(scored),
        "questions": packed(rows),
    }
    path = folder / f"{name_of(config)}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return path


def read_all(folder: Path) -> dict[str, Outcome]:
    """The outcomes of a folder by name. Raises `UserError` for a file that is none."""
    return {path.stem: read_one(path) for path in sorted(folder.glob("*.json"))}


def read_one(path: Path) -> Outcome:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']}, and this code reads {SCHEMA}")
        train, scored = found["train"] and _completed(found["train"], path), _completed(found["eval"], path)
        for r in filter(None, (train, scored)):  # what tables read
            assert isinstance(r["may_differ"]["device"]["name"], str)
            assert isinstance(r["must_match"]["data"], str)
            assert isinstance(r["must_match"]["questions"], int)
        if train:
            assert train["result"]["trained_weights"] / train["result"]["frozen_weights"] >= 0
            assert isinstance(train["result"]["peak"], dict)
        rows, result = unpacked(found["questions"]), scored["result"]
        own = 100 * sum(row["em"] for row in rows.values()) / len(rows) if rows else None
        if rows and (len(rows) != result["n"] or abs((own or 0.0) - (result["em"] or 0.0)) > 1e-6):
            raise ValueError(f"its record says EM {result['em']} of {result['n']}, its rows {own} of {len(rows)}")
        return Outcome(path.stem, train, scored, rows)
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        lzma.LZMAError,
    ) as error:
        raise UserError(f"{path}: not a readable outcome ({error}); restore it, or move it away") from error


def _completed(r: Section, path: Path) -> Record:
    """A record with its outcome's name for a folder, and all of today's keys in its configuration."""
    return cast(Record, {**r, "folder": path.stem, "config": with_defaults(r["config"])})


def packed(rows: Rows) -> Section:
    """Rows as text: articles and ids in their order, and a byte a question for its pair of EM and F1, compressed."""
    pairs = [(bool(row["em"]), float(row["f1"])) for row in rows.values()]
    values = sorted(set(pairs), reverse=True)
    if len(values) > 256:
        raise UserError(f"{len(values)} different pairs of EM and F1, and a byte holds 256")
    number = {pair: i for i, pair in enumerate(values)}
    articles = [[title, len(list(of))] for title, of in itertools.groupby(row["article"] for row in rows.values())]
    return {
        "articles": articles,
        "ids_sha256": ids_sha256(rows),
        "pairs": [[int(em), f1] for em, f1 in values],
        "of_question": base64.b64encode(lzma.compress(bytes(number[pair] for pair in pairs))).decode(),
    }


def unpacked(found: Section) -> dict[str, dict[str, Any]]:
    """Rows with em, f1 and article by number; equal numbers are equal questions if the hash of the ids is equal."""
    numbers = lzma.decompress(base64.b64decode(found["of_question"], validate=True))
    titles = [title for title, n in found["articles"] for _ in range(n)]
    if len(titles) != len(numbers):
        raise ValueError(f"{len(titles)} questions of articles, and {len(numbers)} pairs of EM and F1")
    pairs = [(bool(em), float(f1)) for em, f1 in found["pairs"]]
    each = zip(numbers, titles, strict=True)
    of_file = found["ids_sha256"][:12]
    return {
        f"{of_file} {i}": {"em": pairs[number][0], "f1": pairs[number][1], "article": title}
        for i, (number, title) in enumerate(each)
    }


def ids_sha256(rows: Mapping[str, object]) -> str:
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _kept(r: Record) -> Section:
    """A record without the names of files that only its machine has."""
    source = re.sub(r"^.*/(?=[^/]+\.(json|gz)(, held out)?$)", "", r["may_differ"]["data_source"])
    made = {**r["may_differ"], "data_source": source}
    result = {key: value for key, value in r["result"].items() if key not in PLACES}
    config = {**r["config"], "adapter": None, "runs": "runs"}
    return {**{k: v for k, v in r.items() if k != "folder"}, "may_differ": made, "config": config, "result": result}
