"""Regressions planted in the code itself are caught by `make revalidate`, and unchanged code raises no alarm.

On SmolLM2's real weights with an adapter trained once on demo/ (or ADAPTERS=runs, what the recipe trained there), by
SQuAD's dev set (SQUAD_DIR, or the hub's): `make test-planted`, on a machine that nothing else uses, or latency says
nothing. On a GPU by the whole dev set and 200 timed queries; without one by ten questions of each article and 16
queries, in two hours. REPEATS=n unchanged runs (20). Each regression is a line changed in a copy of the repo. To tell
an engine that is 20 % slower from chance, processes must be alike, as a 7B model's are on a GPU: TIMED="qlora7b
base.random_weights=true …" times that, as `make bench` does by itself. Without it SmolLM2's engine becomes 50 % slower,
on a CPU twice as slow.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

import pytest

pytestmark = pytest.mark.planted
GPU = shutil.which("nvidia-smi")
REPEATS = int(os.environ.get("REPEATS", "20"))
TIMED = os.environ.get("TIMED", "").split()
SLOWER = "0.2" if TIMED else "0.5" if GPU else "1.0"
ANSWERS = {"em", "f1"}
PLANTED = {  # file, line, what it becomes, which checks may raise the alarm
    "LoRA's alpha is not the adapter's": (
        "common/model/load.py",
        "    peft_model = get_peft_model(model, config)\n    load_weights(",
        "    config.lora_alpha = 1\n    peft_model = get_peft_model(model, config)\n    load_weights(",
        ANSWERS,
    ),
    "contexts are cut": (
        "common/data/prompt.py",
        "_fit(contexts, _CONTEXT, window.context,",
        "_fit(contexts, _CONTEXT, 90,",
        ANSWERS,
    ),
    "another byte in the prompt": (
        "common/data/prompt.py",
        '_CONTEXT = "Context: {}"',
        '_CONTEXT = "Context:  {}"',
        {"comparable"},
    ),
    "slower": (
        "bench_latency.py",
        "                total = meter.now(device) - began\n",
        f"                __import__('time').sleep({SLOWER} * (meter.now(device) - began))\n"
        "                total = meter.now(device) - began\n",
        {"p95"},
    ),
}


def run(folder: Path, *command: str, codes: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode in codes, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def copy(folder: Path) -> Path:
    """This repo's code, with the weights where they are."""
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / ".cache").symlink_to(ROOT / ".cache")
    return folder


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """Train once; measure and accept each once; then: revalidate by a folder's code, and return its verdict."""
    home = tmp_path_factory.mktemp("planted")
    adapters, order = os.environ.get("ADAPTERS"), "both"
    if adapters is None:
        adapters, order = str(home / "trained"), "context"
        demo = [f"data.{split}={ROOT / 'demo' / split}.json" for split in ("train", "dev")]
        recipe = ["train.lr=2e-3", "train.questions_per_step=16", "train.eval_every=15", "train.epochs=1"]
        recipe += ["train.average=0", "train.label_smoothing=0", f"prompt.order={order}"]
        run(ROOT, "train_loop.py", "smollm2-qlora", *demo, *recipe, f"runs={adapters}")
    few = [f"bench.queries={200 if GPU else 16}", "bench.processes=1"]
    words = {"eval": [] if GPU else ["data.dev_questions=480"], "bench": few, "slower": [] if GPU else few}

    def revalidate(what: str, folder: Path) -> dict:
        file = home / f"{what}.yaml"
        if not file.exists():
            settings = {"systems": ["smollm2-qlora"], "kinds": ["eval" if what == "eval" else "bench"]}
            settings |= {
                "adapters": str(Path(adapters).resolve()),
                "overrides": [f"prompt.order={order}", *words[what]],
            }
            if what == "slower" and TIMED:
                settings = {"systems": TIMED[:1], "kinds": ["bench"], "overrides": TIMED[1:]}
            file.write_text(json.dumps(settings))  # which is YAML too
            revalidate(what, ROOT)
            run(ROOT, "-m", "scripts.revalidate", "--accept", "the first", f"runs={home / what}")
        done = run(folder, "-m", "scripts.revalidate", str(file), f"runs={home / what}", codes=(0, 1))
        return json.loads(done.stdout.splitlines()[-1])

    return revalidate


def said(verdict: dict) -> list[tuple]:
    return [(c["what"], c["fine"], c["words"]) for c in verdict["checks"]]


@pytest.mark.parametrize(("kind", "checks"), [("eval", {"em", "f1"}), ("bench", {"p95"})])
def test_unchanged_code_raises_no_alarm(again, kind, checks):
    found = []
    for _ in range(REPEATS):
        found.append(again(kind, ROOT))
        print(said(found[-1]), flush=True)
    assert [v for v in found if not v["passed"]] == []
    assert all({c["what"] for c in v["checks"]} >= checks for v in found)


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_regression_is_caught(again, what, tmp_path):
    name, line, planted, alarms = PLANTED[what]
    folder = copy(tmp_path / "repo")
    text = (folder / name).read_text()
    assert text.count(line) == 1
    (folder / name).write_text(text.replace(line, planted))
    verdict = again("slower" if alarms == {"p95"} else "eval", folder)
    print(what, said(verdict), flush=True)
    assert not verdict["passed"]
    assert alarms & {c["what"] for c in verdict["checks"] if not c["fine"]}
