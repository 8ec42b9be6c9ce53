"""Questions about one context, answered by any system.

    python -m scripts.ask smollm2-qlora [key=value ...] --context TEXT --question TEXT
    python -m scripts.ask newest runs=runs/demo …        (the newest training there)
    python -m scripts.ask smollm2-qlora --context-file notes.txt --questions asked.txt   (a question a line)
    printf 'A paragraph.\nWhat is asked?\n' | python -m scripts.ask smollm2-qlora

What is not given is taken from the environment (CONTEXT or CONTEXT_FILE, QUESTION or QUESTIONS), and else from stdin:
with a context its lines are questions, for which a terminal is asked one by one; with a question it is the context;
with neither it is both, the question being the last line that is not empty. With a paragraph-first prompt that fits one
window, a Llama reads the context once, and from the second question on each takes the time of a branch.
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.arguments import parse
from common.config import Config
from common.data import prompt
from common.data.prompt import QUESTION
from common.data.squad import Example
from common.data.tokens import Span, Tokenizers
from common.data.trees import parts_read, prompt_texts
from common.data.window import fit
from common.decode import hosted, single, snap
from common.decode.answers import stop_tokens
from common.device import describe_device, out_of_memory, pick_device
from common.errors import UserError, one_line_errors
from common.files import read_text
from common.metrics.calibration import features
from common.model.load import load_system, load_tokenizers
from common.runs import adapters, calibrations, checkpoint, gauges, preflight
from common.runs.results import Section


def main(argv: list[str]) -> None:
    config, args = parse("ask", adapters.newest_system(argv))
    context, questions = given_texts(args)
    chosen = adapters.choose(config, args.given, args.force)
    config = preflight.check(chosen.config)
    if config.prompt.earlier:
        raise UserError("prompt.earlier: a single question has no earlier ones; it is of make eval")
    tokenizers = load_tokenizers(config)
    if isinstance(questions, list):  # before anything is loaded
        for question in questions:
            need_room(question, config, tokenizers)
    if config.api:
        results = ask_api(config, tokenizers, context, questions)
    else:
        results = ask_here(config, chosen, tokenizers, context, questions)
    for result in results:
        text, span = result["answer"], result.get("span")
        if not span and text and (at := context.find(text)) >= 0:
            span = at, at + len(text)
        result["span"] = span = list(span) if text and span else None
        unsure = f"(not sure: {result['confidence']:.0%} < {config.ask.least:.0%})" if result.get("abstained") else ""
        print(text or unsure or "(nothing)")
        if span:
            print(in_sentence(context, (span[0], span[1])))
        if result["context_cut"]:
            print(f"only the context's first {config.window.context} tokens were read; window.overflow=chunk reads all")
        where = f"characters {span[0]} to {span[1]} of the context" if span else "not a span of the context"
        where = "no answer is given" if unsure else where
        how = ", calibrated" if result.get("calibrated") else ""
        sure = f"; confidence {result['confidence']:.0%}{how}" if result["confidence"] is not None else ""
        print(f"{where}{sure}; {result['milliseconds']:.0f} ms, {config.title} on {result['on']}")
        print(json.dumps(result, ensure_ascii=False), flush=True)


def ask_here(
    config: Config, chosen: adapters.Chosen, tokenizers: Tokenizers, context: str, questions: Iterable[str]
) -> Iterator[Section]:
    adapter = checkpoint.verified(chosen.adapter)
    chosen.note()
    calibration_of = calibrations.needed if config.ask.least else calibrations.find
    calibration = calibration_of(adapter, checkpoint.weights_sha256(adapter), config)
    device = pick_device()
    model = load_system(config, adapter, device, bool(chosen.forced))
    with out_of_memory("a single query does not fit: lower window.context, or base.quant=nf4"):
        stops = stop_tokens(tokenizers.own, model, config.decode)
        around = prompt.overhead(tokenizers.own, config.prompt)
        engine = single.engine(model, stops, config.window, config.eval, around, config.decode)
        for number, question in enumerate(checked(questions, config, tokenizers)):
            example = Example("asked", "", context, question, ())
            if number == 0:
                single.ask(engine, tokenizers, example, config)  # compiles, loads kernels
                engine.keeps_prompt = True
            began = gauges.now(device)
            answer, found, cut = single.ask(engine, tokenizers, example, config)
            seconds = gauges.now(device) - began
            best = found[0]
            result = {"system": config.system, "random_weights": config.base.random_weights, "question": question}
            result |= {"answer": answer.text, "span": answer.span}
            result |= {"confidence": math.exp(best.logprob), "tokens": len(best.token_ids), "windows": len(found)}
            result |= {"nbest": answer.nbest} if answer.nbest else {}
            sure = calibration.of(features(vars(answer), question)) if calibration else None
            if config.ask.least and sure is None:
                raise UserError("ask.least: the calibration reads what this answer does not have; make calibrate again")
            if sure is not None:
                result |= {"confidence": sure, "calibrated": True}
                if sure < config.ask.least:
                    result |= {"answer": "", "span": None, "nbest": None, "abstained": True}
            result |= {"passes": sum(a.passes for a in found), "ended_by_itself": best.token_ids[-1] in stops}
            result |= {"context_cut": cut and config.window.overflow == "truncate", "milliseconds": 1000 * seconds}
            yield result | {"on": describe_device(device)["name"]}


def ask_api(config: Config, tokenizers: Tokenizers, context: str, questions: Iterable[str]) -> Iterator[Section]:
    assert config.api
    with tempfile.TemporaryDirectory() as folder:
        client = hosted.Client(config, Path(folder) / "transcript.jsonl", count=hosted.counter(tokenizers.window))
        for question in checked(questions, config, tokenizers):
            example = Example("asked", "", context, question, ())
            ((_, asked),), counts = prompt_texts([example], tokenizers.window, config.window, config.prompt)
            reply = client.ask(asked)
            for note in hosted.notes(client, {example.id: asked}, {example.id: reply}):
                print(note)
            text, span = reply.text, None
            if config.decode.snap:
                read = parts_read([example], tokenizers.window, config.window, config.prompt)
                text, span = snap.nearest(read[example.id], text) or (text, None)
            result = {"system": config.system, "random_weights": False, "question": question}
            result |= {"answer": text, "span": span}
            confidence = None if reply.logprob is None else math.exp(reply.logprob)
            result |= {"confidence": confidence, "tokens": reply.written, "windows": 1}
            result |= {"ended_by_itself": not reply.hit_limit, "context_cut": bool(counts["truncated"])}
            yield result | {"milliseconds": 1000 * reply.total, "on": config.api.url}
        client.close()


def need_room(question: str, config: Config, tokenizers: Tokenizers) -> None:
    """Raises `UserError` for a question that its window would cut, or that is none."""
    need_text(question)
    (room,) = fit([question], QUESTION, config.window.question, tokenizers.window)
    if room < len(question):
        short = question if len(question) <= 60 else f"{question[:60]}…"
        raise UserError(f'"{short}" takes more than the {config.window.question} tokens of window.question: raise it')


def checked(questions: Iterable[str], config: Config, tokenizers: Tokenizers) -> Iterator[str]:
    """The questions that can be asked; for every other one an error is printed."""
    for question in questions:
        try:
            need_room(question, config, tokenizers)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        yield question


def in_sentence(context: str, span: Span) -> str:
    """The sentence around an answer, which is marked: bold in a terminal."""
    start, stop = span
    before = [end.end() for end in re.finditer(r"[.!?]\s+|\n", context[:start])]
    behind = re.search(r"[.!?](?=\s)|\n", context[stop - 1 :])  # the answer may hold the end itself
    first, last = before[-1] if before else 0, stop - 1 + behind.end() if behind else len(context)
    marks = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("»", "«")
    return f"{context[first:start]}{marks[0]}{context[start:stop]}{marks[1]}{context[stop:last]}".strip()


def given_texts(args: argparse.Namespace) -> tuple[str, list[str] | Iterator[str]]:
    """(context, questions), what is missing taken from the environment, and else from stdin."""
    context = one_of("CONTEXT", args.context, "CONTEXT_FILE", args.context_file)
    question = one_of("QUESTION", args.question, "QUESTIONS", args.questions)
    by_line = not (args.question or (args.questions is None and os.environ.get("QUESTION", "").strip()))
    typed = sys.stdin.isatty()
    if context and not question and typed:
        return need_text(context), typed_lines()
    if not context or not question:
        if typed:
            last = "the context; " if question else "context, then the question on the last line; "
            print(f"{last}end with Ctrl-D:", file=sys.stderr)
        try:
            given = sys.stdin.read().strip()
        except UnicodeDecodeError as error:
            raise UserError("stdin must be UTF-8 text") from error
        if context or question:
            context, question = context or given, question or given
        else:
            (context, _, question), by_line = map(str.strip, given.rpartition("\n")), False
    if not context or not question:
        how = "CONTEXT='…' QUESTION='…' (--context, --question), or both on stdin, the question as the last line"
        raise UserError(f"no {'question' if context else 'context'}: make ask {how}")
    need_text(question)
    lines = [line.strip() for line in question.splitlines() if line.strip()]
    return need_text(context), lines if by_line else [question]


def one_of(name: str, text: str | None, file_name: str, file: str | None) -> str:
    """The text that was typed or that the named file holds, else the environment's; "" where there is none."""
    if text is None and file is None:
        text, file = os.environ.get(name, ""), os.environ.get(file_name, "")
    if text and text.strip() and file:
        raise UserError(f"{name} and {file_name}: give one of the two")
    if not file:
        return (text or "").strip()
    if not (found := read_text(Path(file)).strip()):
        raise UserError(f"{file}: it holds no text")
    return found


def typed_lines() -> Iterator[str]:
    """Questions as they are typed, until Ctrl-D."""
    while True:
        print("question (Ctrl-D ends): ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UserError("stdin must be UTF-8 text") from error
        if not line:
            print(file=sys.stderr)
            return
        if line.strip():
            yield line.strip()


def need_text(text: str) -> str:
    """The text. Raises `UserError` for one that is no UTF-8, or has no word."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("context and question must be UTF-8 text") from error
    if not any(map(str.isalnum, text)):
        raise UserError(f'no word is in "{text[:60]}"')
    return text


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
