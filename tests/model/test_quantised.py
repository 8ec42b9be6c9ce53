"""A base's quantised copy holds the same bits, and is found for what it was made of and for nothing else."""

import json
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

from common.config import Base
from common.errors import UserError
from common.model import load, quantised
from common.model.load import load_base
from tests.conftest import ROOT
from tests.model.test_load import four_bit_bytes
from tests.model.test_pack import CPU

import pytest
import torch
from safetensors.torch import load_file, save_file

# before the tests change them
DEFAULTS = quantised.FOLDER, quantised.LEAST_BYTES, quantised.HEAD


@pytest.fixture
def made(tiny_base, tmp_path, monkeypatch):
    """(a base of its own, the copies there are): small files have copies too."""
    monkeypatch.setattr(quantised, "FOLDER", tmp_path / "new" / "copies")
    monkeypatch.setattr(quantised, "LEAST_BYTES", 1)
    shutil.copytree(tiny_base, tmp_path / "base")
    return Base(str(tmp_path / "base")), lambda: sorted(
        path.parent for path in (tmp_path / "new" / "copies").glob(f"*/{quantised.SOURCE}")
    )


def loaded(base: Base, monkeypatch, from_copy: bool):
    """The base, from its copy or from its files, and not otherwise."""
    with monkeypatch.context() as patch:
        way = load._from_copy
        used = []
        patch.setattr(load, "_from_copy", lambda *args: used.append(args) or way(*args))
        model = load_base(base, CPU)
    assert bool(used) == from_copy
    return model


@pytest.mark.parametrize("settings", [{}, {"quant": "fp4"}, {"double_quant": False}, {"dtype": "bf16"}])
def test_a_copy_holds_the_same_bits_and_names_the_base(made, monkeypatch, settings):
    base, copies = made
    base = Base(base.path, **settings)
    fresh = loaded(base, monkeypatch, False)
    with monkeypatch.context() as patch:
        patch.setattr(quantised, "drop", lambda folder: pytest.fail("it is whole"))
        copy = loaded(base, patch, True)
    assert len(copies()) == 1
    ours, theirs = copy.state_dict(), fresh.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
    assert all(torch.equal(a, b) for a, b in zip(four_bit_bytes(copy), four_bit_bytes(fresh), strict=True))
    ids = torch.arange(9)[None]
    assert torch.equal(copy(ids, attention_mask=None).logits, fresh(ids, attention_mask=None).logits)
    assert copy.name_or_path == fresh.name_or_path == base.path
    assert copy.generation_config.eos_token_id == fresh.generation_config.eos_token_id
    assert not any(p.requires_grad for p in copy.parameters())


def rewrite(base: Base, change, format: str = "pt") -> None:
    """The base's weights, changed, in a file of the same size and time."""
    file = quantised.stored_files(base)[0]
    stat, weights = file.stat(), load_file(file)
    change(weights)
    save_file(weights, file, {"format": format})
    assert file.stat().st_size == stat.st_size
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_other_numbers_settings_times_or_versions_are_another_base(made, monkeypatch):
    base, copies = made
    loaded(base, monkeypatch, False)
    for settings in ({"quant": "fp4"}, {"double_quant": False}, {"dtype": "bf16"}):
        loaded(Base(base.path, **settings), monkeypatch, False)
    assert len(copies()) == 4
    rewrite(base, lambda weights: weights["model.norm.weight"].mul_(2))
    assert loaded(base, monkeypatch, False).model.norm.weight[0] == 2
    rewrite(base, lambda weights: None, format="xx")
    loaded(base, monkeypatch, False)
    os.utime(quantised.stored_files(base)[0], ns=(1, 1))
    loaded(base, monkeypatch, False)
    assert len(copies()) == 1, "those of the file as it was are of no use"
    monkeypatch.setattr(quantised.importlib.metadata, "version", lambda name: "another")
    loaded(base, monkeypatch, False)
    monkeypatch.setattr(quantised, "describe_device", lambda device: {"name": "another"})
    loaded(base, monkeypatch, False)
    monkeypatch.setattr(quantised, "CODE", quantised.CODE[:2])
    loaded(base, monkeypatch, False)
    config = quantised.stored_file(base, "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.1}))
    assert loaded(base, monkeypatch, False).config.rms_norm_eps == 0.1


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", "source.json", "a bit", "zeros"])
def test_a_damaged_copy_is_made_again(made, monkeypatch, damage):
    base, copies = made
    fresh = loaded(base, monkeypatch, False)
    file = copies()[0] / (damage if "." in damage else "model.safetensors")
    whole = file.read_bytes()
    if damage == "zeros":
        file.write_bytes(whole[:-2000] + bytes(2000))
    elif damage == "a bit":
        file.write_bytes(whole[:-500] + bytes([whole[-500] ^ 1]) + whole[-499:])
    else:
        file.write_bytes(b"{")
    again = loaded(base, monkeypatch, True)  # tried, and not taken
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), fresh.state_dict().values(), strict=True))
    loaded(base, monkeypatch, True)
    assert (copies()[0] / file.name).stat().st_size == len(whole)


