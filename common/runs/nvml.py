"""`python -m common.runs.nvml GPU-UUID PID FILE`: sample NVML from a process of its own, phase by phase.

So measuring never waits for the measured process, allocates nothing in it, and outlives it: FILE is written anew every
second, at every change of phase (a line on stdin names the new one) and at the end of stdin, which comes when the
measured process closes it or dies. Imports no torch.
"""

import json
import os
import select
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.files import write_text

import pynvml

STDIN = 0
INTERVAL_S, WRITE_S = 0.02, 1.0
REASONS = {  # why clocks are below what they could be; idle and a clock that someone set are no trouble
    "power cap": 0x4, "hardware slowdown": 0x8, "sync boost": 0x10, "software thermal slowdown": 0x20,
    "hardware thermal slowdown": 0x40, "power brake": 0x80,
}  # fmt: skip


class Phase:
    """What NVML said during one phase; bytes, MHz, joules, seconds. None: the driver does not say."""

    def __init__(self, handle: object, pid: int):
        self.handle, self.pid = handle, pid
        self.began, self.energy = time.monotonic(), _maybe(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        self.process_bytes: int | None = None
        self.device_bytes, self.processes, self.clocks = 0, 0, list[int]()
        self.reasons: set[str] = set()

    def sample(self) -> None:
        self.device_bytes = max(self.device_bytes, pynvml.nvmlDeviceGetMemoryInfo(self.handle).used)
        running = _maybe(pynvml.nvmlDeviceGetComputeRunningProcesses, self.handle) or []
        self.processes = max(self.processes, len(running))
        for process in running:
            if process.pid == self.pid and process.usedGpuMemory is not None:
                self.process_bytes = max(self.process_bytes or 0, process.usedGpuMemory)
        clock = _maybe(pynvml.nvmlDeviceGetClockInfo, self.handle, pynvml.NVML_CLOCK_SM)
        self.clocks += [clock] if clock else []
        bits = _maybe(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, self.handle) or 0
        self.reasons |= {name for name, bit in REASONS.items() if bits & bit}

    def summary(self) -> dict[str, object]:
        now = _maybe(pynvml.nvmlDeviceGetTotalEnergyConsumption, self.handle)
        out: dict[str, object] = {"seconds": round(time.monotonic() - self.began, 3), "throttled": sorted(self.reasons)}
        out |= {"process_bytes": self.process_bytes, "device_bytes": self.device_bytes, "processes": self.processes}
        out["energy_j"] = (now - self.energy) / 1000 if now is not None and self.energy is not None else None
        clocks = self.clocks
        return out | {"clock_mhz": [min(clocks), statistics.median(clocks), max(clocks)] if clocks else None}


def main(uuid: str, pid: int, file: str) -> None:
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    done: dict[str, object] = {}
    name, phase, written, rest = "start", Phase(handle, pid), 0.0, ""

    def write() -> None:
        write_text(Path(file), json.dumps({**done, name: phase.summary()}))

    while True:
        phase.sample()
        if time.monotonic() - written > WRITE_S:
            write()
            written = time.monotonic()
        if select.select([STDIN], [], [], INTERVAL_S)[0]:
            write()
            came = os.read(STDIN, 4096)
            if not came:
                break
            *lines, rest = (rest + came.decode()).split("\n")
            for line in lines:
                done[name] = phase.summary()
                name, phase = line, Phase(handle, pid)
    pynvml.nvmlShutdown()


def _maybe(question: Callable[..., Any], *arguments: object) -> Any:
    try:
        return question(*arguments)
    except pynvml.NVMLError:
        return None


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
