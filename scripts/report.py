"""One page of all records: tables, verdicts, plots, provenance, as HTML that fetches nothing and as Markdown.

    python -m scripts.report [runs folder] [--usd-per-hour 1.20] [--systems NAME ...]

A system and seed counts with the evaluation and the timing of the most questions on the same data, the newest among
equals, so a smoke run never replaces a measurement; the others are listed below the tables. Seeds of one configuration
make one line. Systems with random weights have lines of their own, without accuracy. Imports no torch.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import cast

from common.data import squad
from common.errors import UserError, one_line_errors
from common.files import ROOT, write_text
from common.metrics import confidence, error_analysis, plots
from common.metrics.calibration import probability_of
from common.metrics.compare import Rows, brackets, compare
from common.metrics.pages import Cells, environment, text_table
from common.metrics.stats import Interval, clustered, t_interval, wilson
from common.parser import Parser
from common.runs import ablations, calibrations, outcomes, record
from common.runs.results import Record, Section

import yaml

Trust = tuple[dict[str, float], dict[str, bool], dict[str, str]]  # by question: probability, whether right, article

COLUMNS = ("system", "seeds", "EM [95 %]", "F1 [95 %]", "n", "p95 ms [95 %]", "peak memory", "J a query", "device")
USD, SNAPSHOT = "USD a 1,000 queries", "EM in the snapshot"  # further columns, of some reports
Key = tuple[str, int, bool, str]  # system, seed, whether its weights are random, its base
Group = dict[Key, dict[str, Record]]  # kind → the record that counts; of records that may be compared


@dataclass(frozen=True)
class Line:
    """A line of the table: evaluations that differ in their seed alone, and the timings that go with them."""

    evaluations: list[Record]
    benches: list[Record]
    rows: dict[str, Rows]  # by the evaluation's folder

    @property
    def records(self) -> list[Record]:
        return self.evaluations or self.benches

    @property
    def seeds(self) -> str:
        return ", ".join(str(r["seed"]) for r in self.records)

    @property
    def name(self) -> str:
        some = self.records[-1]
        quant, hosted = some["config"]["base"]["quant"], some["config"]["api"]
        about = ["random weights"] if is_random(some) else []
        about += [] if quant == "nf4" or hosted else ["not quantised" if quant == "none" else quant]
        return some["system"] + (f" ({', '.join(about)})" if about else "")

    @property
    def bench(self) -> Record | None:
        return max(self.benches, key=rank, default=None)

    @property
    def scored(self) -> bool:
        return bool(self.evaluations) and not is_random(self.evaluations[-1])

    def values(self, name: str) -> list[float]:
        """EM or F1 of every seed, in percent."""
        return [cast(Section, e["result"])[name] for e in self.evaluations]

    def percent(self, name: str) -> tuple[float, Interval | None]:
        """The mean EM or F1 over seeds, and its interval when whole articles are resampled, both in percent.

        EM of a single seed has Wilson's interval instead if there is but one article, or if all answers are alike.
        """
        rows = [self.rows[e["folder"]] for e in self.evaluations]
        shares = {id_: fmean(float(r[id_][name]) for r in rows) for id_ in rows[0]}
        interval = clustered(shares, {id_: row["article"] for id_, row in rows[0].items()})
        if name == "em" and len(rows) == 1 and (not interval or interval[0] == interval[1]):
            interval = wilson(sum(r["em"] for r in rows[0].values()), len(rows[0]))
        return fmean(self.values(name)), interval and (100 * interval[0], 100 * interval[1])


def is_random(r: Record) -> bool:
    return r.get("random_weights", False)


def rank(r: Record) -> tuple[int, str, str]:
    """Questions of an evaluation, or of each process of a timing; date and folder. The largest counts."""
    return r["result"]["n"], r["created"], r["folder"]


def key_of(r: Record) -> Key:
    return r["system"], r["seed"], is_random(r), json.dumps(record.weights_of(r["config"]["base"]))


def choose(found: Sequence[Record]) -> tuple[dict[str, Group], list[dict[str, str]]]:
    """The groups of the tables by `must_match`, and a row for each run that is in none of them.

    A timing counts only with the adapter that is evaluated. A group is left out if it is of a part of dev, and each of
    its runs was repeated with more questions of the same file.
    """
    groups: dict[str, Group] = {}
    others: list[tuple[Record, str]] = []
    for r in sorted(found, key=lambda r: (r["kind"], *rank(r)), reverse=True):  # evaluations first; the best first
        kinds = groups.setdefault(json.dumps(r["must_match"], sort_keys=True), {}).setdefault(key_of(r), {})
        adapters = {x["result"].get("adapter_sha256") for x in (r, kinds.get("eval", r))} - {None}
        if r["kind"] == "bench" and len(adapters) > 1:
            others.append((r, "another adapter was evaluated since, or before"))
        elif (best := kinds.setdefault(r["kind"], r)) is not r:
            others.append((r, beaten_by(best, r)))

    def asked(r: Record) -> str:
        data = r["config"]["data"]
        same = {**r["must_match"], "data": [data["dev"], data["split"]], "questions": None}
        return json.dumps([r["kind"], key_of(r), same], sort_keys=True)

    def shown(group: Group) -> list[Record]:
        return [r for kinds in group.values() for r in kinds.values()]

    most = {asked(r): r for r in sorted((r for group in groups.values() for r in shown(group)), key=rank)}
    for name, runs in [(name, shown(group)) for name, group in groups.items()]:
        both = [(r, most[asked(r)]) for r in runs]
        if all(r["config"]["data"]["dev_questions"] and rank(r)[0] < rank(best)[0] for r, best in both):
            others += [(r, beaten_by(best, r)) for r, best in both]
            del groups[name]
    others.sort(key=lambda other: (other[0]["created"], other[0]["folder"]), reverse=True)
    return groups, [
        {"run": r["folder"], "questions": str(r["result"]["n"]), "made": r["created"], "reason": why}
        for r, why in others
    ]


def beaten_by(best: Record, r: Record) -> str:
    n, more = r["result"]["n"], best["result"]["n"]
    return f"fewer questions than the {more} of {best['folder']}" if n < more else f"older than {best['folder']}"


def lines_of(runs: Group) -> list[Line]:
    """The lines of {key: {"eval": record, "bench": record}} by rising EM; the seeds of a line in their order."""
    alike: dict[str, Line] = {}
    for _, found in sorted(runs.items()):
        e, b = found.get("eval"), found.get("bench")
        some = e or found["bench"]
        same = {**some["config"], "seed": None, "adapter": None, "runs": None, "kind": some["kind"]}
        line = alike.setdefault(json.dumps(same, sort_keys=True), Line([], [], {}))
        line.evaluations.extend([e] if e else [])
        line.benches.extend([b] if b else [])
        if e and not is_random(e):
            line.rows[e["folder"]] = record.read_questions(e)
    return sorted(alike.values(), key=lambda line: fmean(line.values("em")) if line.scored else math.inf)


def memory(bench: Record) -> str:
    """Peak memory by the first gauge there is: NVML of the process, torch's reserve, the resident set."""
    peak, nvml = bench["result"]["peak"], bench["result"]["nvml_peak"] or {}
    gauges = {"NVML": nvml.get("process_bytes"), "reserved": peak["reserved_bytes"], "RSS": peak["rss_bytes"]}
    return next((f"{size / 2**30:.2f} GiB {gauge}" for gauge, size in gauges.items() if size), "–")


