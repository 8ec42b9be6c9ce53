"""Before a card is used for the first time fast layers are held against the modules, and the answer is kept."""

import json
from types import SimpleNamespace

from common.model import first_use
from common.model.first_use import Found
from tests.conftest import ROOT
from tests.model.test_pack import lora_model

import pytest
import torch
from peft.tuners.lora import LoraLayer

DEFAULT = first_use.FOLDER  # before the tests change it
DECIDES = {"way": "training", "device": "Some GPU"}
FINE = Found("loss", 1.0, 1.001, 0.001, 0.01)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(first_use, "FOLDER", tmp_path / "new" / "checked")
    monkeypatch.setattr(first_use, "_known", {})
    monkeypatch.setattr(first_use, "_decides", lambda model, way: {**DECIDES, "way": way})
    return tmp_path / "new" / "checked"


def asked(compare, way: str = "training") -> str | None:
    """What a process answers that has asked nothing before."""
    first_use._known.clear()
    return first_use.mismatch(SimpleNamespace(device=SimpleNamespace(type="cuda")), way, compare)


def never():
    pytest.fail("it was known")


def test_an_agreement_is_said_and_kept_and_a_cpu_is_not_asked(folder, capsys):
    assert first_use.mismatch(SimpleNamespace(device=torch.device("cpu")), "training", never) is None
    assert asked(lambda: FINE) is None
    said = "loss 1 for 1.001 of PEFT's modules, 0.001 apart"
    told = f"training by fast layers on Some GPU, checked at first use: {said}\n"
    assert capsys.readouterr().err == told
    (kept,) = folder.iterdir()
    assert json.loads(kept.read_text()) == {"mismatch": None, "said": said, **DECIDES}
    assert asked(never) is None
    assert capsys.readouterr().err == ""
    assert DEFAULT == ROOT / ".cache" / "checked"


@pytest.mark.parametrize("distance", [0.011, float("nan"), float("inf")])
def test_a_difference_is_the_answer_and_names_the_file_that_keeps_it(folder, distance):
    wrong = asked(lambda: FINE._replace(distance=distance))
    assert wrong.startswith("training by fast layers on Some GPU is wrong (loss 1 for 1.001 of PEFT's modules, ")
    (kept,) = folder.iterdir()
    assert str(kept) in wrong
    assert asked(never) == wrong
    assert asked(lambda: FINE, "decoding") is None, "another way is asked for itself"


def test_the_largest_distance_that_is_fine():
    assert asked(lambda: FINE._replace(distance=0.01)) is None


def test_what_fails_is_not_used_and_tried_again_at_the_next_start(folder, capsys):
    def fail():
        raise RuntimeError("Failed to find C compiler\nmore")

    assert asked(fail) == "training by fast layers on Some GPU fails: Failed to find C compiler"
    assert "modules compute instead" in capsys.readouterr().err
    model = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    assert first_use.mismatch(model, "training", never).endswith("Failed to find C compiler"), "in this process"
    assert not folder.exists()
    assert asked(lambda: FINE) is None


def test_where_memory_is_short_nothing_is_kept_and_modules_that_overflow_tell_nothing(folder, capsys):
    def short():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert asked(short) is None
    assert "could not be checked: out of memory" in capsys.readouterr().err
    assert not folder.exists()
    assert asked(lambda: Found("loss", 1.0, float("nan"), 1.0, 0.01)) is None
    assert "the modules overflow, so nothing was compared" in capsys.readouterr().err
    assert asked(never) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}"])
def test_a_damaged_answer_is_asked_for_again(folder, damage):
    asked(lambda: FINE)
    next(folder.iterdir()).write_text(damage)
    assert asked(lambda: FINE) is None
    assert asked(never) is None


def test_a_folder_that_cannot_be_written_is_no_reason_and_one_of_many_processes_speaks(tmp_path, monkeypatch, capsys):
    (tmp_path / "new").write_text("")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert asked(lambda: FINE) is None
    assert capsys.readouterr().err == ""


def test_whatever_decides_how_layers_compute_is_asked_for_again(tiny_base, tmp_path, monkeypatch):
    monkeypatch.undo()
    model = lora_model(tiny_base, "nf4")
    found = [first_use._decides(model, "training")]
    keys = {"way", "device", "versions", "code", "dtype", "quantised", "model", "adapter", "kernels"}
    assert found[0].keys() == keys
    assert found[0]["versions"].keys() == {"torch", "triton", "bitsandbytes", "transformers", "peft"}
    assert not any(key.startswith("_") for key in found[0]["model"]), "where a model lies decides nothing"
    assert found[0]["kernels"] == [None, False]
    assert found[0]["quantised"] == [("nf4", True)]
    assert found[0]["device"].startswith("CPU")

    def other(what: object) -> None:
        assert what not in found
        found.append(what)

    for more in (lora_model(tiny_base, "fp4"), lora_model(tiny_base), lora_model(tiny_base, "nf4", "bf16")):
        other(first_use._decides(more, "training"))
    other(first_use._decides(model, "decoding"))
    for key, value in (("rope_parameters", {"rope_type": "default", "rope_theta": 7.0}), ("rms_norm_eps", 0.5)):
        with monkeypatch.context() as patch:
            patch.setattr(model.config, key, value)
            other(first_use._decides(model, "training"))
    with monkeypatch.context() as patch:
        patch.setattr(first_use.varlen, "kernels", lambda device, dtype: first_use.varlen.Kernels(max, min))
        other(first_use._decides(model, "training"))
        assert found[-1]["kernels"] == ["max", False]
    for name in ("_version", "has_nf4_kernels"):
        with monkeypatch.context() as patch:
            patch.setattr(first_use, name, lambda *args: "another")
            other(first_use._decides(model, "training"))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] = 7.0
    other(first_use._decides(model, "training"))
    for wing in ("model", "train", "decode", "data"):
        (tmp_path / "common" / wing).mkdir(parents=True)
    monkeypatch.setattr(first_use, "ROOT", tmp_path)
    other(first_use._decides(model, "training"))
    for file in ("model/a.py", "train/b.py", "decode/c.py", "device.py", "torch_private.py"):
        (tmp_path / "common" / file).write_text(f"# {file}")
        other(first_use._decides(model, "training"))
    (tmp_path / "common" / "data" / "d.py").write_text("x = 1")
    assert first_use._decides(model, "training") == found[-1]
    assert first_use._version("no such package") is None
