"""Revalidation: one at a time, a folder each, compared with what was accepted; its exit code says how it went."""

import fcntl
import json
import runpy
import sys
from datetime import UTC, datetime
from pathlib import Path

from common.errors import UserError
from scripts import revalidate

import pytest

# in place of the sweep, in this process: evaluations of the accuracy that a file beside it says, or none; timings of
# the next pace there
FAKE = """\
import json, sys, yaml
from pathlib import Path
from common.runs import record
from common.config import load
from common.data.squad import Dataset
plan, *words = sys.argv[1:]
wanted = yaml.safe_load(Path(plan).read_text())
right = float(Path(__file__).with_name("accuracy").read_text())
if right < 0:
    sys.exit(1)
paces = Path(__file__).with_name("paces")
if "bench" in wanted["kinds"]:
    pace, *rest = json.loads(paces.read_text())
    paces.write_text(json.dumps(rest))
    config = load("smollm2-qlora", words)
    run = record.new_run(config, "bench")
    queries = [{"total": pace * (1 + i % 7 / 10)} for i in range(200)]
    (run / "process-0.json").write_text(json.dumps({"ids": [], "modes": {"natural": queries}}))
    result = {"peak": {"allocated_bytes": 2**30, "rss_bytes": 1}}
    record.write(run, config, "bench", Dataset([], "x.json"), {"name": "a test"}, result)
for seed in wanted["seeds"] if "eval" in wanted["kinds"] else ():
    config = load("smollm2-qlora", [*words, f"seed={seed}"])
    run = record.new_run(config, "eval")
    same = {"text": "", "hit_limit": False, "f1": 1.0}
    rows = [{"id": str(i), "em": i % 100 < 100 * right, "article": str(i % 37), **same} for i in range(1000)]
    (run / "questions.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    result = {"em": 100 * right, "f1": 100.0, "n": 1000, "peak": {"allocated_bytes": 2**30, "rss_bytes": 1}}
    record.write(run, config, "eval", Dataset([], "x.json"), {"name": "a test"}, result)
"""


@pytest.fixture
def again(tmp_path, monkeypatch, capsys):
    """Revalidate with an accuracy: (exit code, output, the verdict)."""
    fake, file = tmp_path / "fake_sweep.py", tmp_path / "revalidate.yaml"
    fake.write_text(FAKE)
    file.write_text("systems: [smollm2-qlora]\nseeds: [0, 1]\nkinds: [eval]\n")
    monkeypatch.setattr(revalidate, "SWEEP", [sys.executable, str(fake)])

    def swept(command: list[str]) -> int:
        assert command[0] == sys.executable
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            try:
                runpy.run_path(command[1])
            except SystemExit as ended:
                return int(ended.code)
        return 0

    monkeypatch.setattr(revalidate.signals, "run", swept)

    def run(accuracy: float, *words: str):
        (tmp_path / "accuracy").write_text(str(accuracy))
        with pytest.raises(SystemExit) as ended:
            revalidate.main([str(file), f"runs={tmp_path / 'runs'}", *words])
        out = capsys.readouterr().out
        last = (out.strip().splitlines() or [""])[-1]
        return ended.value.code, out, json.loads(last) if last.startswith("{") else None

    return run


def accept(tmp_path, *words: str) -> None:
    revalidate.main([f"runs={tmp_path / 'runs'}", "--accept", *words])


