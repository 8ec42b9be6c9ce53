"""The report says what the records say: tables, verdicts, plots, provenance, and nothing that they do not."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import report
from common import record, squad
from common.config import load
from common.errors import UserError
from common.score import score
from tests.conftest import squad_file

import pytest

DEVICE = {"name": "a card"}


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
        record.write_text(training / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        record.write(training, config, "train", data, DEVICE, {})
        adapter = f"{training}/best"
    folder = record.new_run(config, "eval")
    rows = [
        {"id": e.id, "text": texts[e.id], "em": found.correct[e.id], "f1": found.overlap[e.id], "hit_limit": False,
         "logprob": -0.1 if found.correct[e.id] else -1.0, "article": e.title}
        for e in data.examples
    ]  # fmt: skip
    record.write_text(folder / "questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    result = {"em": found.em, "f1": found.f1, "n": found.n, "adapter": adapter, "adapter_sha256": adapter and "ab" * 32}
    return record.write(folder, config, "eval", data, DEVICE, result)


def timed(dev: Path, runs: Path, system: str, p95: float, *overrides: str) -> dict:
    config = load(system, [f"data.dev={dev}", f"runs={runs}", *overrides])
    folder = record.new_run(config, "bench")
    queries = [{"total": p95 / 1000 * i / 95} for i in range(1, 101)]
    record.write_text(folder / "process-0.json", json.dumps({"modes": {"natural": queries}}))
    peak = {"allocated_bytes": 2**30, "reserved_bytes": 2**31, "rss_bytes": 2**32}
    result = {
        "n": 100, "latency": {"p95_ms": p95, "p95_interval_ms": [p95 - 5, p95 + 5]}, "peak": peak, "nvml_peak": None,
        "natural": {"queries_per_s": 1000 / p95}, "phases": {"natural": {"energy_j_per_query": 12.34}},
    }  # fmt: skip
    return record.write(folder, config, "bench", squad.load(config.data, "dev"), DEVICE, result)


@pytest.fixture
def runs(tmp_path) -> Path:
    """Records of an adapter with three seeds, its base, and timings of both, on 60 questions of 3 articles."""
    dev, runs = squad_file(tmp_path / "dev.json", paragraphs=12, questions=5), tmp_path / "runs"
    evaluated(dev, runs, "smollm2-raw", 0, 0.1)
    for seed in range(3):
        evaluated(dev, runs, "smollm2-qlora", seed, 0.8)
    timed(dev, runs, "smollm2-raw", 200.0)
    timed(dev, runs, "smollm2-qlora", 100.0)
    return runs


class Page(HTMLParser):
    """Text, and what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.fetched = "", []
        self.feed(text)

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        self.fetched += [
            value for key, value in attrs if key in ("src", "href", "xlink:href", "srcset") and value[0] != "#"
        ]
        assert tag not in ("script", "link", "iframe")


def made(runs: Path, capsys, *arguments: str) -> tuple[dict, Page, str]:
    report.main([str(runs), *arguments])
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    return out, Page((runs / "report.html").read_text()), (runs / "report.md").read_text()


def test_seeds_make_one_line_with_their_mean(runs, capsys):
    found = [r["result"] for r in record.read_all(runs) if r["kind"] == "eval" and r["system"] == "smollm2-qlora"]
    out, page, markdown = made(runs, capsys)
    (group,) = out["groups"]
    raw, qlora = group["rows"]
    assert (raw["seeds"], qlora["seeds"]) == ("0", "0, 1, 2")
    mean = sum(r["em"] for r in found) / 3
    assert qlora["EM [95 %]"].startswith(f"{mean:.2f} [")
    for text in (page.text, markdown):
        assert f"mean of 3 seeds: EM {mean:.2f} [" in text
        assert text.count("smollm2-qlora (seed ") == 3  # a verdict each
        assert qlora["EM [95 %]"] in text


