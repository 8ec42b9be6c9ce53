"""From records to one page: tables, verdicts in words, plots, provenance; as HTML that needs no network, and Markdown.

    python -m scripts.report [runs folder] [--usd-per-hour 1.20] [--systems NAME ...]

Of each system and seed it takes the newest evaluation and the newest timing on the same data; seeds of one
configuration make one line. Systems with random weights have lines of their own, without accuracy. Imports no torch.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from common.config import Data
from common.data import squad
from common.errors import UserError, one_line_errors
from common.files import ROOT, write_text
from common.metrics import error_analysis, plots
from common.metrics.compare import Rows, compare
from common.metrics.stats import Bin, clustered, reliability, t_interval, wilson
from common.runs import record

import yaml
from jinja2 import Environment, FileSystemLoader

COLUMNS = ("system", "seeds", "EM [95 %]", "F1 [95 %]", "n", "p95 ms [95 %]", "peak memory", "J a query", "device")
SNAPSHOT = "EM in the snapshot"
PROVENANCE = ("run", "made", "code", "with", "again")
Record = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A line of the table: evaluations that differ in their seed alone, and the timings that go with them."""

    evaluations: list[Record]
    benches: list[Record]
    rows: dict[str, Rows]  # by the evaluation's folder

    @property
    def some(self) -> Record:
        return (self.evaluations or self.benches)[-1]

    @property
    def name(self) -> str:
        quant, hosted = self.some["config"]["base"]["quant"], self.some["config"]["api"]
        about = ["random weights"] if is_random(self.some) else []
        about += [] if quant == "nf4" or hosted else ["not quantised" if quant == "none" else quant]
        return self.some["system"] + (f" ({', '.join(about)})" if about else "")

    @property
    def bench(self) -> Record | None:
        return max(self.benches, key=lambda r: r["created"]) if self.benches else None

    @property
    def scored(self) -> bool:
        return bool(self.evaluations) and not is_random(self.some)

    def mean(self, name: str) -> tuple[float, tuple[float, float] | None]:
        """EM or F1 and its interval: whole articles drawn, of the questions' means over the seeds; Wilson's for one."""
        rows = [self.rows[e["folder"]] for e in self.evaluations]
        values = {id_: fmean(float(r[id_][name]) for r in rows) for id_ in rows[0]}
        interval = clustered(values, {id_: row["article"] for id_, row in rows[0].items()})
        degenerate = not interval or interval[0] == interval[1]  # one article; all right, or none
        if degenerate and name == "em" and len(rows) == 1:
            interval = wilson(sum(r["em"] for r in rows[0].values()), len(rows[0]))
        return fmean(e["result"][name] for e in self.evaluations), interval and (100 * interval[0], 100 * interval[1])


def is_random(r: Record) -> bool:
    return r.get("random_weights", False)


def lines_of(runs: Mapping[Any, dict[str, Record]]) -> list[Line]:
    """Of {(system, seed, …): {"eval": record, "bench": record}}, by rising EM; seeds in their order."""
    alike: dict[str, Line] = {}
    for _, found in sorted(runs.items()):
        e, b = found.get("eval"), found.get("bench")
        config = (e or b or {})["config"]
        same = {**config, "seed": None, "adapter": None, "runs": None, "kind": "eval" if e else "bench"}
        line = alike.setdefault(json.dumps(same, sort_keys=True), Line([], [], {}))
        if e:
            line.evaluations.append(e)
            if not is_random(e):
                line.rows[e["folder"]] = record.read_questions(e)
        if b:
            line.benches.append(b)
    return sorted(alike.values(), key=lambda line: (not line.scored, line.mean("em")[0] if line.scored else 0))


def memory(bench: Record) -> str:
    """The gauge that says most: NVML of the process, else torch's reserve, else the resident set."""
    peak, nvml = bench["result"]["peak"], bench["result"]["nvml_peak"] or {}
    for value, gauge in (
        (nvml.get("process_bytes"), "NVML"),
        (peak["reserved_bytes"], "reserved"),
        (peak["rss_bytes"], "RSS"),
    ):
        if value:
            return f"{value / 2**30:.2f} GiB {gauge}"
    return "–"


