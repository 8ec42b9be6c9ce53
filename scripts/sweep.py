"""Train, score and time many runs: systems × variants × seeds, each a subprocess of the other scripts.

    python -m scripts.sweep seeds [key=value ...] [--workers N] [--dry-run] [--plan slurm [--slurm key=value ...]]

`seeds` names a file in configs/sweeps/, or is one; overrides go to every run. It prints the plan, what is done and how
long the rest should take. A second call resumes. Each GPU has one worker (or `--workers`). A failed run is tried once
more, unless the mistake is the user's; the others continue. SIGTERM and SIGINT are passed on, and runs save. `--plan
slurm` submits a job array to a cluster that shares this folder: one task per run, this script with that run alone.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from common.errors import UserError, one_line_errors
from common.parser import Parser
from common.runs import pool, sweeps

SLURM = {"name": "squad-qlora", "gpus_per_node": 1, "timeout_min": 1440}  # of a task; minutes


def main(argv: list[str]) -> None:
    # ---- plan ------------------------------------------------------------------------------------------------------
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("sweep", help="a name in configs/sweeps/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one a GPU, or one")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and run nothing")
    parser.add_argument("--plan", choices=("local", "slurm"), default="local", help="who runs them")
    parser.add_argument("--slurm", action="append", default=[], metavar="key=value", help=f"of {', '.join(SLURM)}, …")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the configuration's hash of one run
    args = parser.parse_intermixed_args(argv)
    planned, sweep = sweeps.plan(sweeps.find(args.sweep), args.overrides)
    planned = [job for job in planned if args.only in (None, job.config.hash())]
    if not planned:
        raise UserError(f"{args.only}: the sweep has changed since this run was handed out; it has none with this hash")
    workers, at_once = pool.at_a_time(args.workers)
    waiting = []
    for job in planned:
        steps = [kind for kind, _ in sweeps.left(job, sweep.kinds)]
        print(f"{job.name}: {', '.join(steps) or 'done'}")
        waiting += [job] if steps else []
    seconds, unknown = sweeps.expected_seconds(waiting, sweep.kinds)
    rest = f"about {seconds / 60 / workers:.0f} min" + (f" and {unknown} steps of unknown length" if unknown else "")
    print(f"{len(planned)} runs, {len(planned) - len(waiting)} done; left: {rest if waiting else 'nothing'}; {at_once}")
    if args.dry_run:
        return
    if args.plan == "slurm":
        command = [sys.executable, "-m", "scripts.sweep", args.sweep, *args.overrides, "--workers=1", "--only"]
        submit(command, waiting, args.slurm)
        return

    # ---- run -------------------------------------------------------------------------------------------------------
    def ended(job: sweeps.Job, done: bool, said: str, left: int, minutes: float) -> None:
        print(f"{job.name}: {pool.figures(said) if done else said}; {left} left, about {minutes:.0f} min")

    code, failed = pool.run(waiting, sweep.kinds, workers, ended)

    # ---- end -------------------------------------------------------------------------------------------------------
    if code:
        print("stopped; the same command goes on")
    roots = ", ".join(sorted({job.config.runs for job in planned}))
    print(f"{len(planned) - len(failed)} of {len(planned)} runs are done; make report shows them ({roots})")
    print(json.dumps({"runs": len(planned), "failed": failed}, ensure_ascii=False))
    sys.exit(code or bool(failed))


def submit(command: list[str], waiting: list[sweeps.Job], given: list[str]) -> None:
    """A job array of `command` with each run's hash; `given` is key=value of submitit's parameters, over `SLURM`."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("--plan slurm needs submitit: .venv/bin/pip install -r requirements-slurm.lock") from error
    if not waiting:
        return
    if wrong := [word for word in given if "=" not in word]:
        raise UserError(f"--slurm {wrong[0]}: write key=value, like slurm_partition=gpu")
    settings = SLURM | {key: typed(value) for key, _, value in (word.partition("=") for word in given)}
    folder = Path(waiting[0].config.runs).resolve() / "slurm"
    try:
        executor = submitit.AutoExecutor(folder, cluster="slurm")
        executor.update_parameters(**settings)
        run = submitit.helpers.CommandFunction(command, cwd=Path.cwd())
        tasks = executor.map_array(run, [job.config.hash() for job in waiting])
    except (NameError, TypeError, AssertionError) as error:  # of a parameter's name or value
        raise UserError(f"--slurm: {error}") from error
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"SLURM did not take the runs: {error}") from error
    array = tasks[0].job_id.partition("_")[0]
    print(f"job array {array}: {len(tasks)} runs; what they say is in {folder}/; the same command then does the rest")
    print(json.dumps({"array": array, "runs": len(tasks)}))


def typed(text: str) -> str | float | bool:
    """true and false, numbers, and all else as it stands: 24:00:00 is a time, which YAML would take for a number."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False}.get(text, text)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
