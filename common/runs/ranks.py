"""Several processes, one result. A single process is the case of one rank.

Every rank runs the same lines on the same plan and holds the same adapter; what they exchange are sums and answers, and
which of them answers what.
"""

import atexit
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from common import torch_private
from common.config import Config, flat
from common.errors import UserError, first_line

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

Item = TypeVar("Item")


def join(at_most: int | None = None) -> PartialState:
    """This process among those that `accelerate launch` or torchrun started: NCCL on GPUs, gloo on CPUs.

    Only the first rank is heard on stdout from here on. Raises `UserError` where a launcher was asked for several
    processes and started one (without several GPUs, `accelerate launch` does that silently), or started more than
    `at_most`, the questions of an optimizer step.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        raise UserError("accelerate launch started one process, not several; add --multi_gpu (it means CPUs as well)")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if torch.cuda.is_available() and here > gpus:
        raise UserError(f"{here} processes were asked for, and this machine has {gpus} GPUs: one each is what works")
    state = PartialState(cpu=not torch.cuda.is_available())
    if at_most is not None and at_most < state.num_processes:
        raise UserError(f"train.questions_per_step={at_most}: fewer than the {state.num_processes} processes")
    if state.num_processes > 1:
        # at the interpreter's end gloo's threads may be torn down in an order that aborts the process
        atexit.register(state.destroy_process_group)
    if not state.is_main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    return state


def accelerator(config: Config, device: torch.device, dtype: torch.dtype) -> Accelerator:
    """Accelerate's object for one training. Raises `UserError` where the tracker is unknown or not installed."""
    try:
        made = Accelerator(
            mixed_precision={torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}[dtype],
            cpu=device.type == "cpu",
            log_with=config.tracker,
            project_dir=config.runs,
        )
    except ValueError as error:
        if not config.tracker:
            raise
        raise UserError(f"tracker={config.tracker}: {error}") from error
    if config.tracker and not made.log_with:
        raise UserError(f"tracker={config.tracker}: its package is not installed; pip install {config.tracker}")
    if made.scaler:  # its scale is made by the first loss, and a rank without trees has none
        made.scaler.scale(torch.zeros((), device=device))
    return made


def start_tracker(accelerator: Accelerator, config: Config, run: Path) -> None:
    accelerator.project_configuration.logging_dir = str(run)
    accelerator.init_trackers("squad-qlora", flat(config.to_dict()))


def idle_share(busy: float, stepping: float) -> float | None:
    """The share of the steps' seconds in which a mean rank's GPU waited; None where no step was taken."""
    mean = sum(gather_object([busy])) / count()
    return round(1 - mean / stepping, 4) if mean else None


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
    store = torch_private.default_store()  # what the ranks found each other by
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
        raise UserError(f"another rank of this run has gone, for a reason of its own: {first_line(error)}") from error
    if len(gradients) > 1:
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    return sums
