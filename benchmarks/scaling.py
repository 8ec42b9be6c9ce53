"""What several processes gain, a GPU each: train_loop.py and eval_loop.py by one of them, by two, …

    python -m benchmarks.scaling [MODEL] [key=value ...] [--processes 1 2 4] [--questions 64 256] [--parts 16]

Every figure comes from fresh processes, one run after the other, so that a run has the host to itself; a first one lets
all GPUs compile and load their kernels. Of a training the first step is left out, of an evaluation loading. Efficiency
is a rate by that of the fewest processes, over how many times as many there are. What comes out is compared too: how
far a training's losses are from those of the fewest at most, and how many answers are others. Rounds are interleaved;
the table has their medians, the last line is one JSON object.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NotRequired, TypedDict

from benchmarks.records import markdown
from common.config import load
from common.device import describe_device, pick_device
from common.errors import UserError, one_line_errors
from common.files import ROOT
from common.parser import Parser
from common.runs import preflight, record

import torch

COLUMNS = ("", "processes", "questions/s", "efficiency", "idle", "differs from the first by")


class Result(TypedDict):
    """A script's last line, as far as it is read here."""

    run: str  # folder
    questions_per_s: float
    idle_share: float  # of a training


class Run(TypedDict):
    questions_per_s: float
    idle_share: NotRequired[float]  # these two of a training
    losses: NotRequired[list[float]]  # by step
    answers: NotRequired[dict[str, str]]  # of an evaluation, by question


class Row(TypedDict):
    """Medians of the runs of one kind with so many processes."""

    work: str
    processes: int
    questions_per_s: float
    efficiency: float
    idle_share: NotRequired[float]  # these two of a training
    losses_differ: NotRequired[float]  # share of a loss, the largest
    answers_differ: NotRequired[int]  # these two of an evaluation
    answers: NotRequired[int]


def main(argv: list[str]) -> None:
    args = parse(argv)
    config = load(args.model, args.overrides)
    if config.lora is None or config.adapter:
        raise UserError("scaling trains an adapter and answers with it: a MODEL with a lora section, and no adapter")
    preflight.check(config)
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        rows = measured(args, Path(folder))
    print(f"\n{config.title} on {describe_device(pick_device())['name']}, medians of {args.rounds}")
    print(markdown(COLUMNS, map(cells, rows)))
    print(json.dumps({"model": config.title, "overrides": args.overrides, "rows": rows}))


def parse(argv: list[str]) -> argparse.Namespace:
    gpus = torch.cuda.device_count()
    p = Parser(__doc__.partition("\n")[0])
    p.add_argument(
        "model", nargs="?", default="qlora7b" if gpus else "smollm2-qlora", help="a name in configs/, a YAML"
    )
    p.add_argument("overrides", nargs="*", metavar="key=value")
    known = [n for n in (1, 2, 4, 8) if n <= (gpus or 2)]
    p.add_argument("--processes", nargs="+", type=int, default=known, help="default: %(default)s")
    p.add_argument(
        "--questions", nargs="*", type=int, default=[64, 256], help="of a training's step; none: no training"
    )
    p.add_argument("--steps", type=int, default=100, help="of a training")
    p.add_argument("--dev", type=int, default=0, help="questions that an evaluation answers; 0: all")
    p.add_argument("--parts", nargs="*", type=int, default=[16], help="eval.parts to evaluate with, beside null")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--out", type=Path, help="keep the rows here after every run")
    args = p.parse_intermixed_args(argv)
    if "=" in args.model:
        args.model, args.overrides = p.get_default("model"), [args.model, *args.overrides]
    if min(args.rounds, *args.processes, *args.questions, *args.parts) < 1 or args.steps < 2:
        raise UserError("--rounds, --processes, --questions and --parts must be 1 or more, --steps 2")
    args.processes = sorted(set(args.processes))
    return args


