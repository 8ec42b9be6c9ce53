"""Official EM and F1 of one system, by greedy decoding with the one prompt and window.

    python eval_loop.py smollm2-raw [key=value ...]

`accelerate launch --multi_gpu --num_processes 2 eval_loop.py …` shares the paragraphs out.
"""

import argparse
import json
import sys
from typing import Any

from common import cache, checkpoint, decode, meter, plan, preflight, ranks, record, squad
from common.config import load
from common.errors import one_line_errors
from common.model import load_system, load_tokenizers, sources
from common.score import score
from common.stats import clustered, wilson

from accelerate.utils import gather_object


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a name in configs/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    config = load(args.model, args.overrides)
    preflight.check(config.base, config.system)
    adapter = checkpoint.verified(record.trained_adapter(config))
    process = ranks.join()
    device = meter.pick_device()

    # ---- data, model -----------------------------------------------------------------------------------------------
    dev = squad.load(config.data, "dev")
    tokenizer, cutter = load_tokenizers(config)
    model = load_system(config, adapter, device)
    built = cache.build_trees(
        dev.examples, tokenizer, config.window, train=False, options=config.prompt, window_tokenizer=cutter
    )

    # ---- decode, score ---------------------------------------------------------------------------------------------
    stops = decode.stop_ids(tokenizer)
    meter.reset_peaks(device)
    began = meter.now(device)
    mine = plan.share(built.trees, process.num_processes)[process.process_index]
    own = decode.predict(
        model, tokenizer, mine, stops, config.window.answer, config.eval,
        "decode" if process.is_main_process else None,
    )  # fmt: skip
    answers = decode.merge(gather_object(list(own.values())))
    seconds = meter.now(device) - began
    if not process.is_main_process:
        return
    texts = {e.id: answers[e.id].text for e in dev.examples}
    rows = [{**vars(answers[e.id]), "article": e.title} for e in dev.examples]
    accuracy: dict[str, Any] = dict.fromkeys(("em", "em_interval", "em_article_interval", "f1", "f1_article_interval"))
    shown = "random weights: no accuracy"
    if not config.base.random_weights:
        scored = score(dev.examples, texts)
        rows = [{**row, "em": scored.correct[row["id"]], "f1": round(scored.overlap[row["id"]], 6)} for row in rows]
        article = {e.id: e.title for e in dev.examples}
        intervals = {
            "em_interval": wilson(sum(scored.correct.values()), scored.n),
            "em_article_interval": clustered(scored.correct, article),
            "f1_article_interval": clustered(scored.overlap, article),
        }
        accuracy |= {"em": scored.em, "f1": scored.f1}
        accuracy |= {name: [100 * share for share in interval] for name, interval in intervals.items() if interval}
        em, em_by_article, f1_by_article = (
            f"[{accuracy[name][0]:.2f}, {accuracy[name][1]:.2f}]" if accuracy[name] else "–" for name in intervals
        )
        shown = f"EM {scored.em:.2f} {em}, by article {em_by_article}  F1 {scored.f1:.2f}, by article {f1_by_article}"

    # ---- record ----------------------------------------------------------------------------------------------------
    run, n = record.new_run(config, "eval"), len(dev.examples)
    record.write_text(run / "predictions.json", json.dumps(texts, ensure_ascii=False, indent=0) + "\n")
    record.write_text(run / "questions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    result = {
        "run": str(run), **accuracy, "n": n, "random_weights": config.base.random_weights,
        "truncated_share": built.counts["truncated"] / n,
        "hit_limit_share": sum(answer.hit_limit for answer in answers.values()) / n,
        "adapter": str(adapter) if adapter else None,
        "adapter_sha256": checkpoint.sha256(adapter / "adapter_model.safetensors") if adapter else None,
        "processes": process.num_processes,
        "seconds": round(seconds, 2), "questions_per_s": round(n / seconds, 2), "peak": meter.peaks(device),
    }  # fmt: skip
    made_by = {"engine": decode.engine_of(model, config.eval), **sources(model, tokenizer)}
    record.write(run, config, "eval", dev, meter.describe(device), result, made_by)
    print(
        f"{config.title}{f' with {adapter}' if adapter else ''} on {dev.source}\n"
        f"{shown}  n {n}\n"
        f"context cut {result['truncated_share']:.2%}, answer ran into the limit {result['hit_limit_share']:.2%}, "
        f"{result['questions_per_s']} questions/s; {run}/predictions.json"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
