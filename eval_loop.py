"""Official EM and F1 of one system, by greedy decoding with the one prompt and window.

    python eval_loop.py smollm2-raw [key=value ...] [--replay RUN]

`accelerate launch --multi_gpu --num_processes 2 eval_loop.py …` shares the paragraphs out. A system with an `api`
section is asked over the network: started again, it goes on; `--replay RUN` takes all answers from a run's transcript.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from common.arguments import parse
from common.config import Config
from common.data import cache, squad
from common.data.tokens import holds_special
from common.data.trees import parts_read, prompt_texts
from common.decode import hosted, predict, snap
from common.decode.answers import Prediction, stop_tokens
from common.device import describe_device, pick_device
from common.errors import UserError, one_line_errors
from common.files import sha256, write_text
from common.metrics.calibration import features
from common.metrics.score import score
from common.metrics.stats import clustered, wilson
from common.model.load import load_system, load_tokenizers, sources
from common.runs import adapters, calibrations, checkpoint, gauges, preflight, ranks, record, signals
from common.runs.results import Accuracy, EvalResult, Section

from accelerate.utils import broadcast_object_list


@dataclass(frozen=True)
class Answered:
    """A system's answers, and how they were made."""

    answers: dict[str, Prediction]  # by id
    truncated: int  # questions whose context was cut, or read in windows
    seconds: float | None  # None: not known
    device: Section
    made_by: Section
    result: EvalResult  # fields of the record that depend on where the model runs
    run: Path | None = None  # its folder, where there is one already
    notes: Sequence[str] = ()  # lines to print below the scores


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    config, args = parse("eval_loop", argv)
    if not config.api and (args.replay or args.fresh):
        raise UserError(f"--replay and --fresh are of systems behind an API; {config.system} runs here")
    chosen = adapters.choose(config, args.given, args.force)
    config = preflight.check(chosen.config)
    dev = squad.evaluated(config.data, config.early_stop)

    # ---- answers ---------------------------------------------------------------------------------------------------
    found: Answered | None
    if config.api:
        anew = bool(args.replay) or args.fresh
        run, finished = record.open_run(config, "eval", lambda r: r["must_match"]["data"] == dev.sha256, anew)
        if finished:
            print(f"{run} is finished; FRESH=1 asks anew\n{json.dumps(finished)}")
            return
        found = answer_hosted(config, dev, run, args.replay)
    else:
        found = answer_here(config, dev, chosen)
    if found is None:  # the first rank scores
        return
    answers = found.answers

    # ---- score -----------------------------------------------------------------------------------------------------
    texts = {e.id: answers[e.id].text for e in dev.examples}
    rows = [{**vars(answers[e.id]), "article": e.title} for e in dev.examples]
    rows = [{k: v for k, v in row.items() if v is not None or k not in record.OPTIONAL} for row in rows]
    # held-out articles have one gold answer a question, which is another probability
    dev_split = config.data.split == "dev"
    if dev_split and (calibration := calibrations.find(chosen.adapter, found.result.get("adapter_sha256"), config)):
        asked = (calibration.of(features(row, e.question)) for e, row in zip(dev.examples, rows, strict=True))
        rows = [row if p is None else row | {"confidence": round(p, 6)} for row, p in zip(rows, asked, strict=True)]
    accuracy = cast(Accuracy, dict.fromkeys(Accuracy.__annotations__))  # None: random weights
    shown = "random weights: no accuracy"
    if not config.base.random_weights:
        scored = score(dev.examples, texts)
        rows = [{**row, "em": scored.correct[row["id"]], "f1": round(scored.overlap[row["id"]], 6)} for row in rows]
        article = {e.id: e.title for e in dev.examples}
        shares = (
            wilson(sum(scored.correct.values()), scored.n),
            clustered(scored.correct, article),
            clustered(scored.overlap, article),
        )
        intervals = [interval and [100 * share for share in interval] for interval in shares]
        accuracy = {
            "em": scored.em,
            "em_interval": intervals[0],
            "em_article_interval": intervals[1],
            "f1": scored.f1,
            "f1_article_interval": intervals[2],
        }
        em, em_by_article, f1_by_article = (f"[{i[0]:.2f}, {i[1]:.2f}]" if i else "–" for i in intervals)
        shown = f"EM {scored.em:.2f} {em}, by article {em_by_article}  F1 {scored.f1:.2f}, by article {f1_by_article}"

    # ---- record ----------------------------------------------------------------------------------------------------
    run, n = found.run or record.new_run(config, "eval"), len(dev.examples)
    write_text(run / "predictions.json", json.dumps(texts, ensure_ascii=False, indent=0) + "\n")
    write_text(run / "questions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    result: EvalResult = {
        "run": str(run),
        **accuracy,
        "n": n,
        "random_weights": config.base.random_weights,
        "truncated_share": found.truncated / n,
        "hit_limit_share": sum(answer.hit_limit for answer in answers.values()) / n,
        "empty_share": sum(not answer.text for answer in answers.values()) / n,
        "mean_words": sum(len(answer.text.split()) for answer in answers.values()) / n,
        "seconds": round(found.seconds, 2) if found.seconds else None,
        "questions_per_s": round(n / found.seconds, 2) if found.seconds else None,
        **found.result,
    }
    record.write(run, config, "eval", dev, found.device, result, found.made_by)
    adapter = f" with {result['adapter']}" if result.get("adapter") else ""
    print(
        f"{config.title}{adapter} on {dev.source}\n"
        f"{shown}  n {n}\n"
        f"context cut {result['truncated_share']:.2%}, answer ran into the limit {result['hit_limit_share']:.2%}, "
        f"answer empty {result['empty_share']:.2%}, "
        f"{result['questions_per_s'] or 'unknown'} questions/s; {run}/predictions.json",
        *found.notes,
        json.dumps(result),
        sep="\n",
    )


