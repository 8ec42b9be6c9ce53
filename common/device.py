"""The device that a process computes on: its name, what it supports, and advice when its memory runs out."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError

import torch

AMPERE = (8, 0)  # compute capability of the A100: the least that torch builds flash attention for, and that has bf16


def pick_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def describe_device(device: torch.device) -> dict[str, Any]:
    """For records: a GPU's name, memory in GiB and CUDA version, or a CPU's name and number of threads."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return {"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return {"name": f"CPU {_cpu_name()}", "threads": torch.get_num_threads()}


def has_flash_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """True if torch's flash attention runs: 16-bit numbers on a GPU of compute capability 8.0 or more."""
    return dtype.itemsize == 2 and _is_ampere(device)


def has_efficient_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """True if torch's memory-efficient attention stands in for flash attention: fp16 on any GPU."""
    return device.type == "cuda" and dtype == torch.float16


def has_nf4_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """True if `common.model.nf4_kernels` runs: 16-bit numbers on a GPU of compute capability 8.0 or more."""
    return dtype.itemsize == 2 and _is_ampere(device)


@contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """Raises `UserError` with `advice`, the setting to change, if memory runs out in the body."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory; {advice}") from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(f"out of memory; {advice}") from error


def _is_ampere(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
