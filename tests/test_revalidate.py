"""Revalidation: one at a time, a folder each, compared with what was accepted; its exit code says how it went."""

import fcntl
import json

import revalidate
from common.errors import UserError
from tests.conftest import ROOT

import pytest

# in place of the sweep: evaluations of the accuracy that a file beside it says, or none; timings of the next pace there
FAKE = """\
import json, sys, yaml
from pathlib import Path
sys.path.insert(0, {root!r})
from common import record
from common.config import load
from common.squad import Dataset
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
    queries = [{{"total": pace * (1 + i % 7 / 10)}} for i in range(200)]
    (run / "process-0.json").write_text(json.dumps({{"ids": [], "modes": {{"natural": queries}}}}))
    result = {{"peak": {{"allocated_bytes": 2**30, "rss_bytes": 1}}}}
    record.write(run, config, "bench", Dataset([], "x.json"), {{"name": "a test"}}, result)
for seed in wanted["seeds"] if "eval" in wanted["kinds"] else ():
    config = load("smollm2-qlora", [*words, f"seed={{seed}}"])
    run = record.new_run(config, "eval")
    same = {{"text": "", "hit_limit": False, "f1": 1.0}}
    rows = [{{"id": str(i), "em": i % 100 < 100 * right, "article": str(i % 37), **same}} for i in range(1000)]
    (run / "questions.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    result = {{"em": 100 * right, "f1": 100.0, "n": 1000, "peak": {{"allocated_bytes": 2**30, "rss_bytes": 1}}}}
    record.write(run, config, "eval", Dataset([], "x.json"), {{"name": "a test"}}, result)
"""


@pytest.fixture
def again(tmp_path, monkeypatch, capsys):
    """Revalidate with an accuracy: (exit code, output, the verdict)."""
    fake, file = tmp_path / "sweep.py", tmp_path / "revalidate.yaml"
    fake.write_text(FAKE.format(root=str(ROOT)))
    file.write_text("systems: [smollm2-qlora]\nseeds: [0, 1]\nkinds: [eval]\n")
    monkeypatch.setattr(revalidate, "SWEEP", fake)

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
    code, out, verdict = again(0.7)
    assert (code, verdict["passed"]) == (0, True)
    assert f"PASS: 3 checks against {tmp_path}/runs/revalidate/0001" in out
    code, out, verdict = again(0.6, "--notify", f"cat > {tmp_path / 'told'}")
    assert code == 1
    assert "REGRESSION: smollm2-qlora em: EM -10.00 over 2 seeds" in out
    told = json.loads((tmp_path / "told").read_text())
    assert told["line"].startswith("REGRESSION")
    assert not told["passed"]
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


def test_a_second_one_at_a_time_says_so_and_does_nothing(again, tmp_path):
    root = tmp_path / "runs" / "revalidate"
    root.mkdir(parents=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert again(0.7)[0] == 75
    assert sorted(path.name for path in root.iterdir()) == ["lock"]


def test_mistakes_are_named(again, tmp_path):
    for words, message in (
        (["absent"], 'unknown sweep "absent"; known: orders'),
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
    assert revalidate.jobs.plan(revalidate.jobs.find("revalidate"))[1].gate.p95_ratio == 1.1
    file = tmp_path / "sweep.yaml"
    for rule, message in (("p95_ratio: 0.9", "p95_ratio ≥ 1"), ("p95: 2", 'unknown key "gate.p95"')):
        file.write_text(f"systems: [smollm2-qlora]\ngate: {{{rule}}}\n")
        with pytest.raises(UserError, match=message):
            revalidate.main([str(file), f"runs={tmp_path / 'runs'}"])
