"""How fast SQuAD is answered: ours beside Hugging Face's `generate`, Unsloth's inference and vLLM.

    python -m benchmarks.decode_throughput [MODEL] [key=value ...] [--scripts natural | a b c] [--out FILE]

Each stack runs in a fresh process, one after the other, with the same base and adapter. Ours answers the whole dev set
in a stream, freely and as spans (`decode.spans`) by turns, and single questions one at a time, with and without their
paragraph in the cache; peers answer as many as takes them a while, at each of their batch sizes. Models with random
weights follow scripts, the same for all: (a) each question's gold answer and EOS, (b) 8 and (c) 32 fixed tokens. One
table, and one JSON object as the last line.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, final

from benchmarks.child import last_line
from benchmarks.records import DecodeJob, DecodeResult, DecodeRow, Question, markdown
from common.config import Config, Decode, load
from common.data import cache, squad
from common.decode.answers import gold_ids, stop_tokens, to_text
from common.device import describe_device, pick_device
from common.errors import UserError, one_line_errors
from common.metrics.score import score
from common.metrics.stats import mcnemar
from common.model.load import load_tokenizers
from common.parser import Parser
from common.runs import adapters, preflight

import torch

SYSTEMS = {"ours": "ours", "hf": "Hugging Face generate", "unsloth": "Unsloth", "vllm": "vLLM"}
WHAT = {"natural": "until they end", "a": "gold answer, EOS", "b": "8 tokens", "c": "32 tokens"}
COLUMNS = ("system", "answers", "batch", "questions/s", "ours is", "p50 ms", "p95 ms", "ours is", "allocated", "n")


@final
class Row(DecodeRow):
    system: str
    ours_is_questions_per_s: float | None  # our stream by this row
    ours_is_p95_ms: float | None  # this row by ours


@final
class Failure(TypedDict):
    system: str
    failed: str
    ours_is_questions_per_s: None
    ours_is_p95_ms: None


def main(argv: list[str]) -> None:
    gpu = torch.cuda.is_available()
    arguments = parser(gpu)
    args = arguments.parse_intermixed_args(argv)
    if "=" in args.model:
        args.model, args.overrides = arguments.get_default("model"), [args.model, *args.overrides]
    if not gpu and args.model == arguments.get_default("model"):
        args.overrides = ["prompt.order=context", *args.overrides]  # there is nothing to share in the others
    config = load(args.model, args.overrides)
    kinds = args.scripts or (["a", "b", "c"] if config.base.random_weights else ["natural"])
    if config.base.random_weights and "natural" in kinds:
        raise UserError("random weights never end an answer: --scripts a, b or c")
    if config.decode != Decode():
        raise UserError("decode: the stacks are compared as they decode freely")
    preflight.check(config)
    with tempfile.TemporaryDirectory(prefix="decode-") as folder:
        job, examples = job_of(config, args, kinds, Path(folder))
        if config.base.random_weights and set(args.systems) - {"ours"}:
            written = last_line("peers", "base", job, Path(folder))
            if "failed" in written:
                raise UserError(f"{config.base.path}: {written['failed']}")
        found: dict[str, DecodeResult] = {}
        for system in args.systems:
            found[system] = last_line("decode_peers", system, job, Path(folder))
            if args.out:  # as they come
                args.out.write_text(json.dumps(found) + "\n")

    # ---- table -----------------------------------------------------------------------------------------------------
    rows: list[Row | Failure] = []
    ours = {(r["kind"], r["batch"]): r for r in found.get("ours", DecodeResult()).get("rows", []) if "way" not in r}
    for system in args.systems:
        stack = found[system]
        if "failed" in stack:
            print(f"{SYSTEMS[system]}: {stack['failed']}", file=sys.stderr)
            rows.append(
                {"system": system, "failed": stack["failed"], "ours_is_questions_per_s": None, "ours_is_p95_ms": None}
            )
        for row in stack.get("rows", []):
            stream, alone = (ours.get((row["kind"], batch)) for batch in (None, 1))
            if system == "ours":  # its other ways beside itself, a stream with a stream
                stream, alone = (
                    x if x and "way" in row and x["batch"] == row["batch"] else None for x in (stream, alone)
                )
            rows.append(
                {
                    "system": system,
                    **row,
                    "ours_is_questions_per_s": stream["questions_per_s"] / row["questions_per_s"] if stream else None,
                    "ours_is_p95_ms": row["p95_ms"] / alone["p95_ms"] if alone and "p95_ms" in row else None,
                }
            )
    device = describe_device(pick_device())["name"]
    print(f"\n{config.title} on {device}: {len(job['questions'])} questions in a stream, {len(job['alone'])} alone")
    print(markdown(COLUMNS, map(cells, rows)))
    e = equal(examples, found, config)
    result = {
        "model": config.title,
        "overrides": args.overrides,
        "device": device,
        "rows": rows,
        "start": {s: f.get("start") for s, f in found.items()},
        "sizes": found.get("ours", {}).get("sizes"),
        "versions": next((f["versions"] for f in found.values() if "versions" in f), None),
        "equal": e,
    }
    if e:
        print(
            f"of {e['n']} answers {e['same']} (alone: {e['same_alone']}) have the token ids that `generate` gives at "
            f"batch 1; EM {e['em']:.2f} against {e['em_generate']:.2f} (McNemar p = {e['p']:.2g}); {e['ties']} of "
            "the stream's tokens were ties"
        )
    print(json.dumps(result))


def parser(gpu: bool) -> Parser:
    p = Parser(__doc__.partition("\n")[0])
    p.add_argument(
        "model", nargs="?", default="qlora7b" if gpu else "smollm2-raw", help="a name in configs/, or a YAML"
    )
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS) if gpu else ["ours", "hf"])
    p.add_argument("--scripts", nargs="+", choices=list(WHAT))
    p.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64] if gpu else [1], help="of peers")
    p.add_argument("--questions", type=int, default=0 if gpu else 200, help="of dev, for the stream; 0: all")
    p.add_argument("--alone", type=int, default=100 if gpu else 200, help="of these, asked one at a time")
    p.add_argument("--peers-alone", type=int, help="how many of these a peer is asked (default: all)")
    p.add_argument("--peers-batched", type=int, default=256, help="questions a peer is asked at a larger batch size")
    p.add_argument("--rounds", type=int, default=1, help="of our streams, freely and as spans by turns; their median")
    p.add_argument("--out", type=Path, help="keep every stack's figures here as they come")
    return p


def job_of(
    config: Config, args: argparse.Namespace, kinds: list[str], folder: Path
) -> tuple[DecodeJob, list[squad.Example]]:
    """The job of every stack, and the questions' examples."""
    chosen = adapters.choose(config)
    config = chosen.config  # asked as its adapter was trained
    tokenizers = load_tokenizers(config)
    tokenizer = tokenizers.own
    dev = squad.load(config.data, "dev")
    dev = replace(dev, examples=dev.examples[: args.questions or None])
    trees = cache.build_trees(dev, tokenizers, config.window, config.prompt, train=False).trees
    gold = {e.id: gold_ids(tokenizer, e.answers[0].text, config.window.answer) for e in dev.examples}
    questions: list[Question] = [
        {"id": b.id, "context": t.context, "prefix": t.prefix_ids, "prompt": b.prompt_ids, "gold": gold[b.id]}
        for t in trees
        for b in t.branches
    ]
    alone, batched = (
        random.Random(0).sample(questions, min(n, len(questions))) for n in (args.alone, args.peers_batched)
    )
    adapter = chosen.adapter
    sections = config.to_dict()
    return {
        "base": sections["base"],
        "model": str(folder / "base") if config.base.random_weights else config.base.path,
        "adapter": str(adapter.resolve()) if adapter else None,
        "lora": sections["lora"],
        "eval": sections["eval"],
        "window": max(len(q["prefix"] + q["prompt"]) for q in questions) + config.window.answer,
        "limit": config.window.answer,
        "stops": stop_tokens(tokenizer),
        "eos": tokenizer.eos_token_id,
        "kinds": kinds,
        "batches": args.batches,
        "counts": {str(b): (args.peers_alone or len(alone)) if b == 1 else args.peers_batched for b in args.batches},
        "rounds": args.rounds,
        "questions": questions,
        "alone": alone,
        "batched": batched,
    }, dev.examples


