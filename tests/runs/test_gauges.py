"""Gauges say what they measured, and nothing where they measured nothing."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from common import device as device_module
from common.device import describe_device, out_of_memory, pick_device
from common.errors import UserError
from common.runs import gauges, nvml
from tests.conftest import ROOT

import numpy as np
import psutil
import pynvml
import pytest
import torch

CPU = torch.device("cpu")


def test_peak_resident_memory_is_in_bytes_and_no_less_than_what_is_held():
    held = np.ones(8 * 2**20)  # 64 MiB
    now, peak = psutil.Process().memory_info().rss, gauges.peaks(CPU)["rss_bytes"]
    assert held.nbytes < 0.9 * now < peak < psutil.virtual_memory().total
    assert gauges.peaks(CPU)["allocated_bytes"] is None


def test_an_earlier_part_of_the_run_counts_among_the_peaks():
    before = gauges.peaks(CPU) | {"rss_bytes": 2**60}
    assert gauges.peaks(CPU, before) == before
    assert gauges.peaks(CPU, {})["rss_bytes"] < 2**60


def test_a_cpu_has_no_nvml_figures(tmp_path):
    with gauges.nvml_sampler(CPU, tmp_path / "gauges.json") as begin:
        begin("phase")
    assert not list(tmp_path.iterdir())


def test_the_clock_runs_forward():
    assert gauges.now(CPU) < gauges.now(CPU)


def test_a_cpu_is_named_with_its_threads():
    assert describe_device(CPU)["name"].startswith("CPU ")
    assert describe_device(CPU)["threads"] == torch.get_num_threads()


# ---- the clock and torch's gauges, of a GPU that is made up --------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """A GPU for `meter`: what it was asked for, in order."""
    asked = []

    def answers(name, result):
        monkeypatch.setattr(torch.cuda, name, lambda *args: (asked.append((name, *args)), result)[1])

    answers("is_available", True)
    answers("current_device", 3)
    answers("synchronize", None)
    answers("reset_peak_memory_stats", None)
    answers("max_memory_allocated", 500)
    answers("max_memory_reserved", 700)
    uuid = "11-22"
    gpu = SimpleNamespace(name="A GPU", total_memory=int(79.26 * 2**30), uuid=uuid)
    answers("get_device_properties", gpu)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gauges.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss={0: 90}[who]))
    monkeypatch.setattr(gauges.time, "perf_counter", lambda: (asked.append("clock"), 12.5)[1])
    return asked


GPU = torch.device("cuda", 3)


def test_the_device_is_this_processs_gpu_or_the_cpu(cuda, monkeypatch):
    assert pick_device() == GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == CPU


def test_the_clock_is_read_after_the_device_has_finished(cuda):
    assert gauges.now(GPU) == 12.5
    assert cuda == [("synchronize", GPU), "clock"]
    cuda.clear()
    assert gauges.now(CPU) == 12.5
    assert cuda == ["clock"]


def test_a_gpu_is_described_with_its_memory(cuda):
    assert describe_device(GPU) == {"name": "A GPU", "memory_gib": 79.3, "cuda": "13.0"}
    assert ("get_device_properties", GPU) in cuda


def test_a_gpus_peaks_are_of_torchs_allocator_and_of_the_process(cuda):
    assert gauges.peaks(GPU) == {"allocated_bytes": 500, "reserved_bytes": 700, "rss_bytes": 90 * 1024}
    assert ("max_memory_allocated", GPU) in cuda
    assert ("max_memory_reserved", GPU) in cuda
    before = {"allocated_bytes": 600, "reserved_bytes": 650, "rss_bytes": None}
    assert gauges.peaks(GPU, before) == {"allocated_bytes": 600, "reserved_bytes": 700, "rss_bytes": 90 * 1024}
    assert gauges.peaks(CPU, before) == {"allocated_bytes": None, "reserved_bytes": None, "rss_bytes": 90 * 1024}


@pytest.mark.parametrize(
    ("says", "peak"),
    [
        ([(1, 9000), (os.getpid(), 1000)], 700 + 1000 - 400),  # the allocator's most, and what is beside it now
        ([(1, 9000)], None),  # in a container, where processes have other numbers
        ([(os.getpid(), None)], None),
        (None, None),  # no NVML
    ],
)
def test_what_a_process_has_had_of_its_gpu_is_said_by_nvml(cuda, monkeypatch, says, peak):
    def running(handle):
        if says is None:
            raise gauges.pynvml.NVMLError(1)
        return [SimpleNamespace(pid=pid, usedGpuMemory=n) for pid, n in says if handle == "handle"]

    monkeypatch.setattr(torch.cuda, "memory_reserved", {GPU: 400}.get)
    monkeypatch.setattr(gauges.pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(gauges.pynvml, "nvmlDeviceGetHandleByUUID", {"GPU-11-22": "handle"}.get)
    monkeypatch.setattr(gauges.pynvml, "nvmlDeviceGetComputeRunningProcesses", running)
    assert gauges.process_peak(GPU) == peak
    assert gauges.process_peak(CPU) is None


def test_another_system_counts_resident_memory_in_bytes(cuda, monkeypatch):
    monkeypatch.setattr(gauges.sys, "platform", "darwin")
    assert gauges.peaks(CPU)["rss_bytes"] == 90


def test_peaks_are_reset_on_a_gpu_alone(cuda):
    gauges.reset_peaks(CPU)
    assert cuda == []
    gauges.reset_peaks(GPU)
    assert cuda == [("reset_peak_memory_stats", GPU)]


def test_seconds_lie_between_two_marks(cuda, monkeypatch):
    times = iter([10.0, 12.5])
    monkeypatch.setattr(gauges.time, "perf_counter", lambda: next(times))
    assert gauges.between(gauges.mark(CPU), gauges.mark(CPU)) == 2.5

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing is True
            self.at = None

        def record(self):
            self.at = next(marks)

        def elapsed_time(self, other):
            return other.at - self.at  # milliseconds

    marks = iter([100.0, 350.0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert gauges.between(gauges.mark(GPU), gauges.mark(GPU)) == 0.25


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of GPU memory; lower x"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory; lower x"),
    ],
)
def test_running_out_of_memory_says_what_to_lower(error, message):
    with pytest.raises(UserError) as found, out_of_memory("lower x"):
        raise error
    assert str(found.value) == message


def test_what_is_no_lack_of_memory_is_left_alone():
    with pytest.raises(RuntimeError, match="shapes differ"), out_of_memory("lower x"):
        raise RuntimeError("shapes differ")


# ---- the sampler's process -----------------------------------------------------------------------------------------


@pytest.fixture
def sampler(cuda, monkeypatch):
    """What the sampler's process is started with and told."""
    found = SimpleNamespace(told=[], flushed=0, closed=False, broken=False, waited=False)

    class Stdin:
        def write(self, text):
            if found.broken:
                raise BrokenPipeError
            found.told.append(text)

        def flush(self):
            found.flushed += 1

        def close(self):
            found.closed = True
            if found.broken:
                raise BrokenPipeError

    class Process:
        stdin = Stdin()

        def __init__(self, command, **how):
            found.command, found.how = command, how

        def __enter__(self):
            return self

        def __exit__(self, *what):
            assert found.closed, "it would be waited for in vain"
            found.waited = True

    monkeypatch.setattr(gauges.subprocess, "Popen", Process)
    return found


