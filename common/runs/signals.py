"""SIGTERM, SIGINT and a terminal that closes ask a long run to save and end; a second one ends it at once."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from types import FrameType

CODES = (129, 130, 143)  # exit codes of what SIGHUP, SIGINT or SIGTERM has ended
ECHO_S = 0.3  # make and launchers pass on what their whole process group has got already: that is no second one


class Stopped(Exception):
    """Raised by `Request.check` in the middle of work that can be left."""


class Request:
    """What came so far: `code` is 128 + the signal's number, a shell's exit code for it; 0 before any came."""

    code = 0
    _when: float  # of the first, monotonic seconds

    def receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        if not self.code:
            self._when, self.code = time.monotonic(), 128 + number
            name = signal.Signals(number).name
            if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
                with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or its reader has gone
                    os.write(sys.stderr.fileno(), f"\n{name}: saving, then ending; once more ends at once\n".encode())
        elif time.monotonic() - self._when > ECHO_S:
            os._exit(128 + number)

    def check(self) -> None:
        if self.code:
            raise Stopped


def run(command: list[str]) -> int:
    """A command's exit code; 128 + the number of a signal that came meanwhile, which is passed on."""
    with listen() as request:
        child = subprocess.Popen(command, start_new_session=True)  # Ctrl-C is for us, and we pass it on
        passed_on = False
        while True:
            try:
                code = child.wait(0.1)
                return request.code or code
            except subprocess.TimeoutExpired:
                if request.code and not passed_on:
                    child.terminate()
                    passed_on = True


@contextlib.contextmanager
def listen() -> Iterator[Request]:
    """While the body runs, signals are only noted; afterwards they do what they did before."""
    request, numbers = Request(), [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Whoever writes to a terminal that has gone fails; saving must not."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for out in (sys.__stdout__, sys.__stderr__):
        if out and stat.S_ISCHR(os.fstat(out.fileno()).st_mode):
            os.dup2(nowhere, out.fileno())
    os.close(nowhere)