def equal(
    examples: Sequence[squad.Example], found: Mapping[str, DecodeResult], config: Config
) -> dict[str, float] | None:
    """Counts and EM of ours beside `generate` at batch 1, by question; None where answers mean nothing."""
    ours, theirs = (found[s].get("answers", {}) if s in found else {} for s in ("ours", "hf"))
    both = [e for e in examples if e.id in ours and e.id in theirs]
    if not both:
        return None
    tokenizer = load_tokenizers(config).own
    texts = [{e.id: to_text(tokenizer, side[e.id]) for e in both} for side in (ours, theirs)]
    scores = [score(both, side) for side in texts]
    alone = found["ours"]["answers_alone"]
    return {
        "n": len(both),
        "same": sum(ours[e.id] == theirs[e.id] for e in both),
        "same_alone": sum(alone[e.id] == theirs[e.id] for e in both),
        "ties": found["ours"]["ties"],
        "em": scores[0].em,
        "em_generate": scores[1].em,
        "p": mcnemar(scores[0].correct, scores[1].correct)[2],
    }


def cells(r: Row | Failure) -> list[str]:
    if "failed" in r:
        return [SYSTEMS[r["system"]], r["failed"], *[""] * (len(COLUMNS) - 2)]
    speed, latency = r["ours_is_questions_per_s"], r["ours_is_p95_ms"]
    return [
        ", ".join(filter(None, (SYSTEMS[r["system"]], r.get("way")))),
        WHAT[r["kind"]],
        str(r["batch"] or "stream"),
        f"{r['questions_per_s']:.4g}",
        f"{speed:.1f} ×" if speed else "",
        f"{r['p50_ms']:.1f}" if "p50_ms" in r else "",
        f"{r['p95_ms']:.1f}" if "p95_ms" in r else "",
        f"{latency:.1f} ×" if latency else "",
        f"{r['allocated_gib']:.2f} GiB" if r["allocated_gib"] else "–",
        str(r["questions"]),
    ]


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
