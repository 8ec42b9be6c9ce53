"""Several processes, one result. A single process is the case of one rank.

Every rank runs the same lines on the same plan and holds the same adapter; what they exchange are sums and answers, and
which of them answers what.
"""

import atexit
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from common.errors import UserError

import torch
from accelerate import PartialState

Item = TypeVar("Item")


def join() -> PartialState:
    """This process among those that `accelerate launch` or torchrun started: NCCL on GPUs, gloo on CPUs.

    Only the first rank is heard on stdout from here on. Raises `UserError` where a launcher was asked for several
    processes and started one: without several GPUs, `accelerate launch` does that silently.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        raise UserError("accelerate launch started one process, not several; add --multi_gpu (it means CPUs as well)")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if torch.cuda.is_available() and here > gpus:
        raise UserError(f"{here} processes were asked for, and this machine has {gpus} GPUs: one each is what works")
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes > 1:
        # at the interpreter's end gloo's threads may be torn down in an order that aborts the process
        atexit.register(state.destroy_process_group)
    if not state.is_main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    return state


@contextmanager
def local_first() -> Iterator[None]:
    """The body is run by each machine's first rank before its others, which find in a cache what it has made there.

    What the body raises is raised by all ranks alike: none is left waiting.
    """
    state = PartialState()
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_local_main_process:
            state.wait_for_everyone()


def count() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def take(items: Sequence[Item], name: str) -> Iterator[Item]:
    """This rank's items, each taken when it is asked for, in order: a faster rank takes more, each item is of one.

    `name`: the same on all ranks for the same items, and of no other round.
    """
    if count() == 1:
        yield from items
        return
    store = torch.distributed.distributed_c10d._get_default_store()  # what the ranks found each other by
    while (taken := store.add(name, 1)) <= len(items):
        yield items[taken - 1]


def sum_gradients(weights: Sequence[torch.nn.Parameter], *numbers: torch.Tensor | float) -> torch.Tensor:
    """Sum the gradients of all ranks in place; returns the sums of `numbers`, fp32 on the device.

    On a GPU this only queues the sums, behind what computes the gradients: the host waits when it reads the result. A
    rank that had nothing to do adds zeros. The sum, not the mean: each rank's loss is its share of the step's. Raises
    `UserError` where another rank has gone, on CPUs; on GPUs the launcher ends those that wait.
    """
    device = weights[0].device
    # `full` and not `tensor`, which would wait for the device
    sums = torch.stack([n if isinstance(n, torch.Tensor) else torch.full((), float(n), device=device) for n in numbers])
    if count() == 1:
        return sums
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    # the fused layers' is one tensor already
    flat = gradients[0] if len(gradients) == 1 else torch.cat([gradient.flatten() for gradient in gradients])
    try:
        torch.distributed.all_reduce(flat)
        torch.distributed.all_reduce(sums)
    except RuntimeError as error:
        if device.type != "cpu":
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"another rank of this run has gone, for a reason of its own: {reason}") from error
    if len(gradients) > 1:
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    return sums
