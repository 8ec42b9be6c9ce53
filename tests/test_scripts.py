"""The scripts as a user meets them: what they print, what they write, and how they refuse."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import ask
import bench_latency
import eval_loop
import report
import train_loop
from common import stopping
from common.errors import UserError
from tests.conftest import ROOT

import pytest
from packaging.requirements import Requirement


def run(*command: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


# ---- from training to the report -----------------------------------------------------------------------------------


@pytest.fixture
def finished(tiny_config, tmp_path, capsys, monkeypatch):
    """A trained, scored and timed adapter and its scored base; returns what each script printed."""
    monkeypatch.setattr(bench_latency, "FIXED", 3)
    raw = tmp_path / "raw.yaml"
    raw.write_text(tiny_config.read_text().replace("system: tiny", "system: raw"))
    out = {}
    for name, main, arguments in (
        ("train", train_loop.main, [str(tiny_config)]),
        ("eval", eval_loop.main, [str(tiny_config)]),
        ("bench", bench_latency.main, [str(tiny_config)]),
        ("raw", eval_loop.main, [str(raw), "lora=null", "base.dtype=bf16"]),
        ("report", report.main, [str(tmp_path / "runs")]),
    ):
        main(arguments)
        out[name] = capsys.readouterr().out
    return out


def test_every_script_ends_with_one_json_object_and_the_report_says_it_all(finished, tmp_path):
    results = {name: json.loads(out.strip().splitlines()[-1]) for name, out in finished.items()}
    evaluation, bench = results["eval"], results["bench"]
    assert f"EM {evaluation['em']:.2f}" in finished["eval"]
    assert evaluation["em_interval"][0] <= evaluation["em"] <= evaluation["em_interval"][1]
    predictions = json.loads((tmp_path / evaluation["run"] / "predictions.json").read_text())
    assert len(predictions) == evaluation["n"] == 12
    assert bench["n"] == bench["natural"]["n"] == 4
    assert bench["fixed"]["n"] == 3  # as FIXED says here
    assert bench["fixed"]["mean_tokens"] == 32
    assert bench["latency"]["p95_ms"] >= bench["latency"]["p50_ms"] >= bench["ttft"]["p50_ms"] > 0
    assert bench["latency"]["p95_interval_ms"] is None  # 4 queries cannot give one
    assert "too small" in finished["bench"]
    assert "no VRAM was measured" in finished["bench"]
    assert bench["peak"]["rss_bytes"] > 0

    (group,) = results["report"]["groups"]
    assert {row["system"] for row in group["rows"]} == {"tiny", "raw"}
    (test,) = group["tests"]
    assert test["em_gain"] == pytest.approx(evaluation["em"] - results["raw"]["em"])
    page, markdown = ((tmp_path / "runs" / f"report.{kind}").read_text() for kind in ("html", "md"))
    for text in (page, markdown, finished["report"]):
        assert f"{evaluation['f1']:.2f}" in text
        assert "McNemar" in text
    for run, found in zip((results["eval"], results["raw"]), group["mistakes"], strict=True):
        assert sum(found["kinds"].values()) == run["n"]
        assert 100 * found["kinds"]["right"] / run["n"] == pytest.approx(run["em"])
    assert all("Right and wrong answers" in text for text in (page, markdown))


def test_a_record_says_what_decided_the_number(finished, tmp_path):
    (path,) = (tmp_path / "runs").glob("tiny-*-eval-001/record.json")
    record = json.loads(path.read_text())
    assert record["must_match"].keys() == {"data", "questions", "prompt", "scorer", "window"}
    assert record["may_differ"]["versions"]["torch"]
    assert record["may_differ"]["engine"] == "stream"
    for other in (tmp_path / "runs").glob("tiny-*/record.json"):
        assert json.loads(other.read_text())["may_differ"]["tokenizer"] == record["may_differ"]["tokenizer"]
    assert record["config"]["lora"]["rank"] == 4


def test_an_untrained_system_says_how_to_train_it(tiny_config):
    with pytest.raises(UserError, match="make train MODEL=tiny"):
        eval_loop.main([str(tiny_config)])


def test_a_context_longer_than_the_window_is_cut_and_counted(tiny_config, dev_file, capsys):
    data = json.loads(dev_file.read_text())
    paragraph = data["data"][0]["paragraphs"][0]
    paragraph["context"] += " amber" * 2000
    dev_file.write_text(json.dumps(data))
    for overflow in ("truncate", "chunk"):
        eval_loop.main([str(tiny_config), "lora=null", f"window.overflow={overflow}"])
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["truncated_share"] == len(paragraph["qas"]) / 12


def test_dev_can_be_a_fixed_part_of_itself(tiny_config, capsys):
    eval_loop.main([str(tiny_config), "lora=null", "data.dev_questions=5"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 5


def test_asking_prints_answer_span_confidence_and_time(tiny_config, capsys, monkeypatch):
    arguments = [str(tiny_config), "lora=null", "--context", "An amber bridge stands by the canal.", "--question"]
    ask.main([*arguments, "What stands by the canal?"])
    answer, about, line = capsys.readouterr().out.splitlines()[-3:]
    result = json.loads(line)
    assert result["answer"] == answer or answer == "(nothing)"
    assert 0 < result["confidence"] <= 1
    assert result["passes"] <= result["tokens"] <= 32
    assert ("not a span" in about) == (result["span"] is None)
    monkeypatch.setattr(ask.sys, "stdin", io.StringIO("What stands by the canal?\n"))
    ask.main([*arguments, ""])
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["answer"] == result["answer"]


@pytest.mark.parametrize(
    ("context", "question", "stdin", "expected"),
    [
        ("c", "q", "", ("c", "q")),
        ("", "q", " two\n\nparts \n", ("two\n\nparts", "q")),
        ("c", "", " q \n", ("c", "q")),
        ("", "", "two\n\nparts\n\nq?\n", ("two\n\nparts", "q?")),
        ("", "", "q?", "no context"),
        ("c", "", " ", "no question"),
        ("", "", "", "no context"),
    ],
)
def test_what_is_not_given_comes_from_stdin(monkeypatch, context, question, stdin, expected):
    monkeypatch.setattr(ask.sys, "stdin", io.StringIO(stdin))
    if isinstance(expected, tuple):
        assert ask.texts(context, question) == expected
    else:
        with pytest.raises(UserError, match=expected):
            ask.texts(context, question)


def test_text_that_is_no_text_and_a_context_that_is_cut_are_said(tiny_config, capsys):
    with pytest.raises(UserError, match="must be UTF-8"):
        ask.texts("caf\udce9", "q")
    for overflow, cut in (("truncate", True), ("chunk", False)):
        ask.main([str(tiny_config), "lora=null", f"window.overflow={overflow}", "--question", "Which?", "--context",
                  "amber bridge " * 600])  # fmt: skip
        said = capsys.readouterr().out
        assert json.loads(said.splitlines()[-1])["context_cut"] == cut
        assert ("first 416 tokens" in said) == cut


def test_make_hands_text_on_as_it_was_typed(tmp_path):
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s|%s" "$CONTEXT" "$QUESTION"\n')
    fake.chmod(0o755)
    ready, text = tmp_path / ".ready", "It cost $5 million and $(HOME) 'quoted'."
    ready.touch()
    typed = [f"CONTEXT={text}", "QUESTION=$1?", "MODEL=x.yaml", f"VENV={tmp_path}"]
    assert run("make", "-s", "ask", *typed, "-o", str(ready)).stdout == f"{text}|$1?"


def test_a_measuring_process_that_dies_is_named(tiny_config, monkeypatch):
    monkeypatch.setattr(stopping, "run", lambda command: -9)
    with pytest.raises(UserError, match="measuring process 1 of 2 ended with -9"):
        bench_latency.main([str(tiny_config), "lora=null", "bench.processes=2"])


def test_the_process_in_the_middle_is_reported(tiny_config, monkeypatch, capsys):
    """Three processes whose queries take 1, 3 and 2 times as long."""
    times = iter([1.0, 3.0, 2.0])

    def measured(command):
        slow = next(times)
        sample = {"first": 0.01 * slow, "last": 0.03 * slow, "tokens": 5, "passes": 2, "drafted": 15, "accepted": 3}
        queries = [{**sample, "total": 0.04 * slow * (1 + i / 100)} for i in range(100)]
        memory = {"allocated_bytes": None, "reserved_bytes": None, "rss_bytes": int(slow)}
        found = {"ids": [str(i) for i in range(100)],
                 "modes": dict.fromkeys(bench_latency.MODES, queries),
                 "gauges": {"natural": memory}, "made_by": {"engine": "drafts"}, "peak": memory,
                 "nvml": {"natural": {"process_bytes": None, "device_bytes": int(slow) * 2**30, "processes": 2,
                                      "energy_j": 100 * slow, "clock_mhz": [1, 1000 * slow, 2000],
                                      "throttled": ["power cap"] if slow == 3 else []}}}  # fmt: skip
        Path(command[-1]).write_text(json.dumps(found))
        return 0

    monkeypatch.setattr(stopping, "run", measured)
    bench_latency.main([str(tiny_config), "lora=null", "bench.processes=3"])
    said = capsys.readouterr().out
    result = json.loads(said.splitlines()[-1])
    assert result["natural"]["processes_p95_ms"] == pytest.approx([77.62, 232.86, 155.24])
    assert result["latency"]["p95_ms"] == pytest.approx(155.24)
    low, high = result["latency"]["p95_interval_ms"]
    assert low < 155.24 < high
    assert result["tpot"]["p50_ms"] == pytest.approx(1000 * 0.04 / 4)
    assert result["natural"]["drafts_accepted"] == 0.2
    assert result["peak"]["rss_bytes"] == 3
    assert "200.0% apart" in said
    assert result["host"]["cores"] == os.cpu_count()
    assert f"host: {result['host']['load']:.1f} processes at work" in said
    assert result["phases"]["natural"] == {
        "allocated_bytes": None, "reserved_bytes": None, "rss_bytes": 3, "process_bytes": None,
        "device_bytes": 3 * 2**30, "processes": 2, "energy_j_per_query": 2.0, "clock_mhz": [1, 2000, 2000],
        "throttled": ["power cap"],
    }  # fmt: skip
    assert result["nvml_peak"] == {"process_bytes": None, "device_bytes": 3 * 2**30}


# ---- errors, from outside ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["sweep.py", "absent"], 'unknown sweep "absent"'),
        (["report.py", "absent"], "no finished evaluation"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command, words):
    result = run(sys.executable, *command, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (train_loop.main, ["qlora7B"], 'did you mean "qlora7b"'),
        (bench_latency.main, ["smollm2-raw", "data.dev=absent.json"], "absent.json: no such file"),
    ],
)
def test_what_is_wrong_is_named(main, arguments, words):
    with pytest.raises(UserError, match=words):
        main(arguments)


# ---- make ----------------------------------------------------------------------------------------------------------


def test_make_alone_lists_every_target_with_one_line():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    lines = run("make").stdout.splitlines()
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line.startswith("  ")}
    assert set(listed) == set(phony)
    assert all(listed.values())


def test_a_mistyped_target_is_named():
    result = run("make", "trian")
    assert result.returncode == 2
    assert 'no target "trian"' in result.stderr


@pytest.mark.parametrize(("code", "reported"), [(0, True), (1, True), (2, False), (143, False)])
def test_a_table_with_runs_that_failed_is_shown_and_one_that_was_mistyped_or_stopped_is_not(tmp_path, code, reported):
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "ran $1"\n[ "$1" != sweep.py ] || exit {code}\n')
    fake.chmod(0o755)
    (tmp_path / ".ready").touch()
    result = run("make", "-s", "table", f"VENV={tmp_path}", "-o", str(tmp_path / ".ready"))
    assert ("ran report.py" in result.stdout, result.returncode == 0) == (reported, reported)


def test_set_up_is_skipped_where_nothing_changed():
    assert (ROOT / ".venv" / ".ready").exists(), "run the tests by `make test`"
    dry = run("make", "--dry-run", "eval", "MODEL=smollm2-raw").stdout
    assert "eval_loop.py" in dry
    assert "pip install" not in dry


# ---- packaging -----------------------------------------------------------------------------------------------------


def test_the_lock_holds_every_requirement_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line and line[0] != "#")
    for requirement in map(Requirement, wanted):
        assert locked[requirement.name.lower()] in requirement.specifier, requirement


def test_demo_sets_are_as_large_and_as_apart_as_promised():
    train, dev = (json.loads((ROOT / "demo" / f"{name}.json").read_text())["data"] for name in ("train", "dev"))
    for data, articles, paragraphs, questions in ((train, 8, 30, 150), (dev, 5, 16, 80)):
        blocks = [p for article in data for p in article["paragraphs"]]
        assert len(data) >= articles
        assert len(blocks) >= paragraphs
        assert sum(len(p["qas"]) for p in blocks) >= questions
    assert not {a["title"] for a in train} & {a["title"] for a in dev}
    assert all(2 <= len(qa["answers"]) <= 3 for a in dev for p in a["paragraphs"] for qa in p["qas"])


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_nothing_large_and_no_squad_text_is_tracked():
    if run("git", "rev-parse", "HEAD").returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in run("git", "ls-files").stdout.split()]
    assert all(file.stat().st_size < 2**20 for file in files if file.exists())
    assert not [file for file in files if re.search(r"(train|dev)-v[12]\.[01]", file.name)]
