"""Measure everything anew and compare it with what was accepted: for cron.

    python -m scripts.revalidate [SWEEP] [key=value ...] [--notify COMMAND]
    python -m scripts.revalidate --accept "why" [--run FOLDER]

SWEEP (revalidate) names a file in configs/sweeps/, or is one; its section `gate` has the rules. Each run gets a folder,
RUNS/revalidate/NUMBER; an unfinished run is resumed. An alarm of p95 stands if a second measurement raises it too:
something else may have run on the machine. The folder's verdict.json has the verdict; if it is no pass, COMMAND gets it
on stdin. Exit codes: 0 as good as accepted, 1 a regression, 2 set-up, 75 another one is running. `--accept` makes the
last run (or FOLDER) the one to compare with; accepted.json keeps the history.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line_errors
from common.files import lock, write_text
from common.parser import Parser
from common.runs import record, regression, signals, sweeps

SWEEP = [sys.executable, "-m", "scripts.sweep"]
BUSY = 75  # EX_TEMPFAIL: try again later


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="SWEEP, key=value", help="a sweep, and overrides for every run")
    parser.add_argument("--notify", metavar="COMMAND", help="gets the verdict as JSON, where it is no pass")
    parser.add_argument("--accept", metavar="WHY", help="accept what was measured last")
    parser.add_argument("--run", type=Path, help="with --accept: the folder to accept")
    args = parser.parse_intermixed_args(argv)
    names = [word for word in args.words if "=" not in word] or ["revalidate"]
    overrides = [word for word in args.words if "=" in word and not word.startswith("runs=")]
    if len(names) > 1:
        raise UserError(f"{' '.join(names)}: name one sweep")
    file = sweeps.find(names[0])
    runs = next((word.removeprefix("runs=") for word in args.words if word.startswith("runs=")), "runs")
    if not runs.strip():
        raise UserError("runs=: must not be empty; leave it out for runs/")
    root = Path(runs) / "revalidate"
    root.mkdir(parents=True, exist_ok=True)
    accepted = root / "accepted.json"
    try:
        history: list[dict[str, Any]] = json.loads(accepted.read_text()) if accepted.exists() else []
    except ValueError as error:
        raise UserError(f"{accepted}: not readable ({error}); restore it, or move it away and accept anew") from error
    planned, sweep = sweeps.plan(file, overrides)
    rows = Counter((job.config.system, job.config.seed) for job in planned)
    if twice := next((name for (name, _), n in rows.items() if n > 1), None):
        raise UserError(f"{file}: several variants are called {twice}; give each a name of its own (system=…)")

    # ---- one at a time ---------------------------------------------------------------------------------------------
    with (root / "lock").open("w") as alone:
        if not lock(alone):
            print(f"another revalidation is running in {root}; this one does nothing", file=sys.stderr)
            sys.exit(BUSY)
        numbers = sorted(path for path in root.iterdir() if re.fullmatch("[0-9]+", path.name))
        if args.accept is not None:
            accept(args.accept, args.run or (numbers[-1] if numbers else root), accepted, history)
            return

        # ---- measure -----------------------------------------------------------------------------------------------
        going_on = numbers and not (numbers[-1] / "verdict.json").exists()
        folder = numbers[-1] if going_on else root / f"{int(numbers[-1].name) + 1 if numbers else 1:04}"
        folder.mkdir(exist_ok=True)
        print(f"{folder}{': going on' if going_on else ''}", flush=True)
        measure(file, overrides, folder)

        # ---- compare -----------------------------------------------------------------------------------------------
        checks: list[regression.Check] = []
        last = history[-1] if history else None
        line = f"nothing is accepted yet: look at {folder}, then make accept REASON='…'"
        if last:
            before = Path(last["folder"])
            checks = regression.compare(before, folder, sweep.gate)
            if any(check.what == "p95" and not check.fine for check in checks):
                print("p95 is too long; once more, for something else may have run on this machine", flush=True)
                again = regression.once_more(folder)
                again.mkdir(exist_ok=True)
                timing = replace(sweep, kinds=("bench",), adapters=sweep.adapters or str(folder))
                write_text(again / "sweep.yaml", json.dumps(asdict(timing)))  # which is YAML too
                measure(again / "sweep.yaml", overrides, again)
                checks = regression.confirmed(checks, regression.compare(before, again, sweep.gate, ("bench",)))
            for check in checks:
                print(f"{'ok   ' if check.fine else 'ALARM'} {check.system}, {check.what}: {check.words}")
            alarms = "; ".join(f"{check.system} {check.what}: {check.words}" for check in checks if not check.fine)
            line = f"REGRESSION: {alarms}" if alarms else f"PASS: {len(checks)} checks against {last['folder']}"
        passed = all(check.fine for check in checks)
        verdict = {"folder": str(folder), "passed": passed, "accepted": last, "checks": [vars(c) for c in checks]}
        write_text(folder / "verdict.json", json.dumps(verdict, indent=1) + "\n")
        print(line)
        print(json.dumps(verdict))
        if args.notify and not passed:
            subprocess.run(args.notify, shell=True, input=json.dumps({"line": line, **verdict}), text=True)
        sys.exit(0 if passed else 1)


def measure(file: Path, overrides: list[str], folder: Path) -> None:
    """Do what is left of the sweep in `folder`; exits where it fails."""
    if code := signals.run([*SWEEP, str(file), *overrides, f"runs={folder}"]):
        print(f"error: measuring ended with {code}; the same command goes on in {folder}", file=sys.stderr)
        sys.exit(code if code in signals.CODES else 2)


def accept(why: str, folder: Path, accepted: Path, history: list[dict[str, Any]]) -> None:
    if not why.strip():
        raise UserError("a reason is needed: make accept REASON='…'")
    if not (folder / "verdict.json").is_file():
        raise UserError(f"{folder}: no finished revalidation is there; make revalidate makes one")
    commit, dirty = record.code()
    when = datetime.now(UTC).isoformat(timespec="seconds")
    history = [*history, {"folder": str(folder), "why": why, "when": when, "commit": commit, "dirty": dirty}]
    write_text(accepted, json.dumps(history, indent=1) + "\n")
    print(f"{folder} is what later ones are compared with, from now on: {why}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