def test_what_was_accepted_is_what_later_ones_are_compared_with(again, tmp_path):
    code, out, verdict = again(0.7)
    assert (code, verdict["accepted"]) == (0, None)
    assert "nothing is accepted yet" in out
    accept(tmp_path, "the first")
    code, out, verdict = again(0.7, "--notify", f"cat > {tmp_path / 'told'}")
    assert (code, verdict["passed"]) == (0, True)
    assert f"PASS: 3 checks against {tmp_path}/runs/revalidate/0001" in out
    assert not (tmp_path / "told").exists()
    assert [(check["system"], check["what"], check["fine"]) for check in verdict["checks"]] == [
        ("smollm2-qlora", "em", True),
        ("smollm2-qlora", "f1", True),
        ("smollm2-qlora", "memory of eval", True),
    ]
    assert out.count("ok    smollm2-qlora, ") == 3
    assert "ALARM" not in out
    code, out, verdict = again(0.6, "--notify", f"cat > {tmp_path / 'told'}")
    assert code == 1
    assert "REGRESSION: smollm2-qlora em: EM -10.00 over 2 seeds" in out
    assert "ALARM smollm2-qlora, em: EM -10.00 over 2 seeds" in out
    assert out.count("ok    smollm2-qlora, ") == 2
    told = json.loads((tmp_path / "told").read_text())
    line = told.pop("line")
    assert line.startswith("REGRESSION")
    assert line in out
    kept = json.loads((tmp_path / "runs" / "revalidate" / "0003" / "verdict.json").read_text())
    assert told == verdict == kept
    assert not told["passed"]
    assert (told["folder"], told["accepted"]["why"]) == (f"{tmp_path}/runs/revalidate/0003", "the first")
    accept(tmp_path, "it is meant")
    assert again(0.6)[0] == 0
    history = json.loads((tmp_path / "runs" / "revalidate" / "accepted.json").read_text())
    assert [entry["why"] for entry in history] == ["the first", "it is meant"]
    assert history[0]["folder"].endswith("0001")
    folders = sorted(path.name for path in (tmp_path / "runs" / "revalidate").iterdir() if path.is_dir())
    assert folders == ["0001", "0002", "0003", "0004"]


@pytest.mark.parametrize(("second", "code"), [(1.0, 0), (1.5, 1)])
def test_an_alarm_of_p95_stands_if_it_comes_again(again, tmp_path, second, code):
    file = tmp_path / "revalidate.yaml"
    file.write_text(file.read_text().replace("[eval]", "[eval, bench]"))
    (tmp_path / "paces").write_text(json.dumps([1.0, 1.0, 1.5, second]))
    again(0.7)
    accept(tmp_path, "the first")
    assert again(0.7)[2]["passed"]
    ended, out, verdict = again(0.7)
    assert ended == code
    (p95,) = [check for check in verdict["checks"] if check["what"] == "p95"]
    assert "p95 1.500 times as long" in p95["words"]
    assert f"measured again: p95 {second:.3f} times as long" in p95["words"]
    assert "once more, for something else may have run" in out
    timed = json.loads((tmp_path / "runs" / "revalidate" / "0003-again" / "sweep.yaml").read_text())
    assert (timed["kinds"], timed["adapters"]) == (["bench"], str(tmp_path / "runs" / "revalidate" / "0003"))
    accept(tmp_path, "what was measured last")  # and of that what was measured again
    (tmp_path / "paces").write_text("[1.5, 1.5]")
    verdict = again(0.7)[2]
    assert verdict["folder"].endswith("0004")
    assert verdict["passed"] == (second > 1)


def test_what_was_cut_off_is_gone_on_with(again, tmp_path):
    assert again(-1)[0] == 2
    code, out, _ = again(0.7)
    assert code == 0
    assert "0001: going on" in out
    assert not (tmp_path / "runs" / "revalidate" / "0002").exists()


@pytest.mark.parametrize(("code", "ends"), [(1, 2), (2, 2), (129, 129), (130, 130), (143, 143)])
def test_measuring_that_fails_is_set_up_and_one_that_is_stopped_says_of_what(tmp_path, monkeypatch, capsys, code, ends):
    commands = []
    monkeypatch.setattr(revalidate.signals, "run", lambda command: commands.append(command) or code)
    with pytest.raises(SystemExit) as ended:
        revalidate.main([f"runs={tmp_path}", "seeds", "data.dev_questions=5", "smollm2-qlora:lora.rank=2"])
    assert ended.value.code == ends
    folder = tmp_path / "revalidate" / "0001"
    assert commands == [
        [
            *revalidate.SWEEP,
            str(revalidate.sweeps.find("seeds")),
            "data.dev_questions=5",
            "smollm2-qlora:lora.rank=2",
            f"runs={folder}",
        ]
    ]
    assert capsys.readouterr().err == f"error: measuring ended with {code}; the same command goes on in {folder}\n"
    assert not (folder / "verdict.json").exists()


