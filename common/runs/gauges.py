"""The one clock and the memory gauges."""

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.files import ROOT
from common.runs.results import Peak

import pynvml
import torch


def now(device: torch.device) -> float:
    """Seconds on a monotonic clock, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


UNKNOWN: Peak = {"allocated_bytes": None, "reserved_bytes": None, "rss_bytes": None}


def peaks(device: torch.device, before: Peak = UNKNOWN) -> Peak:
    """Peak bytes: torch's allocator on a GPU; on a CPU the process's resident set since its start, loading included.

    `before`: the peaks of an earlier part of the same run, which count as well.
    """
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    cuda = device.type == "cuda"
    found = {
        "allocated_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else None,
        "rss_bytes": rss,
    }
    return {name: max(value, before.get(name) or 0) if value else None for name, value in found.items()}


def process_peak(device: torch.device) -> int | None:
    """Most bytes of the GPU that this process has had, CUDA's own included. None on a CPU, or where NVML hides it."""
    if device.type != "cuda":
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        mine = [p for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
    except pynvml.NVMLError:
        return None
    if not mine or mine[0].usedGpuMemory is None:
        return None
    beside = mine[0].usedGpuMemory - torch.cuda.memory_reserved(device)  # CUDA and its kernels, which only grow
    return torch.cuda.max_memory_reserved(device) + beside


Mark = float | torch.cuda.Event  # seconds of the host's clock, or an event of the device


def mark(device: torch.device) -> Mark:
    """A point in what the device computes, which the host does not wait for: see `between`."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(began: Mark, ended: Mark) -> float:
    """Seconds from one mark to another, both of which the device has passed."""
    if isinstance(began, float) and isinstance(ended, float):
        return ended - began
    assert isinstance(began, torch.cuda.Event)
    assert isinstance(ended, torch.cuda.Event)
    return began.elapsed_time(ended) / 1000


@contextmanager
def nvml_sampler(device: torch.device, file: Path) -> Iterator[Callable[[str], None]]:
    """Sample NVML from a process of its own while the body runs, into `file` (`common.runs.nvml`).

    Yields what begins a new phase by name; the first is "start". On a CPU nothing is sampled and no file written.
    """
    if device.type != "cuda":
        yield lambda phase: None
        return
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = [sys.executable, "-m", "common.runs.nvml", uuid, str(os.getpid()), str(file.resolve())]
    # in a session of its own, where no Ctrl-C reaches it
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True) as sampler:
        assert sampler.stdin

        def begin(phase: str) -> None:
            with contextlib.suppress(BrokenPipeError):  # a sampler that has died is missed when its file is read
                print(phase, file=sampler.stdin, flush=True)

        try:
            yield begin
        finally:
            with contextlib.suppress(BrokenPipeError):
                sampler.stdin.close()  # ends it
