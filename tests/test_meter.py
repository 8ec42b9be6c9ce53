"""Gauges say what they measured, and nothing where they measured nothing."""

import io
import json
from types import SimpleNamespace

from common import meter, nvml

import numpy as np
import psutil
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


def test_a_cpu_has_no_nvml_figures():
    with meter.nvml_sampler(CPU) as found:
        pass
    assert found == {}


def test_the_clock_runs_forward():
    assert meter.now(CPU) < meter.now(CPU)


def test_a_cpu_is_named_with_its_threads():
    assert meter.describe(CPU)["name"].startswith("CPU ")
    assert meter.describe(CPU)["threads"] == torch.get_num_threads()


def test_the_sampler_reports_the_peaks_of_one_process_and_of_the_device(monkeypatch, capsys):
    readings = iter([(100, 10), (300, 40), (200, 30)])
    state = {}

    def device_memory(handle):
        state["device"], state["process"] = next(readings)
        return SimpleNamespace(used=state["device"])

    def processes(handle):
        other = SimpleNamespace(pid=7, usedGpuMemory=999)
        return [other, SimpleNamespace(pid=42, usedGpuMemory=state["process"])]

    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetMemoryInfo=device_memory,
        nvmlDeviceGetComputeRunningProcesses=processes,
    )
    stops = iter([False, False, True])
    monkeypatch.setattr(nvml, "pynvml", fake)
    monkeypatch.setattr(nvml.select, "select", lambda *_: ([sys_stdin] if next(stops) else [], [], []))
    sys_stdin = io.StringIO()
    nvml.main("GPU-x", 42)
    assert json.loads(capsys.readouterr().out) == {"process_bytes": 40, "device_bytes": 300}
