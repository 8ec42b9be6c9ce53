"""`python -m common.nvml GPU-UUID PID`: sample NVML until stdin closes, then print the peaks as one JSON object.

A process of its own, so that measuring never waits for, or allocates in, the measured process. Imports no torch.
"""

import json
import select
import sys

import pynvml

INTERVAL_S = 0.02


def main(uuid: str, pid: int) -> None:
    peak: dict[str, int | None] = {"process_bytes": None, "device_bytes": None}
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    while True:
        seen = {"device_bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).used, "process_bytes": None}
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == pid:
                seen["process_bytes"] = process.usedGpuMemory
        for key, value in seen.items():
            if value is not None:
                peak[key] = max(peak[key] or 0, value)
        if select.select([sys.stdin], [], [], INTERVAL_S)[0]:
            break
    pynvml.nvmlShutdown()
    print(json.dumps(peak))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
