"""The runs of a sweep: systems × variants × seeds, each trained, scored and timed as asked, and what is left to do.

What is done is what `record.json`s say, so a sweep that was cut off goes on, and one that is repeated does nothing.
Imports no torch.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.config import CONFIGS, Config, Kind, Sweep, load
from common.config_file import given_keys, read
from common.errors import UserError
from common.runs import adapters, preflight, record
from common.words import nearest

# keys that change nothing about a system without an adapter
TRAINED = ("train.", "lora.", "early_stop.", "data.train_share", "data.train_unit")


@dataclass(frozen=True)
class Job:
    system: str  # as the sweep names it
    variant: str
    overrides: tuple[str, ...]  # what its scripts are given beside the system, the seed included
    config: Config

    @property
    def name(self) -> str:
        return f"{self.system} {self.variant} seed={self.config.seed}".replace("  ", " ")


def find(name: str, what: str = "sweep") -> Path:
    """A sweep of `configs/sweeps/` (a family of `configs/ablations/`), or a YAML file."""
    folder = CONFIGS / {"sweep": "sweeps", "family": "ablations"}[what]
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        raise UserError(f'unknown {what} "{name}"{nearest(name, known)}; known: {", ".join(known)}, or a .yaml file')
    return path


def plan(path: Path, overrides: Iterable[str] = ()) -> tuple[list[Job], Sweep]:
    """The jobs of a sweep's file, and the sweep."""
    sweep = read(Sweep, path)
    return jobs_of(sweep, overrides), sweep


def jobs_of(sweep: Sweep, overrides: Iterable[str] = ()) -> list[Job]:
    """All jobs, seed by seed. A system without an adapter has no seeds, and only variants that change it."""
    jobs: dict[str, Job] = {}
    for seed in sweep.seeds:
        for variant in sweep.variants:
            for system in sweep.systems:
                words, own = (
                    _of(system, some, sweep.systems) for some in ([*sweep.overrides, *overrides], variant.split())
                )
                if load(system).lora is None:
                    own = [word for word in own if not word.startswith(TRAINED)]
                    words = [word for word in words if not word.startswith(TRAINED)]
                    seed_word = f"seed={sweep.seeds[0]}"
                else:
                    seed_word = f"seed={seed}"
                given = (*words, *own, seed_word)
                config = preflight.with_shots(load(system, given))
                if sweep.adapters and not config.adapter:
                    adapter = adapters.newest(replace(config, runs=sweep.adapters))
                    if adapter:  # random weights need none
                        given, config = (*given, f"adapter={adapter}"), replace(config, adapter=str(adapter))
                if config.adapter:
                    config = adapters.choose(config, given_keys(given)).config
                jobs.setdefault(config.hash(), Job(system, " ".join(own), given, config))
    return list(jobs.values())


def _of(system: str, words: Iterable[str], systems: Sequence[str]) -> list[str]:
    """The overrides for all systems and those for this one (`SYSTEM:key=value`)."""
    out = []
    for word in words:
        name, colon, _ = word.partition("=")[0].partition(":")
        if colon and name not in systems:
            raise UserError(f"{word}: {name} is none of {', '.join(systems)}")
        if not colon or name == system:
            out.append(word.removeprefix(f"{name}:"))
    return out


def left(job: Job, kinds: Sequence[Kind]) -> list[tuple[Kind, list[str]]]:
    """The steps without a finished record, each with what its script is given beside the system.

    What follows a training answers with that training's adapter, whatever else was trained since; until it has ended,
    the adapter is not in their words.
    """
    config, words = job.config, list(job.overrides)
    steps: list[Kind] = [kind for kind in ("train", "eval", "bench") if kind in kinds]
    if config.lora is None or config.adapter:
        steps = [kind for kind in steps if kind != "train"]
    if "train" in steps:
        config = with_adapter(config)
        if not config.adapter:
            return [(kind, words) for kind in steps]
        words = [*words, f"adapter={config.adapter}"]
    return [(kind, words) for kind in steps if kind != "train" and finished(config, kind) is None]


def with_adapter(config: Config) -> Config:
    """The configuration with the adapter of its own training, where that has ended."""
    trained = finished(config, "train")
    return replace(config, adapter=str(trained / "best")) if trained else config


def finished(config: Config, kind: Kind) -> Path | None:
    """The newest run of this configuration, where that has ended."""
    run = record.newest_run(config, kind)
    return run if run and (run / "record.json").exists() else None


def expected_seconds(jobs: Iterable[Job], kinds: Sequence[Kind]) -> tuple[float, int]:
    """(seconds left of the steps with a like one on record, the number of steps left without)."""
    known: dict[tuple[str, str], list[float]] = {}
    jobs = list(jobs)
    for runs in {Path(job.config.runs) for job in jobs}:
        for r in record.read_all(runs):
            if seconds := r["result"].get("seconds"):
                took = seconds + r["result"].get("start_seconds", 0.0)
                known.setdefault((r["system"], r["kind"]), []).append(took)
    total, unknown = 0.0, 0
    for job in jobs:
        for kind, _ in left(job, kinds):
            times = known.get((job.config.system, kind))
            total += statistics.median(times) if times else 0.0
            unknown += not times
    return total, unknown
