"""A first signal is noted, a second one ends the process; afterwards signals do what they did before."""

import os
import pty
import signal
import subprocess
import sys

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
import sys, time
from pathlib import Path
from common import stopping
with stopping.listen() as request:
    print("begun", flush=True)
    end = time.monotonic() + 2
    while not request.code and time.monotonic() < end:
        time.sleep(0.05)
print("to whom?", flush=True)
print("to whom?", file=sys.stderr, flush=True)
Path({str(tmp_path / "saved")!r}).touch()
sys.exit(request.code)
"""
    out = tmp_path / "out"
    command = [*how, sys.executable, "-c", program]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        if how:  # its messages would end it
            file = os.open(out, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1)
            os.dup2(file, 2)
        os.execvp(command[0], command)
    while b"begun" not in (out.read_bytes() if out.exists() else b"" if how else os.read(terminal, 1000)):
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
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
