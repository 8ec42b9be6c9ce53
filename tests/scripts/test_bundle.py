"""A bundle brings what was packed, byte for byte, or says that it does not; one that was there is not lost."""

import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from common.errors import UserError
from scripts import bundle
from tests.conftest import ROOT, squad_file

import pytest

LOCK = "# made by pip\ntorch==2.13.0\nPyYAML==6.0.3\nbitsandbytes==0.50.2\nmypy_extensions==1.2.0\n"


def test_only_what_the_other_machine_lacks_is_packed():
    have = "torch==2.11.0+cu130\npyyaml==5.4\nmypy-extensions==1.0.0\n"
    ranges = ["torch>=2.11,<3", "pyyaml>=6,<7", "bitsandbytes>=0.50.2", 'mypy_extensions>=1.1; extra == "dev"']
    assert bundle.lacking(LOCK, have, ranges) == ["PyYAML==6.0.3", "bitsandbytes==0.50.2"]


def test_packages_that_ask_for_more_than_is_there_are_heeded():
    have = "torch==2.11.0\nPyYAML==6.0.1\nbitsandbytes==0.50.2\nmypy-extensions==1.0.0\n"
    assert bundle.lacking(LOCK, have, ["pyyaml>=6,<7", "PyYAML>=6.0.2"]) == ["PyYAML==6.0.3"]


@pytest.fixture
def packed(tiny_base, tmp_path, monkeypatch) -> Path:
    """A bundle of the tiny base, hub-like SQuAD and one stand-in for pip's wheels."""
    folder = tmp_path / "squad"
    folder.mkdir()
    for split in ("train", "dev"):
        squad_file(folder / f"{split}-v1.1.json", paragraphs=2, questions=2)
    monkeypatch.setenv("SQUAD_DIR", str(folder))
    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    wheel.write_bytes(b"wheel" * 1000)
    monkeypatch.setattr(bundle, "_wheels", lambda *_: iter([(f"wheels/{wheel.name}", wheel)]))
    system = tmp_path / "tiny.yaml"
    system.write_text(f"system: tiny\nbase: {{path: {tiny_base}}}\n")
    bundle.pack([str(system)], [], to=tmp_path / "bundle.tar")
    return tmp_path / "bundle.tar"


def test_what_is_packed_arrives_byte_for_byte(packed, tiny_base, tmp_path):
    into = tmp_path / "there"
    bundle.unpack(packed, into)
    for path in tiny_base.iterdir():
        assert (into / "models" / tiny_base.name / path.name).read_bytes() == path.read_bytes()
    for split in ("train", "dev"):
        name = f"{split}-v1.1.json"
        assert (into / "squad" / name).read_bytes() == (tmp_path / "squad" / name).read_bytes()
    assert (into / "wheels" / "some-1.0-py3-none-any.whl").read_bytes() == b"wheel" * 1000
    assert not list(into.rglob("*.part"))
    assert {p.relative_to(into).as_posix() for p in into.rglob("*") if p.is_file()} == {
        bundle.LIST,
        *json.loads((into / bundle.LIST).read_text())["sha256"],
    }


def test_random_weights_leave_the_real_ones_at_home(packed, tmp_path):
    bundle.pack([str(tmp_path / "tiny.yaml")], ["base.random_weights=true"], to=tmp_path / "small.tar")
    with tarfile.open(tmp_path / "small.tar") as tar:
        names = [Path(name).name for name in tar.getnames()]
    assert "config.json" in names
    assert "tokenizer.json" in names
    assert not [name for name in names if name.endswith(".safetensors")]


def test_wheels_of_an_earlier_bundle_do_not_stay(packed, tmp_path):
    into = tmp_path / "there"
    (into / "wheels").mkdir(parents=True)
    (into / "wheels" / "old-0.1-py3-none-any.whl").touch()
    (into / bundle.ON_TOP).touch()
    bundle.unpack(packed, into)
    assert [path.name for path in (into / "wheels").iterdir()] == ["some-1.0-py3-none-any.whl"]
    assert not (into / bundle.ON_TOP).exists()


def damaged(packed: Path, how: str) -> bytes:
    data = packed.read_bytes()
    middle = data.index(b"wheel" * 10) + 7
    return {
        "a byte is another": data[:middle] + b"#" + data[middle + 1 :],
        "cut in a file": data[:middle],
        "cut between files": data[: data.index(b"wheels/", 3000) // 512 * 512],
        "empty": b"",
        "no tar": b"PK" * 600,
    }[how]


@pytest.mark.parametrize("how", ["a byte is another", "cut in a file", "cut between files", "empty", "no tar"])
def test_a_damaged_bundle_is_refused(packed, tmp_path, how):
    bad = tmp_path / "bad.tar"
    bad.write_bytes(damaged(packed, how))
    with pytest.raises(UserError, match="is damaged or was cut short; copy it again"):
        bundle.unpack(bad, tmp_path / "there")
    assert not (tmp_path / "there" / bundle.LIST).exists(), "make would take it for unpacked"


@pytest.mark.parametrize("name", ["../outside", "/outside", "inside/../../outside"])
def test_a_tar_that_would_write_elsewhere_is_refused(tmp_path, name):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for member, content in ((bundle.LIST, b'{"sha256": {}}'), (name, b"x")):
            head = tarfile.TarInfo(member)
            head.size = len(content)
            tar.addfile(head, io.BytesIO(content))
    with pytest.raises(UserError, match="was not made by make bundle"):
        bundle.unpack(tmp_path / "bad.tar", tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("outside"))


def test_a_bundle_that_is_not_there_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"make bundle MODEL=name"):
        bundle.unpack(tmp_path / "bundle.tar", tmp_path)


def test_a_pack_that_fails_leaves_the_bundle_that_was_there(packed, tmp_path, monkeypatch):
    before = packed.read_bytes()
    shutil.rmtree(tmp_path / "squad")
    with pytest.raises(UserError):
        bundle.pack([str(tmp_path / "tiny.yaml")], [], to=packed)
    assert packed.read_bytes() == before
    assert not list(tmp_path.glob(".bundle-*"))


def test_the_hubs_squad_is_packed_as_the_official_file(packed, tmp_path, monkeypatch):
    articles = {
        split: json.loads((tmp_path / "squad" / f"{split}-v1.1.json").read_text())["data"] for split in ("train", "dev")
    }
    monkeypatch.delenv("SQUAD_DIR")
    monkeypatch.setattr("common.data.squad.hub_articles", lambda _source, split: articles[split])
    bundle.pack([str(tmp_path / "tiny.yaml")], [], to=tmp_path / "hub.tar")
    bundle.unpack(tmp_path / "hub.tar", tmp_path / "there")
    for split in ("train", "dev"):
        file = tmp_path / "there" / "squad" / f"{split}-v1.1.json.gz"
        assert json.loads(gzip.decompress(file.read_bytes()))["data"] == articles[split]


def test_a_list_of_the_other_machines_packages_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"HAVE=.*have.txt: no such file; there: pip list --format=freeze"):
        list(bundle._wheels(tmp_path, tmp_path / "have.txt", ""))


def test_unpacking_needs_the_standard_library_alone(packed, tmp_path):
    paths = [str(packed), str(tmp_path / "there")]
    program = f"from pathlib import Path; from scripts import bundle; bundle.unpack(*map(Path, {paths}))"
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
