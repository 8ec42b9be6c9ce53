"""The report says what the records say: tables, verdicts, plots, provenance, and nothing that they do not."""

import functools
import json
import math
import os
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path

from common.config import load
from common.data import squad
from common.errors import UserError
from common.files import write_text
from common.metrics import pages, plots
from common.metrics.confidence import reliability
from common.metrics.score import score
from common.runs import record
from scripts import report
from tests.conftest import squad_file
from tests.metrics.test_stats import by_hand

import pytest

DEVICE = {"name": "a card"}
GIB = 2**30
COMMIT = "0123456789abcdef"


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """Nothing is drawn unless a test asks for `drawn`; git is not asked for each record."""
    monkeypatch.setattr(record, "code", lambda: (COMMIT, False))
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(report, "draw", lambda *_: {})


@pytest.fixture
def drawn():
    pass


# ---- a small set of records, all of whose figures differ -----------------------------------------------------------

# Two articles: the bootstrap's interval is the range of their means. Of each question em and f1 of each system.
ROWS = {
    "smollm2-raw 0": {"p0": (0, 0.5), "p1": (0, 0), "p2": (0, 0.25), "q0": (1, 1), "q1": (0, 0)},
    "smollm2-qlora 0": {"p0": (1, 1), "p1": (1, 1), "p2": (1, 1), "q0": (1, 1), "q1": (0, 0.8)},
    "smollm2-qlora 1": {"p0": (1, 1), "p1": (0, 0.4), "p2": (1, 1), "q0": (0, 0), "q1": (0, 0.6)},
}
TEXTS = {
    "smollm2-raw 0": ("red stone bridge", "", "a mill", "delta", "delta by"),
    "smollm2-qlora 0": ("stone bridge", "canal", "amber canal", "delta", "forest"),
    "smollm2-qlora 1": ("stone bridge", "the", "amber canal", "by", "ember"),
}
QUESTIONS = {
    "The red stone bridge over the amber canal.": (
        "P",
        [("p0", "What is red?", "stone bridge"), ("p1", "Who?", "canal"), ("p2", "How many?", "amber canal")],
    ),
    "A delta by the ember forest.": ("Q", [("q0", "What?", "delta"), ("q1", "Why?", "ember forest")]),
}


def stored(runs: Path, kind: str, system: str, result: dict, seed: int = 0, words: tuple[str, ...] = (), **change):
    """Write the record of a finished run, made by hand; returns its folder."""
    data = squad.read(str(runs.parent / "dev.json"), "dev")
    config = load(system, [f"seed={seed}", f"runs={runs}", f"data.dev={runs.parent / 'dev.json'}", *words]).to_dict()
    run = runs / change.pop("folder", f"{system}-s{seed}-{kind}")
    run.mkdir(parents=True)
    versions = {"torch": "2.13", "numpy": "2.3", "transformers": "5.1", "bitsandbytes": "0.49"}
    about = {"data_source": data.source, "commit": COMMIT, "dirty": False, "versions": versions, "device": DEVICE}
    must = {
        "data": data.sha256,
        "questions": 5,
        "prompt": "feed",
        "scorer": "squad-v1.1",
        "window": {"context": 416, "question": 64, "answer": 32, "tokenizer": None},
    }
    found = {
        "schema": 2,
        "kind": kind,
        "system": system,
        "random_weights": config["base"]["random_weights"],
        "seed": seed,
        "created": "2026-01-02",
        "must_match": must | change.pop("must", {}),
        "may_differ": about | change.pop("about", {}),
        "config": config,
        "result": result,
    } | change
    (run / "record.json").write_text(json.dumps(found))
    return run


def answered(runs: Path, system: str, seed: int = 0, **change):
    """An evaluation of `ROWS`."""
    rows = change.pop("rows", None) or ROWS[f"{system} {seed}"]
    texts = change.pop("texts", None) or TEXTS.get(f"{system} {seed}", [""] * 5)
    result = {
        "em": 100 * sum(em for em, _ in rows.values()) / 5,
        "f1": 100 * sum(f1 for _, f1 in rows.values()) / 5,
        "n": 5,
    } | change.pop("result", {})
    run = stored(runs, "eval", system, result, seed, **change)
    lines = [
        {
            "id": id_,
            "text": text,
            "em": bool(em),
            "f1": f1,
            "hit_limit": False,
            "article": id_[0].upper(),
            "logprob": math.log(0.9 - 0.1 * i),
        }
        for i, ((id_, (em, f1)), text) in enumerate(zip(rows.items(), texts, strict=True))
    ]
    (run / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def clocked(runs: Path, system: str, p95: float, interval, queries_per_s: float, n: int, **change):
    """A timing, with figures beside those that are shown."""
    latency = {
        "p50_ms": 1.0,
        "p90_ms": 2.0,
        "p95_ms": p95,
        "p99_ms": 3.0,
        "p50_interval_ms": [4.0, 5.0],
        "p95_interval_ms": interval,
        "p99_interval_ms": None,
        "ttft_p95_ms": 6.0,
    }
    result = {
        "n": n,
        "latency": latency,
        "peak": {"allocated_bytes": GIB, "reserved_bytes": None, "rss_bytes": None},
        "nvml_peak": None,
        "natural": {"queries_per_s": queries_per_s},
        "forced": {"queries_per_s": 99.0},
    } | change.pop("result", {})
    return stored(runs, "bench", system, result, **change)


@pytest.fixture
def hand(tmp_path) -> Path:
    """A base and an adapter of two seeds, trained, scored and timed; the folder of their runs."""
    data = [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": context,
                    "qas": [
                        {
                            "id": id_,
                            "question": question,
                            "answers": [{"text": gold, "answer_start": context.index(gold)}],
                        }
                        for id_, question, gold in asked
                    ],
                }
            ],
        }
        for context, (title, asked) in QUESTIONS.items()
    ]
    (tmp_path / "dev.json").write_text(json.dumps({"data": data}))
    runs = tmp_path / "runs"
    answered(runs, "smollm2-raw")
    stored(
        runs,
        "train",
        "smollm2-qlora",
        {"em": 1.0},
        created="2026-01-01T00",
        about={"dirty": True, "tokenizer": "tok" * 9, "base_commit": "base" * 9},
    )
    adapter = {"adapter": f"{runs}/smollm2-qlora-s0-train/best", "adapter_sha256": "ab" * 32}
    answered(runs, "smollm2-qlora", 0, result=adapter)
    answered(runs, "smollm2-qlora", 1, about={"commit": None, "dirty": None, "versions": {"torch": "2.14"}})
    peak = {"allocated_bytes": GIB, "reserved_bytes": 3 * GIB, "rss_bytes": 7 * GIB}
    energy = {"natural": {"energy_j_per_query": 12.34}, "forced": {"energy_j_per_query": 99.0}}
    clocked(
        runs,
        "smollm2-raw",
        123.4,
        [110.2, 130.7],
        8.0,
        1000,
        result={"peak": peak, "nvml_peak": {"process_bytes": 5.25 * GIB, "device_bytes": 9 * GIB}, "phases": energy},
    )
    clocked(
        runs,
        "smollm2-qlora",
        61.6,
        None,
        20.0,
        900,
        about={"device": {"name": "another card"}},
        result={"peak": {**peak, "reserved_bytes": None, "rss_bytes": 7.5 * GIB}} | adapter,
    )
    return runs