def cells(line: Line, columns: Cells, usd_per_hour: float | None, before: Section) -> dict[str, str]:
    """The cell of a line in each of `columns`; `before`: the snapshot."""
    some, bench = line.records[-1], line.bench
    device = some["may_differ"]["device"]["name"]
    em, f1, n, p95, peak, joules, usd, then = ("–",) * 8
    if line.scored:
        em, f1 = (f"{mean:.2f}{brackets(interval)}" for mean, interval in map(line.percent, ("em", "f1")))
        n = str(some["result"]["n"])
    if bench:
        result, timed_on = bench["result"], bench["may_differ"]["device"]["name"]
        latency, energy = result["latency"], result.get("phases", {}).get("natural", {}).get("energy_j_per_query")
        p95 = f"{latency['p95_ms']:.0f}{brackets(latency['p95_interval_ms'], 0)} (n {result['n']})"
        peak, joules = memory(bench), f"{energy:.1f}" if energy else "–"
        device += "" if timed_on == device else f"; timed on {timed_on}"
        if usd_per_hour and "natural" in result:
            usd = f"{1000 * usd_per_hour / 3600 / result['natural']['queries_per_s']:.4f}"
    if some["system"] in before["em"] and not is_random(some):
        then = f"{before['em'][some['system']]:.2f} (n {before['questions']})"
    found = (line.name, line.seeds, em, f1, n, p95, peak, joules, device, usd, then)
    return {name: cell for name, cell in zip((*COLUMNS, USD, SNAPSHOT), found, strict=True) if name in columns}


