"""Where the GPU's time goes in optimizer steps of train_loop.py, by class of kernel.

    python -m benchmarks.profile_step [MODEL] [key=value ...]

Runs the loop itself for a few steps, and has torch's profiler watch the last of them. Prints a table and one JSON line.
"""

import json
import re
import sys
import tempfile
from collections import defaultdict

import train_loop
from common.device import pick_device
from common.errors import UserError, one_line_errors
from common.runs import gauges

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

WARMUP, STEPS = 5, 10
CLASSES = {  # the first that matches; names of kernels in CUDA 12 and 13, Triton and bitsandbytes
    "attention": r"flash|fmha",
    "dequantisation": r"dequant",
    "optimizer": r"optimizer|blockwise",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitk",
    "compiled elementwise": r"^triton_",
    "copies": r"^Memcpy|^Memset|copy",
    "other elementwise": r"",
}


def main(argv: list[str]) -> None:
    if not torch.cuda.is_available():
        raise UserError("no CUDA device, and this profiles a GPU")
    watch = profile(activities=[ProfilerActivity.CUDA])
    marks: list[float] = []

    def after_step(*_: object) -> None:
        marks.append(gauges.now(pick_device()))
        if len(marks) == WARMUP:
            watch.start()
        elif len(marks) == WARMUP + STEPS:
            watch.stop()

    hook = register_optimizer_step_post_hook(after_step)
    total = WARMUP + STEPS
    with tempfile.TemporaryDirectory(prefix="profile-") as runs:
        model, *overrides = argv or ["qlora7b"]
        train_loop.main(
            [
                model,
                *overrides,
                f"train.max_steps={total}",
                f"train.eval_every={total}",
                "early_stop.questions=1",
                f"runs={runs}",
            ]
        )
    hook.remove()
    if len(marks) < total:
        raise UserError(f"{len(marks)} optimizer steps are in this data, and {total} are needed")
    took: defaultdict[str, float] = defaultdict(float)
    for event in watch.key_averages():
        kind = next(name for name, pattern in CLASSES.items() if re.search(pattern, event.key, re.I))
        took[kind] += event.self_device_time_total / STEPS / 1000
    wall = 1000 * (marks[-1] - marks[WARMUP - 1]) / STEPS
    busy = sum(took.values())
    print(f"\n{'ms a step':>12} {'share':>7}")
    for kind, ms in sorted(took.items(), key=lambda item: -item[1]):
        print(f"{ms:12.1f} {ms / busy:7.1%}  {kind}")
    print(f"{busy:12.1f}          GPU busy, of {wall:.1f} ms a step while profiled")
    print(json.dumps({"ms_per_step": took, "busy_ms": busy, "wall_ms": wall}))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