def brackets(interval: Sequence[float] | None, digits: int = 2) -> str:
    return f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""


def cells(line: Line, columns: Sequence[str], usd_per_hour: float | None, before: Mapping[str, Any]) -> tuple[str, ...]:
    em, f1 = (line.mean(name) if line.scored else None for name in ("em", "f1"))
    p95, joules, usd, device = "–", None, "–", line.some["may_differ"]["device"]["name"]
    em_then = None if is_random(line.some) else before["em"].get(line.some["system"])
    if line.bench:
        r = line.bench["result"]
        interval = r["latency"]["p95_interval_ms"]
        p95 = f"{r['latency']['p95_ms']:.0f}{brackets(interval, 0)} (n {r['n']})"
        timed_on = line.bench["may_differ"]["device"]["name"]
        device += "" if timed_on == device else f"; timed on {timed_on}"
        joules = r.get("phases", {}).get("natural", {}).get("energy_j_per_query")
        if usd_per_hour and "natural" in r:
            usd = f"{1000 * usd_per_hour / 3600 / r['natural']['queries_per_s']:.4f}"
    return (
        line.name,
        ", ".join(str(r["seed"]) for r in line.evaluations or line.benches),
        f"{em[0]:.2f}{brackets(em[1])}" if em else "–",
        f"{f1[0]:.2f}{brackets(f1[1])}" if f1 else "–",
        str(line.some["result"]["n"]) if em else "–",
        p95,
        memory(line.bench) if line.bench else "–",
        f"{joules:.1f}" if joules else "–",
        device,
        *([usd] if usd_per_hour else []),
        *([f"{em_then:.2f} (n {before['questions']})" if em_then else "–"] if columns[-1] == SNAPSHOT else []),
    )


def seeds(line: Line) -> list[str]:
    """Of a system that was evaluated with several seeds: what they come to on average, as a sentence."""
    means = []
    for name in ("em", "f1"):
        values = [e["result"][name] for e in line.evaluations]
        if interval := t_interval(values):
            means.append(
                f"{name.upper()} {fmean(values):.2f}{brackets(interval)} ({min(values):.2f} to {max(values):.2f})"
            )
    return [f"{line.name}, mean of {len(line.evaluations)} seeds: {', '.join(means)}"] if means else []


def pairs(lines: Sequence[Line]) -> list[tuple[str, str, Rows, Rows]]:
    """Every adapter with its own base: of the same seed, or the first, where the base was scored with another."""
    out = []
    for a in (line for line in lines if line.scored and line.some["config"]["lora"]):
        for b in (line for line in lines if line.scored and not line.some["config"]["lora"]):
            if record.weights_of(a.some["config"]["base"]) == record.weights_of(b.some["config"]["base"]):
                by_seed = {e["seed"]: e for e in reversed(b.evaluations)}
                for e in a.evaluations:
                    base = by_seed.get(e["seed"], b.evaluations[0])
                    name = f"{a.name} (seed {e['seed']})"
                    out.append((name, b.name, a.rows[e["folder"]], b.rows[base["folder"]]))
    return out


