"""Which careless edits of a file would no test notice? Mutates it, edit by edit, and runs the tests that belong to it.

    python -m tests.mutation [FILE ...] [--sample N] [--seed N] [--again] [--jobs N]

Without FILE all of `modules.yaml`, which says which tests belong to which. A file of more than N mutants is tried on a
seeded sample of N (0: on all). Survivors are listed; those of `equivalent.yaml` change nothing that anyone could
notice, each for the reason that stands there. Exit code 1 where fewer than 95 % of the others were killed.

The edits are mutmut's and a few more (`mutants.py`). The running is ours, for speed: a mutant is tried in a fork of a
process that has imported torch already, in a copy of the tree, and the tests that killed the last ones go first.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line_errors
from tests.mutation.mutants import Mutant, mutants

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GOAL = 0.95
RESULTS = ROOT / ".cache" / "mutation"  # of each file the survivors of the last time, for --again


@dataclass(frozen=True)
class Tried:
    mutant: Mutant
    killer: str | None  # the test that failed first; None: it survived


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="make mutate", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("--sample", type=int, default=150, help="of a file that has more mutants; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="which sample")
    parser.add_argument("--again", action="store_true", help="only what survived the last time")
    parser.add_argument("--killers", type=int, default=0, help="show so many of the tests that killed most")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    modules: dict[str, list[str]] = yaml.safe_load((HERE / "modules.yaml").read_text())
    names = [os.path.relpath(file, ROOT) if Path(file).is_absolute() else file for file in args.files]
    for name in names:
        if name not in modules:
            raise UserError(
                f"FILE={name}: modules.yaml does not say which tests belong to it; it has {', '.join(modules)}"
            )
    equivalent = yaml.safe_load((HERE / "equivalent.yaml").read_text())
    found = [one(name, modules[name], equivalent.get(name, []), args) for name in names or modules]
    killed, real = (sum(result[key] for result in found) for key in ("killed", "not_equivalent"))
    print(
        json.dumps({"killed": killed, "not_equivalent": real, "share": round(killed / max(1, real), 4), "files": found})
    )
    sys.exit(killed < GOAL * real)


def one(
    name: str, tests: Sequence[str], equivalent: Sequence[dict[str, str]], args: argparse.Namespace
) -> dict[str, Any]:
    """Try the mutants of one file; print its survivors."""
    source = (ROOT / name).read_text()
    candidates = mutants(source)
    memory = RESULTS / f"{name.replace('/', '-')}.json"
    if args.again:
        if not memory.exists():
            raise UserError(f"{name}: nothing to try again; run it without --again first")
        before = {tuple(pair) for pair in json.loads(memory.read_text())}
        chosen = [mutant for mutant in candidates if (mutant.was, mutant.now) in before]
    elif args.sample and len(candidates) > args.sample:
        chosen = sorted(random.Random(args.seed).sample(candidates, args.sample), key=lambda mutant: mutant.line)
    else:
        chosen = candidates
    reasons = {(e["was"], e["now"]): e["why"] for e in equivalent}
    stale = [was for was, _ in reasons if not any(mutant.was == was for mutant in candidates)]
    began = time.monotonic()
    tried = attempt(name, tests, chosen, args.jobs)
    survivors = [t.mutant for t in tried if t.killer is None]
    same = [mutant for mutant in survivors if (mutant.was, mutant.now) in reasons]
    left = [mutant for mutant in survivors if mutant not in same]
    for mutant in left:
        print(f"{name}:{mutant.line}: survived\n  - {mutant.was}\n  + {mutant.now}")
    for was in stale:
        print(f"equivalent.yaml: {name} no longer has the line: {was}")
    killed, real = len(tried) - len(survivors), len(tried) - len(same)
    print(
        f"{name}: {killed} of {real} killed ({killed / max(1, real):.1%}), {len(same)} more are equivalent; "
        f"{len(tried)} of its {len(candidates)} mutants, {time.monotonic() - began:.0f} s",
        flush=True,
    )
    for killer, n in Counter(t.killer for t in tried if t.killer).most_common(args.killers):
        print(f"  {n:4} by {killer}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    memory.write_text(json.dumps([(mutant.was, mutant.now) for mutant in left]))
    return {"file": name, "killed": killed, "not_equivalent": real, "equivalent": len(same), "of": len(candidates)}


def attempt(name: str, tests: Sequence[str], chosen: Sequence[Mutant], jobs: int) -> list[Tried]:
    """Each mutant tried, in order, by several processes with a copy of the tree each."""
    jobs = max(1, min(jobs, len(chosen)))
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder, ThreadPoolExecutor(jobs) as pool:
        parts = [chosen[i::jobs] for i in range(jobs)]
        done = list(pool.map(lambda i: _process(Path(folder) / str(i), name, tests, parts[i]), range(jobs)))
    return sorted((tried for part in done for tried in part), key=lambda tried: tried.mutant.line)


def _process(copy: Path, name: str, tests: Sequence[str], part: Sequence[Mutant]) -> list[Tried]:
    """A worker's answer; it is a process of its own, which only what it forks imports ours in."""
    command = [sys.executable, str(HERE / "worker.py"), str(copy), name, *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    copied(copy)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as worker:
        out, _ = worker.communicate(json.dumps([mutant.code for mutant in part]))
    if worker.returncode:
        raise UserError(f"{name}: its tests fail before anything is mutated, or too slowly:\n{out}")
    return [Tried(mutant, killer) for mutant, killer in zip(part, json.loads(out), strict=True)]


def copied(folder: Path) -> None:
    """A copy of the checkout as git would have it, with the environment and weights of this one."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name in (".venv", ".cache"):
        (folder / name).symlink_to(ROOT / name)
    for words in (("init", "-q"), ("add", "-A"), ("-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "copy")):
        subprocess.run(["git", "-C", str(folder), *words], check=True)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
