"""A sweep on a real SLURM of one node on this host's loopback. `make test-slurm` runs these, and fails without it."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from common.errors import UserError
from common.runs import record
from scripts import sweep
from tests.conftest import ROOT

import pytest

pytestmark = pytest.mark.slurm
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(holds, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what} took longer than {seconds:.0f} s"
        time.sleep(0.3)


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """munged, slurmctld and slurmd, with all that is theirs in one folder; ended afterwards."""
    for name in ("munged", "slurmctld", "slurmd", "sbatch"):
        assert shutil.which(name), f"no {name} in PATH; on Debian: apt install munge slurmctld slurmd"
    assert os.geteuid() == 0, "starting SLURM needs root"
    folder = tmp_path_factory.mktemp("slurm")
    for path in (folder, *folder.parents):  # munge's user has to come here
        path.chmod(path.stat().st_mode | 0o011) if path.owner() == "root" and path != Path("/") else None
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    munge = folder / "munge"
    munge.mkdir(mode=0o700)
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o400)
    conf = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    conf.write_text(CONF.format(host=host, ports=(free_port(), free_port()), folder=folder, cpus=os.cpu_count()))
    before = dict(os.environ)
    os.environ["SLURM_CONF"] = str(conf)
    daemons = []

    def start(*command: str) -> None:
        log = (folder / f"{Path(command[0]).name}.out").open("w")
        daemons.append(subprocess.Popen(command, stdout=log, stderr=log))

    try:
        start(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={munge / 'key'}",
            f"--socket={folder / 'munge.socket'}",
            f"--pid-file={munge / 'pid'}",
            f"--log-file={munge / 'log'}",
            f"--seed-file={munge / 'seed'}",
        )
        until((folder / "munge.socket").exists, "munged")
        start("slurmctld", "-D", "-i")
        start("slurmd", "-D")
        idle = ("sinfo", "--noheader", "--format=%T")
        until(lambda: subprocess.run(idle, capture_output=True, text=True).stdout.strip() == "idle", "SLURM's start")
        yield folder
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            daemon.kill()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def file(tiny_config, tmp_path) -> Path:
    broken = tmp_path / "broken.yaml"
    broken.write_text(
        tiny_config.read_text()
        .replace("system: tiny", "system: broken")
        .replace("nf4", "none")
        .replace("path: /", "path: /absent/")
    )
    path = tmp_path / "sweep.yaml"
    path.write_text(f"systems: [{tiny_config}, {broken}]\nseeds: [0, 1]\n")
    return path


def submit(file: Path, capsys, *arguments: str) -> dict:
    sweep.main([str(file), "--plan=slurm", "--slurm=gpus_per_node=0", *arguments])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def ended(array: str) -> bool:
    return not said("squeue", "--noheader", f"--jobs={array}").strip()


def test_a_job_array_does_the_runs_and_the_next_one_what_is_left(cluster, file, tmp_path, capsys):
    first = submit(file, capsys)
    assert first["runs"] == 4
    until(lambda: ended(first["array"]), "the array", 180)
    logs = "".join(path.read_text() for path in (tmp_path / "runs" / "slurm").glob("*.out"))
    found = record.read_all(tmp_path / "runs")
    assert sorted((r["system"], r["seed"], r["kind"]) for r in found) == [
        ("tiny", seed, kind) for seed in (0, 1) for kind in ("eval", "train")
    ], logs
    assert "absent" in logs  # what is wrong with the others
    second = submit(file, capsys)
    assert second["runs"] == 2
    until(lambda: ended(second["array"]), "the second array", 90)


def test_a_cancelled_task_is_gone_on_with(cluster, tiny_config, tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"systems: [{tiny_config}]\noverrides: [train.epochs=40]\n")
    first = submit(path, capsys)
    metrics = lambda: list((tmp_path / "runs").glob("tiny-*-train-001/metrics.jsonl"))  # noqa: E731
    until(lambda: metrics() and '"em"' in metrics()[0].read_text(), "the first evaluation")
    said("scancel", first["array"])
    until(lambda: ended(first["array"]), "the end of a cancelled task")
    assert record.read_all(tmp_path / "runs") == []
    second = submit(path, capsys)
    until(lambda: ended(second["array"]), "the rest", 180)
    assert [r["kind"] for r in record.read_all(tmp_path / "runs")] == ["train", "eval"]
    assert "going on after step" in "".join(p.read_text() for p in (tmp_path / "runs" / "logs").glob("*train.log"))


def test_hosts_train_together(cluster, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHON", sys.executable)
    two = ("--nodes=1", "--ntasks-per-node=2", f"--output={tmp_path / 'out'}")  # two launchers, as two hosts have
    script = str(ROOT / "docs" / "several-hosts.sbatch")
    array = said("sbatch", "--parsable", *two, f"--chdir={ROOT}", script, "train_loop.py", str(tiny_config)).strip()
    until(lambda: ended(array), "the training", 180)
    (trained,) = record.read_all(tmp_path / "runs")
    assert trained["result"]["processes"] == 2, (tmp_path / "out").read_text()


def test_what_slurm_does_not_take_is_one_line(cluster, file, capsys):
    with pytest.raises(UserError, match=r"SLURM did not take the runs: .*nowhere"):
        submit(file, capsys, "--slurm=slurm_partition=nowhere")
    with pytest.raises(UserError, match=r"--slurm: .*partitoin"):
        submit(file, capsys, "--slurm=slurm_partitoin=all")
