"""`python -m common.runs.launch 2 train_loop.py …`: a script in several processes, one a GPU, or on CPUs.

torchrun with an end for people: what a rank died of is one line, and this exits as that rank did. `accelerate launch`
and torchrun itself start the scripts as well.
"""

import logging
import os
import signal
import sys

from common.errors import UserError, one_line_errors

SAVE_SECONDS = 110  # that a rank has from SIGTERM on; torchrun before 2.13 knows 30 alone
KILLED = [-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS]


def how(code: int) -> str:
    known = {-s: s.name for s in signal.Signals}
    return f"by {known.get(code, f'signal {-code}')}" if code < 0 else f"with {code}"


def main(argv: list[str]) -> None:
    if len(argv) < 2 or not argv[0].isdecimal() or not int(argv[0]):
        raise UserError(
            f"PROCESSES={argv[0] if argv else ''}: it must be how many processes, 1 or more, and a script to run"
        )
    # here, so that a mistake is answered without the seconds that torch takes
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    threads = max(1, (os.cpu_count() or 1) // int(argv[0]))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # torchrun would set 1, and say so at length
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_SECONDS))
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each has a level of its own
    try:
        run.run(run.parse_args(["--standalone", f"--nproc-per-node={argv[0]}", *argv[1:]]))
    except ChildFailedError as error:
        # of what was seen at once, what killed a process comes before what it did to the others
        rank, first = min(error.failures.items(), key=lambda f: (f[1].timestamp, f[1].exitcode not in KILLED))
        code = first.exitcode
        print(f"rank {rank} of {argv[0]} ended {how(code)}, and the others with it", file=sys.stderr)
        sys.exit(128 - code if code < 0 else code)
    except SignalException as error:  # passed on to the ranks, which save
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