def test_timings_stand_beside_accuracy(runs, capsys):
    out, *_ = made(runs, capsys, "--usd-per-hour", "3.6")
    row = out["groups"][0]["rows"][1]
    assert row["p95 ms [95 %]"] == "100 [95, 105] (n 100)"
    assert row["peak memory"] == "2.00 GiB reserved"
    assert row["J a query"] == "12.3"
    assert row["USD a 1,000 queries"] == "0.1000"  # 0.1 s each


def test_a_timing_of_another_device_says_so_and_one_of_another_adapter_is_left_out(runs, capsys):
    for file in runs.glob("*-bench-*/record.json"):
        found = json.loads(file.read_text())
        found["may_differ"]["device"] = {"name": "another card"}
        if found["system"] == "smollm2-qlora":
            found["result"]["adapter_sha256"] = "cd" * 32
        file.write_text(json.dumps(found))
    out, page, text = made(runs, capsys)
    rows = {row["system"]: row for row in out["groups"][0]["rows"]}
    assert rows["smollm2-raw"]["device"] == "a card; timed on another card"
    assert rows["smollm2-qlora"]["p95 ms [95 %]"] == "–"
    assert "-bench-001 is in no table: another adapter" in page.text
    assert "-bench-001 is in no table: another adapter" in text


def test_nothing_right_is_no_certainty(tmp_path, capsys):
    dev = squad_file(tmp_path / "dev.json", paragraphs=12, questions=5)
    evaluated(dev, tmp_path / "runs", "smollm2-raw", 0, 0.0)
    (row,) = made(tmp_path / "runs", capsys)[0]["groups"][0]["rows"]
    assert re.fullmatch(r"0\.00 \[0\.00, [5-7]\.\d\d\]", row["EM [95 %]"])


def test_the_page_fetches_nothing_and_draws_everything(runs, capsys):
    _, page, _ = made(runs, capsys)
    assert page.fetched == []
    text = (runs / "report.html").read_text()
    labels = set(re.findall(r'<svg role="img" aria-label="([^"]+)"', text))
    assert len(labels) == text.count("<svg ") == 5
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert all(name in ids for name in re.findall(r'(?:href="|url\()#([^")]+)', text))


def test_what_was_not_kept_is_not_drawn(runs, capsys):
    for path in runs.glob("*-eval-*/questions.jsonl"):
        path.write_text(path.read_text().replace('"logprob"', '"other"'))
    for path in [*runs.glob("*/process-0.json"), *runs.glob("*/metrics.jsonl")]:
        path.unlink()
    made(runs, capsys)
    text = (runs / "report.html").read_text()
    assert re.findall(r'aria-label="([^"]+)"', text) == ["Exact match against p95 latency", "Exact match by seed"]


def test_every_run_says_how_to_make_it_again(runs, capsys):
    _, page, markdown = made(runs, capsys)
    for r in record.read_all(runs):
        again = f"make {r['kind']} MODEL={r['folder']}/config.yaml"
        assert again in page.text
        assert again in markdown
        assert load(f"{r['folder']}/config.yaml").hash(r["kind"]) == r["may_differ"]["config_hash"]
    assert f"ADAPTER={runs}/smollm2-qlora-s0" in page.text


def test_other_settings_are_another_line(runs, capsys, tmp_path):
    evaluated(tmp_path / "dev.json", runs, "smollm2-qlora", 3, 0.5, "train.lr=9e-3")
    out, *_ = made(runs, capsys)
    assert [row["seeds"] for row in out["groups"][0]["rows"]] == ["0", "3", "0, 1, 2"]


def test_a_base_of_several_seeds_is_compared_seed_by_seed(runs, capsys, tmp_path):
    for seed in (1, 2):
        evaluated(tmp_path / "dev.json", runs, "smollm2-raw", seed, 0.1)
    out, *_ = made(runs, capsys)
    assert len(out["groups"][0]["tests"]) == 3


def test_the_snapshot_stands_apart_with_the_interval_it_has(runs, capsys):
    _, page, markdown = made(runs, capsys)
    for text in (page.text, markdown):
        assert "70.33 [64.93, 75.22]" in text
        assert "Not measured by this code" in text


