"""Which GPUs there are, and what a script's last line says."""

from common.runs import pool

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
