"""From records to one table: Markdown, a plain HTML page, and the paired test of every adapter against its base.

    python report.py [runs folder]

Of each system and seed it takes the newest evaluation and the newest timing on the same data. Systems with random
weights have rows of their own, without accuracy. Imports no torch.
"""

import argparse
import html
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from common import mistakes, record, squad
from common.config import Data
from common.errors import UserError, one_line_errors
from common.stats import t_interval
from common.verdict import Rows, compare

COLUMNS = ("system", "seed", "EM [95 %]", "F1", "n", "p95 ms", "peak memory", "device", "run")
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>SQuAD: {systems}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.6rem }} h2 {{ font-size: 1.2rem; margin-top: 2.5rem }}
p {{ opacity: .7; overflow-wrap: anywhere }}
div {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .4rem .8rem; border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent);
  text-align: right; white-space: nowrap }}
th:first-child, td:first-child, .runs :nth-last-child(-n+2):is(th, td) {{ text-align: left }}
</style>
<h1>SQuAD v1.1: exact match, F1, latency, memory</h1>
{sections}
"""


def memory(bench: dict[str, Any]) -> str:
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


def row(evaluation: dict[str, Any] | None, bench: dict[str, Any] | None) -> tuple[str, ...]:
    """One line of the table, of an evaluation, a timing or both."""
    some = evaluation or bench
    assert some is not None
    r = evaluation["result"] if evaluation else {}
    scored = r.get("em") is not None
    return (
        some["system"] + (" (random weights)" if is_random(some) else ""),
        str(some["seed"]),
        f"{r['em']:.2f} [{r['em_interval'][0]:.2f}, {r['em_interval'][1]:.2f}]" if scored else "–",
        f"{r['f1']:.2f}" if scored else "–",
        str(r["n"]) if scored else "–",
        f"{bench['result']['latency']['p95_ms']:.0f} (n {bench['result']['n']})" if bench else "–",
        memory(bench) if bench else "–",
        some["may_differ"]["device"]["name"],
        Path(some["folder"]).name,
    )


def is_random(r: dict[str, Any]) -> bool:
    return r.get("random_weights", False)


def seeds(evaluations: list[dict[str, Any]]) -> list[str]:
    """Of each system that was evaluated with several seeds, all else equal: their mean EM and F1, as sentences."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for e in evaluations:
        alike.setdefault(json.dumps({**e["config"], "seed": None, "adapter": None, "runs": None}), []).append(e)
    out = []
    for found in alike.values():
        means = []
        for name in ("em", "f1"):
            values = [e["result"][name] for e in found]
            if interval := t_interval(values):
                means.append(
                    f"{name.upper()} {fmean(values):.2f} [{interval[0]:.2f}, {interval[1]:.2f}] "
                    f"({min(values):.2f} to {max(values):.2f})"
                )
        out += [f"{found[0]['system']}, mean of {len(found)} seeds: {', '.join(means)}"] if means else []
    return out


def mistaken(evaluations: list[dict[str, Any]], rows: dict[str, Rows]) -> list[dict[str, Any]]:
    """`mistakes.table` of each; none where the data is no longer in the file that it was read from."""
    if not evaluations or not Path(evaluations[0]["may_differ"]["data_source"]).is_file():
        return []
    some = evaluations[0]
    try:
        data = squad.load(Data(**some["config"]["data"] | {"dev": some["may_differ"]["data_source"]}), "dev")
    except UserError:  # another file has that name now
        return []
    if data.sha256 != some["must_match"]["data"]:
        return []
    return [mistakes.table(data.examples, rows[evaluation["folder"]]) for evaluation in evaluations]


