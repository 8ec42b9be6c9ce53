"""A user's mistake is one line and exit code 2; our own is a traceback."""

import subprocess
import sys

from common.errors import UserError, one_line_errors, way_on
from tests.conftest import ROOT

import pytest


@pytest.mark.parametrize(("error", "code"), [(UserError("a: b"), 2), (KeyboardInterrupt(), 130)])
def test_what_a_person_can_cause_ends_in_one_line(error, code, capsys):
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise error
    assert caught.value.code == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_that_may_not_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught, one_line_errors():
        (tmp_path / "file" / "below").write_text("")
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/file/below: Not a directory\n"


def test_a_name_that_is_too_long_is_named_in_part(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught, one_line_errors():
        (tmp_path / ("x" * 3000)).read_text()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/xxx")
    assert said.endswith("x: File name too long\n")
    assert len(said) < 300


def test_our_own_mistakes_are_not_hidden():
    with pytest.raises(ValueError, match="ours"), one_line_errors():
        raise ValueError("ours")


def test_a_reader_that_goes_away_is_no_error():
    code = "from common.errors import *\nwith one_line_errors():\n for _ in range(99999): print('line')"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as writer:
        writer.stdout.readline()
        writer.stdout.close()
        assert writer.stderr.read() == ""
        assert writer.wait() == 141


@pytest.mark.parametrize(
    ("error", "way"),
    [
        (OSError(28, "No space left on device"), "make room"),
        (OSError(122, "Disk quota exceeded"), "make room"),
        (OSError(13, "Permission denied"), "see to that"),
        (RuntimeError("IoError: No space left on device (os error 28)"), "make room"),
        (RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0"), "make room"),
        (RuntimeError("CUDA error: an illegal memory access"), "see to that"),
    ],
)
def test_room_is_asked_for_only_where_it_is_missing(error, way):
    assert way_on(error) == way
