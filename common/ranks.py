"""Several processes, one result. A single process is the case of one rank.

Every rank runs the same lines on the same plan and holds the same adapter; what they exchange are sums and answers.
"""

import atexit
import os
import sys
from collections.abc import Sequence

from common.errors import UserError

import torch
from accelerate import PartialState


def join() -> PartialState:
    """This process among those that `accelerate launch` or torchrun started: NCCL on GPUs, gloo on CPUs.

    Only the first rank is heard on stdout from here on. Raises `UserError` where a launcher was asked for several
    processes and started one: without several GPUs, `accelerate launch` does that silently.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        raise UserError("accelerate launch started one process, not several; add --multi_gpu (it means CPUs as well)")
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes > 1:
        # at the interpreter's end gloo's threads may be torn down in an order that aborts the process
        atexit.register(state.destroy_process_group)
    if not state.is_main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    return state


def sum_gradients(weights: Sequence[torch.nn.Parameter], *numbers: float) -> list[float]:
    """Sum the gradients of all ranks in place, and `numbers` with them, in one all-reduce; returns the numbers' sums.

    A rank that had nothing to do adds zeros. The sum, not the mean: each rank's loss is its share of the step's.
    """
    if PartialState().num_processes == 1:
        return list(numbers)
    parts = [(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights]
    flat = torch.cat([*parts, torch.tensor(numbers, device=parts[0].device)])
    torch.distributed.all_reduce(flat)
    *sums, totals = flat.split([*map(len, parts), len(numbers)])
    for weight, part in zip(weights, sums, strict=True):
        if weight.grad is None:
            weight.grad = torch.empty_like(weight)
        weight.grad.copy_(part.view_as(weight))
    return totals.tolist()