def mistake_rows(evaluations: list[dict[str, Any]], tables: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A column an evaluation: shares of all questions, then EM class by class."""

    def shares(name: str, counts: list[int]) -> tuple[str, ...]:
        return name, *(f"{count} ({count / n:.1%})" for count in counts)

    n = sum(tables[0]["kinds"].values())
    rows: list[tuple[str, ...]] = [("answers", *(f"{e['system']}, seed {e['seed']}" for e in evaluations))]
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


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines; the first row is the head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows]
    return [lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]]


def html_table(rows: Sequence[Sequence[str]], kind: str) -> str:
    lines = []
    for tag, cells in zip(["th"] + ["td"] * (len(rows) - 1), rows, strict=True):
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>")
    return f'<div><table class="{kind}">\n' + "\n".join(lines) + "\n</table></div>\n"


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="?", default="runs", help="the folder of run folders")
    root = Path(parser.parse_args(argv).runs)
    records = record.read_all(root)
    records = [r for r in records if r["kind"] in ("eval", "bench")]
    if not records:
        raise UserError(
            f"{root}/: no finished evaluation there yet; make eval MODEL=… makes one, make demo a whole set"
        )

    # ---- gather: newest last, so later records win -----------------------------------------------------------------
    groups: dict[str, dict[tuple[Any, ...], dict[str, dict[str, Any]]]] = {}
    for r in records:
        group = groups.setdefault(json.dumps(r["must_match"], sort_keys=True), {})
        group.setdefault((r["system"], r["seed"], is_random(r)), {})[r["kind"]] = r

    # ---- tables, the freshest last ---------------------------------------------------------------------------------
    markdown, sections, plain, output = [], [], [], []
    before: dict[str, Any] | None = None
    newest = {key: max(r["created"] for runs in group.values() for r in runs.values()) for key, group in groups.items()}
    for comparable in sorted(groups, key=lambda key: newest[key]):
        systems = groups[comparable].values()
        rows = [row(runs.get("eval"), runs.get("bench")) for runs in systems]
        scored = [runs["eval"] for runs in systems if "eval" in runs and not is_random(runs["eval"])]
        answered: dict[str, Rows] = {evaluation["folder"]: record.read_questions(evaluation) for evaluation in scored}
        adapted = [r for r in scored if r["config"]["lora"]]
        verdicts = compare([
            (f"{a['system']} (seed {a['seed']})", b["system"], answered[a["folder"]], answered[b["folder"]])
            for a in adapted
            for b in scored
            if not b["config"]["lora"]
            and record.weights_of(a["config"]["base"]) == record.weights_of(b["config"]["base"])
        ])  # fmt: skip
        sentences = [*seeds(scored), *map(str, verdicts)]
        some = next(r for runs in systems for r in runs.values())
        must = some["must_match"]
        window = must["window"]
        title = f"{some['may_differ']['data_source']}, {must['questions']} questions"
        cut = f"{window['context']}+{window['question']}+{window['answer']} tokens"
        same = f"data {must['data'][:12]}, prompt {must['prompt']}, scorer {must['scorer']}, window {cut}"
        if before:
            same += f"; not comparable with the table above: {', '.join(record.mismatch(before, some))}"
        before = some
        wrong = mistaken(scored, answered)
        markdown += [f"## {title}", "", same, "", *markdown_table([COLUMNS, *rows]), ""]
        markdown += [*(f"- {sentence}" for sentence in sentences), ""]
        items = "".join(f"<li>{html.escape(sentence)}</li>\n" for sentence in sentences)
        section = f"<h2>{html.escape(title)}</h2>\n<p>{html.escape(same)}</p>\n{html_table([COLUMNS, *rows], 'runs')}"
        section += f"<ul>\n{items}</ul>"
        if wrong:
            lines = mistake_rows(scored, wrong)
            markdown += ["### Right and wrong answers", "", *markdown_table(lines), ""]
            section += f"\n<h3>Right and wrong answers</h3>\n{html_table(lines, 'mistakes')}"
        sections.append(section)
        widths = [max(len(r[i]) for r in (COLUMNS, *rows)) for i in range(len(COLUMNS) - 2)]
        plain += [title, same]
        for line in (COLUMNS, *rows):
            plain.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip())
        plain += [*sentences, ""]
        output.append(
            {
                "must_match": must,
                "rows": [dict(zip(COLUMNS, r, strict=True)) for r in rows],
                "tests": [asdict(v) for v in verdicts],
                "mistakes": wrong,
            }
        )

    # ---- write -----------------------------------------------------------------------------------------------------
    names = ", ".join(sorted({r["system"] for r in records}))
    record.write_text(root / "report.md", "# SQuAD v1.1: exact match, F1, latency, memory\n\n" + "\n".join(markdown))
    page = PAGE.format(systems=html.escape(names), sections="\n".join(sections))
    record.write_text(root / "report.html", page)
    print("\n".join(plain))
    print(f"{root}/report.md, {root}/report.html")
    print(json.dumps({"report": str(root / "report.html"), "groups": output}, ensure_ascii=False))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
