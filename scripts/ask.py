"""One question about one context, answered by any system.

    python -m scripts.ask smollm2-qlora [key=value ...] --context TEXT --question TEXT
    python -m scripts.ask newest runs=runs/demo …        (the newest training there)
    printf 'A paragraph.\nWhat is asked?\n' | python -m scripts.ask smollm2-qlora

What is not given is taken from the environment's CONTEXT and QUESTION, and else from stdin: the context, or the
question, or both, the question being the last line that is not empty.
"""

import json
import math
import os
import sys
import tempfile
from pathlib import Path

from common.arguments import parse
from common.config import Config
from common.data import prompt
from common.data.squad import Example
from common.data.trees import prompt_texts
from common.decode import hosted, single
from common.decode.answers import stop_tokens
from common.device import describe_device, out_of_memory, pick_device
from common.errors import UserError, one_line_errors
from common.model.load import load_system, load_tokenizers
from common.runs import adapters, checkpoint, gauges, preflight
from common.runs.results import Section


def main(argv: list[str]) -> None:
    config, args = parse("ask", adapters.newest_system(argv))
    typed = {"CONTEXT": args.context, "QUESTION": args.question}
    texts = (os.environ.get(name, "") if text is None else text for name, text in typed.items())
    context, question = given_texts(*map(str.strip, texts))
    chosen = adapters.choose(config, args.given, args.force)
    config = preflight.check(chosen.config)
    if config.prompt.earlier:
        raise UserError("prompt.earlier: a single question has no earlier ones; it is of make eval")
    result = ask_api(config, context, question) if config.api else ask_here(config, chosen, context, question)
    text = result["answer"]
    if not (span := result.get("span")):  # the engine decodes freely
        span = (at, at + len(text)) if text and (at := context.find(text)) >= 0 else None
    result["span"] = span
    where = f"characters {span[0]} to {span[1]} of the context" if span else "not a span of the context"
    print(text or "(nothing)")
    if result["context_cut"]:
        print(f"only the context's first {config.window.context} tokens were read; window.overflow=chunk reads all")
    sure = f"; confidence {result['confidence']:.0%}" if result["confidence"] is not None else ""
    print(f"{where}{sure}; {result['milliseconds']:.0f} ms, {config.title} on {result['on']}")
    print(json.dumps(result, ensure_ascii=False))


def ask_here(config: Config, chosen: adapters.Chosen, context: str, question: str) -> Section:
    adapter = checkpoint.verified(chosen.adapter)
    chosen.note()
    device = pick_device()
    tokenizers = load_tokenizers(config)
    model = load_system(config, adapter, device, bool(chosen.forced))
    with out_of_memory("a single query does not fit: lower window.context, or base.quant=nf4"):
        stops = stop_tokens(tokenizers.own, model, config.decode)
        around = prompt.overhead(tokenizers.own, config.prompt)
        engine = single.engine(model, stops, config.window, config.eval, around, config.decode)
        example = Example("asked", "", context, question, ())
        single.ask(engine, tokenizers, example, config)  # compiles, loads kernels
        began = gauges.now(device)
        answer, found, cut = single.ask(engine, tokenizers, example, config)
        seconds = gauges.now(device) - began
    best = found[0]
    result = {"system": config.system, "random_weights": config.base.random_weights}
    result |= {"answer": answer.text, "span": answer.span}
    result |= {"confidence": math.exp(best.logprob), "tokens": len(best.token_ids), "windows": len(found)}
    result |= {"passes": sum(a.passes for a in found), "ended_by_itself": best.token_ids[-1] in stops}
    result |= {"context_cut": cut and config.window.overflow == "truncate", "milliseconds": 1000 * seconds}
    return result | {"on": describe_device(device)["name"]}


def ask_api(config: Config, context: str, question: str) -> Section:
    assert config.api
    tokenizers = load_tokenizers(config)
    example = Example("asked", "", context, question, ())
    ((_, text),), counts = prompt_texts([example], tokenizers.window, config.window, config.prompt)
    with tempfile.TemporaryDirectory() as folder:
        client = hosted.Client(config, Path(folder) / "transcript.jsonl", count=hosted.counter(tokenizers.window))
        reply = client.ask(text)
        client.close()
    for note in hosted.notes(client, {example.id: text}, {example.id: reply}):
        print(note)
    result = {"system": config.system, "random_weights": False, "answer": reply.text, "confidence": None}
    result |= {"tokens": reply.written, "windows": 1, "ended_by_itself": not reply.hit_limit}
    return result | {"context_cut": bool(counts["truncated"]), "milliseconds": 1000 * reply.total, "on": config.api.url}


def given_texts(context: str, question: str) -> tuple[str, str]:
    """(context, question), what is missing taken from stdin."""
    if not context or not question:
        if sys.stdin.isatty():
            print("context, then the question on the last line; end with Ctrl-D:", file=sys.stderr)
        try:
            given = sys.stdin.read().strip()
        except UnicodeDecodeError as error:
            raise UserError("stdin must be UTF-8 text") from error
        if context or question:
            context, question = context or given, question or given
        else:
            context, _, question = (part.strip() for part in given.rpartition("\n"))
    if not context or not question:
        how = "CONTEXT='…' QUESTION='…' (--context, --question), or both on stdin, the question as the last line"
        raise UserError(f"no {'question' if context else 'context'}: make ask {how}")
    try:
        (context + question).encode()
    except UnicodeEncodeError as error:
        raise UserError("context and question must be UTF-8 text") from error
    return context, question


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