def answer_here(config: Config, dev: squad.Dataset, chosen: adapters.Chosen) -> Answered | None:
    """Answers of a model on this machine; None on all ranks but the first."""
    adapter = checkpoint.verified(chosen.adapter)
    process = ranks.join()
    # of one rank: a training may end meanwhile
    adapter, weights = broadcast_object_list([adapter, checkpoint.weights_sha256(adapter)])
    device = pick_device()
    tokenizers = load_tokenizers(config)
    if process.is_main_process:
        chosen.note()
    model = load_system(config, adapter, device, bool(chosen.forced))
    checkpoint.unchanged(adapter, weights)
    with ranks.local_first():  # the others read the trees from the cache
        built = cache.build_trees(dev, tokenizers, config.window, config.prompt, train=False)
    gauges.reset_peaks(device)
    stop_tokens(tokenizers.own, model, config.decode)  # kept, as is the vocabulary: their time is not the decoding's
    predict.quotes_of(model, tokenizers.own, config.decode)
    began = gauges.now(device)
    answers = predict.by_all_ranks(model, tokenizers, built.trees, config)
    seconds = gauges.now(device) - began
    if not process.is_main_process or answers is None:
        return None
    result: EvalResult = {"adapter": str(adapter) if adapter else None, "adapter_sha256": weights}
    result |= {"processes": process.num_processes, "peak": gauges.peaks(device)}
    result |= {"trained_with": chosen.trained_with, "forced": chosen.forced or None} if adapter else {}
    made_by = {"engine": predict.engine_of(model, config.eval), **sources(model, tokenizers)}
    lost = sum(all(holds_special(tokenizers.own, answer.text) for answer in e.answers) for e in dev.examples)
    notes = [f"{lost} questions have no gold answer that can be given: all hold a special token"] if lost else []
    described, truncated = describe_device(device), built.counts["truncated"]
    return Answered(answers, truncated, seconds, described, made_by, result, notes=notes)


def answer_hosted(config: Config, dev: squad.Dataset, run: Path | None, replay: Path | None) -> Answered:
    """Answers of a model behind an API: `run` is resumed, or the answers are those of the run `replay`."""
    assert config.api
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a hosted model is asked by one process: leave PROCESSES out, api.concurrency is what it takes")
    if replay and not (replay / "transcript.jsonl").is_file():
        raise UserError(
            f"{replay}/transcript.jsonl: no such file; --replay names the run of a hosted model's evaluation"
        )
    tokenizers = load_tokenizers(config)
    prompts, counts = prompt_texts(dev.examples, tokenizers.window, config.window, config.prompt)
    folder = replay or run or record.new_run(config, "eval")
    count = hosted.counter(tokenizers.window)
    client = hosted.Client(config, folder / "transcript.jsonl", replay=bool(replay), count=count)
    before, began = client.requests, time.perf_counter()
    with signals.listen() as request:
        try:
            replies = hosted.ask_all(client, dict(prompts), request.check)
        except signals.Stopped:
            print(f"stopped; the same command goes on from {folder}")
            sys.exit(request.code)
        finally:
            client.close()
    seconds = None if replay or before else time.perf_counter() - began  # of a resumed run it is not known
    result: EvalResult = {
        "adapter": None,
        "adapter_sha256": None,
        "peak": gauges.UNKNOWN,
        "transcript_sha256": sha256(client.transcript),
        "replayed": str(replay) if replay else None,
        "requests": client.requests,
        "requests_before": before,
        "refused": sum(bool(r.refused) for r in replies.values()),
        "cost_usd": round(client.usd, 6) or None,
        "tokens_read": total(r.read for r in replies.values() if not r.refused),
        "tokens_written": total(r.written for r in replies.values() if not r.refused),
        "waited_s": round(sum(r.waited for r in replies.values()), 2),
    }
    made_by = {"engine": "api", **sources(None, tokenizers)}
    answers = {id_: Prediction(id_, r.text, [], r.logprob, r.hit_limit, least=r.least) for id_, r in replies.items()}
    if config.decode.snap:
        read = parts_read(dev.examples, tokenizers.window, config.window, config.prompt)
        answers = {id_: snap.of(answer, read[id_]) for id_, answer in answers.items()}
    device, folder_or_none = {"name": config.api.url}, None if replay else folder
    notes = hosted.notes(client, dict(prompts), replies)
    return Answered(answers, counts["truncated"], seconds, device, made_by, result, folder_or_none, notes)


def total(counts: Iterable[int | None]) -> int | None:
    """The sum; None if a host left one out."""
    found = list(counts)
    return None if None in found else sum(count for count in found if count is not None)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