def test_what_is_accepted_is_written_down_with_its_reason_time_and_code(again, tmp_path, monkeypatch, capsys):
    for _ in range(3):
        again(0.7)
    monkeypatch.setattr(revalidate.record, "code", lambda: ("c0ffee", True))
    root, began = tmp_path / "runs" / "revalidate", datetime.now(UTC).replace(microsecond=0)
    accept(tmp_path, "an older one", "--run", str(root / "0002"))
    monkeypatch.setattr(revalidate.record, "code", lambda: ("decaf", False))
    accept(tmp_path, "the newest")
    first, second = json.loads((root / "accepted.json").read_text())
    assert began <= datetime.fromisoformat(first.pop("when")) <= datetime.now(UTC)
    assert first == {"folder": str(root / "0002"), "why": "an older one", "commit": "c0ffee", "dirty": True}
    assert (second["folder"], second["commit"], second["dirty"]) == (str(root / "0003"), "decaf", False)
    assert f"{root / '0003'} is what later ones are compared with, from now on: the newest" in capsys.readouterr().out
    assert again(0.7)[2]["accepted"]["why"] == "the newest"
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["0001", "0002", "0003", "0004"]
    with pytest.raises(UserError, match=r"0009: no finished revalidation is there"):
        accept(tmp_path, "one that is not there", "--run", str(root / "0009"))


def test_without_a_name_it_measures_revalidate_in_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(revalidate, "measure", lambda *args: asked.append(args))
    asked: list[tuple] = []
    with pytest.raises(SystemExit) as ended:
        revalidate.main([])
    assert ended.value.code == 0
    assert asked == [(revalidate.sweeps.find("revalidate"), [], Path("runs/revalidate/0001"))]
    assert capsys.readouterr().out.startswith(
        "runs/revalidate/0001\nnothing is accepted yet: look at runs/revalidate/0001"
    )


def test_a_second_one_at_a_time_says_so_and_does_nothing(again, tmp_path):
    root = tmp_path / "runs" / "revalidate"
    root.mkdir(parents=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert again(0.7)[0] == 75
    assert sorted(path.name for path in root.iterdir()) == ["lock"]


def test_mistakes_are_named(again, tmp_path):
    for words, message in (
        (["wxyz"], 'unknown sweep "wxyz"; known: lengths, orders'),
        (["orders", "seeds"], "name one sweep"),
        (["--accept", "why"], "no finished revalidation is there"),
    ):
        with pytest.raises(UserError, match=message):
            revalidate.main([f"runs={tmp_path / 'runs'}", *words])
    file = tmp_path / "variants.yaml"
    file.write_text("systems: [smollm2-qlora]\nvariants: [lora.rank=8, lora.rank=4]\n")
    with pytest.raises(UserError, match="several variants are called smollm2-qlora; give each a name"):
        revalidate.main([str(file), f"runs={tmp_path / 'runs'}"])
    again(0.7)
    (tmp_path / "runs" / "revalidate" / "accepted.json").write_text("[{")
    with pytest.raises(UserError, match=r"accepted\.json: not readable"):
        again(0.7)
    (tmp_path / "runs" / "revalidate" / "accepted.json").unlink()
    with pytest.raises(UserError, match="a reason is needed"):
        accept(tmp_path, " ")


def test_rules_are_the_sweeps_own_and_checked(tmp_path):
    assert revalidate.sweeps.plan(revalidate.sweeps.find("revalidate"))[1].gate.p95_ratio == 1.1
    file = tmp_path / "sweep.yaml"
    wrong = {"p95_ratio: 0.9": "sweep.yaml:2: gate.p95_ratio: must be between 1 and 1,000", "p95: 2": 'key "gate.p95"'}
    for rule, message in wrong.items():
        file.write_text(f"systems: [smollm2-qlora]\ngate: {{{rule}}}\n")
        with pytest.raises(UserError, match=message):
            revalidate.main([str(file), f"runs={tmp_path / 'runs'}"])


def test_runs_without_a_folder_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="runs=: must not be empty"):
        revalidate.main(["runs="])
    assert not list(tmp_path.iterdir())