HEAD = (
    "system",
    "seeds",
    "EM [95 %]",
    "F1 [95 %]",
    "n",
    "p95 ms [95 %]",
    "peak memory",
    "J a query",
    "device",
    "USD a 1,000 queries",
)
TABLE = [
    HEAD,
    (
        "smollm2-raw",
        "0",
        "20.00 [0.00, 50.00]",
        "35.00 [25.00, 50.00]",
        "5",
        "123 [110, 131] (n 1000)",
        "5.25 GiB NVML",
        "12.3",
        "a card",
        "0.1250",
    ),
    (
        "smollm2-qlora",
        "0, 1",
        "60.00 [25.00, 83.33]",
        "78.00 [60.00, 90.00]",
        "5",
        "62 (n 900)",
        "7.50 GiB RSS",
        "–",
        "a card; timed on another card",
        "0.0500",
    ),
]
SENTENCES = [  # t is 12.7062 with one degree of freedom, and a mean's standard error half of what two seeds are apart
    "smollm2-qlora, mean of 2 seeds: EM 60.00 [-194.12, 314.12] (40.00 to 80.00), "
    "F1 78.00 [-150.71, 306.71] (60.00 to 96.00)",
    "smollm2-qlora (seed 0) and smollm2-raw cannot be told apart: +60.00 [0.00, 100.00] EM "
    "(a difference of 676.0 would mostly have been seen), +61.00 [40.00, 75.00] F1; "
    "right where the other is wrong: 3 against 0 questions, exact McNemar p = 0.25, p = 0.5 among 2 tests",
    "smollm2-qlora (seed 1) and smollm2-raw cannot be told apart: +20.00 [-50.00, 66.67] EM "
    "(a difference of 788.6 would mostly have been seen), +25.00 [-20.00, 55.00] F1; "
    "right where the other is wrong: 2 against 1 questions, exact McNemar p = 1, p = 1 among 2 tests",
]
MISTAKES = [
    ("answers", "smollm2-raw, seed 0", "smollm2-qlora, seed 0"),
    ("right", "1 (20.0%)", "4 (80.0%)"),
    ("empty", "1 (20.0%)", "0 (0.0%)"),
    ("cut by the limit", "0 (0.0%)", "0 (0.0%)"),
    ("not a span of the context", "1 (20.0%)", "0 (0.0%)"),
    ("boundary off", "1 (20.0%)", "1 (20.0%)"),
    ("… by 1 word", "1 (20.0%)", "1 (20.0%)"),
    ("… by 2 words", "0 (0.0%)", "0 (0.0%)"),
    ("… by 3 or 4", "0 (0.0%)", "0 (0.0%)"),
    ("… by 5 or more", "0 (0.0%)", "0 (0.0%)"),
    ("right sentence, other words", "1 (20.0%)", "0 (0.0%)"),
    ("another sentence", "0 (0.0%)", "0 (0.0%)"),
    ('EM, "what" (n 2)', "50.0", "100.0"),
    ('EM, "who" (n 1)', "0.0", "100.0"),
    ('EM, "why" (n 1)', "0.0", "0.0"),
    ('EM, "how many" (n 1)', "0.0", "100.0"),
    ("EM, answers of 1 word (n 2)", "50.0", "100.0"),
    ("EM, answers of 2 words (n 3)", "0.0", "66.7"),
    ("EM, contexts of up to 80 words (n 5)", "20.0", "80.0"),
]
SNAPSHOT = [
    ("system", "EM [95 %, Wilson]", "n"),
    *(
        (name, f"{em} [{100 * low:.2f}, {100 * high:.2f}]", "300")
        for name, em, (low, high) in (
            ("tinyllama1b", "29.33", by_hand(88, 300, 1.959964)),
            ("raw7b", "54.33", by_hand(163, 300, 1.959964)),
            ("qlora7b", "70.33", by_hand(211, 300, 1.959964)),
            ("api8b", "79.33", by_hand(238, 300, 1.959964)),
        )
    ),
]
VERSIONS = "torch 2.13, transformers 5.1, bitsandbytes 0.49"


def provenance(runs: Path) -> list[tuple[str, ...]]:
    def again(kind: str, name: str, more: str = "") -> str:
        return f"git checkout 0123456789 && make {kind} MODEL={runs}/{name}/config.yaml RUNS={runs}{more}"

    adapter, tuned = f" ADAPTER={runs}/smollm2-qlora-s0-train/best", f"{VERSIONS}, adapter abababababab"
    train = f"a card; {VERSIONS}, tokenizer toktoktoktok, base commit basebasebase"
    first = "2026-01-02"
    return [
        ("run", "made", "code", "with", "again"),
        (
            f"{runs}/smollm2-qlora-s0-train",
            "2026-01-01T00",
            "0123456789, changed since",
            train,
            again("train", "smollm2-qlora-s0-train", " FRESH=1"),
        ),
        (
            f"{runs}/smollm2-raw-s0-eval",
            first,
            "0123456789",
            f"a card; {VERSIONS}",
            again("eval", "smollm2-raw-s0-eval"),
        ),
        (
            f"{runs}/smollm2-raw-s0-bench",
            first,
            "0123456789",
            f"a card; {VERSIONS}",
            again("bench", "smollm2-raw-s0-bench"),
        ),
        (
            f"{runs}/smollm2-qlora-s0-eval",
            first,
            "0123456789",
            f"a card; {tuned}",
            again("eval", "smollm2-qlora-s0-eval", adapter),
        ),
        (
            f"{runs}/smollm2-qlora-s1-eval",
            first,
            "not known",
            "a card; torch 2.14",
            f"make eval MODEL={runs}/smollm2-qlora-s1-eval/config.yaml RUNS={runs}",
        ),
        (
            f"{runs}/smollm2-qlora-s0-bench",
            first,
            "0123456789",
            f"another card; {tuned}",
            again("bench", "smollm2-qlora-s0-bench", adapter),
        ),
    ]


NOTE = (
    (Path(report.__file__).parent.parent / "common/metrics/page.md")
    .read_text()
    .partition("### Confidence\n\n")[2]
    .partition("\n")[0]
)
# right are, by falling probability, the fourth of five, and all but the fifth
CONFIDENCE = [
    ("probabilities", "ECE", "of a perfect model", "AURC", "answered at 80 % EM", "at 90 % EM"),
    ("smollm2-raw", "66.0", "38.3", f"{(1 + 1 + 1 + 3 / 4 + 4 / 5) / 5:.4f}", "0.0 %", "0.0 %"),
    ("smollm2-qlora", "30.0", "38.3", f"{1 / 5 / 5:.4f}", "100.0 %", "80.0 %"),
]


