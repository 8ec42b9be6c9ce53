"""Families of ablations (`configs/ablations/*.yaml`): their runs, what is left, how long it takes, and their tables.

A family has a baseline and variants of it, each trained with the same seeds. A run is done if there is an outcome of it
(`common.runs.outcomes`), whoever made it. Imports no torch.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

from common.config import CONFIGS, Config, Family, Sweep, load, without_unset
from common.config_file import read
from common.data import prompt, squad
from common.errors import UserError
from common.metrics import plots
from common.metrics.effects import BySeed, Effect, effects, findable
from common.metrics.stats import t_interval
from common.runs import outcomes, record, sweeps
from common.runs.outcomes import Outcome
from common.runs.results import Record, Result, Section

COLUMNS = ("variant", "seeds", "EM", "F1", "EM gain [95 %]", "F1 gain [95 %]", "p", "p equal", "verdict")
COSTS = ("variant", "trained share", "questions/s", "peak memory")


@dataclass(frozen=True)
class Planned:
    """A family and its jobs: of each variant one a seed. The first is the baseline."""

    name: str
    path: Path
    family: Family
    jobs: dict[str, list[sweeps.Job]]

    @property
    def baseline(self) -> str:
        return next(iter(self.jobs))

    @property
    def all_jobs(self) -> list[sweeps.Job]:
        return [job for jobs in self.jobs.values() for job in jobs]

    def part(self, variants: int | None) -> "Planned":
        """The baseline and the first variants, or all, with the first seed alone."""
        return replace(self, jobs={name: jobs[:1] for name, jobs in itertools.islice(self.jobs.items(), variants)})


def names() -> list[str]:
    """The families of `configs/ablations/`."""
    return sorted(path.stem for path in (CONFIGS / "ablations").glob("*.yaml"))


def plan(path: Path, overrides: Iterable[str] = (), system: str | None = None) -> Planned:
    """The jobs of a family's file. Raises `UserError` for a variant that equals another, or may not be compared."""
    family = read(Family, path)
    name = system or family.system
    if load(name).lora is None and any(w.startswith(sweeps.TRAINED) for v in family.variants for w in v.split()):
        raise UserError(f"{path}: {name} has no lora section, so variants of its training change nothing")
    for word in (*family.overrides, *(w for v in (family.baseline, *family.variants) for w in v.split())):
        if (key := word.partition("=")[0]) in ("seed", "adapter", "runs", "system"):
            raise UserError(f"{path}: {word}: {key} is none of a family's settings")
    jobs: dict[str, list[sweeps.Job]] = {}
    seen: dict[str, str] = {}
    for variant in (family.baseline, *family.variants):
        shown = " ".join(variant.split()) or "as it is"
        sweep = Sweep((name,), family.seeds, (variant,), (*family.overrides, *overrides))
        try:
            found = sweeps.jobs_of(sweep)
        except UserError as error:
            raise UserError(f'{path}: variant "{shown}" of {name}: {error}') from error
        same = seen.setdefault(outcomes.name_of(found[0].config), shown)
        if same is not shown or shown in jobs:
            raise UserError(f'{path}: variant "{shown}" is the same run as "{same}"; leave one out')
        jobs[shown] = found
    (_, (base, *_)), *others = jobs.items()
    for shown, (job, *_) in others:
        if forbidden := changed(base.config, job.config) - set(family.changes):
            raise UserError(
                f'{path}: variant "{shown}" changes the baseline\'s {", ".join(sorted(forbidden))}, so their answers '
                "cannot be compared; a family about that says so: changes: […]"
            )
    return Planned(path.stem, path, family, jobs)


def changed(a: Config, b: Config) -> set[str]:
    """What two evaluations must share and do not, as far as configurations say."""

    def shared(c: Config) -> Section:
        return {
            "data": [c.data.dev, c.data.dev_questions, c.data.fix_offsets],
            "prompt": prompt.fingerprint(c.prompt),
            "window": without_unset(c.window),
            "decoding": without_unset(c.decode),
        }

    one, other = shared(a), shared(b)
    return {what for what in one if one[what] != other[what]}


# ---- what is left, and how long it takes ---------------------------------------------------------------------------


def left(planned: Sequence[Planned], done: Mapping[str, Outcome]) -> list[sweeps.Job]:
    """The jobs without an outcome, each once, those of one base together."""
    waiting: dict[str, sweeps.Job] = {}
    for family in planned:
        for job in family.all_jobs:
            if (name := outcomes.name_of(job.config)) not in done:
                waiting.setdefault(name, job)
    bases = list(dict.fromkeys(job.config.base for job in waiting.values()))
    return sorted(waiting.values(), key=lambda job: bases.index(job.config.base))


def finish(job: sweeps.Job, folder: Path) -> Outcome:
    """The outcome of a job whose runs have ended, written to `folder`."""
    config = job.config
    train = sweeps.finished(config, "train") if _trains(job) else None
    scored = sweeps.finished(sweeps.with_adapter(config) if _trains(job) else config, "eval")
    assert scored, "an evaluation that has ended"
    return outcomes.read_one(outcomes.keep(config, train, scored, folder))


