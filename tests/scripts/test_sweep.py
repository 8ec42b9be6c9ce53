"""A sweep runs what is left, tries again what failed, goes on where it stopped, and passes on being told to stop."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from common.errors import UserError
from common.runs import pool, sweeps
from scripts import sweep
from tests.conftest import ROOT

import pytest

# in place of the scripts: a run that takes no torch, fails as often as its system's name says, or waits to be stopped
FAKE = """\
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from common.runs import record
from common.config import load
from common.data.squad import Dataset
kind, system, *words = sys.argv[1:]
config = load(system, words)
print("GPU", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if config.system == "waits":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    Path(config.runs, "waiting").touch()
    time.sleep(60)
time.sleep(0.3 * (config.system == "slow"))
tried = Path(config.runs) / f"{{config.system}}-{{kind}}-tried"
n = len(tried.read_text()) if tried.exists() else 0
tried.write_text("x" * (n + 1))
if config.system == "mistaken":
    print("error: a mistake")
    sys.exit(2)
if config.system == "broken" or (config.system == "shaky" and n == 0):
    sys.exit("it broke")
run = record.new_run(config, kind)
result = {{"em": 50.0 + config.seed, "f1": 60.0, "seconds": 1.0}}
record.write(run, config, kind, Dataset([], "x.json"), {{"name": "a test"}}, result)
print(json.dumps(result))
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Write a sweep over systems of these names, with fake scripts; returns its path."""
    (tmp_path / "fake.py").write_text(FAKE.format(root=str(ROOT)))
    wrapper = "import runpy, sys; sys.argv[1:1] = [{!r}]; runpy.run_path({!r}, run_name='__main__')"
    scripts = {}
    for kind in pool.SCRIPTS:
        (tmp_path / f"{kind}.py").write_text(wrapper.format(kind, str(tmp_path / "fake.py")))
        scripts[kind] = str(tmp_path / f"{kind}.py")
    monkeypatch.setattr(pool, "SCRIPTS", scripts)

    def make(*names: str, seeds: str = "[0]"):
        for name in names:
            (tmp_path / f"{name}.yaml").write_text(
                f"system: {name}\nbase: {{path: somewhere}}\nlora: {{rank: 4}}\nruns: {tmp_path / 'runs'}\n"
            )
        path = tmp_path / "sweep.yaml"
        path.write_text(f"systems: {json.dumps([str(tmp_path / f'{n}.yaml') for n in names])}\nseeds: {seeds}\n")
        return path

    return make


def swept(capsys, *arguments: object) -> tuple[int, str, dict]:
    with pytest.raises(SystemExit) as ended:
        sweep.main([str(a) for a in arguments])
    out = capsys.readouterr().out
    return int(ended.value.code), out, json.loads(out.strip().splitlines()[-1])


def test_every_run_is_done_once_and_a_second_sweep_does_nothing(file, tmp_path, capsys):
    path = file("tuned", seeds="[0, 1]")
    sweep.main([str(path), "--dry-run"])
    assert "2 runs, 0 done; left: about 0 min and 4 steps of unknown length; 1 at a time on 0 GPUs" in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "runs").exists()
    code, out, result = swept(capsys, path)
    assert (code, result) == (0, {"runs": 2, "failed": {}})
    assert "seed=1: EM 51.00 F1 60.00; 0 left" in out
    made = sorted((tmp_path / "runs").glob("*/record.json"))
    assert len(made) == 4
    code, out, _ = swept(capsys, path)
    assert code == 0
    assert "2 runs, 2 done; left: nothing" in out
    assert sorted((tmp_path / "runs").glob("*/record.json")) == made


def test_what_fails_is_tried_again_what_is_mistaken_is_not_and_the_others_go_on(file, tmp_path, capsys):
    code, out, result = swept(capsys, file("broken", "mistaken", "shaky"))
    assert code == 1
    assert "broken.yaml seed=0: train failed: it broke" in out
    assert "mistaken.yaml seed=0: train failed: error: a mistake" in out
    assert "shaky.yaml seed=0: EM 50.00" in out
    assert len(result["failed"]) == 2
    tried = {name: len((tmp_path / "runs" / f"{name}-train-tried").read_text()) for name in ("broken", "mistaken")}
    assert tried == {"broken": 2, "mistaken": 1}
    (log,) = (tmp_path / "runs" / "logs").glob("mistaken-*-train.log")
    assert "error: a mistake" in log.read_text()
    (log,) = (tmp_path / "runs" / "logs").glob("broken-*-train.log")
    assert log.read_text().count("it broke") == 2  # a second try leaves what the first said
    assert "1 of 3 runs are done; make report shows them" in out


def test_variants_of_one_training_do_not_train_at_the_same_time(file, tmp_path, capsys):
    path = file("slow")
    path.write_text(path.read_text() + "variants: ['', decode.max_tokens=4, decode.spans=true]\n")
    code, _, result = swept(capsys, path, "--workers=3")
    assert (code, result) == (0, {"runs": 3, "failed": {}})
    tried = {kind: len((tmp_path / "runs" / f"slow-{kind}-tried").read_text()) for kind in ("train", "eval")}
    assert tried == {"train": 1, "eval": 3}


def test_each_gpu_gets_one_run_at_a_time(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    _, out, _ = swept(capsys, file("tuned", seeds="[0, 1, 2]"))
    assert "2 at a time on 2 GPUs" in out
    used = [log.read_text().split()[1] for log in (tmp_path / "runs" / "logs").iterdir()]
    assert set(used) == {"4", "7"}


def test_one_run_of_a_sweep_is_done_alone_where_a_cluster_asks_for_it(file, capsys):
    path = file("tuned", "other")
    (_, other), _ = sweeps.plan(path)
    sweep.main([str(path), "--only", other.config.hash(), "--dry-run"])
    assert capsys.readouterr().out.splitlines() == [
        f"{other.name}: train, eval",
        "1 runs, 0 done; left: about 0 min and 2 steps of unknown length; 1 at a time on 0 GPUs",
    ]
    with pytest.raises(UserError, match="the sweep has changed since this run was handed out"):
        sweep.main([str(path), "--only", "0123", "--dry-run"])


@pytest.mark.parametrize(
    ("gpus", "words", "shown"),
    [
        ("", [], "about 4 min and 1 steps of unknown length; 1 at a time on 0 GPUs"),
        ("0", [], "about 4 min and 1 steps of unknown length; 1 at a time on 1 GPU"),
        ("0,3", [], "about 2 min and 1 steps of unknown length; 2 at a time on 2 GPUs"),
        ("0,3", ["--workers=3"], "about 1 min and 1 steps of unknown length; 3 at a time on 2 GPUs"),
    ],
)
def test_the_rest_takes_as_long_as_the_like_did_shared_by_all_workers(file, capsys, monkeypatch, gpus, words, shown):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setattr(sweep.sweeps, "expected_seconds", lambda waiting, kinds: (len(waiting) * 240.0, 1))
    sweep.main([str(file("tuned")), "--dry-run", *words])
    assert f"1 runs, 0 done; left: {shown}" in capsys.readouterr().out
    with pytest.raises(UserError, match="--workers must be 1 or more"):
        sweep.main([str(file("tuned")), "--dry-run", "--workers=0"])


def test_a_cluster_gets_a_task_for_each_run_that_is_left(file, tmp_path, capsys, monkeypatch):
    given: dict[str, object] = {}

    class Executor:
        def __init__(self, folder, cluster):
            given.update(folder=folder, cluster=cluster)

        def update_parameters(self, **settings):
            if "typo" in settings:
                raise NameError("typo")
            given.update(settings=settings)

        def map_array(self, function, hashes):
            given.update(function=function, hashes=hashes)
            return [SimpleNamespace(job_id=f"77_{i}") for i in range(len(hashes))]

    class Failed(Exception):
        pass

    fake = SimpleNamespace(
        AutoExecutor=Executor,
        helpers=SimpleNamespace(CommandFunction=lambda command, cwd: (command, cwd)),
        core=SimpleNamespace(utils=SimpleNamespace(FailedJobError=Failed)),
    )
    monkeypatch.setitem(sys.modules, "submitit", fake)
    path = file("tuned", "other")
    words = ["data.dev_questions=5", "--slurm", "slurm_time=24:00:00", "--slurm", "timeout_min=60", "--slurm=x=true"]
    sweep.main([str(path), "--plan=slurm", *words])
    command = [sys.executable, "-m", "scripts.sweep", str(path), "data.dev_questions=5", "--workers=1", "--only"]
    planned, _ = sweeps.plan(path, ["data.dev_questions=5"])
    assert given == {
        "folder": tmp_path / "runs" / "slurm",
        "cluster": "slurm",
        "function": (command, Path.cwd()),
        "hashes": [job.config.hash() for job in planned],
        "settings": {"name": "squad-qlora", "gpus_per_node": 1, "timeout_min": 60, "slurm_time": "24:00:00", "x": True},
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("job array 77: 2 runs; ")
    assert json.loads(lines[-1]) == {"array": "77", "runs": 2}
    for word, message in (("typo=1", "--slurm: typo"), ("partition", "--slurm partition: write key=value")):
        with pytest.raises(UserError, match=message):
            sweep.main([str(path), "--plan=slurm", "--slurm", word])
    monkeypatch.setattr(Executor, "map_array", lambda *_: (_ for _ in ()).throw(RuntimeError("no sbatch")))
    with pytest.raises(UserError, match="SLURM did not take the runs: no sbatch"):
        sweep.main([str(path), "--plan=slurm"])
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"needs submitit: .*requirements-slurm\.lock"):
        sweep.main([str(path), "--plan=slurm"])


def test_settings_of_a_cluster_are_numbers_where_they_look_like_it():
    found = [sweep.typed(text) for text in ("3", "1.5", "true", "false", "24:00:00", "gpu", "1e3")]
    assert found == [3, 1.5, True, False, "24:00:00", "gpu", 1000.0]
    assert [type(value) for value in found[:4]] == [int, float, bool, bool]


def test_being_told_to_stop_is_passed_on_and_the_exit_code_says_it(file, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from common.runs import pool; from scripts import sweep; "
    code += f"pool.SCRIPTS = {pool.SCRIPTS!r}; sweep.main([{str(file('waits', 'tuned'))!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 30
    while not (tmp_path / "runs" / "waiting").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "stopped; the same command goes on" in out
    assert not list((tmp_path / "runs").glob("*/record.json"))