class Page(HTMLParser):
    """Text, cells, list items, and what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.fetched, self.tables, self.items = "", [], [], []
        self.inside: list[str] | None = None
        self.feed(text)

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.inside[-1] += data

    def handle_starttag(self, tag, attrs):
        self.fetched += [
            value for key, value in attrs if key in ("src", "href", "xlink:href", "srcset") and value[0] != "#"
        ]
        assert tag not in ("script", "link", "iframe")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th", "li"):
            self.inside = self.items if tag == "li" else self.tables[-1][-1]
            self.inside.append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th", "li"):
            self.inside = None


def made(runs: Path, capsys, *arguments: str) -> tuple[dict, Page, str]:
    report.main([str(runs), *arguments])
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    return out, Page((runs / "report.html").read_text()), (runs / "report.md").read_text()


def piped(rows) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "| " + " | ".join(["---"] * len(rows[0])) + " |", *lines[1:]]


def title(runs: Path) -> tuple[str, str]:
    source = runs.parent / "dev.json"
    digest = squad.read(str(source), "dev").sha256[:12]
    return (f"{source}, 5 questions", f"data {digest}, prompt feed, scorer squad-v1.1, window 416+64+32 tokens")


def test_every_figure_of_the_markdown_is_its_own(hand, capsys):
    report.main([str(hand), "--usd-per-hour", "3.6"])
    assert (hand / "report.md").read_text().splitlines() == [
        "# SQuAD v1.1: exact match, F1, latency, memory",
        "",
        "",
        f"## {title(hand)[0]}",
        "",
        title(hand)[1],
        "",
        *piped(TABLE),
        "",
        *(f"- {sentence}" for sentence in SENTENCES),
        "",
        "### Confidence",
        "",
        NOTE,
        "",
        *piped(CONFIDENCE),
        "",
        "### Right and wrong answers",
        "",
        *piped(MISTAKES),
        "",
        "### How each was made",
        "",
        *piped(provenance(hand)),
        "",
        "## The snapshot this project began with",
        "",
        f"{report.snapshot()['what']}. Not measured by this code.",
        "",
        *piped(SNAPSHOT),
    ]


def test_the_page_has_the_same_tables_and_sentences(hand, capsys):
    _, page, _ = made(hand, capsys, "--usd-per-hour", "3.6")
    assert page.tables == [
        [[*row] for row in table] for table in (TABLE, CONFIDENCE, MISTAKES, provenance(hand), SNAPSHOT)
    ]
    assert page.items == SENTENCES
    for text in (*title(hand), "SQuAD: smollm2-qlora, smollm2-raw", report.snapshot()["what"]):
        assert text in page.text


def test_the_screen_has_the_table_and_the_last_line_all_of_it_for_programs(hand, capsys):
    report.main([str(hand), "--usd-per-hour", "3.6"])
    *lines, last = capsys.readouterr().out.splitlines()
    widths = [max(len(row[i]) for row in TABLE) for i in range(len(HEAD))]
    assert lines == [
        *title(hand),
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in TABLE),
        *SENTENCES,
        "",
        f"{hand}/report.md, {hand}/report.html",
    ]
    found = json.loads(last)
    assert found["report"] == f"{hand}/report.html"
    (group,) = found["groups"]
    assert group["rows"] == [dict(zip(HEAD, row, strict=True)) for row in TABLE[1:]]
    assert group["must_match"] == record.read_all(hand)[0]["must_match"]
    assert [table["kinds"]["right"] for table in group["mistakes"]] == [1, 4]
    first, second = group["tests"]
    assert (first["a"], first["b"], first["only_a"], first["only_b"]) == ("smollm2-qlora (seed 0)", "smollm2-raw", 3, 0)
    assert (first["p"], first["p_adjusted"], first["tests"]) == (pytest.approx(0.25), pytest.approx(0.5), 2)
    assert (second["em_gain"], second["f1_gain"]) == (pytest.approx(20), pytest.approx(25))
    assert second["f1_interval"] == pytest.approx([-20, 55])


def test_without_a_price_nothing_costs(hand, capsys):
    out, page, _ = made(hand, capsys)
    assert page.tables[0] == [[*row[:-1]] for row in TABLE]
    assert list(out["groups"][0]["rows"][0]) == [*HEAD[:-1]]


# ---- lines and cells -----------------------------------------------------------------------------------------------


def changed(run: Path, **found) -> None:
    file = run / "record.json"
    was = json.loads(file.read_text())
    for key, value in found.items():
        was[key] = {**was[key], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(was))


def cell(out: dict, column: str) -> list[str]:
    return [row[column] for group in out["groups"] for row in group["rows"]]


@pytest.mark.parametrize(
    ("em", "articles", "interval"),
    [
        ((0, 0, 0, 0, 0), "PPPQQ", by_hand(0, 5, 1.959964)),  # nothing right is no certainty
        ((1, 1, 1, 1, 1), "PPPQQ", by_hand(5, 5, 1.959964)),
        ((1, 0, 0, 1, 1), "PPPPP", by_hand(3, 5, 1.959964)),  # one article
        ((1, 0, 0, 1, 1), "PPPQQ", (1 / 3, 1)),
    ],
)
def test_em_of_one_seed_has_wilsons_interval_where_articles_do_not_differ_and_f1_has_none(em, articles, interval):
    rows = {str(i): {"em": bool(x), "f1": x / 2, "article": articles[i]} for i, x in enumerate(em)}
    mean = 100 * sum(em) / 5
    line = report.Line([{"folder": "x", "result": {"em": mean, "f1": mean / 2}}], [], {"x": rows})
    low, high = (pytest.approx(100 * end, abs=1e-4) for end in interval)
    assert line.percent("em") == (mean, (low, high))
    by_article = [sum(x for x, a in zip(em, articles, strict=True) if a == article) for article in "PQ"]
    f1 = tuple(pytest.approx(50 * n / size) for n, size in zip(by_article, (3, 2), strict=True))
    assert line.percent("f1") == (mean / 2, None if articles == "PPPPP" else f1)
    two = [*line.evaluations, {"folder": "y", "result": {"em": mean, "f1": mean / 2}}]
    several = report.Line(two, [], {"x": rows, "y": rows}).percent("em")[1]
    assert several == (None if articles == "PPPPP" else pytest.approx((100 * by_article[0] / 3, 50 * by_article[1])))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "s"),
        ({"quant": "none"}, "s (not quantised)"),
        ({"quant": "fp4"}, "s (fp4)"),
        ({"quant": "none", "api": {"url": "x"}}, "s"),
        ({"random_weights": True}, "s (random weights)"),
        ({"random_weights": True, "quant": "none"}, "s (random weights, not quantised)"),
    ],
)
def test_a_line_is_named_by_its_system_and_what_is_unusual_of_it(change, name):
    r = {"system": "s", "config": {"base": {"quant": change.get("quant", "nf4")}, "api": change.get("api")}}
    r |= {"random_weights": True} if "random_weights" in change else {}
    assert report.Line([r], [], {}).name == report.Line([], [r], {}).name == name
    assert report.Line([r], [], {}).scored == ("random_weights" not in change)
    assert not report.Line([], [r], {}).scored


def test_the_timing_of_the_most_queries_counts_on_a_line_and_the_newest_of_equals():
    runs = ((900, "02"), (1000, "02"), (1000, "03"), (1000, "01"), (10, "04"))
    timings = [{"folder": "x", "created": day, "result": {"n": n}} for n, day in runs]
    assert report.Line([], timings, {}).bench == timings[2]
    assert report.Line([], [], {}).bench is None


@pytest.mark.parametrize(
    ("peak", "nvml", "words"),
    [
        ((2, 3), {"process_bytes": GIB}, "1.00 GiB NVML"),
        ((2, 3), {"process_bytes": None}, "2.00 GiB reserved"),
        ((2, 3), None, "2.00 GiB reserved"),
        ((None, 3.456), None, "3.46 GiB RSS"),
        ((0, None), {}, "–"),
    ],
)
def test_peak_memory_is_of_the_gauge_that_says_most(peak, nvml, words):
    reserved, rss = (much and much * GIB for much in peak)
    gauges = {"allocated_bytes": 9 * GIB, "reserved_bytes": reserved, "rss_bytes": rss}
    assert report.memory({"result": {"peak": gauges, "nvml_peak": nvml}}) == words


def test_lines_rise_by_em_and_those_without_stand_last(hand, capsys):
    stored(
        hand,
        "eval",
        "smollm2-raw",
        {"em": None, "f1": None, "n": 5},
        words=("base.random_weights=true",),
        folder="random",
    )
    clocked(hand, "raw7b", 50.0, None, 1.0, 10)
    clocked(hand, "smollm2-qlora", 70.0, None, 1.0, 10, seed=5)
    better = dict.fromkeys(ROWS["smollm2-raw 0"], (1, 1))
    answered(hand, "smollm2-raw", 0, rows=better, words=("base.quant=none",), folder="whole")
    out, *_ = made(hand, capsys)
    assert [(row["system"], row["seeds"], row["EM [95 %]"][:5]) for row in out["groups"][0]["rows"]] == [
        ("smollm2-raw", "0", "20.00"),
        ("smollm2-qlora", "0, 1", "60.00"),
        ("smollm2-raw (not quantised)", "0", "100.0"),
        ("raw7b", "0", "–"),
        ("smollm2-qlora", "5", "–"),
        ("smollm2-raw (random weights)", "0", "–"),
    ]
    assert cell(out, "F1 [95 %]")[3:] == cell(out, "n")[3:] == ["–"] * 3
    assert cell(out, "p95 ms [95 %]")[2:] == ["–", "50 (n 10)", "70 (n 10)", "–"]
    assert cell(out, "peak memory")[2:] == ["–", "–", "–", "–"]
    assert len(out["groups"][0]["tests"]) == 2


def test_other_settings_are_another_line_and_other_folders_are_not(hand, capsys):
    adapter = ("adapter=/elsewhere",)
    answered(hand, "smollm2-qlora", 2, words=adapter, rows=ROWS["smollm2-qlora 0"], texts=TEXTS["smollm2-qlora 0"])
    answered(hand, "smollm2-qlora", 3, words=("train.lr=9e-3",), rows=ROWS["smollm2-qlora 1"])
    out, *_ = made(hand, capsys)
    assert cell(out, "seeds") == ["0", "3", "0, 1, 2"]
    assert [test["a"][-7:] for test in out["groups"][0]["tests"]] == ["seed 3)", "seed 0)", "seed 1)", "seed 2)"]


def test_settings_in_another_order_and_records_from_before_random_weights_are_the_same_line(hand, capsys):
    file = hand / "smollm2-qlora-s1-eval" / "record.json"
    found = json.loads(file.read_text())
    del found["random_weights"]
    found["config"] = {
        key: dict(reversed(value.items())) if isinstance(value, dict) else value
        for key, value in reversed(found["config"].items())
    }
    file.write_text(json.dumps(found))
    assert cell(made(hand, capsys)[0], "seeds") == ["0", "0, 1"]
    assert report.is_random({}) is False


OTHERS = ["run", "questions", "made", "reason"]


def test_the_newest_of_the_same_seed_counts_and_the_others_are_listed(hand, capsys):
    answered(hand, "smollm2-raw", rows=ROWS["smollm2-qlora 1"], created="2026-01-03", folder="newer")
    answered(hand, "smollm2-raw", rows=ROWS["smollm2-qlora 0"], created="2026-01-01", folder="older")
    clocked(hand, "smollm2-raw", 77.0, None, 1.0, 1000, created="2026-01-03", folder="timed")
    out, page, markdown = made(hand, capsys)
    assert cell(out, "EM [95 %]")[0].startswith("40.00 ")
    assert cell(out, "p95 ms [95 %]")[0] == "77 (n 1000)"
    assert cell(out, "J a query")[0] == "–"
    rows = [
        [f"{hand}/smollm2-raw-s0-eval", "5", "2026-01-02", f"older than {hand}/newer"],
        [f"{hand}/smollm2-raw-s0-bench", "1000", "2026-01-02", f"older than {hand}/timed"],
        [f"{hand}/older", "5", "2026-01-01", f"older than {hand}/newer"],
    ]
    assert page.tables[-2] == [OTHERS, *rows]
    assert out["others"] == [dict(zip(OTHERS, row, strict=True)) for row in page.tables[-2][1:]]
    assert "\n".join(piped(page.tables[-2])) in markdown
    for text in (page.text, markdown):
        assert text.count("Other runs that are not in the tables") == 1
    assert f"{hand}/older" not in str(page.tables[:-2])
    report.main([str(hand)])
    assert capsys.readouterr().out.splitlines()[-3] == (
        "runs that are not in the tables, listed below them in the report: 3"
    )


def test_where_every_run_counts_no_others_are_listed(hand, capsys):
    out, page, markdown = made(hand, capsys)
    assert out["others"] == []
    assert "Other runs" not in page.text + markdown


@pytest.mark.parametrize("created", ["2026-01-01", "2026-01-03"])
def test_a_smoke_timing_never_replaces_a_measurement(hand, capsys, created):
    for seed, n in ((0, 999), (5, 7)):
        folder = f"smoke-{seed}"
        clocked(hand, "smollm2-raw", 7.0, None, 1.0, n, seed=seed, created=created, folder=folder)
    shapes = ("base.random_weights=true",)
    clocked(hand, "smollm2-raw", 8.0, None, 1.0, 5000, words=shapes, created=created, folder="random")
    out, *_ = made(hand, capsys)
    assert cell(out, "p95 ms [95 %]")[0] == "123 [110, 131] (n 1000)"
    why = f"fewer questions than the 1000 of {hand}/smollm2-raw-s0-bench"
    assert out["others"] == [dict(zip(OTHERS, (f"{hand}/smoke-0", "999", created, why), strict=True))]
    assert cell(out, "system")[2:] == ["smollm2-raw (random weights)", "smollm2-raw"]
    assert cell(out, "p95 ms [95 %]")[2:] == ["8 (n 5000)", "7 (n 7)"]  # seed 5 has no other timing


def test_an_evaluation_of_more_questions_counts_whenever_it_was_made(hand, capsys):
    rows = ROWS["smollm2-qlora 1"]
    answered(hand, "smollm2-raw", rows=rows, created="2026-01-03", folder="cut", result={"n": 4})
    out, *_ = made(hand, capsys)
    assert cell(out, "EM [95 %]")[0].startswith("20.00 ")
    assert [row["reason"] for row in out["others"]] == [f"fewer questions than the 5 of {hand}/smollm2-raw-s0-eval"]


def part_of_dev(hand: Path, n: int, words: tuple[str, ...] = (), system="smollm2-raw", seed=0, **change) -> str:
    """An evaluation of `n` questions of dev, newer than all others; its folder."""
    dev = squad.read(str(hand.parent / "dev.json"), "dev")
    part = squad.Dataset(squad.stratified(dev.examples, n), dev.source)
    folder, kept = f"part-{system}-{n}", {e.id for e in part.examples}
    must = {"data": part.sha256, "questions": n} | change
    words = (f"data.dev_questions={n}", *words)
    about = {"must": must, "words": words, "result": {"n": n}, "created": f"2026-02-0{n}", "folder": folder}
    answered(hand, system, seed, rows=ROWS["smollm2-raw 0"], **about)
    file = hand / folder / "questions.jsonl"
    lines = [line for line in file.read_text().splitlines(keepends=True) if json.loads(line)["id"] in kept]
    file.write_text("".join(lines))
    return str(hand / folder)


def test_a_table_of_runs_that_were_all_repeated_with_more_questions_is_left_out(hand, capsys):
    three, two = part_of_dev(hand, 3), part_of_dev(hand, 2)
    file = Path(three) / "record.json"
    found = json.loads(file.read_text())
    found["must_match"] = dict(reversed(found["must_match"].items()))  # the order of keys means nothing
    file.write_text(json.dumps(found))
    out, page, _ = made(hand, capsys)
    assert [group["must_match"]["questions"] for group in out["groups"]] == [5]
    why = f"fewer questions than the 5 of {hand}/smollm2-raw-s0-eval"
    rows = [[three, "3", "2026-02-03", why], [two, "2", "2026-02-02", why]]
    assert page.tables[-2] == [OTHERS, *rows]
    (hand / "smollm2-raw-s0-eval" / "record.json").unlink()
    out, *_ = made(hand, capsys)
    assert [group["must_match"]["questions"] for group in out["groups"]] == [5, 3]
    assert [row["reason"] for row in out["others"]] == [f"fewer questions than the 3 of {three}"]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "other"},
        {"window": {"context": 300, "question": 50, "answer": 20, "tokenizer": None}},
        {"words": ("base.quant=none",)},
        {"words": ("base.random_weights=true",)},
        {"seed": 7},
        {"words": ("data.dev=elsewhere.json",)},
        {"words": ("data.dev_questions=null",)},  # another file by the same name
    ],
)
def test_a_table_of_fewer_questions_stays_where_one_of_its_runs_was_not_repeated(hand, capsys, change):
    part_of_dev(hand, 3, **change)
    out, *_ = made(hand, capsys)
    assert [group["must_match"]["questions"] for group in out["groups"]] == [5, 3]
    assert out["others"] == []


def test_a_table_stays_as_long_as_one_system_was_only_scored_there(hand, capsys):
    part_of_dev(hand, 3)
    run = part_of_dev(hand, 3, system="smollm2-qlora")
    assert [group["must_match"]["questions"] for group in made(hand, capsys)[0]["groups"]] == [5]
    changed(Path(run), system="smollm2-other")
    out, *_ = made(hand, capsys)
    assert [group["must_match"]["questions"] for group in out["groups"]] == [5, 3]
    assert len(out["groups"][1]["rows"]) == 2


def test_without_costs_or_rates_the_price_is_not_known(hand, capsys):
    changed(hand / "smollm2-raw-s0-bench", result={"phases": {"forced": {"energy_j_per_query": 5}}})
    file = hand / "smollm2-qlora-s0-bench" / "record.json"
    found = json.loads(file.read_text())
    del found["result"]["natural"]
    file.write_text(json.dumps(found))
    out, *_ = made(hand, capsys, "--usd-per-hour", "7.2")
    assert cell(out, "USD a 1,000 queries") == ["0.2500", "–"]
    assert cell(out, "J a query") == ["–", "–"]


def test_the_snapshots_figure_stands_beside_ours(hand, capsys):
    assert report.SNAPSHOT == "EM in the snapshot"
    assert report.SNAPSHOT not in made(hand, capsys)[0]["groups"][0]["rows"][0]
    answered(hand, "raw7b", rows=ROWS["smollm2-raw 0"], texts=TEXTS["smollm2-raw 0"])
    clocked(hand, "api8b", 9.0, None, 1.0, 10)
    stored(hand, "eval", "qlora7b", {"em": None, "f1": None, "n": 5}, words=("base.random_weights=true",))
    out, page, _ = made(hand, capsys, "--usd-per-hour", "1")
    assert page.tables[0][0] == [*HEAD, report.SNAPSHOT]
    then = dict(zip(cell(out, "system"), cell(out, report.SNAPSHOT), strict=True))
    assert then["raw7b"] == "54.33 (n 300)"
    assert then["api8b"] == "79.33 (n 300)"
    assert then["smollm2-raw"] == then["qlora7b (random weights)"] == "–"


def test_seeds_are_summed_up_only_where_there_are_several():
    line = report.Line([{"result": {"em": 1.0, "f1": 2.0}}], [], {})
    assert report.seeds(line) == []


def test_an_adapter_is_compared_with_its_own_base_by_seed_or_with_the_first():
    def line(system: str, seeds: tuple[int, ...], lora: dict | None, path: str = "base", random: bool = False):
        base = dict.fromkeys(("revision", "tokenizer", "random_weights", "double_quant"))
        config = {"base": {**base, "path": path, "quant": "nf4"}, "lora": lora, "api": None}
        found = [
            {"system": system, "seed": seed, "folder": f"{system}{seed}", "config": config, "random_weights": random}
            for seed in seeds
        ]
        return report.Line(found, [], {r["folder"]: r["folder"] for r in found})

    timed = report.Line([], line("timed", (1,), {}).evaluations, {})
    lines = [
        line("raw", (3, 1), None),
        line("whole", (0,), None, path="other"),
        line("tuned", (0, 1, 3), {"rank": 1}),
        line("shapes", (1,), {"rank": 1}, random=True),
        line("empty", (1,), None, random=True),
        timed,
    ]
    assert report.pairs(lines) == [
        ("tuned (seed 0)", "raw", "tuned0", "raw3"),
        ("tuned (seed 1)", "raw", "tuned1", "raw1"),
        ("tuned (seed 3)", "raw", "tuned3", "raw3"),
    ]


# ---- what is compared, and what stands apart -----------------------------------------------------------------------


def test_a_timing_of_another_adapter_is_in_no_table(hand, capsys):
    changed(hand / "smollm2-qlora-s0-bench", result={"adapter_sha256": "cd" * 32})
    out, page, markdown = made(hand, capsys)
    assert cell(out, "p95 ms [95 %]") == ["123 [110, 131] (n 1000)", "–"]
    why = "another adapter was evaluated since, or before"
    row = [f"{hand}/smollm2-qlora-s0-bench", "900", "2026-01-02", why]
    assert page.tables[-2] == [OTHERS, row]
    assert piped([row])[0] in markdown.splitlines()


def test_a_smaller_timing_of_the_evaluated_adapter_counts_before_a_larger_one_of_another(hand, capsys):
    adapter = {"adapter_sha256": "cd" * 32}
    clocked(hand, "smollm2-qlora", 50.0, None, 1.0, 5000, result=adapter, created="2026-01-03", folder="of-another")
    out, *_ = made(hand, capsys)
    assert cell(out, "p95 ms [95 %]")[1] == "62 (n 900)"
    assert [row["run"] for row in out["others"]] == [f"{hand}/of-another"]


@pytest.mark.parametrize("unknown", ["eval", "bench"])
def test_a_timing_whose_adapter_is_not_known_to_be_another_stands_in_the_table(hand, capsys, unknown):
    changed(hand / f"smollm2-qlora-s0-{unknown}", result={"adapter_sha256": None})
    assert cell(made(hand, capsys)[0], "p95 ms [95 %]")[1] == "62 (n 900)"


def test_tables_that_are_not_comparable_say_why_the_freshest_last(hand, capsys):
    must = {"window": {"context": 300, "question": 50, "answer": 20, "tokenizer": None}}
    answered(hand, "smollm2-raw", created="2026-01-01T05", must=must, folder="before")
    report.main([str(hand)])
    lines = capsys.readouterr().out.splitlines()
    same = title(hand)[1]
    assert lines[1] == same.replace("416+64+32", "300+50+20")
    assert f"{same}; not comparable with the table above: window" in lines
    answered(hand, "smollm2-qlora", 1, created="2026-01-04", must=must, folder="after")
    report.main([str(hand)])
    assert capsys.readouterr().out.splitlines()[1] == same


def test_answers_that_were_decoded_in_several_ways_have_tables_of_their_own_and_one_by_length(hand, capsys):
    found, page, markdown = made(hand, capsys)
    assert found["lengths"] == []
    assert "Answers and their length" not in markdown
    spans = {"decoding": {"spans": True, "whole_words": True}}
    rows = dict.fromkeys(("p0", "p1", "p2", "q0"), (1, 1)) | {"q1": (0, 0.5)}
    texts = ("stone bridge", "canal", "amber canal", "delta", "the ember forest")
    change = {"words": ("decode.spans=true", "decode.whole_words=true"), "created": "2026-01-03"}
    answered(hand, "smollm2-raw", rows=rows, texts=texts, must=spans, folder="spans", **change)
    found, page, markdown = made(hand, capsys)
    assert len(found["groups"]) == 2
    (table,) = found["lengths"]
    golds = ["EM, golds of 1 word", "EM, golds of 2 words"]
    way = "decode.spans=true decode.whole_words=true"
    assert table["table"] == [
        ["system", "decoded", "seeds", "EM", "F1", "words", "cut by the limit", *golds],
        ["smollm2-qlora", "freely", "0, 1", "60.00", "78.00", "1.4", "0.0%", "100.0", "66.7"],
        # texts of 3, 0, 2, 1 and 2 words; of the golds canal and delta have one
        ["smollm2-raw", "freely", "0", "20.00", "35.00", "1.6", "0.0%", "50.0", "0.0"],
        ["smollm2-raw", way, "0", "80.00", "90.00", "1.8", "0.0%", "100.0", "66.7"],
    ]
    (sentence,) = table["sentences"]
    assert sentence.startswith(f"smollm2-raw {way} (seed 0) and smollm2-raw freely cannot be told apart: +60.00 ")
    assert piped(table["table"])[-1] in markdown
    assert f"questions, {way}" in markdown
    assert table["table"] in page.tables
    assert sentence in page.items


def test_families_of_ablations_are_those_of_the_systems_that_are_shown(hand, capsys, monkeypatch):
    asked = []

    def pages(done, systems):
        asked.append(systems)
        table = [("variant", "EM gain"), ("lora.rank=2", "<-1.00>")]
        words = {"name": "rank", "of": " (raw)", "why": "Why?", "about": "about", "again": "make ablate", "id": "rank"}
        return [
            {**words, "table": table, "costs": [("peak",)], "sentences": ["worse"], "plot": "<svg/>", "missing": "2"}
        ]

    monkeypatch.setattr(report.ablations, "pages", pages)
    _, page, markdown = made(hand, capsys)
    assert asked == [{"smollm2-raw", "smollm2-qlora"}]
    assert "## rank (raw)\n" in markdown
    assert "| lora.rank=2 | <-1.00> |" in markdown
    assert "svg" not in markdown
    html = (hand / "report.html").read_text()
    assert "Ablation: rank (raw)" in html
    assert "&lt;-1.00&gt;" in html
    assert "<figure><svg/>" in html
    assert page


def test_trainings_are_those_of_the_adapters_that_are_shown(hand, capsys):
    stored(hand, "train", "smollm2-qlora", {"em": 1.0}, folder="of-another-adapter")
    _, page, _ = made(hand, capsys)
    assert [row[0].rpartition("/")[2] for row in page.tables[3][1:]][:2] == [
        "smollm2-qlora-s0-train",
        "smollm2-raw-s0-eval",
    ]
    assert "of-another-adapter" not in page.text


def test_systems_are_shown_alone_and_one_that_was_not_run_says_why(hand, capsys):
    (hand / "logs").mkdir()
    (hand / "logs" / "raw7b-s0-12345678-eval.log").write_text("loading\nerror: No CUDA device. raw7b needs one\n")
    (hand / "logs" / "raw7b-small-s0-12345678-eval.log").write_text("error: of another system\n")
    stored(hand, "train", "tinyllama1b", {"em": 1.0})
    out, page, markdown = made(hand, capsys, "--systems", "smollm2-qlora", "raw7b", "api8b", "tinyllama1b")
    assert cell(out, "system") == ["smollm2-qlora"]
    assert page.items[:3] == [
        "raw7b is in no table: No CUDA device. raw7b needs one",
        "api8b is in no table: not run",
        "tinyllama1b is in no table: not run",
    ]
    assert markdown.splitlines()[2:5] == [f"- {item}" for item in page.items[:3]]
    assert "smollm2-raw" not in page.text
    report.main([str(hand), "--systems", "smollm2-qlora", "raw7b", "api8b"])
    assert capsys.readouterr().out.splitlines()[-4:-1] == [*page.items[:2], f"{hand}/report.md, {hand}/report.html"]


@pytest.mark.parametrize(
    ("logs", "why"),
    [
        ({}, "not run"),
        ({"s-s0-x.log": "one\nerror: two\n\n"}, "two"),
        ({"s-s0-x.log": "error: old", "s-s1-x.log": "error: new"}, "new"),
        ({"s-s1-x.log": "error: old", "s-s0-x.log": "error: new"}, "new"),
        ({"s-s0-x.log": "error: old", "s-s1-x.log": '{"em": 1}'}, "not run"),
        ({"s-s0-x.log": " \n"}, "not run"),
        ({"s-small-s0-x.log": "error: of another", "s-s0.txt": "error: no log"}, "not run"),
        ({"s-s0-x.log": "\u00e9 killed"}, "\u00e9 killed"),
    ],
)
def test_a_system_is_absent_for_what_its_newest_log_ends_with(tmp_path, logs, why):
    (tmp_path / "logs").mkdir()
    for i, (name, text) in enumerate(logs.items()):
        (tmp_path / "logs" / name).write_text(text, encoding="utf-8")
        os.utime(tmp_path / "logs" / name, (i, i))
    assert report.why_not(tmp_path, "s") == why


def test_a_log_that_is_no_text_is_shown_as_far_as_it_is(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "s-s0-x.log").write_bytes(b"error: \xff!")
    assert report.why_not(tmp_path, "s") == "\ufffd!"


def test_a_report_of_nothing_says_what_to_run(tmp_path, capsys):
    with pytest.raises(UserError, match=f"{tmp_path}/: no finished evaluation there yet; make eval MODEL=… makes one"):
        report.main([str(tmp_path), "--systems", "raw7b"])
    assert capsys.readouterr().out == "raw7b: not run\n"


def test_trainings_alone_are_no_report(tmp_path, hand):
    for run in hand.glob("*"):
        if not run.name.endswith("train"):
            run.rename(tmp_path / run.name)
    with pytest.raises(UserError, match="no finished evaluation"):
        report.main([str(hand)])


def test_the_folder_is_runs_unless_another_is_named(hand, monkeypatch, capsys):
    monkeypatch.chdir(hand.parent)
    report.main([])
    assert capsys.readouterr().out.splitlines()[-2] == "runs/report.md, runs/report.html"


def test_it_is_a_program(hand, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report.py", str(hand / "absent")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(report.__file__, run_name="__main__")
    assert capsys.readouterr().err.startswith(f"error: {hand}/absent/: no finished evaluation there yet")


# ---- right and wrong answers ---------------------------------------------------------------------------------------


def test_mistakes_are_not_explained_by_other_data_than_was_answered(hand, capsys):
    dev = hand.parent / "dev.json"
    dev.write_text(dev.read_text().replace("What?", "What now?", 1))
    out, page, markdown = made(hand, capsys)
    assert out["groups"][0]["mistakes"] == []
    assert "McNemar" in page.text
    assert "Right and wrong answers" not in page.text + markdown
    dev.write_text("damaged")
    assert made(hand, capsys)[0]["groups"][0]["mistakes"] == []


def test_mistakes_of_runs_from_elsewhere_are_explained_by_the_data_that_is_here(hand, capsys, tmp_path, monkeypatch):
    dev, here = tmp_path / "dev.json", tmp_path / "here"
    for run in hand.glob("*-eval"):
        config = json.loads((run / "record.json").read_text())["config"]
        data = {**config["data"], "dev": "rajpurkar/squad"}
        changed(run, config={"data": data}, may_differ={"data_source": "/elsewhere/dev-v1.1.json"})
    monkeypatch.delenv("SQUAD_DIR", raising=False)
    assert made(hand, capsys)[0]["groups"][0]["mistakes"] == []
    here.mkdir()
    dev.rename(here / "dev-v1.1.json")
    monkeypatch.setenv("SQUAD_DIR", str(here))
    assert "Right and wrong answers" in made(hand, capsys)[1].text
    monkeypatch.setenv("SQUAD_DIR", str(tmp_path))
    assert made(hand, capsys)[0]["groups"][0]["mistakes"] == []


def test_mistakes_are_of_the_part_of_the_data_that_was_asked(hand, capsys):
    dev = squad.read(str(hand.parent / "dev.json"), "dev")
    part = squad.Dataset(squad.stratified(dev.examples, 3), dev.source)
    kept = {e.id for e in part.examples}
    run = hand / "smollm2-raw-s0-eval"
    data = {**json.loads((run / "record.json").read_text())["config"]["data"], "dev_questions": 3}
    changed(run, config={"data": data}, must_match={"data": part.sha256}, result={"n": 3})
    lines = [line for line in (run / "questions.jsonl").read_text().splitlines() if json.loads(line)["id"] in kept]
    (run / "questions.jsonl").write_text("\n".join(lines) + "\n")
    found, _ = sorted(made(hand, capsys)[0]["groups"], key=lambda group: group["must_match"]["data"] != part.sha256)
    assert sum(found["mistakes"][0]["kinds"].values()) == 3


def test_of_timings_alone_there_are_no_mistakes(hand, capsys):
    for file in hand.glob("*-eval/record.json"):
        file.unlink()
    out, page, _ = made(hand, capsys)
    assert cell(out, "EM [95 %]") == ["–", "–"]
    assert cell(out, "n") == ["–", "–"]
    assert out["groups"][0]["mistakes"] == []
    assert page.items == []


# ---- how each was made ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "fresh"), [("eval", True), ("bench", False), ("train", True)])
def test_what_is_made_again_of_a_hosted_model_is_asked_again(hand, kind, fresh):
    r = record.read_one(hand / "smollm2-raw-s0-eval" / "record.json")
    r["config"]["api"] = {"url": "x"}
    assert report.provenance({**r, "kind": kind})[-1].endswith(" FRESH=1") == fresh


def test_every_run_says_how_to_make_it_again_of_its_own_configuration(runs, capsys):
    _, page, markdown = made(runs, capsys)
    for r in record.read_all(runs):
        again = f"make {r['kind']} MODEL={r['folder']}/config.yaml RUNS={runs}"
        assert again in page.text
        assert again in markdown
        assert load(f"{r['folder']}/config.yaml").hash(r["kind"]) == r["may_differ"]["config_hash"]


def test_a_report_escapes_what_it_did_not_write(hand, capsys):
    for path in hand.glob("*-eval/record.json"):
        path.write_text(path.read_text().replace("dev.json", "<script>|.json"))
    _, page, markdown = made(hand, capsys)  # `Page` allows no script
    assert "<script>|.json" in page.text
    assert "<script>|.json, 5 questions" in markdown
    table = ["| a\\|b | c |", "| --- | --- |", "| d | \\|e\\| |"]
    assert pages.markdown_table([("a|b", "c"), ("d", "|e|")]).splitlines() == table


# ---- plots ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def plotted(monkeypatch, drawn):
    """What each plot is asked to show, and in which styles."""
    shown, styles = {}, {}

    def plot(name: str, data, of) -> str:
        shown[name] = data
        styles.update(of)
        return f"<svg>{name}</svg>"

    for name in ("learning", "tradeoff", "latencies", "reliability", "risk_coverage", "seeds"):
        monkeypatch.setattr(plots, name, functools.partial(plot, name))
    return shown, styles


def seconds(run: Path, *processes: list[float]) -> None:
    for i, totals in enumerate(processes):
        modes = {"natural": [{"total": s, "first": 9.0} for s in totals], "forced": [{"total": 8.0}]}
        (run / f"process-{i}.json").write_text(json.dumps({"modes": modes}))
    (run / "process-0.nvml.json").write_text("[]")


def test_plots_show_what_the_records_say(hand, capsys, plotted):
    metrics = [{"step": 1, "loss": 2.0}, {"step": 2, "em": 30.0}]
    (hand / "smollm2-qlora-s0-train" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    seconds(hand / "smollm2-raw-s0-bench", [0.25, 0.5], [0.125])
    seconds(hand / "smollm2-qlora-s0-bench", [0.75])
    _, page, _ = made(hand, capsys)
    shown, styles = plotted
    assert shown["learning"] == [("smollm2-qlora", metrics)]
    assert shown["tradeoff"] == [
        ("smollm2-raw", 20.0, (0.0, pytest.approx(50)), 123.4, [110.2, 130.7]),
        ("smollm2-qlora", 60.0, (pytest.approx(25), pytest.approx(250 / 3)), 61.6, None),
    ]
    assert shown["latencies"] == {"smollm2-raw": [250.0, 500.0, 125.0], "smollm2-qlora": [750.0]}
    probabilities = dict(zip(ROWS["smollm2-raw 0"], (0.9, 0.8, 0.7, 0.6, 0.5), strict=True))
    for name in ("smollm2-raw", "smollm2-qlora"):
        right = {id_: bool(em) for id_, (em, _) in ROWS[f"{name} 0"].items()}
        (expected, found) = reliability(probabilities, right), shown["reliability"][name]
        assert [(share, n) for _, share, _, n in found] == [(share, n) for _, share, _, n in expected]
        assert [p for p, *_ in found] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    answered, wrong = shown["risk_coverage"]["smollm2-qlora"]
    assert answered.tolist() == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert wrong.tolist() == pytest.approx([0, 0, 0, 0, 0.2])
    assert shown["seeds"] == {"smollm2-qlora": [80.0, 40.0]}
    assert styles == plots.styles_of(["smollm2-raw", "smollm2-qlora"])
    for words in (
        "Learning: exact match of each evaluation, and the loss.",
        "How long single queries take; the line is at 95 %.",
    ):
        assert words in page.text


def test_calibrated_answers_have_a_row_and_a_curve_of_their_own(hand, capsys, plotted):
    exact = dict.fromkeys(ROWS["smollm2-qlora 0"], 0.8)
    (hand / "smollm2-qlora-s0-eval" / "confidence.json").write_text(json.dumps(exact))
    (hand / "smollm2-raw-s0-eval" / "confidence.json").write_text('{"of others": 0.5}')
    _, page, _ = made(hand, capsys)
    rows = [row for table in page.tables if table[0][0] == "probabilities" for row in table[1:]]
    assert [row[0] for row in rows] == ["smollm2-raw", "smollm2-qlora", "smollm2-qlora, calibrated"]
    assert rows[2][1] == "32.0" != rows[1][1], "each bin is one answer: four times 0.2 and once 0.8, of five: 32"
    assert set(plotted[0]["reliability"]) == {row[0] for row in rows}


def test_what_was_not_kept_is_not_plotted(hand, capsys, plotted):
    for path in hand.glob("*-eval/questions.jsonl"):
        path.write_text(path.read_text().replace('"logprob"', '"other"', 1))  # of one question is enough
    made(hand, capsys)
    assert plotted[0].keys() == {"tradeoff", "seeds"}
    for path in [*hand.glob("*-bench"), *hand.glob("*-s1-eval")]:
        (path / "record.json").unlink()
    plotted[0].clear()
    made(hand, capsys)
    assert plotted[0] == {}


def test_random_weights_are_timed_and_not_scored(hand, capsys, plotted):
    shapes = ("base.random_weights=true",)
    stored(hand, "train", "smollm2-raw", {"em": None}, words=shapes, folder="trained")
    (hand / "trained" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    adapter = {"adapter": f"{hand}/trained/best"}
    stored(hand, "eval", "smollm2-raw", {"em": None, "f1": None, "n": 5} | adapter, words=shapes, folder="random")
    seconds(clocked(hand, "smollm2-raw", 50.0, None, 1.0, 10, words=shapes, folder="timed"), [0.5])
    made(hand, capsys)
    assert "learning" not in plotted[0]
    assert [name for name, *_ in plotted[0]["tradeoff"]] == ["smollm2-raw", "smollm2-qlora"]
    assert plotted[0]["latencies"] == {"smollm2-raw (random weights)": [500.0]}


def test_lines_of_one_name_are_told_apart_by_their_seeds(hand, capsys, plotted):
    answered(hand, "smollm2-qlora", 3, words=("train.lr=9e-3",), rows=ROWS["smollm2-qlora 1"])
    clocked(hand, "smollm2-qlora", 70.0, None, 1.0, 10, seed=7)
    made(hand, capsys)
    assert [*plotted[1]][:4] == [
        "smollm2-raw",
        "smollm2-qlora, seed 3",
        "smollm2-qlora, seed 0, 1",
        "smollm2-qlora, seed 7",
    ]


# ---- end to end, by the records that scripts write -----------------------------------------------------------------


def evaluated(dev: Path, runs: Path, system: str, seed: int, right: float, *overrides: str) -> dict:
    """A record of an evaluation whose answers are right for that share of the questions, trained where it has LoRA."""
    config = load(system, [f"seed={seed}", f"data.dev={dev}", f"runs={runs}", *overrides])
    data = squad.load(config.data, "dev")
    texts = {
        e.id: e.answers[0].text if (7 * i + seed) % 100 < 100 * right else "no" for i, e in enumerate(data.examples)
    }
    found = score(data.examples, texts)
    adapter = None
    if config.lora:
        training = record.new_run(config, "train")
        rows = [{"step": step, "loss": 3 / step, "em": 10.0 * step if step % 3 == 0 else None} for step in range(1, 8)]
        write_text(training / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        record.write(training, config, "train", data, DEVICE, {})
        adapter = f"{training}/best"
    folder = record.new_run(config, "eval")
    rows = [
        {
            "id": e.id,
            "text": texts[e.id],
            "em": found.correct[e.id],
            "f1": found.overlap[e.id],
            "hit_limit": False,
            "logprob": -0.1 if found.correct[e.id] else -1.0,
            "article": e.title,
        }
        for e in data.examples
    ]
    write_text(folder / "questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    result = {"em": found.em, "f1": found.f1, "n": found.n, "adapter": adapter, "adapter_sha256": adapter and "ab" * 32}
    return record.write(folder, config, "eval", data, DEVICE, result)


def timed(dev: Path, runs: Path, system: str, p95: float, *overrides: str) -> dict:
    config = load(system, [f"data.dev={dev}", f"runs={runs}", *overrides])
    folder = record.new_run(config, "bench")
    queries = [{"total": p95 / 1000 * i / 95} for i in range(1, 101)]
    write_text(folder / "process-0.json", json.dumps({"modes": {"natural": queries}}))
    peak = {"allocated_bytes": 2**30, "reserved_bytes": 2**31, "rss_bytes": 2**32}
    result = {
        "n": 100,
        "latency": {"p95_ms": p95, "p95_interval_ms": [p95 - 5, p95 + 5]},
        "peak": peak,
        "nvml_peak": None,
        "natural": {"queries_per_s": 1000 / p95},
        "phases": {"natural": {"energy_j_per_query": 12.34}},
    }
    return record.write(folder, config, "bench", squad.load(config.data, "dev"), DEVICE, result)


@pytest.fixture
def runs(tmp_path) -> Path:
    """Records of an adapter with two seeds, its base, and timings of both, on 30 questions of 3 articles."""
    dev, runs = squad_file(tmp_path / "dev.json", paragraphs=6, questions=5), tmp_path / "runs"
    evaluated(dev, runs, "smollm2-raw", 0, 0.1)
    for seed in range(2):
        evaluated(dev, runs, "smollm2-qlora", seed, 0.8)
    timed(dev, runs, "smollm2-raw", 200.0)
    timed(dev, runs, "smollm2-qlora", 100.0)
    return runs


def test_the_page_fetches_nothing_and_draws_everything(runs, capsys, drawn):
    out, page, _ = made(runs, capsys)
    assert cell(out, "p95 ms [95 %]") == ["200 [195, 205] (n 100)", "100 [95, 105] (n 100)"]
    assert page.fetched == []
    text = (runs / "report.html").read_text()
    labels = set(re.findall(r'<svg role="img" aria-label="([^"]+)"', text))
    assert len(labels) == text.count("<svg ") == 6
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert all(name in ids for name in re.findall(r'(?:href="|url\()#([^")]+)', text))
