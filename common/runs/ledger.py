"""The ledger: every finished run as a row of a SQLite table, made anew from the records whenever it is asked for.

    python -m common.runs.ledger RUNS [SQL condition]        make runs WHERE="kind = 'train' and em > 70"

The table `runs` in RUNS/ledger.sqlite has the columns of `COLUMNS`, and the configuration as JSON, so that
`config->>'$.train.lr' > 1e-3` is a condition too. Imports no torch.
"""

import contextlib
import json
import sqlite3
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from common.config import flat
from common.errors import UserError, one_line_errors
from common.files import atomic
from common.runs import record
from common.runs.results import Record, Section

COLUMNS: dict[str, tuple[str, Callable[[Record], object]]] = {  # of each, its type and how it is found in a record
    "created": ("text", lambda r: r["created"]),
    "kind": ("text", lambda r: r["kind"]),  # train, eval or bench
    "system": ("text", lambda r: r["system"]),
    "seed": ("integer", lambda r: r["seed"]),
    "em": ("real", lambda r: r["result"].get("em")),  # of a training: on what its weights were chosen by
    "f1": ("real", lambda r: r["result"].get("f1")),
    "n": ("integer", lambda r: r["result"].get("n")),
    "chosen_on": ("text", lambda r: r["result"].get("selected_on")),  # of a training: dev, heldout or nothing
    "p95_ms": ("real", lambda r: r["result"].get("latency", {}).get("p95_ms")),
    "questions_per_s": ("real", lambda r: r["result"].get("questions_per_s")),
    "peak_gib": ("real", lambda r: _gib(r["result"].get("peak", {}))),
    "random_weights": ("integer", lambda r: int(r.get("random_weights", False))),
    "device": ("text", lambda r: r["may_differ"]["device"]["name"]),
    "code": ("text", lambda r: r["may_differ"]["commit"]),
    "dirty": ("integer", lambda r: r["may_differ"]["dirty"]),
    "data": ("text", lambda r: r["must_match"]["data"]),
    "prompt": ("text", lambda r: r["must_match"]["prompt"]),
    "folder": ("text", lambda r: r["folder"]),
    "config": ("text", lambda r: json.dumps(r["config"])),
}
SHOWN = ("created", "kind", "system", "seed", "em", "f1", "n", "chosen_on", "p95_ms", "peak_gib", "folder")
NOT_COMPARED = ("system", "seed", "adapter", "runs", "tracker", "prompt.before")  # shown anyway, or of no interest


def make(runs: Path) -> Path:
    """Write RUNS/ledger.sqlite, whole or not at all; returns its path."""
    path = runs / "ledger.sqlite"
    records = record.read_all(runs)
    if not records:
        raise UserError(f"{runs}/: no finished run is there yet")
    rows = [[find(r) for _, find in COLUMNS.values()] for r in records]
    columns = ", ".join(f"{name} {type_}" for name, (type_, _) in COLUMNS.items())
    try:
        with atomic(path) as partial:
            partial.unlink(missing_ok=True)
            with contextlib.closing(sqlite3.connect(partial)) as ledger, ledger:
                ledger.execute(f"create table runs ({columns})")
                ledger.executemany(f"insert into runs values ({', '.join('?' * len(COLUMNS))})", rows)
    except sqlite3.OperationalError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
    return path


def find(ledger: Path, condition: str) -> list[dict[str, Any]]:
    """The runs that fulfil an SQL condition, oldest first; `UserError` where it is none."""
    with contextlib.closing(sqlite3.connect(f"{ledger.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        try:
            rows = connection.execute(f"select * from runs where ({condition}) order by created, folder").fetchall()
        except sqlite3.Error as error:
            known = ", ".join(COLUMNS)
            raise UserError(f"WHERE={condition}: {error}; an SQL condition over {known}") from error
    return [dict(row) for row in rows]


def differing(configs: Iterable[Section]) -> list[str]:
    """Each configuration's overrides that are not the same in all of them."""
    flats = [flat(config) for config in configs]
    keys = [key for key in dict.fromkeys(key for f in flats for key in f) if key not in NOT_COMPARED]
    varied = [key for key in keys if len({json.dumps(f.get(key)) for f in flats}) > 1]
    return [" ".join(f"{key}={f[key]}" for key in varied if key in f) for f in flats]


def _gib(peak: Mapping[str, int | None]) -> float | None:
    of = peak.get("allocated_bytes") or peak.get("rss_bytes")
    return of and of / 2**30


def _shown(value: object) -> str:
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def main(argv: list[str]) -> None:
    if len(argv) not in (1, 2):
        raise UserError('usage: make runs [RUNS=folder] [WHERE="em > 70"]')
    ledger = make(Path(argv[0]))
    found = find(ledger, argv[1] if len(argv) > 1 and argv[1].strip() else "1")
    differ = differing(json.loads(row["config"]) for row in found)
    lines = [
        (*SHOWN, "differs in"),
        *((*(_shown(row[c]) for c in SHOWN), d) for row, d in zip(found, differ, strict=True)),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"{len(found)} runs; {ledger}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
