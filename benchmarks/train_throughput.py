"""Training throughput side by side: train_loop.py, a plain Hugging Face loop, TRL and Unsloth on the same questions.

    python -m benchmarks.train_throughput [MODEL] [key=value ...] [--systems ours rows hf trl unsloth]
        [--cards 8 12 16 24 | --budgets 8 24]

Every figure comes from a fresh process. `ours` is train_loop.py itself, read off its metrics.jsonl; the others are
benchmarks/peers.py. All train on the questions of the same optimizer steps, with the same token ids, base, LoRA shape,
compute dtype and optimizer class. On a GPU each has a memory budget in GiB: ours gets it as train.memory_budget_gib, of
its whole process; of a peer the fastest batch size that allocates no more is taken, found in the first round; whether
peers recompute activations is train.gradient_checkpointing. With --cards another process takes what a card of so many
GB would not have, and each stack has what is left: ours by train.memory_budget_gib=auto. `rows` is train_loop.py with
train.share_prefixes=false: what sharing alone is worth.
Warm-up steps are left out, with --whole-process nothing is. Rounds are interleaved; the table has their medians, the
last line is one JSON object. Without MODEL: qlora7b at 8 and 24 GiB on a GPU, and on a CPU SmolLM2 against the plain
loop alone, by wall time of whole processes.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, TypedDict

from benchmarks.card import FREE, card
from benchmarks.child import last_line
from benchmarks.records import Figures, PeerResult, TrainJob, markdown
from common.config import Config, load
from common.data import cache, plan, squad
from common.errors import UserError, one_line_errors
from common.files import ROOT
from common.model.estimate import QUESTIONS
from common.model.load import load_tokenizers
from common.parser import Parser
from common.runs import preflight

import torch
from transformers import AutoConfig

CPU_DEFAULT = [
    "train.questions_per_step=32", "train.epochs=1", "train.average=0", "train.label_smoothing=0",
    "prompt.order=context", "--systems", "ours", "hf", "--rounds", "5", "--steps", "7", "--warmup", "1",
    "--questions", "200", "--whole-process",
]  # fmt: skip
GIB = 2**30
NO_BUDGET = 1e6  # GiB
SYSTEMS = {
    "ours": "train_loop.py", "rows": "train_loop.py, no sharing", "hf": "Hugging Face loop", "trl": "TRL SFTTrainer",
    "unsloth": "Unsloth",
}  # fmt: skip
COLUMNS = (
    "system", "budget", "batch", "questions/s", "ours is", "tokens/s", "epoch", "allocated", "reserved", "TFLOP/s",
    "of ceiling",
)  # fmt: skip
Speed = Literal["questions_per_s", "whole_questions_per_s"]


class Run(TypedDict, total=False):
    """What one process measures at a budget. Of one that fails: system, budget, batch, `failed`."""

    round: int
    system: str
    budget: float | None  # GiB; None: a peer that failed at all budgets
    batch: int | None
    failed: str
    questions_per_s: float
    whole_questions_per_s: float  # of the whole process
    tokens_per_s: float
    seconds: float
    allocated_gib: float
    reserved_gib: float
    recomputed: float  # share of the forward pass that the backward pass computes again
    questions: int  # from here to `searched`: of peers
    steps: int
    versions: dict[str, str]
    searched: list[Figures]
    first_step_s: float  # from here: of ours
    pack_tokens: int
    kept_layers: float
    counted_bytes: dict[str, int] | None


class Row(Run, total=False):
    """The run of median speed, with medians of what is measured."""

    rounds: list[float]  # the speed of each run
    tflops: float
    of_ceiling: float
    epoch_minutes: float
    ours_is: float | None


def main(argv: list[str]) -> None:
    gpu = torch.cuda.is_available()
    args = parse(argv, gpu)
    config = load(args.model, args.overrides)
    if config.lora is None:
        raise UserError(f"{config.system} has no lora section, so there is nothing to train; try MODEL=qlora7b")
    if min(args.rounds, args.steps, args.warmup, args.questions) < 1:
        raise UserError("--rounds, --steps, --warmup and --questions must be 1 or more")
    base, same = config.base, ("nf4", True, "auto", 0)
    if (base.quant, base.double_quant, base.dtype, config.lora.dropout) != same:
        raise UserError("the stacks are compared with base.quant=nf4, double quantisation, base.dtype=auto, no dropout")
    preflight.check(config)

    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        work = Path(folder)
        job = job_of(config, args, work)
        ceiling: PeerResult = last_line("peers", "matmul", job, work)
        if "failed" in ceiling:
            raise UserError(f"matrix products: {ceiling['failed']}")
        configured = config.train.memory_budget_gib
        asked_for = args.budgets or [configured if isinstance(configured, float) else NO_BUDGET]
        job["budgets"] = [FREE[size] for size in args.cards] or (asked_for if gpu else [NO_BUDGET])
        batches = args.batches or ([8, 16, 24, 32, 64, 128] if gpu else [8])
        if args.whole_process and len(batches) > 1:
            raise UserError("--whole-process: name one of --batches, for a search would count")
        if config.base.random_weights and set(args.systems) - {"ours", "rows"}:
            written = last_line("peers", "base", {"base": config.to_dict()["base"], "model": job["model"]}, work)
            if "failed" in written:
                raise UserError(f"{config.base.path}: {written['failed']}")
        asked = {"config": config.hash(), "budgets": job["budgets"], "batches": batches, "steps": args.steps}
        asked |= {"cards": args.cards} if args.cards else {}
        runs: list[Run] = []
        if args.out and args.out.exists():
            header, *lines = args.out.read_text().splitlines()
            runs = [json.loads(line) for line in lines]
            if json.loads(header) != asked:
                raise UserError(f"{args.out} holds figures of something else: {header}")
        elif args.out:
            args.out.write_text(json.dumps(asked) + "\n")
        for number in range(args.rounds):
            for system in args.systems:
                for budgets in [[FREE[size]] for size in args.cards] or [job["budgets"]]:
                    mine = [r for r in runs if r["system"] == system and r["budget"] in (*budgets, None)]
                    if any(r["round"] == number for r in mine):
                        continue
                    known = {str(r["budget"]): r["batch"] for r in mine if r["batch"]}
                    job["timed"] = known if len(batches) > 1 else {str(budget): batches[0] for budget in budgets}
                    job["search"] = [] if job["timed"] else batches
                    with card(budgets[0]) if args.cards else contextlib.nullcontext():
                        found = one(system, {**job, "budgets": budgets}, args, work)
                    new: list[Run] = [{"round": number, **run} for run in found]
                    for run in new if args.cards else ():
                        run["budget"] = budgets[0]  # of a failure too
                    runs += new
                    if args.out:
                        with args.out.open("a") as file:
                            file.writelines(json.dumps(run) + "\n" for run in new)

    # ---- medians and table -----------------------------------------------------------------------------------------
    speed: Speed = "whole_questions_per_s" if args.whole_process else "questions_per_s"
    rows: list[Row] = []
    for system in args.systems:
        for budget in job["budgets"]:
            here = [run for run in runs if run["system"] == system and run["budget"] in (budget, None)]
            mine = [run for run in here if "failed" not in run]
            if not mine:
                why = here[0]["failed"] if here else f"no batch size keeps to {budget:g} GiB"
                rows.append({"system": system, "budget": budget, "failed": why})
                continue
            middle = sorted(mine, key=lambda run: run[speed])[len(mine) // 2]
            tokens_per_s = statistics.median(run["tokens_per_s"] for run in mine)
            tflops = tokens_per_s * flops_per_token(config.base.path, middle["recomputed"]) / 1e12
            rows.append(
                {
                    **middle,
                    "questions_per_s": statistics.median(run["questions_per_s"] for run in mine),
                    "whole_questions_per_s": statistics.median(run["whole_questions_per_s"] for run in mine),
                    "tokens_per_s": tokens_per_s,
                    "allocated_gib": statistics.median(run["allocated_gib"] for run in mine),
                    "reserved_gib": statistics.median(run["reserved_gib"] for run in mine),
                    "rounds": [run[speed] for run in mine],
                    "tflops": tflops,
                    "of_ceiling": tflops / ceiling["tflops"],
                    "epoch_minutes": QUESTIONS / statistics.median(run[speed] for run in mine) / 60,
                }
            )
    for row in rows:
        ours = next((r for r in rows if r["system"] == "ours" and r["budget"] == row["budget"]), Row())
        row["ours_is"] = ours[speed] / row[speed] if speed in ours and speed in row else None
    print(f"\n{config.title} on {ceiling['device']}; matrix products reach {ceiling['tflops']:.3g} TFLOP/s")
    print(markdown(COLUMNS, (cells(row, speed) for row in rows)))
    result = {
        "model": config.title,
        "overrides": args.overrides,
        "device": ceiling["device"],
        "versions": ceiling["versions"],
        "matmul_tflops": ceiling["tflops"],
        "compared": speed,
        "rows": rows,
    }
    print(json.dumps(result))


def parse(argv: list[str], gpu: bool) -> argparse.Namespace:
    """Arguments, with a model and a size that suit the machine where no model is named."""
    args = parser().parse_intermixed_args(argv)
    if args.model is None or "=" in args.model:
        args = parser().parse_intermixed_args([*(["qlora7b"] if gpu else ["smollm2-qlora", *CPU_DEFAULT]), *argv])
        args.budgets = args.budgets or ([8.0, 24.0] if gpu else None)
    if args.cards and not gpu:
        raise UserError("--cards: no CUDA device, and a card is imitated on a larger GPU")
    if args.cards and "--budgets" in argv:
        raise UserError("--cards: a card's memory is the budget; leave --budgets out")
    for size in (asked := tuple(args.cards)):
        if FREE[size] * GIB > (free := torch.cuda.mem_get_info()[0]):
            print(f"left out: a card of {size} GB, for this GPU has {free / GIB:.1f} GiB free", file=sys.stderr)
            args.cards.remove(size)
    if asked and not args.cards:
        raise UserError("--cards: none of them is smaller than this GPU")
    return args


def parser() -> Parser:
    p = Parser(__doc__.partition("\n")[0])
    p.add_argument("model", nargs="?", help="a name in configs/, or a YAML file")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    p.add_argument("--cards", nargs="+", type=int, choices=list(FREE), default=[], help="GB of cards to imitate")
    p.add_argument("--budgets", nargs="+", type=float, help="GiB on a GPU; without: as configured")
    p.add_argument("--batches", nargs="+", type=int, help="rows a step that peers try")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=20, help="timed optimizer steps of ours")
    p.add_argument("--warmup", type=int, default=5, help="optimizer steps before")
    p.add_argument("--questions", type=int, default=384, help="timed questions of a peer, about")
    p.add_argument("--out", type=Path, help="keep every figure here as it comes, and go on from what is there")
    p.add_argument("--whole-process", action="store_true", help="compare questions per second of wall time")
    return p


def job_of(config: Config, args: argparse.Namespace, work: Path) -> TrainJob:
    """The job of every peer: the questions of our first steps as rows, the base, the LoRA shape."""
    assert config.lora
    train_set = squad.load(config.data, "train")
    built = cache.build_trees(train_set, load_tokenizers(config), config.window, config.prompt, train=True)
    per_step = config.train.questions_per_step
    trees = plan.bounded(built.trees, per_step)
    steps = plan.epoch(trees, config.seed, 0, per_step)[: args.warmup + args.steps]
    if len(steps) < args.warmup + args.steps:
        raise UserError(f"{len(steps)} steps are in this data, not {args.warmup + args.steps}: lower --steps")
    rows = [
        (tree.prefix_ids + branch.prompt_ids + branch.answer_ids, len(tree.prefix_ids + branch.prompt_ids))
        for members in steps
        for tree in members
        for branch in tree.branches
    ]
    model = config.base.path
    if config.base.random_weights:
        model = str(work / "base")
    elif Path(model).is_dir():
        model = str(Path(model).resolve())
    return {
        "model": model,
        "rows": rows,
        "questions": args.questions,
        "seed": config.seed,
        "lr": config.train.lr,
        "weight_decay": config.train.weight_decay,
        "max_grad_norm": config.train.max_grad_norm,
        "window": config.window.tokens,
        "checkpointing": config.train.gradient_checkpointing,
        "work": str(work / "out"),
        "lora": {
            "r": config.lora.rank,
            "lora_alpha": config.lora.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": list(config.lora.targets),
        },
    }


def one(system: str, job: TrainJob, args: argparse.Namespace, work: Path) -> list[Run]:
    """One round of a system: a figure for each budget, or why there is none."""
    if system in ("ours", "rows"):
        return [ours(system, budget, args, work) for budget in job["budgets"]]
    began = time.perf_counter()
    answer: PeerResult = last_line("peers", system, job, work)
    wall = time.perf_counter() - began
    if "failed" in answer:
        print(f"{SYSTEMS[system]}: {answer['failed']}", file=sys.stderr)
        return [{"system": system, "failed": answer["failed"], "budget": None, "batch": None}]
    for figures in answer["searched"]:
        print(
            f"{SYSTEMS[system]}, batch {figures['batch']}: {figures['questions_per_s']:.1f} questions/s, "
            f"{figures['allocated_gib']:.2f} GiB",
            file=sys.stderr,
        )
    recomputed = 1.0 if job["checkpointing"] else 0.0
    return [
        {
            "system": system,
            "budget": float(budget),
            "recomputed": recomputed,
            "versions": answer["versions"],
            "searched": answer["searched"],
            "whole_questions_per_s": figures["questions"] / wall,
            **figures,
        }
        for budget, figures in answer["timed"].items()
    ]


def ours(system: str, budget: float, args: argparse.Namespace, work: Path) -> Run:
    """The figures of train_loop.py's own metrics, from a run of so many steps."""
    runs = tempfile.mkdtemp(prefix="ours-", dir=work)
    total = args.warmup + args.steps
    command = [
        sys.executable,
        str(ROOT / "train_loop.py"),
        args.model,
        *args.overrides,
        f"train.max_steps={total}",
        f"train.eval_every={total}",
        "early_stop.questions=1",
        f"runs={runs}",
    ]
    command += [f"train.memory_budget_gib={budget:g}"] if budget < NO_BUDGET and not args.cards else []
    command += ["train.share_prefixes=false"] if system == "rows" else []
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall = time.perf_counter() - began
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        print(f"{' '.join(command)}\n{said}", file=sys.stderr)
        return {"system": system, "budget": budget, "batch": None, "failed": said}
    result = json.loads(done.stdout.strip().splitlines()[-1])
    lines = (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "loss" in row]
    timed = steps[args.warmup :]
    seconds = timed[-1]["seconds"] - steps[args.warmup - 1]["seconds"]
    questions = sum(row["questions"] for row in timed)
    print(
        f"{SYSTEMS[system]}: {questions / seconds:.1f} questions/s; first step after "
        f"{result['start_seconds'] + steps[0]['seconds']:.1f} s",
        file=sys.stderr,
    )
    return {
        "system": system,
        "budget": budget,
        "batch": round(questions / len(timed)),
        "seconds": seconds,
        "questions_per_s": questions / seconds,
        "tokens_per_s": sum(row["tokens"] for row in timed) / seconds,
        "whole_questions_per_s": sum(row["questions"] for row in steps) / wall,
        "first_step_s": result["start_seconds"] + steps[0]["seconds"],
        "allocated_gib": (result["peak"]["allocated_bytes"] or 0) / GIB,
        "reserved_gib": (result["peak"]["reserved_bytes"] or 0) / GIB,
        "pack_tokens": result["pack_tokens"],
        "kept_layers": result["kept_layers"],
        "counted_bytes": result["counted_bytes"],
        "recomputed": result["recomputed"],
    }