def test_asked_for_by_name_a_system_that_was_not_run_says_why(runs, capsys):
    (runs / "logs").mkdir()
    (runs / "logs" / "raw7b-s0-12345678-eval.log").write_text("loading\nerror: No CUDA device. raw7b needs one\n")
    (runs / "logs" / "raw7b-small-s0-12345678-eval.log").write_text("error: of another system\n")
    _, page, markdown = made(runs, capsys, "--systems", "smollm2-qlora", "raw7b", "api8b")
    for text in (page.text, markdown):
        assert "raw7b is in no table: No CUDA device. raw7b needs one" in text
        assert "api8b is in no table: not run" in text
        assert "smollm2-raw" not in text


def test_the_snapshots_figure_stands_beside_ours(runs, capsys, tmp_path):
    assert report.SNAPSHOT not in made(runs, capsys)[0]["groups"][0]["rows"][0]
    evaluated(tmp_path / "dev.json", runs, "raw7b", 0, 0.5)
    rows = {row["system"]: row for group in made(runs, capsys)[0]["groups"] for row in group["rows"]}
    assert rows["raw7b"][report.SNAPSHOT] == "54.33 (n 300)"
    assert rows["smollm2-raw"][report.SNAPSHOT] == "–"


def test_random_weights_have_no_accuracy(runs, capsys, tmp_path):
    config = load("qlora7b", ["base.random_weights=true", f"data.dev={tmp_path / 'dev.json'}", f"runs={runs}"])
    data = squad.load(config.data, "dev")
    record.write(record.new_run(config, "eval"), config, "eval", data, DEVICE, {"em": None, "f1": None, "n": 60})
    out, *_ = made(runs, capsys)
    (row,) = [r for g in out["groups"] for r in g["rows"] if r["system"] == "qlora7b (random weights)"]
    assert (row["EM [95 %]"], row["F1 [95 %]"]) == ("–", "–")


def test_a_report_says_why_tables_are_not_compared(runs, capsys, tmp_path):
    evaluated(tmp_path / "dev.json", runs, "smollm2-raw", 0, 0.1, "window.question=32")
    report.main([str(runs)])
    assert "not comparable with the table above: window" in capsys.readouterr().out


def test_a_report_explains_no_mistakes_by_other_data_than_was_answered(runs, capsys, tmp_path):
    dev = tmp_path / "dev.json"
    assert "Right and wrong answers" in made(runs, capsys)[1].text
    dev.write_text(dev.read_text().replace("?", "??", 1))
    _, page, _ = made(runs, capsys)
    assert "McNemar" in page.text
    assert "Right and wrong answers" not in page.text


def test_a_report_of_runs_from_elsewhere_explains_mistakes_by_the_data_that_is_here(
    runs, capsys, tmp_path, monkeypatch
):
    dev, here = tmp_path / "dev.json", tmp_path / "here"
    for path in runs.glob("*-eval-*/record.json"):
        was = json.loads(path.read_text())
        was["config"]["data"]["dev"], was["may_differ"]["data_source"] = "rajpurkar/squad", "/elsewhere/dev-v1.1.json"
        path.write_text(json.dumps(was))
    monkeypatch.delenv("SQUAD_DIR", raising=False)
    assert "Right and wrong answers" not in made(runs, capsys)[1].text
    here.mkdir()
    dev.rename(here / "dev-v1.1.json")
    monkeypatch.setenv("SQUAD_DIR", str(here))
    assert "Right and wrong answers" in made(runs, capsys)[1].text


def test_a_report_escapes_what_it_did_not_write(runs, capsys):
    for path in runs.glob("*-eval-*/record.json"):
        path.write_text(path.read_text().replace("dev.json", "<script>.json"))
    _, page, _ = made(runs, capsys)  # `Page` allows no script
    assert "<script>.json" in page.text


def test_a_report_of_nothing_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match="make eval"):
        report.main([str(tmp_path)])
