"""Files are whole or not there, and a lock is of one process."""

import gzip
import io
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from common.errors import UserError
from common.files import atomic, lock, read_json, replacing, sha256, write_text
from tests.conftest import ROOT

import pytest
from hypothesis import given
from hypothesis import strategies as st


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


@pytest.fixture(params=[0o022, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_files_and_folders_that_are_written_whole_have_the_modes_of_new_ones(tmp_path, umask):
    outside = tmp_path / "outside"
    outside.write_text("")
    outside.chmod(0o640)
    with replacing(tmp_path / "best") as folder:
        folder.chmod(0o700)
        for name in ("adapter_model.safetensors", "of-others", "deep/er/file"):
            (folder / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / name).write_text("weights")
            (folder / name).chmod(0o666 if name == "of-others" else 0o600)
        (folder / "link").symlink_to(outside)
        (folder / "deep").chmod(0o2700)
    folder = tmp_path / "best"
    files = ("adapter_model.safetensors", "of-others", "deep/er/file", "SHA256SUMS")
    assert {name: mode(folder / name) for name in files} == dict.fromkeys(files, 0o666 & ~umask)
    folders = [mode(path) for path in (folder, folder / "deep", folder / "deep" / "er")]
    assert folders == [0o777 & ~umask, 0o2777 & ~umask, 0o777 & ~umask]  # a group's folder stays one
    assert mode(outside) == 0o640
    assert os.umask(umask) == umask  # as it was


def test_a_file_that_is_written_whole_has_the_mode_of_a_new_one(tmp_path, umask):
    path = tmp_path / "record.json"
    for narrow in (False, True):
        with atomic(path) as partial:
            partial.write_text("x")
            partial.chmod(0o600 if narrow else 0o666)
        assert mode(path) == 0o666 & ~umask
    assert os.umask(umask) == umask


def test_where_modes_cannot_be_changed_files_are_written_all_the_same(tmp_path, monkeypatch):
    def refused(self, mode):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refused)
    write_text(tmp_path / "a", "x")
    with replacing(tmp_path / "best") as folder:
        (folder / "b").write_text("x")
    assert (tmp_path / "a").is_file()
    assert (tmp_path / "best" / "b").is_file()


# ---- JSON, and what is given for it --------------------------------------------------------------------------------


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("dev.json", "{}")
    return out.getvalue()


def tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("dev.json"))
    return out.getvalue()


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (zipped(), ": a zip archive; unzip it"),
        (b"BZh91AY", ": compressed by bzip2; unpack it"),
        (b"\xfd7zXZ\x00", ": compressed by xz; unpack it"),
        (b"\x28\xb5\x2f\xfd\x00", ": compressed by zstd; unpack it"),
        (b"PAR1\x15", ": a Parquet table; write it as JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", ": a Git LFS pointer, not the file"),
        ('{"a": 1}'.encode("utf-16"), ": text in UTF-16; UTF-8 is read: iconv -f UTF-16 -t UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), ": text in UTF-16-LE; UTF-8 is read: iconv -f UTF-16 -t UTF-8"),
        ('{"a": 1}'.encode("utf-32"), ": text in UTF-32; UTF-8 is read"),
        ('{"a": "Orrín"}'.encode("latin-1"), r": byte 10 \(0xed\) is not UTF-8, perhaps Latin-1: iconv -f LATIN1"),
        (b"", ":1: the file is empty"),
        (b" \n ", ":2: the file is empty"),
        (b"<!DOCTYPE html><html>", ":1: a web page or XML, not JSON"),
        (b'{"a": 1}\n{"a": 2}\n', ":2: JSON lines, a document a line"),
        (b"id,context,question\n1,a,b\n", ":1: CSV or a table of another kind"),
        (b"id\tcontext\n1\ta\n", ":1: CSV or a table of another kind"),
        (b'{"a": [1, 2', r":1: not valid JSON \(.*\); is the file complete\?$"),
        (b'{"a": "cut he', r":1: not valid JSON \(.*\); is the file complete\?$"),
        (b'{"a": 1,\n "b" 2}', r":2: not valid JSON \(Expecting ':' delimiter, at column 6\)$"),
        (b'{"a": NaN}', ":1: NaN is none of JSON's numbers$"),
        (b'{"a":\n "NaN \\" NaN",\n "b": -Infinity}', ":3: -Infinity is none of JSON's numbers$"),
        (b'{"a":\n' + b"9" * 5000 + b"}", ":2: .*4300 digits"),
        (b'{"a": {"b": 1, "b": 2}}', ': "b" stands twice in an object, with two values: 1 and 2$'),
        (b'{"a": 1}' + b"\0" * 9, r": ends in zero bytes; is the file complete\?$"),
        (b"\0" * 99, r": ends in zero bytes; is the file complete\?$"),
        (tarred(), ": a tar archive; unpack it, and name the JSON file"),
        (b"[" * 10**5, ": .*recursion"),
        (gzip.compress(b'{"a": 1}', mtime=0)[:-9], r": cannot be read \(.*\); is the file complete\?$"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_no_json_is_named_for_what_it_is(tmp_path, raw, says, packed):
    path = tmp_path / "d.json"
    path.write_bytes(gzip.compress(raw) if packed and not raw.startswith(b"\x1f\x8b") else raw)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}{says}"):
        read_json(path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
@pytest.mark.parametrize("around", [lambda raw: raw, gzip.compress, lambda raw: b"\xef\xbb\xbf" + raw])
def test_json_is_read_plain_gzipped_and_with_a_byte_order_mark(tmp_path_factory, around, value):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(around(json.dumps(value, ensure_ascii=True).encode()))
    assert read_json(path) == value


def test_a_key_that_stands_twice_with_one_value_is_no_mistake(tmp_path):
    (tmp_path / "d.json").write_text('{"a": 1, "a": 1}')
    assert read_json(tmp_path / "d.json") == {"a": 1}