def flops_per_token(base: str, recomputed: float) -> float:
    """FLOPs per token of the layers' matrix products: forward, backward to the input, and what is computed again.

    Attention, the adapter, the head and what is between products are left out, for all alike.
    """
    c = AutoConfig.from_pretrained(base)
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    heads = c.num_attention_heads + c.num_key_value_heads
    weights = c.num_hidden_layers * c.hidden_size * (2 * heads * width + 3 * c.intermediate_size)
    return 2 * weights * (2 + recomputed)


def cells(r: Row, speed: Speed) -> list[str]:
    budget = r["budget"]
    shown = f"{budget:g} GiB" if budget is not None and budget < NO_BUDGET else "–"
    if "failed" in r:
        return [SYSTEMS[r["system"]], shown, r["failed"], *[""] * (len(COLUMNS) - 3)]
    return [
        SYSTEMS[r["system"]],
        shown,
        str(r["batch"]),
        f"{r[speed]:.4g}",
        f"{r['ours_is']:.2f} ×" if r["ours_is"] else "–",
        f"{r['tokens_per_s']:,.0f}",
        f"{r['epoch_minutes']:.1f} min",
        f"{r['allocated_gib']:.2f} GiB",
        f"{r['reserved_gib']:.2f} GiB",
        f"{r['tflops']:.3g}",
        f"{r['of_ceiling']:.0%}",
    ]


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