def seeds(line: Line) -> list[str]:
    """A sentence with the means over seeds in percent, if there are several."""
    n, both = len(line.evaluations), (("EM", line.values("em")), ("F1", line.values("f1")))
    means = (f"{name} {fmean(x):.2f}{brackets(t_interval(x))} ({min(x):.2f} to {max(x):.2f})" for name, x in both)
    return [f"{line.name}, mean of {n} seeds: {', '.join(means)}"] if n > 1 else []


def pairs(lines: Sequence[Line]) -> list[tuple[str, str, Rows, Rows]]:
    """Every adapter with its own base: of the same seed, or the first if the base was not scored with that seed."""
    out = []
    scored = [(line, line.evaluations[-1]["config"]) for line in lines if line.scored]
    for (a, tuned), (b, plain) in ((x, y) for x in scored for y in scored if x[1]["lora"] and not y[1]["lora"]):
        if record.weights_of(tuned["base"]) == record.weights_of(plain["base"]):
            by_seed = {e["seed"]: e for e in reversed(b.evaluations)}
            for e in a.evaluations:
                base = by_seed.get(e["seed"], b.evaluations[0])
                out.append((f"{a.name} (seed {e['seed']})", b.name, a.rows[e["folder"]], b.rows[base["folder"]]))
    return out


def mistaken(scored: Sequence[Line]) -> list[error_analysis.Mistakes]:
    """`error_analysis.table` of each line's first seed; empty if the data cannot be found without a network."""
    some = scored[0].evaluations[0]
    source = some["may_differ"]["data_source"].removesuffix(squad.HELD_OUT)
    if not Path(source).is_file() and not os.environ.get("SQUAD_DIR"):
        return []
    with contextlib.suppress(UserError):  # it is not there, or another file has its name now
        examples = record.questions_of(some).examples
        return [error_analysis.table(examples, line.rows[line.evaluations[0]["folder"]]) for line in scored]
    return []


def mistake_rows(scored: Sequence[Line], tables: Sequence[error_analysis.Mistakes]) -> list[Cells]:
    """A table with a column per system: shares of all questions, then EM in percent of each class."""
    titles = {"question": 'EM, "{}"', "answer": "EM, answers of {}", "context": "EM, contexts of {}"}
    columns = [{"answers": f"{line.name}, seed {line.evaluations[0]['seed']}"} for line in scored]
    for column, found in zip(columns, tables, strict=True):
        n = sum(found["kinds"].values())
        for kind, count in found["kinds"].items():
            off = {f"… by {name}": words for name, words in found["off"].items()} if kind == "boundary off" else {}
            column |= {name: f"{size} ({size / n:.1%})" for name, size in {kind: count, **off}.items()}
        for what, title in titles.items():
            classes = ((title.format(name), right, size) for name, (right, size) in found["by"][what].items() if size)
            column |= {f"{name} (n {size})": f"{100 * right / size:.1f}" for name, right, size in classes}
    return [(name, *(column[name] for column in columns)) for name in columns[0]]


