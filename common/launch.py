"""`python -m common.launch 2 train_loop.py …`: a script in several processes of this machine, one a GPU, or on CPUs.

torchrun with an end for people: what a rank died of is one line, and this exits as that rank did. `accelerate launch`
and torchrun itself start the scripts as well.
"""

import logging
import os
import signal
import sys

from common.errors import UserError, one_line_errors

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: list[str]) -> None:
    if len(argv) < 2 or not argv[0].isdigit() or not int(argv[0]):
        raise UserError("common.launch wants how many processes, 1 or more, and a script: 2 train_loop.py …")
    threads = max(1, (os.cpu_count() or 1) // int(argv[0]))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # torchrun would set 1, and say so at length
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(["--standalone", f"--nproc-per-node={argv[0]}", *argv[1:]]))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        killed = f"by {signal.Signals(-first.exitcode).name}" if first.exitcode < 0 else f"with {first.exitcode}"
        print(f"rank {rank} of {argv[0]} ended {killed}, and the others with it", file=sys.stderr)
        sys.exit(128 - first.exitcode if first.exitcode < 0 else first.exitcode)
    except SignalException as error:  # passed on to the ranks, which save
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
