"""The scripts as a user meets them: what they print, what they write, and how they refuse."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import bench_latency
import eval_loop
import train_loop
from common.arguments import parser
from common.errors import UserError
from scripts import ask, report
from tests import answering
from tests.conftest import ROOT

import pytest
import yaml
from packaging.requirements import Requirement


def run(*command: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


# ---- from training to the report -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(answering_base, tmp_path_factory):
    """A trained, scored and timed adapter and its scored base: (folder, what each script printed)."""
    folder = tmp_path_factory.mktemp("finished")
    train, dev = (
        answering.squad_file(folder / f"{name}.json", n, seed) for name, n, seed in (("train", 32, 0), ("dev", 12, 1))
    )
    config = {
        "system": "small",
        "base": {"path": str(answering_base), "dtype": "fp32"},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(train), "dev": str(dev)},
        "window": {"answer": 16},
        "train": {
            "lr": 0.01,
            "questions_per_step": 8,
            "max_steps": 16,
            "epochs": 2,
            "eval_every": 8,
            "pack_tokens": 512,
        },
        "runs": str(folder / "runs"),
        "bench": {"queries": 4, "warmup_queries": 1, "processes": 1},
    }
    for system in ("small", "raw"):
        (folder / f"{system}.yaml").write_text(yaml.safe_dump({**config, "system": system}))
    small, out = str(folder / "small.yaml"), {}
    for name, main, arguments in (
        ("train", train_loop.main, [small]),
        ("eval", eval_loop.main, [small]),
        ("bench", bench_latency.main, [small]),
        ("raw", eval_loop.main, [str(folder / "raw.yaml"), "lora=null", "base.dtype=bf16"]),
        ("report", report.main, [str(folder / "runs")]),
    ):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
            patch.setattr(bench_latency, "FIXED", 3)
            main(arguments)
        out[name] = said.getvalue()
    return folder, out


def test_every_script_ends_with_one_json_object_and_the_report_says_it_all(finished):
    folder, out = finished
    results = {name: json.loads(text.strip().splitlines()[-1]) for name, text in out.items()}
    evaluation, bench = results["eval"], results["bench"]
    assert f"EM {evaluation['em']:.2f}" in out["eval"]
    assert 0 < results["raw"]["em"] < evaluation["em"], "training helps"
    assert results["train"]["em"] == evaluation["em"]
    assert evaluation["em_interval"][0] < evaluation["em"] < evaluation["em_interval"][1]
    predictions = json.loads((Path(evaluation["run"]) / "predictions.json").read_text())
    assert len(predictions) == evaluation["n"] == 36
    assert bench["n"] == bench["natural"]["n"] == 4
    assert (bench["fixed"]["n"], bench["fixed"]["mean_tokens"]) == (3, 16)
    assert bench["adapter"] == evaluation["adapter"]
    assert "no VRAM was measured" in out["bench"]

    (group,) = results["report"]["groups"]
    assert {row["system"] for row in group["rows"]} == {"small", "raw"}
    (test,) = group["tests"]
    assert test["em_gain"] == pytest.approx(evaluation["em"] - results["raw"]["em"])
    page, markdown = ((folder / "runs" / f"report.{kind}").read_text() for kind in ("html", "md"))
    for text in (page, markdown, out["report"]):
        assert f"{evaluation['f1']:.2f}" in text
        assert "McNemar" in text
    of = {"small": evaluation, "raw": results["raw"]}
    for row, found in zip(group["rows"], group["mistakes"], strict=True):
        run = of[row["system"]]
        assert sum(found["kinds"].values()) == run["n"]
        assert 100 * found["kinds"]["right"] / run["n"] == pytest.approx(run["em"])
    assert all("Right and wrong answers" in text for text in (page, markdown))


def test_a_record_says_what_decided_the_number(finished):
    folder, _ = finished
    (path,) = (folder / "runs").glob("small-*-eval-001/record.json")
    record = json.loads(path.read_text())
    assert record["must_match"].keys() == {"data", "questions", "prompt", "scorer", "window"}
    assert record["may_differ"]["versions"]["torch"]
    assert record["may_differ"]["engine"] == "stream"
    for other in (folder / "runs").glob("small-*/record.json"):
        assert json.loads(other.read_text())["may_differ"]["tokenizer"] == record["may_differ"]["tokenizer"]
    assert record["config"]["lora"]["rank"] == 4


def test_asking_prints_answer_span_confidence_and_time(answering_config, capsys, monkeypatch):
    context = "Note 1: here are the otter, the chisel and nothing more."
    arguments = [str(answering_config), "lora=null", "--context", context, "--question"]
    ask.main([*arguments, "Which animal is meant?"])
    answer, sentence, about, line = capsys.readouterr().out.splitlines()[-4:]
    result = json.loads(line)
    assert sentence == context.replace("otter", "»otter«")
    assert answer == result["answer"] == "otter"
    assert result["span"] == [21, 26]
    assert 0.5 < result["confidence"] <= 1
    assert about.startswith(f"characters 21 to 26 of the context; confidence {result['confidence']:.0%}; ")
    assert result["ended_by_itself"]
    assert result["passes"] <= result["tokens"] == 2
    assert not result["context_cut"]
    monkeypatch.setattr(ask.sys, "stdin", io.StringIO("Which animal is meant?\n"))
    ask.main([*arguments, ""])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["answer"] == "otter"


@pytest.mark.parametrize(
    ("context", "question", "stdin", "expected"),
    [
        ("c", "q", "", ("c", ["q"])),
        ("", "q", " two\n\nparts \n", ("two\n\nparts", ["q"])),
        ("c", "", " q \n", ("c", ["q"])),
        ("", "", "two\n\nparts\n\nq?\n", ("two\n\nparts", ["q?"])),
        ("", "", "q?", "no context"),
        ("c", "", " ", "no question"),
        ("", "", "", "no context"),
    ],
)
def test_what_is_not_given_comes_from_stdin(monkeypatch, context, question, stdin, expected):
    monkeypatch.setattr(ask.sys, "stdin", io.StringIO(stdin))
    if isinstance(expected, tuple):
        assert given(context, question) == expected
    else:
        with pytest.raises(UserError, match=expected):
            given(context, question)


def given(context: str, question: str):
    return ask.given_texts(parser("ask").parse_args(["a model", "--context", context, "--question", question]))


def test_text_that_is_no_text_and_a_context_that_is_cut_are_said(answering_config, capsys):
    with pytest.raises(UserError, match="must be UTF-8"):
        given("caf\udce9", "q")
    window = ["window.context=64", "window.stride=64", "window.answer=16"]
    for overflow, cut in (("truncate", True), ("chunk", False)):
        ask.main(
            [
                str(answering_config),
                "lora=null",
                f"window.overflow={overflow}",
                *window,
                "--question",
                "Which?",
                "--context",
                "the otter and " * 50,
            ]
        )
        said = capsys.readouterr().out
        assert json.loads(said.splitlines()[-1])["context_cut"] == cut
        assert ("first 64 tokens" in said) == cut


def test_make_hands_text_on_as_it_was_typed(tmp_path):
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\n[ "$2" != scripts.ask ] || printf "%s|%s" "$CONTEXT" "$QUESTION"\n')
    fake.chmod(0o755)
    ready, text = tmp_path / ".ready", "It cost $5 million and $(HOME) 'quoted'."
    ready.touch()
    typed = [f"CONTEXT={text}", "QUESTION=$1?", "MODEL=x.yaml", f"VENV={tmp_path}"]
    assert run("make", "-s", "ask", *typed, "-o", str(ready)).stdout == f"{text}|$1?"


# ---- errors, from outside ------------------------------------------------------------------------------------------


def test_a_mistake_is_one_line_and_exit_code_2():
    result = run(sys.executable, "-m", "scripts.sweep", "absent", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert 'unknown sweep "absent"' in result.stderr
    assert "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (train_loop.main, ["qlora7B"], 'did you mean "qlora7b"'),
        (bench_latency.main, ["smollm2-raw", "data.dev=absent.json"], "absent.json: no such file"),
        (report.main, ["absent"], "no finished evaluation"),
    ],
)
def test_what_is_wrong_is_named(main, arguments, words):
    with pytest.raises(UserError, match=words):
        main(arguments)


# ---- make ----------------------------------------------------------------------------------------------------------


def test_make_alone_lists_every_target_with_one_line():
    phony = re.search(r"^TARGETS := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    lines = run("make").stdout.splitlines()
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line.startswith("  ")}
    assert set(listed) == set(phony)
    assert all(listed.values())


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["trian"], 'target "trian" is not known — did you mean "train"?'),
        (["xyzzy"], 'target "xyzzy" is not known; make alone lists what is'),
        (["eval", "raw7b"], 'target "raw7b" is not known; it is a system: MODEL=raw7b'),
        (["train", "ARG=train.lr=1"], 'variable "ARG" is not known — did you mean "ARGS"?'),
        (["train", "SEEDS=3"], 'variable "SEEDS" is not known — did you mean "SEED"?'),
        (["eval", "model=raw7b"], 'variable "model" is not known — did you mean "MODEL"?'),
        (["train", "learning_rate=1"], 'variable "learning_rate" is not known; it is a setting: ARGS="train.lr=…"'),
        (["train", "train.lr=1"], 'variable "train.lr" is not known; it is a setting: ARGS="train.lr=…"'),
    ],
)
def test_a_mistyped_target_or_variable_is_named_before_anything_runs(typed, says):
    result = run("make", "--no-print-directory", "--dry-run", *typed)
    assert result.returncode == 2
    assert result.stderr.splitlines()[0] == f"error: {says}"
    assert result.stdout == ""


@pytest.mark.parametrize(("value", "on"), [("1", True), ("yes", True), ("0", False), ("no", False), ("", False)])
def test_a_switch_that_is_off_is_off(value, on):
    done = run("make", "--dry-run", "eval", f"FORCE={value}", f"FRESH={value}")
    assert ("--force" in done.stdout, "--fresh" in done.stdout) == (on, on)


@pytest.mark.parametrize("name", ["ADAPTER", "RUNS", "MODEL", "SEED"])
def test_a_variable_that_is_typed_and_empty_is_an_error(name):
    done = run("make", "--dry-run", "eval", f"{name}=")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == f"error: {name} is empty; leave it out, or say which"


@pytest.mark.parametrize("name", ["MODEL", "SEED", "RUNS"])
def test_nothing_that_is_typed_is_run_by_the_shell(tmp_path, name):
    mark = tmp_path / "run"
    for target in ("eval", "bench-train", "bundle"):
        run("make", "--dry-run", target, f"{name}=`touch {mark}`")
    assert not mark.exists()


def test_variables_of_the_tools_that_make_starts_are_none_of_ours():
    others = ["HF_HOME=/x", "CUDA_VISIBLE_DEVICES=0", "OPENAI_API_KEY=k", "HF_TOKEN=t", "SQUAD_DIR=/y"]
    assert run("make", "--dry-run", "eval", "MODEL=raw7b", *others).returncode == 0


def test_torch_for_an_older_driver_is_installed_by_setup_alone(tmp_path):
    done = run("make", "--dry-run", "setup", "CUDA=cu126", "TORCH_INDEX=https://mirror/whl")
    (line,) = (line for line in done.stdout.splitlines() if "+cu126" in line)
    pinned = next(line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("torch=="))
    assert f"{pinned}+cu126 --index-url https://mirror/whl/cu126 " in line.replace("'", "")
    for typed, says in (
        (["setup", "CUDA=12.6"], "CUDA=12.6: name a build of torch, such as cu126 or cu130"),
        (["train", "CUDA=cu126"], "CUDA= belongs to make setup"),
    ):
        done = run("make", "--no-print-directory", "--dry-run", *typed)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[0] == f"error: {says}"
    mark = tmp_path / "run"
    run("make", "--dry-run", "setup", f"CUDA=cu12`touch {mark}`")
    assert not mark.exists()
    assert run("make", "--dry-run", "eval", "MODEL=raw7b", CUDA="/usr/local/cuda").returncode == 0, "the environment's"


ODD = "a (1) [x] it's, #2"  # as browsers and people name files


@pytest.mark.parametrize(
    ("typed", "module", "expected"),
    [
        (["eval", f"MODEL={ODD}.yaml", f"RUNS={ODD}"], "eval_loop.py", [f"{ODD}.yaml", f"runs='{ODD}'"]),
        (["eval", f"ADAPTER={ODD}", "SEED=2"], "eval_loop.py", ["qlora7b", "runs=runs", "seed=2", f"adapter='{ODD}'"]),
        (["export", f"OUT={ODD}"], "scripts.export", ["qlora7b", ODD, "runs=runs"]),
        (["export"], "scripts.export", ["qlora7b", "", "runs=runs"]),
        (["runs", f"RUNS={ODD}", "WHERE=em > 70"], "common.runs.ledger", [ODD, "em > 70"]),
        (["report", f"RUNS={ODD}"], "scripts.report", [ODD]),
        (["certify", f"RUN={ODD}"], "scripts.certify", [ODD]),
        (["verify-scorer", f"PRED={ODD}", f"DATA={ODD} 2"], "common.metrics.score", [ODD, f"{ODD} 2"]),
        (["compare", "PRED=a.json b.json", f"DATA={ODD}"], "common.metrics.compare", [ODD, "a.json b.json"]),
        (["sweep", f"SWEEP={ODD}.yaml"], "scripts.sweep", [f"{ODD}.yaml", "runs=runs"]),
    ],
)
def test_paths_with_spaces_and_brackets_arrive_whole(tmp_path, typed, module, expected):
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done; printf "\\n"\n')
    fake.chmod(0o755)
    (tmp_path / ".ready").touch()
    out = run("make", "-s", *typed, f"VENV={tmp_path}", "-o", str(tmp_path / ".ready")).stdout
    commands = [line.split("\0")[:-1] for line in out.splitlines()]
    (found,) = [command for command in commands if module in command[:2]]
    arguments = found[found.index(module) + 1 :]
    assert arguments == [word.replace("it's", "it''s") if "='" in word else word for word in expected]


@pytest.mark.parametrize(("code", "reported"), [(0, True), (1, True), (2, False), (143, False)])
def test_a_table_with_runs_that_failed_is_shown_and_one_that_was_mistyped_or_stopped_is_not(tmp_path, code, reported):
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "ran $*"\n[ "$2" != scripts.sweep ] || exit {code}\n')
    fake.chmod(0o755)
    (tmp_path / ".ready").touch()
    result = run("make", "-s", "table", f"VENV={tmp_path}", "-o", str(tmp_path / ".ready"))
    assert ("ran -m scripts.report" in result.stdout, result.returncode == 0) == (reported, reported)


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