def test_a_gpu_is_sampled_by_a_process_of_its_own(sampler, cuda, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with gauges.nvml_sampler(GPU, Path("gauges.json")) as begin:
        begin("load")
        assert sampler.flushed
        begin("warm up")
        assert not sampler.closed
    assert "".join(sampler.told) == "load\nwarm up\n"
    assert cuda == [("get_device_properties", GPU)]
    assert sampler.waited
    file = str((tmp_path / "gauges.json").resolve())
    assert sampler.command == [sys.executable, "-m", "common.runs.nvml", "GPU-11-22", str(os.getpid()), file]
    assert sampler.how == {"stdin": subprocess.PIPE, "text": True, "cwd": ROOT, "start_new_session": True}


def test_a_sampler_that_has_died_breaks_nothing(sampler, tmp_path):
    sampler.broken = True
    with gauges.nvml_sampler(GPU, tmp_path / "gauges.json") as begin:
        begin("load")
    assert sampler.closed


def test_a_sampler_ends_with_a_body_that_fails(sampler, tmp_path):
    with pytest.raises(ValueError, match="no"), gauges.nvml_sampler(GPU, tmp_path / "gauges.json"):
        raise ValueError("no")
    assert sampler.waited


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\nmodel name\t: Some CPU @ 2: GHz \nmodel name\t: Other", "Some CPU @ 2: GHz"),
        ("processor : 0\n", "arm"),
        (None, "arm"),
    ],
)
def test_a_cpu_has_the_name_that_the_kernel_says_or_its_kind(monkeypatch, cpuinfo, name):
    def read(path):
        assert str(path) == "/proc/cpuinfo"
        if cpuinfo is None:
            raise OSError
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(device_module.platform, "processor", lambda: "arm")
    monkeypatch.setattr(device_module.platform, "machine", lambda: "aarch64")
    assert describe_device(CPU)["name"] == f"CPU {name}"
    monkeypatch.setattr(device_module.platform, "processor", lambda: "")
    assert describe_device(CPU)["name"] == f"CPU {'aarch64' if name == 'arm' else name}"