def decoded_as(r: Record) -> str:
    """The overrides that an evaluation's answers were decoded by; "" where they were decoded freely."""
    decoding = r["must_match"].get("decoding", {})
    return " ".join(f"decode.{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in decoding.items())


def by_adapter(line: Line) -> list[tuple[tuple[str, int, str | None], Rows]]:
    """The rows of each evaluation by (name, seed, adapter)."""
    return [
        ((line.name, e["seed"], e["result"].get("adapter_sha256")), line.rows[e["folder"]]) for e in line.evaluations
    ]


def lengths(lines: Sequence[tuple[Line, error_analysis.Mistakes | None]]) -> Section | None:
    """A table of lines of the same data that were decoded in several ways, and verdicts on each against free ones."""
    ways = {decoded_as(line.evaluations[0]) for line, _ in lines}
    if len(ways) < 2:
        return None
    rows = []
    free = {key: row for line, _ in lines if not decoded_as(line.evaluations[0]) for key, row in by_adapter(line)}
    for line, wrong in sorted(lines, key=lambda one: (one[0].name, decoded_as(one[0].evaluations[0]))):
        answers = [row for of_seed in line.rows.values() for row in of_seed.values()]
        row = {"system": line.name, "decoded": decoded_as(line.evaluations[0]) or "freely", "seeds": line.seeds}
        row |= {"EM": f"{fmean(line.values('em')):.2f}", "F1": f"{fmean(line.values('f1')):.2f}"}
        row["words"] = f"{fmean(len(answer['text'].split()) for answer in answers):.1f}"
        row["cut by the limit"] = f"{fmean(answer['hit_limit'] for answer in answers):.1%}"
        classes = wrong["by"]["answer"].items() if wrong else ()
        row |= {f"EM, golds of {name}": f"{100 * right / n:.1f}" for name, (right, n) in classes if n}
        rows.append(row)
    columns = max(rows, key=len)
    tests = [
        (f"{line.name} {way} (seed {key[1]})", f"{line.name} freely", row, free[key])
        for line, _ in lines
        if (way := decoded_as(line.evaluations[0]))
        for key, row in by_adapter(line)
        if key in free
    ]
    table = [list(columns), *([row.get(name, "–") for name in columns] for row in rows)]
    return {"table": table, "sentences": [str(test) for test in compare(tests)]}


def draw(lines: Sequence[Line], trainings: Sequence[Record]) -> dict[str, str]:
    """Title → SVG of the plots that these records have figures for."""
    names = [line.name for line in lines]
    named = {line.name if names.count(line.name) == 1 else f"{line.name}, seed {line.seeds}": line for line in lines}
    out, styles = {}, plots.styles_of([*named, *(t["system"] for t in trainings)])
    curves = [(t["system"], record.read_metrics(Path(t["folder"]))) for t in trainings if not is_random(t)]
    if curves := [(name, rows) for name, rows in curves if rows]:
        out["Learning: exact match of each evaluation, and the loss."] = plots.learning(curves, styles)
    timed = {name: line.bench["result"]["latency"] for name, line in named.items() if line.scored and line.bench}
    percents = ((name, *named[name].percent("em"), of["p95_ms"], of["p95_interval_ms"]) for name, of in timed.items())
    if points := list(percents):
        out["Right answers against waiting: exact match and p95, with 95 % intervals."] = plots.tradeoff(points, styles)
    if waits := {name: ms for name, line in named.items() if line.bench and (ms := natural_ms(line.bench))}:
        out["How long single queries take; the line is at 95 %."] = plots.latencies(waits, styles)
    if trusts := {name: found for line_name, line in named.items() for name, found in trusted(line_name, line).items()}:
        styled = plots.styles_of([*styles, *trusts])
        right = {name: (p, correct) for name, (p, correct, _) in trusts.items()}
        out["Whether a model knows when it is right: the share of right answers at each probability (first seeds)."] = (
            plots.reliability({name: confidence.reliability(*both) for name, both in right.items()}, styled)
        )
        out[
            "What abstaining is worth: errors among the answers that are given, the most certain first (first seeds)."
        ] = plots.risk_coverage({name: confidence.risk_coverage(*both) for name, both in right.items()}, styled)
    if several := {name: ems for name, line in named.items() if line.scored and len(ems := line.values("em")) > 1}:
        title = "What the seed changes: a mark each, above them the mean and its 95 % interval."
        out[title] = plots.seeds(several, styles)
    return out


def natural_ms(bench: Record) -> list[float]:
    """Milliseconds of all queries of all processes."""
    files = [f for f in sorted(Path(bench["folder"]).glob("process-*.json")) if not f.name.endswith(".nvml.json")]
    return [1000 * q["total"] for file in files for q in json.loads(file.read_text())["modes"]["natural"]]


def trusted(name: str, line: Line) -> dict[str, Trust]:
    """Name → probabilities of the first seed's answers, which are right, and their articles.

    The model's own probabilities, and calibrated ones where `make calibrate` has written them; empty without either.
    """
    if not line.scored:
        return {}
    evaluation = line.evaluations[0]
    rows = line.rows[evaluation["folder"]]
    facts = {id_: bool(row["em"]) for id_, row in rows.items()}, {id_: row["article"] for id_, row in rows.items()}
    out: dict[str, Trust] = {}
    if all(row["logprob"] is not None for row in rows.values()):
        out[name] = {id_: probability_of(row["logprob"]) for id_, row in rows.items()}, *facts
    mapped = calibrations.of_answers(evaluation)
    if mapped is not None and mapped.keys() == rows.keys():
        out[f"{name}, calibrated"] = mapped, *facts
    return out


def confidences(lines: Sequence[Line]) -> list[Cells]:
    """A table of calibration and ranking, empty where no line has probabilities."""
    percent = ("ece", "perfect_ece", "coverage_80", "coverage_90")
    head = ("probabilities", "ECE", "of a perfect model", "AURC", "answered at 80 % EM", "at 90 % EM")
    rows: list[Cells] = [head]
    for line in lines:
        for name, trust in trusted(line.name, line).items():
            found = confidence.figures(*trust, draws=0)
            ece, perfect, *coverages = (f"{100 * found[key].value:.1f}" for key in percent)
            rows.append((name, ece, perfect, f"{found['aurc'].value:.4f}", *(f"{share} %" for share in coverages)))
    return rows if len(rows) > 1 else []


def provenance(r: Record) -> Cells:
    """A record's folder, date, code, device and versions, and the command that makes it again."""
    about, folder, result = r["may_differ"], r["folder"], r["result"]
    commit, versions = about["commit"] and about["commit"][:10], about["versions"]
    code = f"{commit}{', changed since' if about['dirty'] else ''}" if commit else "not known"
    again = f"git checkout {commit} && " if commit else ""
    again += f"make {r['kind']} MODEL={folder}/config.yaml RUNS={Path(folder).parent}"
    again += f" ADAPTER={result['adapter']}" if result.get("adapter") else ""
    again += " FRESH=1" if r["kind"] == "train" or (r["kind"] == "eval" and r["config"]["api"]) else ""
    made = [f"{name} {versions[name]}" for name in ("torch", "transformers", "bitsandbytes") if name in versions]
    made += [f"{key.replace('_', ' ')} {about[key][:12]}" for key in ("tokenizer", "base_commit") if about.get(key)]
    made += [f"adapter {sha256[:12]}"] if (sha256 := result.get("adapter_sha256")) else []
    return folder, r["created"], code, f"{about['device']['name']}; {', '.join(made)}", again


def why_not(root: Path, system: str) -> str:
    """Why a system has no record: the last line of its newest log, or "not run"."""
    logs = sorted((root / "logs").glob(f"{system}-s[0-9]*.log"), key=lambda path: path.stat().st_mtime)
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").strip().splitlines() if logs else []
    return lines[-1].removeprefix("error: ") if lines and not lines[-1].startswith("{") else "not run"


def snapshot() -> Section:
    """docs/snapshot.yaml, and its `rows` as a table: EM in percent with the interval that so few questions give."""
    found = yaml.safe_load((ROOT / "docs" / "snapshot.yaml").read_text(encoding="utf-8"))
    n = found["questions"]
    intervals = {name: [100 * end for end in wilson(round(em * n / 100), n)] for name, em in found["em"].items()}
    rows = [(name, f"{em:.2f}{brackets(intervals[name])}", str(n)) for name, em in found["em"].items()]
    return {**found, "rows": [("system", "EM [95 %, Wilson]", "n"), *rows]}


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="?", default="runs", help="the folder of run folders")
    parser.add_argument("--usd-per-hour", type=float, help="price of the device: adds what 1,000 single queries cost")
    parser.add_argument("--systems", nargs="+", default=[], help="these alone; of one that was not run, the reason")
    args = parser.parse_args(argv)
    if args.usd_per_hour is not None and not 0 <= args.usd_per_hour < 1e6:
        raise UserError(f"--usd-per-hour {args.usd_per_hour}: a price is between 0 and a million")
    root, before = Path(args.runs), snapshot()
    records = [r for r in record.read_all(root) if not args.systems or r["system"] in args.systems]
    found = [r for r in records if r["kind"] in ("eval", "bench")]
    absent = {name: why_not(root, name) for name in args.systems if name not in {r["system"] for r in found}}
    if not found:
        print("".join(f"{name}: {why}\n" for name, why in absent.items()), end="")
        advice = "make eval MODEL=… makes one, make demo a whole set"
        raise UserError(f"{root}/: no finished evaluation there yet; {advice}")
    columns = COLUMNS + ((USD,) if args.usd_per_hour else ())
    columns += (SNAPSHOT,) if any(r["system"] in before["em"] for r in records) else ()

    # ---- groups of what may be compared ----------------------------------------------------------------------------
    groups, others = choose(found)
    missing = [f"{name} is in no table: {why}" for name, why in absent.items()]
    trained_in = {f"{r['folder']}/best": r for r in records if r["kind"] == "train"}

    # ---- one part for each group, the freshest last ----------------------------------------------------------------
    parts: list[Section] = []  # what the templates show
    out: list[Section] = []  # what the last line says
    decoded: dict[str, list[tuple[Line, error_analysis.Mistakes | None]]] = {}  # by all that must match but decoding
    above: Record | None = None
    newest = {key: max(r["created"] for kinds in g.values() for r in kinds.values()) for key, g in groups.items()}
    for key in sorted(groups, key=lambda key: (newest[key], key)):
        lines = lines_of(groups[key])
        shown = [r for line in lines for r in (*line.evaluations, *line.benches)]
        adapters = dict.fromkeys(r["result"].get("adapter") for r in shown)
        trainings = [trained_in[adapter] for adapter in adapters if adapter in trained_in]
        must, window = shown[0]["must_match"], shown[0]["must_match"]["window"]
        same = f"data {must['data'][:12]}, prompt {must['prompt']}, scorer {must['scorer']}, window "
        same += f"{window['context']}+{window['question']}+{window['answer']} tokens"
        questions, decoding = f"{must['questions']} questions", decoded_as(shown[0])
        same += f", {decoding}" if decoding else ""
        if above:
            same += f"; not comparable with the table above: {', '.join(record.mismatch(above, shown[0]))}"
        above = shown[0]
        rows = [cells(line, columns, args.usd_per_hour, before) for line in lines]
        scored = [line for line in lines if line.scored]
        tests, wrong = compare(pairs(scored)), mistaken(scored) if scored else []
        part: Section = {
            "title": ", ".join(filter(None, (above["may_differ"]["data_source"], questions, decoding))),
            "same": same,
            "table": [columns, *(row.values() for row in rows)],
            "sentences": [*(text for line in scored for text in seeds(line)), *map(str, tests)],
            "mistakes": mistake_rows(scored, wrong) if wrong else [],
            "confidence": confidences(scored),
            "plots": draw(lines, trainings),
            "provenance": [("run", "made", "code", "with", "again"), *map(provenance, (*trainings, *shown))],
        }
        alike = json.dumps({**must, "decoding": None}, sort_keys=True)
        decoded.setdefault(alike, []).extend((line, wrong[i] if wrong else None) for i, line in enumerate(scored))
        parts.append(part)
        out.append({"must_match": must, "rows": rows, "tests": [asdict(test) for test in tests], "mistakes": wrong})

    by_length = [table for found_lines in decoded.values() if (table := lengths(found_lines))]

    # ---- write -----------------------------------------------------------------------------------------------------
    pages = environment()
    shows = {"systems": sorted({r["system"] for r in records}), "missing": missing, "parts": parts, "snapshot": before}
    shows["lengths"] = by_length
    shows["families"] = ablations.pages(outcomes.read_all(outcomes.FOLDER), {r["system"] for r in records})
    shows["others"] = [list(others[0]), *(row.values() for row in others)] if others else []
    write_text(root / "report.html", pages.get_template("page.html").render(shows))
    write_text(root / "report.md", pages.get_template("page.md").render(shows))
    for part in parts:
        print(f"{part['title']}\n{part['same']}")
        print(text_table(part["table"]))
        print("\n".join([*part["sentences"], ""]))
    for table in by_length:
        print("\n".join([*map(" | ".join, table["table"]), *table["sentences"], ""]))
    apart = [f"runs that are not in the tables, listed below them in the report: {len(others)}"] if others else []
    print("\n".join([*missing, *apart, f"{root}/report.md, {root}/report.html"]))
    last = {"report": str(root / "report.html"), "groups": out, "lengths": by_length, "others": others}
    print(json.dumps(last, ensure_ascii=False))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
