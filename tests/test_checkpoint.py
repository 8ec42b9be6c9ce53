"""A checkpoint is whole or not there, and a damaged one is noticed."""

import subprocess
from pathlib import Path

from common import checkpoint
from common.checkpoint import load_state, recover, replacing, verified, verify
from common.errors import UserError

import pytest


def write(folder, text: str) -> None:
    with replacing(folder) as new:
        (new / "state.json").write_text(text)


def test_a_failed_write_leaves_the_previous_folder(tmp_path):
    write(tmp_path / "last", '{"step": 1}')
    with pytest.raises(OSError, match="disk"), replacing(tmp_path / "last") as new:
        (new / "state.json").write_text('{"step": 2}')
        raise OSError("disk full")
    assert load_state(tmp_path / "last") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_rename_that_fails_brings_the_previous_folder_back(tmp_path, monkeypatch):
    write(tmp_path / "last", '{"step": 1}')
    rename = Path.rename

    def fail(self, target):
        if self.name == "last.partial":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "last", '{"step": 2}')
    assert load_state(tmp_path / "last") == {"step": 1}


def test_a_crash_between_the_renames_is_mended(tmp_path):
    write(tmp_path / "last", '{"step": 1}')
    (tmp_path / "last").rename(tmp_path / "last.old")
    assert load_state(tmp_path / "last") == {"step": 1}


def test_what_lies_deeper_is_summed_too(tmp_path):
    with replacing(tmp_path / "last") as new:
        (new / "inner").mkdir()
        (new / "inner" / "file").write_text("whole")
    verify(tmp_path / "last")
    (tmp_path / "last" / "inner" / "file").write_text("other")
    with pytest.raises(UserError, match="inner/file is damaged"):
        verify(tmp_path / "last")


def test_a_crash_after_the_renames_keeps_the_new_folder(tmp_path):
    write(tmp_path / "last.old", '{"step": 1}')
    write(tmp_path / "last", '{"step": 2}')
    recover(tmp_path / "last")
    assert load_state(tmp_path / "last") == {"step": 2}
    assert not (tmp_path / "last.old").exists()


def test_only_the_training_mends_its_folder(tmp_path):
    """What lies beside an adapter that is read is someone's own, and may have any name."""
    for name in ("mine", "mine.old", "mine.partial"):
        write(tmp_path / name, "{}")
    assert verified(tmp_path / "mine") == tmp_path / "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine.old", "mine.partial"]


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "no sums", "empty sums"])
def test_damage_is_noticed(tmp_path, harm):
    folder = tmp_path / "last"
    write(folder, '{"step": 1}')
    file, sums = folder / "state.json", folder / checkpoint.SUMS
    if harm == "flip":
        file.write_text('{"step": 7}')
    elif harm == "truncate":
        file.write_bytes(file.read_bytes()[:3])
    elif harm == "delete":
        file.unlink()
    elif harm == "no sums":
        sums.unlink()
    else:
        sums.write_text("")
    with pytest.raises(UserError, match=r"last: .*(damaged|not a whole checkpoint)"):
        verify(folder)


def test_sums_are_in_the_format_of_sha256sum(tmp_path):
    write(tmp_path / "last", '{"step": 1}')
    subprocess.run(["sha256sum", "--check", "--quiet", checkpoint.SUMS], cwd=tmp_path / "last", check=True)