# ---- what NVML says ------------------------------------------------------------------------------------------------

READINGS = [  # of one sample after the other: device and our bytes, MHz, joules, reasons, seconds of the clock
    (100, 10, 1500, 5.0, 0x0),
    (300, 40, 900, 6.25, 0x4 | 0x1 | 0x40),
    (250, 20, 1000, 7.5, 0x4),
    (200, None, 1700, 9.5, 0x0),
]


@pytest.fixture
def gpu(monkeypatch):
    """A driver of which every sample gives the next of `READINGS`, then the last again; a sample takes half a second.

    It is silent about what stands in its `silent`.
    """
    state = SimpleNamespace(sample=-1, silent=set(), asked=[])

    class NVMLError(Exception):
        pass

    def reading(column: int):
        return READINGS[min(max(state.sample, 0), len(READINGS) - 1)][column]

    def memory(handle):
        state.sample += 1
        return SimpleNamespace(used=reading(0))

    def processes(handle):
        ours = [SimpleNamespace(pid=42, usedGpuMemory=reading(1))]
        return [SimpleNamespace(pid=7, usedGpuMemory=999), *ours, *ours[: state.sample == 1]]

    def told(name, result):
        def question(*arguments):
            state.asked.append((name, *arguments))
            if name in state.silent:
                raise NVMLError
            return result(*arguments)

        return question

    questions = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: f"handle of {uuid}",
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetComputeRunningProcesses": processes,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: reading(4),
        "nvmlDeviceGetClockInfo": lambda handle, kind: reading(2),
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: int(1000 * reading(3)),
    }
    fake = {name: told(name, result) for name, result in questions.items()}
    monkeypatch.setattr(nvml, "pynvml", SimpleNamespace(NVMLError=NVMLError, NVML_CLOCK_SM="SM", **fake))
    monkeypatch.setattr(nvml.time, "monotonic", lambda: 100 + max(0, state.sample) / 2)
    return state


def watch(monkeypatch, path, events: list[str | None]) -> dict:
    """What the sampler leaves after these events: None, nothing came; a text, that was written; "": stdin ended."""
    coming = iter(events)
    ours, theirs = os.pipe()

    def select(*asked):
        assert asked == ([ours], [], [], 0.02)
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
    found = watch(monkeypatch, tmp_path / "gauges.json", [None, None, "natural\n", None, ""])
    assert found == {
        "start": {
            "seconds": 1.0,
            "process_bytes": 40,
            "device_bytes": 300,
            "processes": 3,
            "energy_j": 2.5,
            "clock_mhz": [900, 1000, 1500],
            "throttled": ["hardware thermal slowdown", "power cap"],
        },
        "natural": {
            "seconds": 1.0,
            "process_bytes": None,
            "device_bytes": 200,
            "processes": 2,
            "energy_j": 2.0,
            "clock_mhz": [1700, 1700, 1700],
            "throttled": [],
        },
    }
    assert list(found) == ["start", "natural"]
    assert not list(tmp_path.glob("*.partial"))
    assert gpu.asked[:2] == [("nvmlInit",), ("nvmlDeviceGetHandleByUUID", "GPU-x")]
    assert gpu.asked[-1] == ("nvmlShutdown",)
    assert ("nvmlDeviceGetClockInfo", "handle of GPU-x", "SM") in gpu.asked
    handles = {arguments[0] for name, *arguments in gpu.asked if arguments and name != "nvmlDeviceGetHandleByUUID"}
    assert handles == {"handle of GPU-x"}


