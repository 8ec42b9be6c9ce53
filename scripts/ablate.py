"""Ablations: every variant of a family trained, scored and compared with its baseline, by `configs/ablations/*.yaml`.

    python -m scripts.ablate [FAMILY ...] [key=value ...] [--model NAME] [--workers N] [--dry-run] [--rehearse]

A FAMILY is a name in configs/ablations/ or a YAML file; without one, all run. It prints what is left, how long it takes
and which differences it can find, then runs what is missing. A run is done by its outcome, a file of some 10 kB in
docs/results/ablations/ that holds its records and EM and F1 of every question: commit it, and another machine goes on.
With overrides, and for a YAML file elsewhere, outcomes go to RUNS/ablations/ instead. README.md beside the outcomes has
the tables and plots. `--rehearse` takes two steps of each baseline and its first variant, and 64 questions: for speed
and memory.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from common.config import CONFIGS, Kind
from common.data import squad
from common.errors import UserError, one_line_errors
from common.files import write_text
from common.metrics.pages import environment, text_table
from common.parser import Parser
from common.runs import ablations, outcomes, pool, record, sweeps
from common.runs.ablations import Planned
from common.runs.outcomes import Outcome
from common.runs.results import Section

KINDS: tuple[Kind, ...] = ("train", "eval")
REHEARSAL = ("train.max_steps=2", "train.eval_every=1000", "data.train_paragraphs=200", "data.dev_questions=64")
INK = "#7f7f7f"  # of plots in Markdown: pages of any colour show them


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="FAMILY, key=value", help="families, and overrides for all runs")
    parser.add_argument("--model", help="a system in place of the families' own")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one a GPU, or one")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and run nothing")
    parser.add_argument("--rehearse", action="store_true", help="two steps, 64 questions, one seed, the first variant")
    parser.add_argument("--rehearse-all", action="store_true", help="the same of all variants")
    parser.add_argument("--records", type=Path, help="the folder of outcomes")
    args = parser.parse_intermixed_args(argv)
    # make's FAMILY is one word: a file, whose name may hold spaces, or several names
    given = [word for word in args.words if Path(word).is_file() or "=" not in word]
    names = [name for word in given for name in ([word] if Path(word).is_file() else word.split())] or ablations.names()
    overrides = [word for word in args.words if word not in given]
    for key, why in {"seed": "the seeds are those of the family's file", "adapter": "every run trains its own"}.items():
        if any(word.startswith(f"{key}=") for word in overrides):
            raise UserError(f"{key}=: {why}")
    typed = [word for word in overrides if not word.startswith("runs=")]
    rehearsed = args.rehearse or args.rehearse_all
    overrides = [*(REHEARSAL if rehearsed else ()), *overrides]
    workers, at_once = pool.at_a_time(args.workers)

    # ---- plan ------------------------------------------------------------------------------------------------------
    paths = [sweeps.find(name, "family") for name in dict.fromkeys(names)]
    planned = [ablations.plan(path, overrides, args.model) for path in paths]
    if rehearsed:
        planned = [family.part(None if args.rehearse_all else 2) for family in planned]
    need_fit(planned)
    known = all(path.resolve().parent == CONFIGS / "ablations" for path in paths)
    known = known and (not args.model or (CONFIGS / f"{args.model}.yaml").is_file())
    apart = bool(typed) or rehearsed or not known
    runs = Path(planned[0].all_jobs[0].config.runs)
    folder = args.records or (runs / "ablations" if apart else outcomes.FOLDER)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file; --records names a folder")
    done = outcomes.read_all(folder)
    waiting = ablations.left(planned, done)
    for family in planned:
        print(described(family, done))
    total = len({outcomes.name_of(job.config) for family in planned for job in family.all_jobs})
    print(f"{total} runs, {total - len(waiting)} done; left: {expected(waiting, done, runs, workers)}; {at_once}")
    if args.dry_run:
        return

    for data in {job.config.data for job in waiting}:
        squad.locate(data.train, "train")
        squad.locate(data.dev, "dev")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot be written to; name another folder by --records")

    # ---- run -------------------------------------------------------------------------------------------------------
    def ended(job: sweeps.Job, finished: bool, said: str, left: int, minutes: float) -> None:
        if finished:
            outcome = ablations.finish(job, folder)
            done[outcome.name] = outcome
        what = pool.figures(said) if finished else said
        print(f"{job.name}: {what}; {left} left, about {minutes:.0f} min", flush=True)

    kept = [job for job in waiting if not sweeps.left(job, KINDS)]  # ended before their outcome was written
    for job in kept:
        ended(job, True, "", len(waiting), 0)
    code, failed = pool.run([job for job in waiting if job not in kept], KINDS, workers, ended)

    # ---- page ------------------------------------------------------------------------------------------------------
    done |= outcomes.read_all(folder)  # another process may have written some
    whole = folder.resolve() == outcomes.FOLDER  # of which the page shows all families
    write_page(ablations.pages(done) if whole else sections(planned, done), folder)
    for found in sections(planned, done):
        print(as_text(found))
    if code:
        print("stopped; the same command goes on")
    print(f"{total - len(failed)} of {total} runs are done; {folder}/README.md")
    print(json.dumps({"runs": total, "failed": failed}, ensure_ascii=False))
    sys.exit(code or bool(failed))


def need_fit(planned: Sequence[Planned]) -> None:
    """Raises `UserError` for a variant that its base cannot take, before anything runs."""
    from common.model import fit  # takes seconds, and a mistake in a family is answered without it

    checked = set()
    for family in planned:
        for variant, (job, *_) in family.jobs.items():
            config = job.config
            decides = config.base, config.lora and config.lora.targets, config.window
            if decides not in checked:
                checked.add(decides)
                try:
                    fit.need_fit(config)
                except UserError as error:
                    raise UserError(f'{family.path}: variant "{variant}": {error}') from error


def described(family: Planned, done: dict[str, Outcome]) -> str:
    """A family's line of the plan: its runs, and the differences that they can find."""
    n = sum(outcomes.name_of(job.config) in done for job in family.all_jobs)
    seeds = len(family.jobs[family.baseline])
    line = f"{family.name}: {len(family.jobs)} variants, {seeds} seed{'s' * (seeds != 1)}, {n} runs done"
    if least := ablations.smallest(family, done):
        line += f"; differences from {least[0]:.2f} EM would mostly be found, {least[1]:.2f} among all of the family"
    return line


