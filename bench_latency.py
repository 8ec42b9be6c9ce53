"""Latency and memory of single queries, one at a time, end to end. The method: docs/latency.md.

    python bench_latency.py qlora7b [key=value ...]

Every figure is of a fresh process, and there are several, one after the other: the one in the middle is reported, and
how far the others are from it is shown. A system with an `api` section is asked over the network, one query at a time.
"""

import functools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

from common.arguments import parse
from common.config import Config
from common.data import prompt, squad
from common.data.trees import prompt_texts
from common.decode import hosted, single
from common.decode.answers import gold_ids, stop_tokens
from common.device import describe_device, out_of_memory, pick_device
from common.errors import UserError, one_line_errors
from common.files import write_text
from common.metrics.stats import percentile, percentile_interval
from common.model.load import load_system, load_tokenizers, sources
from common.runs import adapters, checkpoint, gauges, preflight, record, signals
from common.runs.progress import until
from common.runs.results import BenchResult, Mode, Peak, Process, Query, Section, Spread

import torch
from tqdm import tqdm

MODES = {"natural": "the answer ends by itself", "fixed": "always as many tokens as an answer may have"}
FIXED = 100  # queries of the fixed mode, the first of all: they take long and differ little
PERCENTILES = (50, 90, 95, 99)
APART = {"connect": "connecting", "server": "by the host's own clock", "waited": "waiting to try again"}  # of an API


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    config, args = parse("bench_latency", argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("single queries are timed by one process; start it without a launcher")
    chosen = adapters.choose(config, args.given, args.force)
    config, adapter = preflight.check(chosen.config), checkpoint.verified(chosen.adapter)
    if config.prompt.earlier:
        raise UserError("prompt.earlier: a single question has no earlier ones; it is of make eval")
    if config.decode.nbest:
        raise UserError("decode.nbest: single queries are timed as they are answered greedily; leave it out")
    dev = squad.load(config.data, "dev")
    measure_here = functools.partial(measure, config, adapter, force=args.force)
    timing = functools.partial(measure_api, config) if config.api else measure_here
    if args.measure:
        timing(dev, args.measure)
        return
    chosen.note()

    # ---- fresh processes -------------------------------------------------------------------------------------------
    busy = os.getloadavg()[0]
    run, device = record.new_run(config, "bench"), pick_device()
    weights = checkpoint.weights_sha256(adapter)
    found: list[Process] = []
    started = time.monotonic()
    for number in range(config.bench.processes):
        if number:
            more = config.bench.processes - number
            left = until((time.monotonic() - started) / number * more)
            print(f"{left}: {more} more process{'es' * (more > 1)}", file=sys.stderr)
        file = run / f"process-{number}.json"
        if config.bench.processes == 1:  # this one is as fresh as any
            timing(dev, file)
            found.append(json.loads(file.read_text()))
            break
        named = [f"adapter={adapter}"] if adapter else []  # and not one that is trained meanwhile
        code = signals.run([sys.executable, str(Path(__file__).resolve()), *argv, *named, "--measure", str(file)])
        if code in (2, *signals.CODES):  # it has said why
            raise SystemExit(code)
        if code:
            nvml = f"; what NVML saw until then: {file.with_suffix('.nvml.json')}" if device.type == "cuda" else ""
            raise UserError(f"measuring process {number + 1} of {config.bench.processes} ended with {code}{nvml}")
        found.append(json.loads(file.read_text()))
    checkpoint.unchanged(adapter, weights)  # each process has loaded it anew

    # ---- record ----------------------------------------------------------------------------------------------------
    modes = {}
    for mode in found[0]["modes"]:
        p95 = {id(p): percentile([query["total"] for query in p["modes"][mode]], 95) for p in found}
        middle = sorted(found, key=lambda p: p95[id(p)])[len(found) // 2]
        modes[mode] = summary(middle["modes"][mode])
        modes[mode]["processes_p95_ms"] = [round(1000 * seconds, 3) for seconds in p95.values()]
    natural, seen = modes["natural"], phases(found)
    sampled = [phase for phase in seen.values() if phase.get("device_bytes")]
    result: BenchResult = {
        "run": str(run),
        "random_weights": config.base.random_weights,
        "n": len(found[0]["ids"]),
        **cast(BenchResult, modes),
        "latency": natural["latency"],
        "ttft": natural["ttft"],
        "tpot": natural["tpot"],
        "mean_tokens": natural["mean_tokens"],
        "phases": seen,
        "peak": highest(seen.values(), *gauges.UNKNOWN),
        "nvml_peak": highest(sampled, "process_bytes", "device_bytes") if sampled else None,
        "host": {"cores": os.cpu_count(), "load": busy},
        "engine": found[0]["made_by"]["engine"],
        "adapter": str(adapter) if adapter else None,
        "adapter_sha256": weights,
        "forced": chosen.forced or None,
    }
    described = {"name": config.api.url} if config.api else describe_device(device)
    record.write(run, config, "bench", dev, described, result, found[0]["made_by"])
    show(config, described["name"], device, result)
    print(*found[0].get("notes", ()), json.dumps(result), sep="\n")


def drawn(config: Config, dev: squad.Dataset) -> list[squad.Example]:
    """The questions asked: spread over the articles, shuffled, the same for every system."""
    queries = squad.stratified(dev.examples, config.bench.queries)
    return random.Random(0).sample(queries, len(queries))


def measure(config: Config, adapter: Path | None, dev: squad.Dataset, file: Path, force: bool = False) -> None:
    """One process: load, warm up, time every query in every mode, write all samples and gauges."""
    device = pick_device()
    queries = drawn(config, dev)
    tokenizers = load_tokenizers(config)
    peaks: dict[str, Peak] = {}

    def end_phase(name: str) -> None:
        peaks[name] = gauges.peaks(device)
        gauges.reset_peaks(device)

    with gauges.nvml_sampler(device, file.with_suffix(".nvml.json")) as begin:
        begin("load")
        gauges.reset_peaks(device)
        model = load_system(config, adapter, device, force)
        with out_of_memory("a single query does not fit beside the base: lower window.context, or base.quant=nf4"):
            stops = stop_tokens(tokenizers.own, model, config.decode)
            around = prompt.overhead(tokenizers.own, config.prompt)
            engine = single.engine(model, stops, config.window, config.eval, around, config.decode)
            end_phase("load")

            def ask(example: squad.Example, mode: str) -> Query:
                """One query end to end; seconds."""
                forced = None
                if mode == "natural" and config.base.random_weights and engine.name != "plain":  # it would never end
                    forced = gold_ids(tokenizers.own, example.answers[0].text, config.window.answer)
                ticks: list[float] = []
                began = gauges.now(device)
                _, answers, _ = single.ask(
                    engine,
                    tokenizers,
                    example,
                    config,
                    forced,
                    mode == "fixed",
                    lambda _: ticks.append(gauges.now(device)),
                )
                total = gauges.now(device) - began
                return {
                    "total": total,
                    "first": ticks[0] - began,
                    "last": ticks[-1] - began if len(answers) == 1 else None,  # each window has a prompt of its own
                    "tokens": sum(len(a.token_ids) for a in answers),
                    "passes": sum(a.passes for a in answers),
                    "drafted": sum(a.drafted for a in answers),
                    "accepted": sum(a.accepted for a in answers),
                }

            begin("warm up")
            asked = {mode: queries[:FIXED] if mode == "fixed" else queries for mode in MODES}
            left = 0.0  # seconds, by the last query of the warm-up
            for i in tqdm(range(config.bench.warmup_queries), desc="warm up", unit="query"):
                left = sum(ask(queries[i % len(queries)], mode)["total"] * len(asked[mode]) for mode in MODES)
            if left:
                print(f"{until(left)}: {sum(map(len, asked.values()))} queries of this process", file=sys.stderr)
            end_phase("warm up")
            samples = {}
            for mode in MODES:
                begin(mode)
                samples[mode] = [ask(example, mode) for example in tqdm(asked[mode], desc=mode, unit="query")]
                end_phase(mode)
    nvml = file.with_suffix(".nvml.json")
    found: Process = {
        "ids": [example.id for example in queries],
        "modes": samples,
        "gauges": peaks,
        "made_by": {"engine": engine.name, **sources(model, tokenizers)},
        "nvml": json.loads(nvml.read_text()) if nvml.exists() else {},
    }
    write_text(file, json.dumps(found) + "\n")


def measure_api(config: Config, dev: squad.Dataset, file: Path) -> None:
    """One process: cut the text, ask, one query after the other; connecting and the host's own time are kept apart.

    A try that failed, and the pause after it, are in `waited`, not in the query's time.
    """
    assert config.api
    queries = drawn(config, dev)
    tokenizers = load_tokenizers(config)
    # one transcript for all processes: the limits of requests and cost are the run's
    count = hosted.counter(tokenizers.window)
    client = hosted.Client(config, file.parent / "transcript.jsonl", fresh=True, count=count)
    prompts, replies = dict[str, str](), dict[str, hosted.Reply]()

    def ask(example: squad.Example) -> Query:
        began = time.perf_counter()
        ((_, text),), _ = prompt_texts([example], tokenizers.window, config.window, config.prompt)
        cut = time.perf_counter() - began
        reply = client.ask(text, example.id)
        prompts[example.id], replies[example.id] = text, reply
        return {
            "total": cut + reply.total,
            "first": None if reply.first is None else cut + reply.first,
            "last": cut + reply.total,
            "tokens": reply.written,
            "passes": 0,
            "drafted": 0,
            "accepted": 0,
            "connect": reply.connect,
            "server": reply.server,
            "waited": reply.waited,
        }

    try:
        for i in tqdm(range(config.bench.warmup_queries), desc="warm up", unit="query"):
            ask(queries[i % len(queries)])
        samples = [ask(example) for example in tqdm(queries, desc="natural", unit="query")]
    finally:
        client.close()
    found: Process = {
        "ids": [example.id for example in queries],
        "modes": {"natural": samples},
        "gauges": {"natural": gauges.UNKNOWN},
        "made_by": {"engine": "api", **sources(None, tokenizers)},
        "nvml": {},
        "notes": hosted.notes(client, prompts, replies),
    }
    write_text(file, json.dumps(found) + "\n")


def summary(samples: list[Query]) -> Mode:
    """Figures of one process and mode; times in milliseconds, an interval null where n is too small for one."""

    def spread(values: list[float]) -> Spread:
        ms = [1000 * value for value in values]
        out: Spread = {}
        for q in PERCENTILES:
            interval = percentile_interval(ms, q)
            out[f"p{q}_ms"] = round(percentile(ms, q), 3)
            out[f"p{q}_interval_ms"] = [round(v, 3) for v in interval] if interval else None
        return out

    firsts = [first for s in samples if (first := s["first"]) is not None]
    tokens = [n for s in samples if (n := s["tokens"]) is not None]
    later = [
        (s["last"] - s["first"]) / (s["tokens"] - 1)
        for s in samples
        if s["tokens"] and s["tokens"] > 1 and s["first"] is not None and s["last"]
    ]
    drafted = sum(s["drafted"] for s in samples)
    out: Mode = {"n": len(samples), "latency": spread([s["total"] for s in samples])}
    out |= {"ttft": spread(firsts) if firsts else None, "tpot": spread(later) if later else None}
    out["mean_tokens"] = round(statistics.mean(tokens), 2) if tokens else None
    out["mean_passes"] = round(statistics.mean(s["passes"] for s in samples), 2)
    out["drafts_accepted"] = round(sum(s["accepted"] for s in samples) / drafted, 4) if drafted else None
    out["queries_per_s"] = round(len(samples) / sum(s["total"] for s in samples), 3)
    known = {key: [s[key] for s in cast(list[Section], samples) if s.get(key) is not None] for key in APART}
    return out | cast(Mode, {key: spread(values) for key, values in known.items() if values})


def highest(found: Iterable[Mapping[str, int | None]], *keys: str) -> dict[str, int | None]:
    """The highest value of each key; None if all are 0 or unknown."""
    rows = list(found)
    return {key: max(row[key] or 0 for row in rows) or None for key in keys}


def phases(found: list[Process]) -> dict[str, Section]:
    """The highest of every gauge over the processes; of energy and clocks the middle process's."""
    out: dict[str, Section] = {}
    for name in found[0]["gauges"]:
        out[name] = highest((p["gauges"][name] for p in found), *found[0]["gauges"][name])
        seen = [p["nvml"][name] for p in found if name in p["nvml"]]
        if seen:
            out[name] |= highest(seen, "process_bytes", "device_bytes", "processes")
            joules = [s["energy_j"] for s in seen if s["energy_j"] is not None]
            n = len(found[0]["modes"].get(name, ())) or None
            out[name]["energy_j_per_query"] = round(statistics.median(joules) / n, 3) if joules and n else None
            clocks = [s["clock_mhz"] for s in seen if s["clock_mhz"]]
            out[name]["clock_mhz"] = sorted(clocks, key=lambda c: c[1])[len(clocks) // 2] if clocks else None
            out[name]["throttled"] = sorted({reason for s in seen for reason in s["throttled"]})
    return out


def show(config: Config, name: str, device: torch.device, result: BenchResult) -> None:
    n = result["n"]
    processes = f"{config.bench.processes} processes, engine {result['engine']}"
    print(f"{config.title} on {name}: {n} single queries in each of {processes}")
    print(f"{'ms':26}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}   95 % interval of p95")
    for mode, part in (("natural", result["natural"]), ("fixed", result.get("fixed"))):
        if not part:
            continue
        what = MODES[mode]
        if config.base.random_weights and mode == "natural" and result["engine"] != "plain":
            what = "a gold answer and EOS are replayed, for random weights never end"
        accepted = f", {part['drafts_accepted']:.0%} of drafts accepted" if part["drafts_accepted"] is not None else ""
        passes = f" in {part['mean_passes']} passes" if part["mean_passes"] else ""
        tokens = "an unknown number of" if part["mean_tokens"] is None else part["mean_tokens"]
        print(f"{mode}, n = {part['n']}: {what}; {tokens} tokens{passes}{accepted}")
        rows = {"latency": "end to end", "ttft": "first token", "tpot": "per token after it", **APART}
        for row, name in rows.items():
            if values := cast(Section, part).get(row):
                interval = values["p95_interval_ms"]
                text = f"[{interval[0]:.1f}, {interval[1]:.1f}]" if interval else f"none: n = {part['n']} is too small"
                cells = "".join(f"{values[f'p{q}_ms']:10.1f}" for q in PERCENTILES)
                print(f"  {name:24}{cells}   {text if row in ('latency', 'ttft') else ''}")
        p95 = part["processes_p95_ms"]
        print(
            f"  p95 of each process: {', '.join(f'{value:.1f}' for value in p95)} ({max(p95) / min(p95) - 1:.1%} apart)"
        )
    if config.api:
        return
    host = result["host"]
    print(f"host: {host['load']:.1f} processes at work on {host['cores']} cores in the minute before")
    if device.type == "cpu":
        mib = (result["peak"]["rss_bytes"] or 0) / 2**20
        print(f"no GPU, so no VRAM was measured; peak RSS {mib:.0f} MiB, loading included")
        return
    print(f"{'peak MiB':12}{'allocated':>11}{'reserved':>11}{'process':>11}{'device':>11}   joules a query, clock MHz")
    for name, phase in result["phases"].items():
        keys = ("allocated_bytes", "reserved_bytes", "process_bytes", "device_bytes")
        cells = "".join(f"{phase[k] / 2**20:11.0f}" if phase.get(k) else f"{'not said':>11}" for k in keys)
        joules = phase.get("energy_j_per_query")
        clock = "/".join(f"{c:.0f}" for c in phase.get("clock_mhz") or [])
        print(f"{name:12}{cells}   {f'{joules:.1f}' if joules else '–'}, {clock or '–'}")
    throttled = sorted({reason for phase in result["phases"].values() for reason in phase.get("throttled", ())})
    shared = max(phase.get("processes") or 0 for phase in result["phases"].values())
    others = ", so others shared it" if shared > 1 else ""
    print(f"throttled: {', '.join(throttled) or 'no'}; processes on the GPU: {shared or 'not said'}{others}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