def test_reasons_are_those_that_the_driver_means():
    names = {
        "power cap": "SwPowerCap",
        "hardware slowdown": "HwSlowdown",
        "sync boost": "SyncBoost",
        "software thermal slowdown": "SwThermalSlowdown",
        "hardware thermal slowdown": "HwThermalSlowdown",
        "power brake": "HwPowerBrakeSlowdown",
    }
    meant = {ours: getattr(pynvml, f"nvmlClocksThrottleReason{theirs}") for ours, theirs in names.items()}
    assert meant == nvml.REASONS


def test_phases_that_begin_at_once_are_all_noticed(gpu, monkeypatch, tmp_path):
    found = watch(monkeypatch, tmp_path / "gauges.json", ["warm up\nnatu", "ral\n", None, None, "fixed\n", None, ""])
    assert list(found) == ["start", "warm up", "natural", "fixed"]
    assert found["natural"]["clock_mhz"], "it is the one that lasts"


@pytest.mark.parametrize(
    ("silent", "left_open"),
    [
        ("nvmlDeviceGetTotalEnergyConsumption", {"energy_j": None}),
        ("nvmlDeviceGetClockInfo", {"clock_mhz": None}),
        ("nvmlDeviceGetCurrentClocksThrottleReasons", {"throttled": []}),
        ("nvmlDeviceGetComputeRunningProcesses", {"process_bytes": None, "processes": 0}),
    ],
)
def test_what_a_driver_does_not_say_is_left_open(gpu, monkeypatch, tmp_path, silent, left_open):
    everything = {
        "seconds": 0.5,
        "process_bytes": 40,
        "device_bytes": 300,
        "processes": 3,
        "energy_j": 1.25,
        "clock_mhz": [900, 1200, 1500],
        "throttled": ["hardware thermal slowdown", "power cap"],
    }
    gpu.silent = {silent}
    assert watch(monkeypatch, tmp_path / "gauges.json", [None, ""])["start"] == everything | left_open


def test_energy_that_is_said_at_one_end_alone_is_none(gpu):
    gpu.silent = {"nvmlDeviceGetTotalEnergyConsumption"}
    phase = nvml.Phase("handle", 42)
    gpu.silent = set()
    assert phase.summary()["energy_j"] is None
    phase = nvml.Phase("handle", 42)
    gpu.silent = {"nvmlDeviceGetTotalEnergyConsumption"}
    assert phase.summary()["energy_j"] is None
    assert phase.summary()["clock_mhz"] is None


def test_the_sampler_outlives_what_it_watches_and_writes_every_second(gpu, monkeypatch, tmp_path):
    """A crash ends stdin and nothing else; and before that a file is there already. A sample is half a second here."""
    path, at = tmp_path / "gauges.json", []

    def replace(partial, file):
        assert (str(partial), file) == (f"{path}.partial", path)
        os.rename(partial, file)
        at.append((gpu.sample, list(json.loads(path.read_text()))))

    monkeypatch.setattr(nvml.os, "replace", replace)
    watch(monkeypatch, path, [None] * 4 + ["natural\n", None, None, ""])
    both = ["start", "natural"]
    # at once, then after more than a second, at a change of phase, and at the end
    assert at == [(0, ["start"]), (3, ["start"]), (4, ["start"]), (6, both), (7, both)]


def test_seconds_are_rounded_to_thousandths(gpu, monkeypatch):
    phase = nvml.Phase("handle", 42)
    monkeypatch.setattr(nvml.time, "monotonic", lambda: 101.23456)
    assert phase.summary()["seconds"] == 1.235


def test_the_sampler_is_started_with_gpu_process_and_file(gpu, monkeypatch, tmp_path):
    path = tmp_path / "gauges.json"

    def select(*asked):
        assert asked[0] == [0], "stdin"
        return [0], [], []

    monkeypatch.setitem(sys.modules, "pynvml", nvml.pynvml)
    monkeypatch.setattr(sys, "argv", ["nvml.py", "GPU-x", "42", str(path)])
    monkeypatch.setattr(nvml.select, "select", select)
    monkeypatch.setattr(nvml.os, "read", lambda file, size: b"")
    runpy.run_path(nvml.__file__, run_name="__main__")
    assert ("nvmlDeviceGetHandleByUUID", "GPU-x") in gpu.asked
    assert json.loads(path.read_text())["start"]["process_bytes"] == 10
