"""Latency and memory of single queries: one question at a time, from text to text.

python bench_latency.py qlora7b [key=value ...]
"""

import argparse
import itertools
import json
import os
import random
import sys
from typing import Any

from common import checkpoint, decode, meter, packing, preflight, record, squad
from common.config import load
from common.errors import UserError, one_line_errors
from common.model import load_system, load_tokenizers
from common.prompt import build_trees
from common.stats import percentile, percentile_interval

import torch
from tqdm import tqdm


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a name in configs/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    config = load(args.model, args.overrides)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("single queries are timed by one process; start it without a launcher")
    preflight.check(config.base, config.system)
    adapter = record.trained_adapter(config)
    if adapter and (adapter / checkpoint.SUMS).exists():
        checkpoint.verify(adapter)
    device = meter.pick_device()

    # ---- data, model -----------------------------------------------------------------------------------------------
    dev = squad.load(config.data, "dev")
    queries = squad.stratified(dev.examples, config.bench.queries)
    queries = random.Random(0).sample(queries, len(queries))  # shuffled, the same for every system
    tokenizer, cutter = load_tokenizers(config)
    model = load_system(config, adapter, device)
    stops = torch.tensor(decode.stop_ids(tokenizer), device=device)

    def ask(example: squad.Example) -> dict[str, Any]:
        """One query from text to text; seconds."""
        began = meter.now(device)
        trees = build_trees([example], tokenizer, config.window, train=False, window_tokenizer=cutter).trees
        ticks: list[float] = []
        for tree in trees:  # more than one only where a long context is read in windows
            tokens: list[int] = []
            batch = packing.pack([tree]).to(device)
            for _, token, _ in decode.greedy(model, batch, stops, config.window.answer):
                tokens += token.tolist()
                ticks.append(meter.now(device))
            decode.to_text(tokenizer, tokens)
        total = meter.now(device) - began
        gaps = [later - earlier for earlier, later in itertools.pairwise(ticks)]
        return {"total": total, "first": ticks[0] - began, "gaps": gaps, "tokens": len(ticks)}

    # ---- measure ---------------------------------------------------------------------------------------------------
    with meter.out_of_memory("a single query does not fit beside the base: lower window.context, or base.quant=nf4"):
        for i in tqdm(range(config.bench.warmup_queries), desc="warm up", unit="query"):
            ask(queries[i % len(queries)])
        meter.reset_peaks(device)
        with meter.nvml_sampler(device) as nvml:
            samples = [ask(example) for example in tqdm(queries, desc="time", unit="query")]

    # ---- record ----------------------------------------------------------------------------------------------------
    def spread(values: list[float]) -> dict[str, Any]:
        """Milliseconds; an interval is null where n is too small for one."""
        ms = [1000 * value for value in values]
        out: dict[str, Any] = {}
        for q in (50, 90, 95, 99):
            interval = percentile_interval(ms, q)
            out[f"p{q}_ms"] = round(percentile(ms, q), 3)
            out[f"p{q}_interval_ms"] = [round(v, 3) for v in interval] if interval else None
        return out

    gaps = [gap for sample in samples for gap in sample["gaps"]]
    result = {
        "run": "", "n": len(samples), "random_weights": config.base.random_weights,
        "latency": spread([s["total"] for s in samples]), "ttft": spread([s["first"] for s in samples]),
        "tpot": spread(gaps) if gaps else None,
        "mean_tokens": round(sum(s["tokens"] for s in samples) / len(samples), 2),
        "peak": meter.peaks(device), "nvml_peak": nvml or None,
    }  # fmt: skip
    run = record.new_run(config, "bench")
    result["run"] = str(run)
    rows = [
        {"id": e.id, "tokens": s["tokens"], "total_ms": 1000 * s["total"], "ttft_ms": 1000 * s["first"]}
        for e, s in zip(queries, samples, strict=True)
    ]
    record.write_text(run / "queries.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    record.write(run, config, "bench", dev, meter.describe(device), result)
    print(f"{config.title} on {meter.describe(device)['name']}: {len(samples)} single queries, "
          f"{result['mean_tokens']} tokens each")  # fmt: skip
    print(f"{'ms':16}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}   95 % interval of p95")
    for name, row in (("text to text", "latency"), ("first token", "ttft"), ("per token", "tpot")):
        if values := result[row]:
            interval = values["p95_interval_ms"]
            text = f"[{interval[0]:.1f}, {interval[1]:.1f}]" if interval else f"none: n = {len(samples)} is too small"
            cells = "".join(f"{values[f'p{q}_ms']:10.1f}" for q in (50, 90, 95, 99))
            print(f"{name:16}{cells}   {text if row != 'tpot' else ''}")
    if device.type == "cpu":
        print(
            f"no GPU, so no VRAM was measured; peak RSS {result['peak']['rss_bytes'] / 2**20:.0f} MiB, loading included"
        )
    else:
        sizes = {**result["peak"], **(result["nvml_peak"] or {})}
        print("peak MiB: " + ", ".join(f"{k.removesuffix('_bytes')} {v / 2**20:.0f}" for k, v in sizes.items() if v))
    print(json.dumps(result))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
