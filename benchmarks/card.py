"""A smaller card than the GPU at hand: another process takes what is free, but so much.

    python -m benchmarks.card FREE_GIB        holds it until it is killed

Compute and bandwidth stay those of the GPU at hand, so figures compare stacks on one card, not cards.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import UserError
from common.files import ROOT

import torch

GIB = 2**30
FREE = {8: 7.6, 12: 11.5, 16: 14.6, 24: 23.5}  # what is free on a card of so many GB that does nothing else, in GiB


@contextmanager
def card(free_gib: float) -> Iterator[None]:
    """`free_gib` are free while the body runs. Raises `UserError` on a GPU of which no more are free."""
    command = [sys.executable, "-m", "benchmarks.card", str(free_gib)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as filler:
        try:
            if not filler.stdout or filler.stdout.readline() != "held\n":
                raise UserError(f"this GPU has no {free_gib:g} GiB free, so it cannot stand for a card of them")
            yield
        finally:
            filler.kill()


def main(free_gib: float) -> None:
    torch.empty(1, device="cuda")  # the context counts as taken
    free, _ = torch.cuda.mem_get_info()
    if (surplus := int(free - free_gib * GIB)) >= 0:
        held = torch.empty(surplus, dtype=torch.uint8, device="cuda")
        print("held", flush=True)
        while held.is_cuda:
            time.sleep(1)


if __name__ == "__main__":
    main(float(sys.argv[1]))
