"""A first signal is noted, a second one ends the process; afterwards signals do what they did before."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time

from common.runs import signals
from tests.conftest import ROOT

import pytest

SIGNALS = [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
SAID = "\n{}: saving, then ending; once more ends at once\n"


@pytest.fixture(autouse=True)
def not_ignored(monkeypatch):
    """No signal is ignored, here and in what is started, whoever started the tests: a terminal, nohup or cron."""
    before = {number: signal.signal(number, lambda *_: None) for number, _ in SIGNALS}
    monkeypatch.setattr(signals, "_leave_terminal", lambda: None)
    monkeypatch.delenv("RANK", raising=False)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_codes_are_a_shells():
    assert [code - 128 for code in signals.CODES] == [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_first_signal_is_only_noted(number, code, capfd):
    before = signal.getsignal(number)
    with signals.listen() as request:
        request.check()
        assert request.code == 0
        os.kill(os.getpid(), number)
        assert request.code == code
        os.kill(os.getpid(), number)  # the same one, passed on by a launcher
        assert request.code == code
        with pytest.raises(signals.Stopped):
            request.check()
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err == SAID.format(number.name)


def test_afterwards_signals_do_what_they_did_though_the_body_fails():
    before = [signal.getsignal(number) for number, _ in SIGNALS]
    with pytest.raises(KeyError), signals.listen():
        raise KeyError
    assert [signal.getsignal(number) for number, _ in SIGNALS] == before


def test_an_ignored_hangup_stays_ignored_and_the_others_are_noted_even_so():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.listen() as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert (request.code, signal.getsignal(signal.SIGHUP)) == (0, signal.SIG_IGN)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.code == 143
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_second_signal_ends_the_process_at_once_unless_it_is_an_echo(monkeypatch, number, code):
    now, ended = [0.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    request = signals.Request()
    request.receive(signal.SIGTERM, None)
    for later in (0.0, 0.25, 0.3):
        now[0] = later
        request.receive(number, None)
    assert ended == []
    now[0] = 0.301
    request.receive(number, None)
    assert (ended, request.code) == ([code], 143)


@pytest.mark.parametrize(("rank", "said"), [(None, True), ("0", True), ("1", False)])
def test_the_first_of_several_processes_speaks_for_all(monkeypatch, capfd, rank, said):
    if rank:
        monkeypatch.setenv("RANK", rank)
    request = signals.Request()
    request.receive(signal.SIGINT, None)
    assert request.code == 130
    assert capfd.readouterr().err == (SAID.format("SIGINT") if said else "")


@pytest.mark.parametrize("stderr", [None, "closed", "broken"])
def test_a_signal_is_noted_though_nobody_listens_to_what_is_said(monkeypatch, tmp_path, stderr):
    reader, writer = os.pipe()
    os.close(reader)
    out = os.fdopen(writer, "w")
    if stderr == "closed":
        out.close()
    monkeypatch.setattr(sys, "stderr", None if stderr is None else out)
    request = signals.Request()
    request.receive(signal.SIGTERM, None)
    monkeypatch.undo()
    with contextlib.suppress(OSError):
        out.close()
    assert request.code == 143


def test_only_a_hangup_leaves_the_terminal_and_before_anything_is_said(monkeypatch):
    did = []
    monkeypatch.setattr(signals, "_leave_terminal", lambda: did.append("left"))
    monkeypatch.setattr(signals.os, "write", lambda *_: did.append("said"))
    for number, _ in SIGNALS:
        signals.Request().receive(number, None)
    assert did == ["left", "said", "said", "said"]


# ---- commands ------------------------------------------------------------------------------------------------------


def test_a_commands_exit_code_is_its_own():
    assert [signals.run(["sh", "-c", f"exit {code}"]) for code in (0, 3)] == [0, 3]


@pytest.mark.parametrize(("name", "code"), [("TERM", 143), ("INT", 130), ("HUP", 129)])
def test_a_signal_is_passed_on_to_the_command_that_runs(tmp_path, name, code):
    ended = tmp_path / "ended"
    waits = f"trap 'touch {ended}; exit 7' TERM; kill -{name} $PPID; for i in $(seq 500); do sleep 0.01; done"
    assert signals.run(["sh", "-c", waits]) == code
    assert ended.exists()


def test_a_signal_is_passed_on_once_and_the_command_is_waited_for(monkeypatch):
    did = []

    class Child:
        def __init__(self, command, start_new_session):
            did.append((command, start_new_session))

        def wait(self, timeout):
            did.append(timeout)
            if len(did) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            if len(did) < 8:
                raise subprocess.TimeoutExpired("command", timeout)
            return 7

        def terminate(self):
            did.append("terminated")

    monkeypatch.setattr(signals.subprocess, "Popen", Child)
    assert signals.run(["a", "b"]) == 143
    assert did == [(["a", "b"], True), 0.1, 0.1, "terminated", 0.1, 0.1, 0.1, 0.1]


# ---- terminals -----------------------------------------------------------------------------------------------------


def test_what_is_written_to_a_terminal_that_has_gone_goes_nowhere(monkeypatch, tmp_path):
    monkeypatch.undo()  # of the fixture's
    ours, theirs = pty.openpty()
    descriptors = len(os.listdir("/proc/self/fd"))
    with open(theirs, "w") as terminal, (tmp_path / "log").open("w") as log:
        for out, err in ((terminal, log), (None, terminal), (log, None), (terminal, terminal)):
            monkeypatch.setattr(sys, "__stdout__", out)
            monkeypatch.setattr(sys, "__stderr__", err)
            signals._leave_terminal()
        monkeypatch.undo()
        os.close(ours)
        terminal.write("to whom?")
        terminal.flush()
        log.write("kept")
        assert os.fstat(terminal.fileno()).st_rdev == os.stat(os.devnull).st_rdev
        assert len(os.listdir("/proc/self/fd")) == descriptors  # log was opened, ours was closed
    assert (tmp_path / "log").read_text() == "kept"


@pytest.mark.parametrize(("how", "code"), [([], 129), (["nohup"], 0)])
def test_a_terminal_that_closes_is_a_signal_too_unless_nobody_cares(tmp_path, how, code):
    program = f"""
import fcntl, os, sys, termios, time
from pathlib import Path
from common.runs import signals as stopping
fcntl.ioctl(os.open(sys.argv[1], os.O_RDWR), termios.TIOCSCTTY, 0)  # is now this session's terminal
with stopping.listen() as request:
    Path({str(tmp_path / "begun")!r}).touch()
    while not Path({str(tmp_path / "closed")!r}).exists():
        time.sleep(0.01)
print("to whom?", flush=True)
print("to whom?", file=sys.stderr, flush=True)
Path({str(tmp_path / "saved")!r}).touch()
sys.exit(request.code)
"""
    ours, theirs = pty.openpty()
    out = subprocess.DEVNULL if how else theirs  # nohup keeps nobody from writing to a terminal that has gone
    command = [*how, sys.executable, "-S", "-c", program, os.ttyname(theirs)]
    with subprocess.Popen(command, cwd=ROOT, stdin=out, stdout=out, stderr=out, start_new_session=True) as process:
        os.close(theirs)
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.close(ours)
        (tmp_path / "closed").touch()
        assert process.wait(30) == code
    assert (tmp_path / "saved").exists()
