"""The device: which one, what it is called, what it can do, and what to do when its memory runs out."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError

import torch


def pick_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def describe_device(device: torch.device) -> dict[str, Any]:
    """What a record says of the machine."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return {"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return {"name": f"CPU {_cpu_name()}", "threads": torch.get_num_threads()}


@contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """Running out of memory in the body becomes a `UserError` that ends with `advice`: which knob to turn."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory; {advice}") from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(f"out of memory; {advice}") from error


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def has_flash_attention(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype.itemsize == 2 and torch.cuda.get_device_capability(device) >= (8, 0)
