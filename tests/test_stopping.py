"""A first signal is noted, a second one ends the process; afterwards signals do what they did before."""

import os
import pty
import signal
import subprocess
import sys
import time

from common import stopping
from tests.conftest import ROOT

import pytest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_first_signal_is_only_noted(number, code, capfd):
    before = signal.getsignal(number)
    with stopping.listen() as request:
        request.check()
        os.kill(os.getpid(), number)
        assert request.code == code
        os.kill(os.getpid(), number)  # the same one, passed on by a launcher
        with pytest.raises(stopping.Stopped):
            request.check()
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.count("saving, then ending") == 1


def test_a_signal_is_passed_on_to_the_command_that_runs():
    waits = "import time; print('begun', flush=True); time.sleep(60)"
    program = f"import sys; from common import stopping; sys.exit(stopping.run([sys.executable, '-c', {waits!r}]))"
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout.readline() == "begun\n"
        runner.send_signal(signal.SIGTERM)
        assert runner.stdout.read() == ""  # which ends once the command has ended
        assert runner.wait(30) == 143
    assert stopping.run([sys.executable, "-c", "import sys; sys.exit(3)"]) == 3


@pytest.mark.parametrize(("how", "code"), [([], 129), (["nohup"], 0)])
def test_a_terminal_that_closes_is_a_signal_too_unless_nobody_cares(tmp_path, how, code):
    program = f"""
import fcntl, os, sys, termios, time
from pathlib import Path
from common import stopping
fcntl.ioctl(os.open(sys.argv[1], os.O_RDWR), termios.TIOCSCTTY, 0)  # is now this session's terminal
with stopping.listen() as request:
    Path({str(tmp_path / "begun")!r}).touch()
    end = time.monotonic() + 2
    while not request.code and time.monotonic() < end:
        time.sleep(0.05)
print("to whom?", flush=True)
print("to whom?", file=sys.stderr, flush=True)
Path({str(tmp_path / "saved")!r}).touch()
sys.exit(request.code)
"""
    ours, theirs = pty.openpty()
    out = subprocess.DEVNULL if how else theirs  # nohup keeps nobody from writing to a terminal that has gone
    command = [*how, sys.executable, "-c", program, os.ttyname(theirs)]
    with subprocess.Popen(command, cwd=ROOT, stdin=out, stdout=out, stderr=out, start_new_session=True) as process:
        os.close(theirs)
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.close(ours)
        assert process.wait(30) == code
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_process_at_once(second, code):
    program = f"""
import os, signal, time
from common import stopping
with stopping.listen():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * stopping.ECHO_S)
    os.kill(os.getpid(), {int(second)})
    time.sleep(60)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=30).returncode == code