def mistaken(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """`mistakes.table` of each line's first seed; none where the data is not to be found without a network."""
    firsts = [line.evaluations[0] for line in lines if line.scored]
    if not firsts:
        return []
    some, where = firsts[0], firsts[0]["config"]["data"]
    if Path(some["may_differ"]["data_source"]).is_file():
        where = {**where, "dev": some["may_differ"]["data_source"]}
    elif not os.environ.get("SQUAD_DIR"):
        return []
    try:
        data = squad.load(Data(**where), "dev")
    except UserError:  # it is not there, or another file has its name now
        return []
    if data.sha256 != some["must_match"]["data"]:
        return []
    return [
        error_analysis.table(data.examples, line.rows[line.evaluations[0]["folder"]]) for line in lines if line.scored
    ]


def mistake_rows(lines: Sequence[Line], tables: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A column a system: shares of all questions, then EM class by class."""

    def shares(name: str, counts: list[int]) -> tuple[str, ...]:
        return name, *(f"{count} ({count / n:.1%})" for count in counts)

    n = sum(tables[0]["kinds"].values())
    firsts = [(line.name, line.evaluations[0]["seed"]) for line in lines if line.scored]
    rows: list[tuple[str, ...]] = [("answers", *(f"{name}, seed {seed}" for name, seed in firsts))]
    for kind in tables[0]["kinds"]:
        rows.append(shares(kind, [t["kinds"][kind] for t in tables]))
        if kind == "boundary off":
            rows += [shares(f"… by {name}", [t["off"][name] for t in tables]) for name in tables[0]["off"]]
    for what, classes in tables[0]["by"].items():
        for name, (_, size) in classes.items():
            found = [t["by"][what][name][0] for t in tables]
            if size:
                title = {
                    "question": f'EM, "{name}"',
                    "answer": f"EM, answers of {name}",
                    "context": f"EM, contexts of {name}",
                }[what]
                rows.append((f"{title} (n {size})", *(f"{100 * right / size:.1f}" for right in found)))
    return rows


def draw(lines: Sequence[Line], trainings: Sequence[Record]) -> dict[str, str]:
    """Title → SVG of what these records have something to show of."""
    names = [line.name for line in lines]
    named = {
        name
        if names.count(name) == 1
        else f"{name}, seed {', '.join(str(r['seed']) for r in line.evaluations or line.benches)}": line
        for name, line in zip(names, lines, strict=True)
    }
    out, styles = {}, plots.styles_of([*named, *(t["system"] for t in trainings)])
    curves = [(t["system"], record.read_metrics(Path(t["folder"]))) for t in trainings if not is_random(t)]
    if curves := [(name, rows) for name, rows in curves if rows]:
        out["Learning: exact match of each evaluation, and the loss."] = plots.learning(curves, styles)
    points = []
    for name, line in named.items():
        if line.scored and line.bench:
            p95 = line.bench["result"]["latency"]
            points.append((name, *line.mean("em"), p95["p95_ms"], p95["p95_interval_ms"]))
    if points:
        out["Right answers against waiting: exact match and p95, with 95 % intervals."] = plots.tradeoff(points, styles)
    waits = {name: ms for name, line in named.items() if line.bench and (ms := natural(line.bench))}
    if waits:
        title = "How long single queries take; the line is at 95 %."
        out[title] = plots.latencies(waits, styles)
    trusts = {name: bins for name, line in named.items() if line.scored and (bins := trust(line))}
    if trusts:
        off = ", ".join(f"{name} {100 * gap(bins):.1f}" for name, bins in trusts.items())
        title = f"Whether a model knows when it is right: mean distance from the line, in points: {off} (first seeds)."
        out[title] = plots.reliability(trusts, styles)
    ems = {name: [e["result"]["em"] for e in line.evaluations] for name, line in named.items() if line.scored}
    if several := {name: values for name, values in ems.items() if len(values) > 1}:
        title = "What the seed changes: a mark each, above them the mean and its 95 % interval."
        out[title] = plots.seeds(several, styles)
    return out


def natural(bench: Record) -> list[float]:
    """ms of all queries of all its processes."""
    files = [f for f in sorted(Path(bench["folder"]).glob("process-*.json")) if not f.name.endswith(".nvml.json")]
    return [1000 * q["total"] for file in files for q in json.loads(file.read_text())["modes"]["natural"]]


def trust(line: Line) -> list[Bin]:
    """`stats.reliability` of its first seed; none where probabilities were not kept."""
    rows = line.rows[line.evaluations[0]["folder"]]
    if any(row["logprob"] is None for row in rows.values()):
        return []
    return reliability(
        {id_: math.exp(row["logprob"]) for id_, row in rows.items()}, {id_: row["em"] for id_, row in rows.items()}
    )


def gap(bins: Sequence[Bin]) -> float:
    """Expected calibration error (https://arxiv.org/abs/1706.04599), of bins of equal size."""
    return sum(n * abs(p - right) for p, right, _, n in bins) / sum(n for *_, n in bins)


def provenance(r: Record) -> tuple[str, ...]:
    """What made it, and the commands that make it again."""
    about, folder = r["may_differ"], r["folder"]
    code = f"{about['commit'][:10]}{', changed since' if about['dirty'] else ''}" if about["commit"] else "not known"
    versions = about["versions"]
    adapter = r["result"].get("adapter")
    again = f"git checkout {code[:10]} && " if about["commit"] else ""
    again += f"make {r['kind']} MODEL={folder}/config.yaml RUNS={Path(folder).parent}"
    again += f" ADAPTER={adapter}" if adapter else ""
    again += " FRESH=1" if r["kind"] == "train" or (r["kind"] == "eval" and r["config"]["api"]) else ""
    said = [f"{name} {versions[name]}" for name in ("torch", "transformers", "bitsandbytes") if name in versions]
    said += [f"{key.replace('_', ' ')} {about[key][:12]}" for key in ("tokenizer", "base_commit") if about.get(key)]
    if digest := r["result"].get("adapter_sha256"):
        said.append(f"adapter {digest[:12]}")
    return folder, r["created"], code, f"{about['device']['name']}; {', '.join(said)}", again


def why_not(root: Path, system: str) -> str:
    """The last line of what a system's last script said, where that left no record."""
    logs = sorted((root / "logs").glob(f"{system}-s[0-9]*.log"), key=lambda path: path.stat().st_mtime)
    said = logs[-1].read_text(encoding="utf-8", errors="replace").strip().splitlines() if logs else []
    return said[-1].removeprefix("error: ") if said and not said[-1].startswith("{") else "not run"


def snapshot() -> dict[str, Any]:
    """The figures of docs/snapshot.yaml: EM by system, and as a table with the interval that so few questions have."""
    found = yaml.safe_load((ROOT / "docs" / "snapshot.yaml").read_text(encoding="utf-8"))
    n = found["questions"]
    rows = [("system", "EM [95 %, Wilson]", "n")]
    for name, em in found["em"].items():
        low, high = wilson(round(em * n / 100), n)
        rows.append((name, f"{em:.2f}{brackets((100 * low, 100 * high))}", str(n)))
    return {**found, "rows": rows}


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines; the first row is the head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]]


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="?", default="runs", help="the folder of run folders")
    parser.add_argument("--usd-per-hour", type=float, help="price of the device: adds what 1,000 single queries cost")
    parser.add_argument("--systems", nargs="+", default=[], help="these alone; of one that was not run, the reason")
    args = parser.parse_args(argv)
    root, first = Path(args.runs), snapshot()
    records = [r for r in record.read_all(root) if not args.systems or r["system"] in args.systems]
    scored_or_timed = {r["system"] for r in records if r["kind"] in ("eval", "bench")}
    absent = {name: why_not(root, name) for name in args.systems if name not in scored_or_timed}
    if not any(r["kind"] in ("eval", "bench") for r in records):
        for name, why in absent.items():
            print(f"{name}: {why}")
        raise UserError(
            f"{root}/: no finished evaluation there yet; make eval MODEL=… makes one, make demo a whole set"
        )

    columns = COLUMNS + (("USD a 1,000 queries",) if args.usd_per_hour else ())
    columns += (SNAPSHOT,) if any(r["system"] in first["em"] for r in records) else ()

    # ---- gather: newest last, so later records win -----------------------------------------------------------------
    groups: dict[str, dict[tuple[Any, ...], dict[str, Record]]] = {}
    for r in records:
        if r["kind"] in ("eval", "bench"):
            group = groups.setdefault(json.dumps(r["must_match"], sort_keys=True), {})
            weights = json.dumps(record.weights_of(r["config"]["base"]))
            group.setdefault((r["system"], r["seed"], is_random(r), weights), {})[r["kind"]] = r
    others = []
    for found in (found for group in groups.values() for found in group.values() if len(found) == 2):
        scored, timed = (found[kind]["result"].get("adapter_sha256") for kind in ("eval", "bench"))
        if scored and timed and scored != timed:
            others.append(
                f"{found.pop('bench')['folder']} is in no table: another adapter was evaluated since, or before"
            )
    trained_in = {f"{r['folder']}/best": r for r in records if r["kind"] == "train"}

    # ---- one part for each group of what may be compared, the freshest last ----------------------------------------
    parts: list[dict[str, Any]] = []
    before: Record | None = None
    newest = {key: max(r["created"] for runs in group.values() for r in runs.values()) for key, group in groups.items()}
    for comparable in sorted(groups, key=lambda key: newest[key]):
        lines = lines_of(groups[comparable])
        verdicts = compare(pairs(lines))
        shown = [r for line in lines for r in (*line.evaluations, *line.benches)]
        adapters = dict.fromkeys(r["result"].get("adapter") for r in shown)
        trainings = [trained_in[adapter] for adapter in adapters if adapter in trained_in]
        must, window = shown[0]["must_match"], shown[0]["must_match"]["window"]
        same = f"data {must['data'][:12]}, prompt {must['prompt']}, scorer {must['scorer']}, window "
        same += f"{window['context']}+{window['question']}+{window['answer']} tokens"
        if before:
            same += f"; not comparable with the table above: {', '.join(record.mismatch(before, shown[0]))}"
        before = shown[0]
        wrong = mistaken(lines)
        parts.append({
            "title": f"{shown[0]['may_differ']['data_source']}, {must['questions']} questions",
            "same": same,
            "must_match": must,
            "rows": [columns, *(cells(line, columns, args.usd_per_hour, first) for line in lines)],
            "sentences": [*(text for line in lines if line.scored for text in seeds(line)), *map(str, verdicts)],
            "tests": [asdict(v) for v in verdicts],
            "wrong": wrong,
            "mistakes": mistake_rows(lines, wrong) if wrong else [],
            "plots": draw(lines, trainings),
            "provenance": [PROVENANCE, *(provenance(r) for r in (*trainings, *shown))],
        })  # fmt: skip

    # ---- write -----------------------------------------------------------------------------------------------------
    page = Environment(loader=FileSystemLoader(ROOT / "common" / "metrics"), autoescape=True).get_template("page.html")
    names = ", ".join(sorted({r["system"] for r in records}))
    missing = [*(f"{name} is in no table: {why}" for name, why in absent.items()), *others]
    html = page.render(systems=names, missing=missing, parts=parts, snapshot=first)
    write_text(root / "report.html", html)
    markdown = ["# SQuAD v1.1: exact match, F1, latency, memory", "", *(f"- {line}" for line in missing), ""]
    for part in parts:
        markdown += [f"## {part['title']}", "", part["same"], "", *markdown_table(part["rows"]), ""]
        markdown += [*(f"- {sentence}" for sentence in part["sentences"]), ""]
        if part["mistakes"]:
            markdown += ["### Right and wrong answers", "", *markdown_table(part["mistakes"]), ""]
        markdown += ["### How each was made", "", *markdown_table(part["provenance"]), ""]
    markdown += ["## The snapshot this project began with", "", f"{first['what']}. Not measured by this code.", ""]
    write_text(root / "report.md", "\n".join([*markdown, *markdown_table(first["rows"])]) + "\n")
    for part in parts:
        print(f"{part['title']}\n{part['same']}")
        widths = [max(map(len, column)) for column in zip(*part["rows"], strict=True)]
        for row in part["rows"]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        print("\n".join([*part["sentences"], ""]))
    print("\n".join([*missing, f"{root}/report.md, {root}/report.html"]))
    groups_out = [
        {
            "must_match": part["must_match"],
            "rows": [dict(zip(columns, row, strict=True)) for row in part["rows"][1:]],
            "tests": part["tests"],
            "mistakes": part["wrong"],
        }
        for part in parts
    ]
    print(json.dumps({"report": str(root / "report.html"), "groups": groups_out}, ensure_ascii=False))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
