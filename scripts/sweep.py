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
import os
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from common.errors import UserError, one_line_errors
from common.files import ROOT
from common.parser import Parser
from common.runs import signals, sweeps

import pynvml

SCRIPTS = {"train": "train_loop.py", "eval": "eval_loop.py", "bench": "bench_latency.py"}
TRIES, USERS_MISTAKE = 2, 2  # the latter is an exit code: trying again does not help
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
    gpus = visible_gpus()
    workers = (len(gpus) or 1) if args.workers is None else args.workers
    if workers < 1:
        raise UserError("--workers must be 1 or more")
    waiting = []
    for job in planned:
        steps = [kind for kind, _ in sweeps.left(job, sweep.kinds)]
        print(f"{job.name}: {', '.join(steps) or 'done'}")
        waiting += [job] if steps else []
    seconds, unknown = sweeps.expected_seconds(waiting, sweep.kinds)
    rest = f"about {seconds / 60 / workers:.0f} min" + (f" and {unknown} steps of unknown length" if unknown else "")
    at_once = f"{workers} at a time on {len(gpus)} GPU{'s' * (len(gpus) != 1)}"
    print(f"{len(planned)} runs, {len(planned) - len(waiting)} done; left: {rest if waiting else 'nothing'}; {at_once}")
    if args.dry_run:
        return
    if args.plan == "slurm":
        command = [sys.executable, "-m", "scripts.sweep", args.sweep, *args.overrides, "--workers=1", "--only"]
        submit(command, waiting, args.slurm)
        return

    # ---- run -------------------------------------------------------------------------------------------------------
    slots = deque(gpus[i % len(gpus)] if gpus else None for i in range(workers))
    running: set[subprocess.Popen] = set()
    failed: dict[str, str] = {}

    def work(job: sweeps.Job) -> tuple[bool, str]:
        """Do what is left of a job: (whether it is done, the last line that a script said)."""
        gpu, said = slots.popleft(), ""
        try:
            while steps := sweeps.left(job, sweep.kinds):
                kind, words = steps[0]
                for _ in range(TRIES):
                    if request.code:
                        return False, "stopped"
                    code, said = step(job, kind, words, gpu)
                    if code in (0, USERS_MISTAKE):
                        break
                if code:
                    return False, "stopped" if request.code else f"{kind} failed: {said}"
                if sweeps.left(job, sweep.kinds) == steps:
                    return False, f"{kind} ended well and left no record: {said}"
            return True, said
        finally:
            slots.append(gpu)

    def step(job: sweeps.Job, kind: str, words: list[str], gpu: str | None) -> tuple[int, str]:
        """One script, to its end: (exit code, its last line). What it says is kept in runs/logs/."""
        log = Path(job.config.runs) / "logs" / f"{job.config.system}-s{job.config.seed}-{job.config.hash()}-{kind}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:  # a second try leaves what the first said
            # a group of its own: Ctrl-C is for us, and we pass it on
            command = [sys.executable, str(ROOT / SCRIPTS[kind]), job.system, *words]
            env = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
            running.add(child)
            code = child.wait()
            running.discard(child)
        return code, (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"])[-1]

    began, told = time.monotonic(), set[subprocess.Popen]()
    with signals.listen() as request, ThreadPoolExecutor(workers) as pool:
        pending = {pool.submit(work, job): job for job in waiting}
        while pending:
            ended, _ = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
            for future in ended:
                job, (done, said) = pending.pop(future), future.result()
                if not done:
                    failed[job.name] = said
                minutes = (time.monotonic() - began) / 60 / (len(waiting) - len(pending)) * len(pending)
                print(f"{job.name}: {figures(said) if done else said}; {len(pending)} left, about {minutes:.0f} min")
            for child in running - told if request.code else ():
                child.terminate()
                told.add(child)

    # ---- end -------------------------------------------------------------------------------------------------------
    if request.code:
        print("stopped; the same command goes on")
    roots = ", ".join(sorted({job.config.runs for job in planned}))
    print(f"{len(planned) - len(failed)} of {len(planned)} runs are done; make report shows them ({roots})")
    print(json.dumps({"runs": len(planned), "failed": failed}, ensure_ascii=False))
    sys.exit(request.code or bool(failed))


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


def visible_gpus() -> list[str]:
    """The values of CUDA_VISIBLE_DEVICES, one per GPU."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip() not in ("", "-1")]
    try:
        pynvml.nvmlInit()
        return [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def figures(line: str) -> str:
    """EM and F1, where a script's last line is a result that has them."""
    result = json.loads(line) if line.startswith("{") else {}
    return f"EM {result['em']:.2f} F1 {result['f1']:.2f}" if result.get("em") is not None else "done"


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