def seconds(jobs: Sequence[sweeps.Job], known: Iterable[Record], device: str) -> float | None:
    """Seconds that jobs take on `device` one after the other; None if no run of one of their systems is known there.

    Rates are medians over records of the same system. Raises `UserError` if the data is not to be had.
    """
    rates: dict[tuple[str, str], list[float]] = {}
    starts: list[float] = []
    for r in known:
        if r["may_differ"]["device"]["name"] == device and r["result"].get("questions_per_s"):
            rates.setdefault((r["system"], r["kind"]), []).append(float(r["result"]["questions_per_s"] or 0))
            starts += [r["result"]["start_seconds"]] if r["result"].get("start_seconds") else []
    needed = {(job.config.system, kind) for job in jobs for kind in (("train", "eval") if _trains(job) else ("eval",))}
    if needed - rates.keys():
        return None
    data = jobs[0].config.data
    train, dev = (len(squad.load(data, split).examples) for split in ("train", "dev"))
    total = 0.0
    for job in jobs:
        config, evaluations = job.config, 1
        if _trains(job):
            questions = train * config.data.train_share * config.train.epochs
            if config.train.max_steps:
                questions = min(questions, config.train.max_steps * config.train.questions_per_step)
            steps = questions / config.train.questions_per_step
            evaluations += math.ceil(steps / config.train.eval_every) if config.early_stop.by == "em" else 0
            total += questions / median(rates[config.system, "train"])
        total += evaluations * dev / median(rates[config.system, "eval"])
        total += (1 + _trains(job)) * (median(starts) if starts else 0.0)
    return total


def _trains(job: sweeps.Job) -> bool:
    return job.config.lora is not None and not job.config.adapter


def smallest(planned: Planned, done: Mapping[str, Outcome]) -> tuple[float, float] | None:
    """Differences in EM, in points, that the family would mostly find: of one test, and of all (`effects.findable`).

    By the scatter of single seeds of this family, else of others of its system; None if no pair is known.
    """
    own = [pair for variant in planned.jobs for pair in _pairs(planned, variant, done)]
    system, n = planned.jobs[planned.baseline][0].config.system, len(planned.jobs) - 1
    pairs = own or _seed_pairs(o for o in done.values() if o.rows and o.evaluation["system"] == system)
    return findable([(a.rows, b.rows) for a, b in pairs], len(planned.jobs[planned.baseline]), n)


def _pairs(planned: Planned, variant: str, done: Mapping[str, Outcome]) -> list[tuple[Outcome, Outcome]]:
    """Outcomes of a variant and of the baseline, seed by seed."""
    if variant == planned.baseline:
        return []
    both = zip(planned.jobs[variant], planned.jobs[planned.baseline], strict=True)
    found = [tuple(done.get(outcomes.name_of(job.config)) for job in pair) for pair in both]
    return [(a, b) for a, b in found if a and b and a.rows and a.rows.keys() == b.rows.keys()]


def _seed_pairs(found: Iterable[Outcome]) -> list[tuple[Outcome, Outcome]]:
    """Neighbouring seeds of one configuration, on the same questions."""
    alike: dict[str, list[Outcome]] = {}
    for outcome in found:
        same = [{**outcome.evaluation["config"], "seed": None}, next(iter(outcome.rows)), len(outcome.rows)]
        alike.setdefault(json.dumps(same, sort_keys=True), []).append(outcome)
    return [pair for group in alike.values() for pair in itertools.pairwise(group)]


# ---- the table of a family -----------------------------------------------------------------------------------------


def refusal(planned: Planned, outcome: Outcome, baseline: Outcome) -> str:
    """Why an outcome cannot be compared with the baseline's; "" if it can."""
    differ = record.mismatch(baseline.evaluation, outcome.evaluation).keys() - set(planned.family.changes)
    trained = [o.train for o in (baseline, outcome) if o.train]
    files = {json.dumps([t["config"]["data"][key] for key in ("train", "train_paragraphs")]) for t in trained}
    if len(files) == 1 and len({t["result"].get("identity", {}).get("train") for t in trained}) > 1:
        differ.add("train set")  # of the same name
    return f"refused: another {', '.join(sorted(differ))} than the baseline's" if differ else ""


