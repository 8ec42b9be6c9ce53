"""Files are whole or not there, and a lock is of one process."""

import subprocess
import sys

from common.files import atomic, lock, sha256, write_text
from tests.conftest import ROOT

import pytest


def test_a_file_takes_the_place_of_the_one_before_when_it_is_whole(tmp_path):
    path = tmp_path / "record.json"
    write_text(path, "before ✓")
    assert path.read_bytes() == "before ✓".encode()
    with pytest.raises(OSError, match="full"), atomic(path) as partial:
        partial.write_text("half")
        assert path.read_text(encoding="utf-8") == "before ✓"
        assert partial == tmp_path / "record.json.partial"
        raise OSError("the disk is full")
    assert path.read_text(encoding="utf-8") == "before ✓"
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]
    with atomic(path, ".7") as partial:
        assert partial == tmp_path / "record.json.7"
        partial.write_text("after")
    assert path.read_text() == "after"


def test_what_was_never_written_leaves_its_own_error(tmp_path):
    with pytest.raises(KeyError), atomic(tmp_path / "x"):
        raise KeyError("y")


def test_a_lock_is_of_one_process_until_its_file_is_closed(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    code = f"from common.files import lock; print(lock(open({str(path)!r}, 'r+')))"

    def other() -> str:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout

    with path.open("r+") as file:
        assert lock(file)
        assert other() == "False\n"
    assert other() == "True\n"


def test_a_sum_is_that_of_sha256sum(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
