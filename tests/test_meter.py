"""Gauges say what they measured, and nothing where they measured nothing."""

import json
import os
from types import SimpleNamespace

from common import meter, nvml

import numpy as np
import psutil
import pytest
import torch

CPU = torch.device("cpu")


def test_peak_resident_memory_is_in_bytes_and_no_less_than_what_is_held():
    held = np.ones(20 * 2**20)  # 160 MiB
    now, peak = psutil.Process().memory_info().rss, meter.peaks(CPU)["rss_bytes"]
    assert held.nbytes < 0.9 * now < peak < psutil.virtual_memory().total
    assert meter.peaks(CPU)["allocated_bytes"] is None


def test_an_earlier_part_of_the_run_counts_among_the_peaks():
    before = meter.peaks(CPU) | {"rss_bytes": 2**60}
    assert meter.peaks(CPU, before) == before
    assert meter.peaks(CPU, {})["rss_bytes"] < 2**60


def test_a_cpu_has_no_nvml_figures(tmp_path):
    with meter.nvml_sampler(CPU, tmp_path / "gauges.json") as begin:
        begin("phase")
    assert not list(tmp_path.iterdir())


def test_the_clock_runs_forward():
    assert meter.now(CPU) < meter.now(CPU)


def test_a_cpu_is_named_with_its_threads():
    assert meter.describe(CPU)["name"].startswith("CPU ")
    assert meter.describe(CPU)["threads"] == torch.get_num_threads()


@pytest.fixture
def gpu(monkeypatch):
    """A driver of which every sample reads the next of these: device bytes, our bytes, clock, energy, reasons."""
    state = {"at": 0}
    readings = [(100, 10, 1500, 5000, 0), (300, 40, 900, 6000, 0x4 | 0x1), (200, None, 1700, 9500, 0)]

    def now(column: int):
        return readings[min(state["at"], len(readings) - 1)][column]

    def clock(handle, kind):
        state["at"] += 1
        return readings[min(state["at"], len(readings)) - 1][2]

    def energy(handle):
        if state.get("no energy"):
            raise NVMLError
        return now(3)

    class NVMLError(Exception):
        pass

    fake = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=now(0)),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [
            SimpleNamespace(pid=7, usedGpuMemory=999), SimpleNamespace(pid=42, usedGpuMemory=now(1)),
        ],
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: now(4),
        nvmlDeviceGetClockInfo=clock,
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )  # fmt: skip
    monkeypatch.setattr(nvml, "pynvml", fake)
    return state


def watch(monkeypatch, path, events: list[str | None]) -> dict:
    """What the sampler leaves after these events: None, nothing came; a text, that was written; "": stdin ended."""
    coming = iter(events)
    ours, theirs = os.pipe()

    def select(*_):
        text = next(coming)
        if text:
            os.write(theirs, text.encode())
        elif text == "":
            os.close(theirs)
        return ([ours] if text is not None else [], [], [])

    monkeypatch.setattr(nvml.select, "select", select)
    monkeypatch.setattr(nvml, "STDIN", ours)
    try:
        nvml.main("GPU-x", 42, str(path))
    finally:
        os.close(ours)
    return json.loads(path.read_text())


def test_the_sampler_tells_phases_apart(gpu, monkeypatch, tmp_path):
    found = watch(monkeypatch, tmp_path / "gauges.json", [None, "natural\n", None, ""])
    assert list(found) == ["start", "natural"]
    start, natural = found["start"], found["natural"]
    assert (start["process_bytes"], start["device_bytes"], start["processes"]) == (40, 300, 2)
    assert start["clock_mhz"] == [900, 1200, 1500]
    assert start["throttled"] == ["power cap"], "idle is no trouble"
    assert start["energy_j"] == 4.5
    assert (natural["process_bytes"], natural["device_bytes"], natural["throttled"]) == (None, 200, [])
    assert not list(tmp_path.glob("*.partial"))


def test_phases_that_begin_at_once_are_all_noticed(gpu, monkeypatch, tmp_path):
    found = watch(monkeypatch, tmp_path / "gauges.json", ["warm up\nnatu", "ral\n", None, None, "fixed\n", None, ""])
    assert list(found) == ["start", "warm up", "natural", "fixed"]
    assert found["natural"]["clock_mhz"], "it is the one that lasts"


def test_what_a_driver_does_not_say_is_left_open(gpu, monkeypatch, tmp_path):
    gpu["no energy"] = True
    assert watch(monkeypatch, tmp_path / "gauges.json", [None, ""])["start"]["energy_j"] is None


def test_the_sampler_outlives_what_it_watches_and_has_written(gpu, monkeypatch, tmp_path):
    """A crash ends stdin and nothing else; and before that a file is there already."""
    path, seen = tmp_path / "gauges.json", []
    monkeypatch.setattr(nvml.os, "replace", lambda a, b: (os.rename(a, b), seen.append(json.loads(path.read_text()))))
    watch(monkeypatch, path, [None, None, ""])
    assert len(seen) >= 2
    assert "start" in seen[0]
