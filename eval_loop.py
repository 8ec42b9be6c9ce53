"""Official EM and F1 of one system, by greedy decoding with the one prompt and window.

python eval_loop.py smollm2-raw [key=value ...]
"""

import argparse
import json
import sys

from common import checkpoint, decode, meter, preflight, record, squad
from common.config import load
from common.errors import one_line_errors
from common.model import load_system, load_tokenizer
from common.prompt import build_trees
from common.score import score
from common.stats import wilson


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a name in configs/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    config = load(args.model, args.overrides)
    preflight.check(config.base, config.system)
    adapter = record.trained_adapter(config)
    if adapter and (adapter / checkpoint.SUMS).exists():
        checkpoint.verify(adapter)
    device = meter.pick_device()

    # ---- data, model -----------------------------------------------------------------------------------------------
    dev = squad.load(config.data, "dev")
    model, tokenizer = load_system(config, adapter, device)
    cutter = load_tokenizer(config.window.tokenizer) if config.window.tokenizer else tokenizer
    built = build_trees(dev.examples, tokenizer, config.window, train=False, window_tokenizer=cutter)

    # ---- decode, score ---------------------------------------------------------------------------------------------
    stops = decode.stop_ids(tokenizer)
    meter.reset_peaks(device)
    began = meter.now(device)
    answers = decode.predict(model, tokenizer, built.trees, stops, config.window.answer, config.eval.pack_tokens)
    seconds = meter.now(device) - began
    scored = score(dev.examples, {id_: answer.text for id_, answer in answers.items()})
    low, high = wilson(sum(scored.correct.values()), scored.n)

    # ---- record ----------------------------------------------------------------------------------------------------
    run = record.new_run(config, "eval")
    texts = {e.id: answers[e.id].text for e in dev.examples}
    record.write_text(run / "predictions.json", json.dumps(texts, ensure_ascii=False, indent=0) + "\n")
    rows = [
        {**vars(answers[e.id]), "em": scored.correct[e.id], "f1": round(scored.overlap[e.id], 6)} for e in dev.examples
    ]
    record.write_text(run / "questions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    result = {
        "run": str(run), "em": scored.em, "em_interval": [100 * low, 100 * high], "f1": scored.f1, "n": scored.n,
        "truncated_share": built.counts["truncated"] / scored.n,
        "hit_limit_share": sum(answer.hit_limit for answer in answers.values()) / scored.n,
        "adapter": str(adapter) if adapter else None,
        "adapter_sha256": checkpoint.sha256(adapter / "adapter_model.safetensors") if adapter else None,
        "seconds": round(seconds, 2), "questions_per_s": round(scored.n / seconds, 2), "peak": meter.peaks(device),
    }  # fmt: skip
    record.write(run, config, "eval", dev, meter.describe(device), result)
    print(
        f"{config.system}{f' with {adapter}' if adapter else ''} on {dev.source}\n"
        f"EM {scored.em:.2f} [{100 * low:.2f}, {100 * high:.2f}]  F1 {scored.f1:.2f}  n {scored.n}\n"
        f"context cut {result['truncated_share']:.2%}, answer ran into the limit {result['hit_limit_share']:.2%}, "
        f"{result['questions_per_s']} questions/s; {run}/predictions.json"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
