"""Which GPUs there are, what a script's last line says, and that an error of ours ends all work."""

import json
import time

from common.runs import pool, sweeps

import pytest


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [("0,2", ["0", "2"]), ("", []), ("-1", []), ("GPU-a,MIG-b", ["GPU-a", "MIG-b"]), (None, ["0", "1"])],
)
def test_gpus_are_those_that_are_visible_else_all(monkeypatch, visible, gpus):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(pool.pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pool.pynvml, "nvmlDeviceGetCount", lambda: 2)
    assert pool.visible_gpus() == gpus


def test_without_a_driver_there_are_no_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def absent():
        raise pool.pynvml.NVMLError(pool.pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pool.pynvml, "nvmlInit", absent)
    assert pool.visible_gpus() == []


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('{"em": 70.126, "f1": 80.4}', "EM 70.13 F1 80.40"),
        ('{"em": 0, "f1": 0}', "EM 0.00 F1 0.00"),
        ('{"em": null, "f1": null}', "done"),
        ('{"p50": 3}', "done"),
        ("finished", "done"),
    ],
)
def test_figures_are_those_of_a_result_that_has_them(line, shown):
    assert pool.figures(line) == shown


def test_an_error_of_what_is_told_of_a_run_stops_the_others(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, time, pathlib\nfrom pathlib import Path\n"
        f"Path({str(tmp_path)!r}, 'began-' + sys.argv[-1]).touch()\n"
        "if sys.argv[-1] != 'seed=0': time.sleep(60)\nsys.exit(2)\n"
    )
    monkeypatch.setattr(pool, "SCRIPTS", {"train": str(script)})
    (tmp_path / "some.yaml").write_text(
        f"system: some\nbase: {{path: x}}\nlora: {{rank: 4}}\nruns: {tmp_path / 'runs'}\n"
    )
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps({"systems": [str(tmp_path / "some.yaml")], "seeds": [0, 1, 2, 3], "kinds": ["train"]}))
    jobs, _ = sweeps.plan(path)

    def ended(*_: object) -> None:
        raise OSError("no place to write")

    began = time.monotonic()
    with pytest.raises(OSError, match="no place"):
        pool.run(jobs, ("train",), 2, ended)
    assert time.monotonic() - began < 30
    assert not (tmp_path / "began-seed=3").exists()  # the third may have begun before