def expected(waiting: Sequence[sweeps.Job], done: dict[str, Outcome], runs: Path, workers: int) -> str:
    """How long the rest takes, by what is known of this machine."""
    if not waiting:
        return "nothing"
    known = [r for o in done.values() for r in (o.train, o.evaluation) if r] + record.read_all(runs)
    try:
        known += [r for o in outcomes.read_all(runs / "ablations").values() for r in (o.train, o.evaluation) if r]
        seconds = ablations.seconds(waiting, known, device())
    except UserError:  # there is no data, which the runs say, or no outcome to learn from
        seconds = None
    if seconds is None:
        return f"{len(waiting)} runs of unknown length (--rehearse measures one of each family)"
    return f"{len(waiting)} runs, about {seconds / 3600 / workers:.1f} h"


def device() -> str:
    """The name of what runs compute on, as records have it."""
    if name := pool.gpu_name():
        return name
    from common.device import describe_device

    import torch

    return str(describe_device(torch.device("cpu"))["name"])


def sections(planned: Sequence[Planned], done: dict[str, Outcome]) -> list[Section]:
    found = (ablations.section(family, done) for family in planned)
    return [section for section in found if section]


def write_page(shown: Sequence[Section], folder: Path) -> None:
    """README.md, and beside it an SVG of each family's plot."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in shown:
        if section["plot"]:
            write_text(folder / f"{section['id']}.svg", section["plot"].replace("currentColor", INK) + "\n")
    write_text(folder / "README.md", environment().get_template("ablations.md").render(families=shown, images=True))


def as_text(section: Section) -> str:
    """A family's tables for a terminal."""
    head = f"\n{section['name']}: {section['why']}\n{section['about']}"
    return f"{head}\n{text_table(section['table'])}\n\n{text_table(section['costs'])}"


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