def test_a_copy_that_can_neither_be_read_nor_removed_is_left_and_the_base_read(made, monkeypatch, capsys):
    base, copies = made
    loaded(base, monkeypatch, False)

    def refuse(*args):
        raise PermissionError("not yours")

    monkeypatch.setattr(load, "_from_copy", refuse)
    monkeypatch.setattr(quantised.shutil, "rmtree", lambda folder, ignore_errors: None)
    assert load_base(base, CPU).name_or_path == base.path
    assert len(copies()) == 1
    assert capsys.readouterr().err.count("note:") == 0


def test_a_machine_without_memory_loses_no_copy(made, monkeypatch):
    base, copies = made
    loaded(base, monkeypatch, False)

    def short(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(load, "_from_copy", short)
    with pytest.raises(UserError, match="can't allocate memory"):
        load_base(base, CPU)
    assert len(copies()) == 1


def test_what_is_left_of_others_goes_and_what_is_of_a_disk_that_is_not_there_stays(made, monkeypatch, tmp_path):
    base, copies = made
    loaded(base, monkeypatch, False)
    away = quantised.FOLDER / "away"
    shutil.copytree(copies()[0], away)
    source = json.loads((away / quantised.SOURCE).read_text())
    source["files"][0][0] = "/not/mounted/model.safetensors"
    (away / quantised.SOURCE).write_text(json.dumps(source))
    (quantised.FOLDER / "half.partial").mkdir()
    for i, text in enumerate(("", "[]", "{}", '{"files": 1}', '{"files": [[1]]}')):
        (quantised.FOLDER / f"cut{i}").mkdir()
        (quantised.FOLDER / f"cut{i}" / quantised.SOURCE).write_text(text)
    loaded(Base(base.path, quant="fp4"), monkeypatch, False)
    assert len(copies()) == 3
    assert away in copies()
    assert {path.name for path in quantised.FOLDER.iterdir()} == {"lock", *(path.name for path in copies())}
    assert not (copies()[0] / "SHA256SUMS").exists(), "3.6 GiB take seconds to hash"
    assert all(stat.S_IMODE(file.stat().st_mode) & 0o044 for file in copies()[0].iterdir()), "others may read it"


@pytest.mark.parametrize("n", [3, 8, 11])
def test_every_byte_counts_in_a_checksum_whatever_a_tensors_size(n):
    def checksum(data: torch.Tensor) -> int:
        module = torch.nn.Module()
        module.register_buffer("data", data)
        (found,) = quantised.checksums(module)
        return found

    whole = torch.arange(n, dtype=torch.uint8)
    for where in range(n):
        other = whole.clone()
        other[where] += 1
        assert checksum(other) != checksum(whole)
    assert checksum(whole.clone()) == checksum(whole)


def test_a_base_without_generation_settings_has_a_copy_too(made, monkeypatch):
    base, copies = made
    Path(base.path, "generation_config.json").unlink()
    loaded(base, monkeypatch, False)
    assert len(copies()) == 1


def test_what_is_wrong_with_a_base_loading_it_says(made):
    base, _ = made
    Path(base.path, "config.json").unlink()
    with pytest.raises(UserError, match="no model could be loaded from there"):
        load_base(base, CPU)


def test_while_another_process_keeps_a_copy_this_one_does_not(made, monkeypatch, capsys):
    base, copies = made
    monkeypatch.setattr(quantised, "lock", lambda file: False)
    loaded(base, monkeypatch, False)
    assert copies() == []
    assert capsys.readouterr().err.count("note:") == 0


def test_no_copy_is_kept_of_small_plain_random_or_stored_4_bit_bases(made, monkeypatch, tmp_path):
    base, copies = made
    load_base(Base(base.path, quant="none"), CPU)
    load_base(Base(base.path, random_weights=True), CPU)
    monkeypatch.setattr(quantised, "LEAST_BYTES", 2**27)
    model = load_base(base, CPU)
    monkeypatch.setattr(quantised, "LEAST_BYTES", 1)
    model.save_pretrained(tmp_path / "stored")
    load_base(Base(str(tmp_path / "stored")), CPU)
    monkeypatch.setenv("LOCAL_RANK", "1")
    load_base(base, CPU)
    assert copies() == []


def test_a_copy_that_cannot_be_written_is_named_and_the_model_serves(made, monkeypatch, tmp_path, capsys):
    base, _ = made
    (tmp_path / "new").write_text("a file in its place")
    loaded(base, monkeypatch, False)
    said = capsys.readouterr().err
    assert f"note: no quantised copy of {base.path} is kept (" in said
    assert "Not a directory" in said or "File exists" in said
    (tmp_path / "new").unlink()


def test_a_copy_is_kept_where_twice_its_size_is_free(made, monkeypatch):
    base, copies = made
    size = sum(p.nbytes for p in load_base(Base(base.path, random_weights=True), CPU).parameters())
    for free, kept in ((2 * size - 1, 0), (2 * size, 1)):
        monkeypatch.setattr(quantised.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        loaded(base, monkeypatch, False)
        assert len(copies()) == kept


def test_what_decides_is_what_a_base_and_its_quantisation_depend_on():
    assert DEFAULTS == (ROOT / ".cache" / "bases", 134_217_728, 1_048_576)
