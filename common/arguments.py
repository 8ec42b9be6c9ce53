"""The command lines of the scripts that take MODEL and `key=value` overrides. Imports no torch."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from common.config import Config, Decode, load
from common.config_file import given_keys
from common.parser import Parser

KEPT_MAP = "the one that is kept; default: features of answers that were searched for (decode.nbest), else platt"
SCRIPTS = {
    "train_loop": "Train one system's LoRA adapter on SQuAD, stop early on exact match, keep `best/` and `last/`.",
    "eval_loop": "Official EM and F1 of one system, by greedy decoding with the one prompt and window.",
    "bench_latency": "Latency and memory of single queries, one at a time, end to end. The method: docs/latency.md.",
    "ask": "One question about one context, answered by any system.",
    "calibrate": "How sure a system's answers are: scores, maps to probabilities, and the map that is kept.",
    "export": "Merge an adapter into its base as a folder that any tool loads, and check that it answers as well.",
}


def parse(script: str, argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """(the system's configuration, the script's own flags and the keys `given`).

    Raises `UserError` for what is wrong with either.
    """
    args = parser(script).parse_intermixed_args(argv)
    config = load(args.model, args.overrides)
    args.given = given_keys(args.overrides)
    if script in ("train_loop", "export") and config.decode != Decode():
        print("note: decode is of evaluations, timings and questions; answers are decoded freely here", file=sys.stderr)
        config = replace(config, decode=Decode()) if script == "export" else config
    return config, args


def parser(script: str) -> Parser:
    """The parser of one of `SCRIPTS`."""
    out = Parser(SCRIPTS[script], script)
    out.add_argument("model", help="a name in configs/, a YAML file, a folder or a hub id")
    if script == "export":
        out.add_argument("folder", type=Path, help="where the merged model goes; must not exist")
        out.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the stored weights")
        out.add_argument("--questions", type=int, default=500, help="of dev, answered before and after")
    out.add_argument("overrides", nargs="*", metavar="key=value")
    if script in ("train_loop", "eval_loop"):
        out.add_argument("--fresh", action="store_true", help="start a new run instead of resuming one")
    if script != "train_loop":
        out.add_argument("--force", action="store_true", help="ask an adapter otherwise than it was trained")
    if script == "eval_loop":
        out.add_argument("--replay", metavar="RUN", type=Path, help="take the answers from this run's transcript")
    if script == "calibrate":
        out.add_argument("--way", choices=("dev", "heldout"), default="dev", help="what maps are fitted to")
        out.add_argument("--map", choices=("temperature", "platt", "isotonic", "features"), help=KEPT_MAP)
        out.add_argument("--score", choices=("logprob", "share"), help="that maps read; default: share after a search")
        out.add_argument("--evaluation", metavar="RUN", type=Path, help="default: the newest of the adapter, so asked")
        out.add_argument("--fit", metavar="RUN", type=Path, help="with --way heldout: the evaluation to fit to")
        out.add_argument("--other", metavar="RUN", type=Path, help="the same questions asked by another prompt")
        out.add_argument("--on", metavar="RUN", type=Path, nargs="+", default=[], help="evaluations of other questions")
    if script == "bench_latency":
        out.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # one of its processes: writes there
    if script == "ask":
        out.add_argument("--context", help="default: the environment's CONTEXT, else stdin")
        out.add_argument(
            "--context-file", metavar="FILE", help="or a file that holds it; the environment's CONTEXT_FILE"
        )
        out.add_argument("--question", help="default: the environment's QUESTION, else stdin's lines, or its last one")
        out.add_argument("--questions", metavar="FILE", help="or a file with one a line; the environment's QUESTIONS")
    return out
