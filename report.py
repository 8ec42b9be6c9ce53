"""From records to one table: Markdown, a plain HTML page, and the paired test of every adapter against its base.

    python report.py [runs folder]

Of each system and seed it takes the newest evaluation and the newest timing on the same data. Imports no torch.
"""

import argparse
import html
import json
import sys
from pathlib import Path
from typing import Any

from common import record
from common.errors import UserError, one_line_errors
from common.stats import mcnemar

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
th:first-child, td:first-child, td:nth-last-child(-n+2), th:nth-last-child(-n+2) {{ text-align: left }}
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


def row(evaluation: dict[str, Any], bench: dict[str, Any] | None) -> tuple[str, ...]:
    r = evaluation["result"]
    low, high = r["em_interval"]
    return (
        evaluation["system"],
        str(evaluation["seed"]),
        f"{r['em']:.2f} [{low:.2f}, {high:.2f}]",
        f"{r['f1']:.2f}",
        str(r["n"]),
        f"{bench['result']['latency']['p95_ms']:.0f} (n {bench['result']['n']})" if bench else "–",
        memory(bench) if bench else "–",
        evaluation["may_differ"]["device"]["name"],
        Path(evaluation["folder"]).name,
    )


def verdict(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """`a` against `b`, paired over the same questions."""
    only_a, only_b, p = mcnemar(correct(a), correct(b))
    gain = a["result"]["em"] - b["result"]["em"]
    return {"a": a["system"], "b": b["system"], "seed": a["seed"], "em_gain": gain,
            "only_a": only_a, "only_b": only_b, "p": p}  # fmt: skip


def sentence(v: dict[str, Any]) -> str:
    p = f"p = {v['p']:.2g}" if v["p"] >= 1e-10 else "p < 1e-10"
    return (
        f"{v['a']} (seed {v['seed']}) against {v['b']}: {v['em_gain']:+.2f} EM; right where the other is wrong: "
        f"{v['only_a']} against {v['only_b']} questions; exact McNemar {p}"
    )


def correct(evaluation: dict[str, Any]) -> dict[str, bool]:
    path = Path(evaluation["folder"]) / "questions.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {r["id"]: r["em"] for r in rows}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); evaluate that system again") from error


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="?", default="runs", help="the folder of run folders")
    root = Path(parser.parse_args(argv).runs)
    records = record.read_all(root)
    if not any(r["kind"] == "eval" for r in records):
        raise UserError(
            f"{root}/: no finished evaluation there yet; make eval MODEL=… makes one, make demo a whole set"
        )

    # ---- gather: newest last, so later records win -----------------------------------------------------------------
    groups: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    timings: dict[tuple[str, str, int], dict[str, Any]] = {}
    for r in records:
        comparable = json.dumps(r["must_match"], sort_keys=True)
        if r["kind"] == "eval":
            groups.setdefault(comparable, {})[r["system"], r["seed"]] = r
        elif r["kind"] == "bench":
            timings[comparable, r["system"], r["seed"]] = r

    # ---- tables, the freshest last ---------------------------------------------------------------------------------
    markdown, sections, plain, output = [], [], [], []
    for comparable, evaluations in sorted(groups.items(), key=lambda g: max(e["created"] for e in g[1].values())):
        rows = [row(e, timings.get((comparable, *key))) for key, e in evaluations.items()]
        verdicts = [
            verdict(a, b)
            for a in evaluations.values()
            for b in evaluations.values()
            if a["config"]["lora"] and not b["config"]["lora"] and a["config"]["base"] == b["config"]["base"]
        ]
        some = next(iter(evaluations.values()))
        must = some["must_match"]
        window = must["window"]
        title = f"{some['may_differ']['data_source']}, {must['questions']} questions"
        cut = f"{window['context']}+{window['question']}+{window['answer']} tokens"
        same = f"data {must['data'][:12]}, prompt {must['prompt']}, scorer {must['scorer']}, window {cut}"
        table = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ("---",) * len(COLUMNS), *rows)]
        markdown += [f"## {title}", "", same, "", *table, "", *(f"- {sentence(v)}" for v in verdicts), ""]
        cells = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>\n" for cells in rows)
        head = "".join(f"<th>{c}</th>" for c in COLUMNS)
        items = "".join(f"<li>{html.escape(sentence(v))}</li>\n" for v in verdicts)
        sections.append(
            f"<h2>{html.escape(title)}</h2>\n<p>{html.escape(same)}</p>\n<div><table>\n<tr>{head}</tr>\n{cells}</table></div>\n<ul>\n{items}</ul>"
        )
        widths = [max(len(r[i]) for r in (COLUMNS, *rows)) for i in range(len(COLUMNS) - 2)]
        plain += [title, same]
        for line in (COLUMNS, *rows):
            plain.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip())
        plain += [*(sentence(v) for v in verdicts), ""]
        output.append(
            {"must_match": must, "rows": [dict(zip(COLUMNS, r, strict=True)) for r in rows], "tests": verdicts}
        )

    # ---- write -----------------------------------------------------------------------------------------------------
    systems = ", ".join(sorted({r["system"] for r in records}))
    record.write_text(root / "report.md", "# SQuAD v1.1: exact match, F1, latency, memory\n\n" + "\n".join(markdown))
    page = PAGE.format(systems=html.escape(systems), sections="\n".join(sections))
    record.write_text(root / "report.html", page)
    print("\n".join(plain))
    print(f"{root}/report.md, {root}/report.html")
    print(json.dumps({"report": str(root / "report.html"), "groups": output}, ensure_ascii=False))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