def measured(args: argparse.Namespace, folder: Path) -> list[Row]:
    """The rows of the table, by what was done and by how many processes."""
    few, most, step = args.processes[0], args.processes[-1], args.questions or [64]
    trained = train(args, folder / "first", most, step[0], steps=2)
    for questions in step[1:]:
        train(args, folder / "first", most, questions, steps=2)
    adapter = f"adapter={trained['run']}/best"
    answer(args, folder / "first", most, adapter, None, questions=100 * most)

    found: dict[tuple[str, int], list[Run]] = {}
    rows: list[Row] = []

    def add(work: str, n: int, run: Run) -> None:
        found.setdefault((work, n), []).append(run)
        shutil.rmtree(folder / "runs")  # adapters and their optimizers' states are large
        done = [(w, k) for w in dict.fromkeys(w for w, _ in found) for k in args.processes if (w, k) in found]
        rows[:] = [row(w, k, found[w, k], found[w, few], few) for w, k in done]
        if args.out:
            args.out.write_text(json.dumps(rows) + "\n")

    for _ in range(args.rounds):
        for n in args.processes:
            for questions in args.questions:
                result = train(args, folder / "runs", n, questions, args.steps)
                add(f"training, {questions} questions a step", n, of_training(result))
            for parts in (None, *args.parts):
                result = answer(args, folder / "runs", n, adapter, parts, args.dev)
                add(f"evaluation{f', eval.parts={parts}' if parts else ''}", n, of_evaluation(result))
    return rows


def train(args: argparse.Namespace, runs: Path, n: int, questions: int, steps: int) -> Result:
    size = (f"train.questions_per_step={questions}", f"train.max_steps={steps}", f"train.eval_every={steps}")
    return ended(n, "train_loop.py", args.model, *args.overrides, *size, "early_stop.questions=1", f"runs={runs}")


def answer(args: argparse.Namespace, runs: Path, n: int, adapter: str, parts: int | None, questions: int) -> Result:
    more = [adapter, f"eval.parts={json.dumps(parts)}", *([f"data.dev_questions={questions}"] if questions else [])]
    return ended(n, "eval_loop.py", args.model, *args.overrides, *more, f"runs={runs}")


def ended(n: int, script: str, *words: str) -> Result:
    """The JSON object of the script's last line. Raises `UserError` with its last error line where it failed."""
    command = [sys.executable, *(["-m", "common.runs.launch", str(n)] if n > 1 else []), script, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.startswith("error: ")]
        raise UserError(f"{' '.join(command)}: {(said or done.stderr.strip().splitlines() or ['ended'])[-1]}")
    result: Result = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{script} by {n}: {result['questions_per_s']} questions/s in all", file=sys.stderr)
    return result


def of_training(result: Result) -> Run:
    """Rate of the steps after the first, idle share, losses by step."""
    steps = [row for row in record.read_metrics(Path(result["run"])) if "loss" in row]
    questions, seconds = sum(s["questions"] for s in steps[1:]), steps[-1]["seconds"] - steps[0]["seconds"]
    return {
        "questions_per_s": questions / seconds,
        "idle_share": result["idle_share"],
        "losses": [s["loss"] for s in steps],
    }


def of_evaluation(result: Result) -> Run:
    answers = json.loads((Path(result["run"]) / "predictions.json").read_text())
    return {"questions_per_s": result["questions_per_s"], "answers": answers}


def row(work: str, n: int, runs: list[Run], few: list[Run], fewest: int) -> Row:
    """Medians of the runs of `n` processes; `few`: those of the fewest, with the first of which all are compared."""
    rate, least = (statistics.median(run["questions_per_s"] for run in those) for those in (runs, few))
    out: Row = {"work": work, "processes": n, "questions_per_s": rate, "efficiency": rate * fewest / (least * n)}
    first = few[0]
    if "losses" in first:
        off = [abs(a - b) / a for run in runs for a, b in zip(first["losses"], run["losses"], strict=True)]
        out["idle_share"] = statistics.median(run["idle_share"] for run in runs)
        out["losses_differ"] = max(off)
    else:
        answers = first["answers"]
        out["answers_differ"] = max(sum(run["answers"][id_] != a for id_, a in answers.items()) for run in runs)
        out["answers"] = len(answers)
    return out


def cells(r: Row) -> list[str]:
    training = "losses_differ" in r
    return [
        r["work"],
        str(r["processes"]),
        f"{r['questions_per_s']:.4g}",
        f"{r['efficiency']:.1%}",
        f"{r['idle_share']:.1%}" if training else "",
        f"{r['losses_differ']:.2%} of a loss" if training else f"{r['answers_differ']} of {r['answers']:,} answers",
    ]


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