def section(planned: Planned, done: Mapping[str, Outcome]) -> Section | None:
    """Table, plot and sentences of a family for a page; None if nothing of it has run."""
    found = {
        variant: {job.config.seed: done[name] for job in jobs if (name := outcomes.name_of(job.config)) in done}
        for variant, jobs in planned.jobs.items()
    }
    if not any(found.values()):
        return None
    base, refused = found[planned.baseline], dict[str, str]()
    usable: dict[str, BySeed] = {}
    for variant, by_seed in found.items():
        reasons = [refusal(planned, o, next(iter(base.values()))) for o in by_seed.values() if base]
        if reason := next(filter(None, reasons), ""):
            refused[variant] = f"{reason}; delete its outcomes to run it again"
        elif variant != planned.baseline:
            usable[variant] = {seed: o.rows for seed, o in by_seed.items() if o.rows}
    if planned.baseline in refused:  # its seeds differ among themselves
        usable = {}
    compared = effects({seed: o.rows for seed, o in base.items() if o.rows}, usable, planned.family.equal_within)
    by_variant = {effect.variant: effect for effect in compared}
    rows = [_cells(planned, variant, found[variant], by_variant.get(variant), refused) for variant in found]
    absent = {
        v: [job.config.seed for job in jobs if job.config.seed not in found[v]] for v, jobs in planned.jobs.items()
    }
    missing = [f"{variant} (seed {', '.join(map(str, seeds))})" for variant, seeds in absent.items() if seeds]
    some = next(o for by_seed in found.values() for o in by_seed.values())
    config, must = some.evaluation["config"], some.evaluation["must_match"]
    other = config["system"] != load(planned.family.system).system
    random = ", random weights: no accuracy" if some.evaluation["random_weights"] else ""
    return {
        "id": planned.name + (f"-{config['system']}" if other else ""),
        "name": planned.name,
        "of": f" ({config['system']})" if other else "",
        "why": planned.family.why,
        "about": f"{config['system']}{random}, {must['questions']} questions, data {must['data'][:12]}; on "
        + ", ".join(sorted({o.device for by_seed in found.values() for o in by_seed.values()})),
        "table": [COLUMNS, *rows],
        "costs": [COSTS, *(_costs(variant, by_seed.values()) for variant, by_seed in found.items())],
        "sentences": [str(effect) for effect in compared if effect.better is not None],
        "plot": plots.forest(compared) if compared else "",
        "missing": f"Missing: {'; '.join(missing)}" if missing else "",
        "again": f"make ablate FAMILY={planned.name}" + (f" MODEL={config['system']}" if other else ""),
    }


def pages(done: Mapping[str, Outcome], systems: Collection[str] | None = None) -> list[Section]:
    """The sections of all families of `configs/ablations/`, for each system (of `systems`) that has outcomes."""
    found = []
    for name in names() if done else ():
        path = sweeps.find(name, "family")
        own = load(read(Family, path).system).system
        for system in sorted(
            {o.evaluation["system"] for o in done.values()}, key=lambda system: (system != own, system)
        ):
            if systems is None or system in systems:
                with contextlib.suppress(UserError):  # no system of configs/, or none with an adapter
                    found.append(section(plan(path, (), system), done))
    return [one for one in found if one]


def _cells(
    planned: Planned, variant: str, by_seed: Mapping[int, Outcome], effect: Effect | None, refused: Mapping[str, str]
) -> list[str]:
    found = list(by_seed.values())
    ems, f1s = ([100 * fmean(row[name] for row in o.rows.values()) for o in found if o.rows] for name in ("em", "f1"))
    gains = ["–"] * 4 + [refused.get(variant, "baseline" if variant == planned.baseline else "–")]
    if effect:
        gains = [_points(effect.em_gain, effect.em_interval), _points(effect.f1_gain, effect.f1_interval)]
        gains += ["–" if p is None else f"{p:.2g}" for p in (effect.p, effect.p_equal)] + [effect.verdict]
    return [variant, f"{len(found)} of {len(planned.jobs[variant])}", *(_mean(values) for values in (ems, f1s)), *gains]


def _costs(variant: str, found: Iterable[Outcome]) -> list[str]:
    """Trained share of the base's weights, median questions/s of training, and its highest peak of memory."""
    trained = [o.train["result"] for o in found if o.train]
    share = {t["trained_weights"] / t["frozen_weights"] for t in trained}
    rates = [t["questions_per_s"] or 0.0 for t in trained]
    peaks = [_peak(t) for t in trained]
    return [
        variant,
        f"{share.pop():.2%}" if len(share) == 1 else "–",
        f"{median(rates):.0f}" if rates else "–",
        max(peaks, key=lambda text: float(text.split()[0])) if peaks else "–",
    ]


def _points(gain: float, interval: tuple[float, float] | None) -> str:
    return f"{gain:+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")


def _mean(values: Sequence[float]) -> str:
    """The mean over seeds, and half of its 95 % interval if there are several."""
    interval = t_interval(values)
    half = f" ± {(interval[1] - interval[0]) / 2:.2f}" if interval else ""
    return f"{fmean(values):.2f}{half}" if values else "–"


def _peak(trained: Result) -> str:
    """The peak of a training: of the GPU by NVML, else torch's, else the process's."""
    peak = trained["peak"]
    gauges = {"NVML": trained.get("gpu_bytes"), "reserved": peak.get("reserved_bytes"), "RSS": peak.get("rss_bytes")}
    return next((f"{size / 2**30:.2f} GiB {gauge}" for gauge, size in gauges.items() if size), "0 GiB")
