"""A merged model answers as its adapter does, for any tool, and says what it is."""

import json

import eval_loop
import export
import train_loop
from common.errors import UserError

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def trained(tiny_config, tmp_path, capsys):
    """A config whose adapter was trained and scored; its run folder."""
    train_loop.main([str(tiny_config), "train.lr=5e-2"])
    eval_loop.main([str(tiny_config), "train.lr=5e-2"])
    capsys.readouterr()
    return next((tmp_path / "runs").glob("*-train-001"))


def exported(tiny_config, folder, capsys, *words: str) -> dict:
    with pytest.raises(SystemExit) as ended:
        export.main([str(tiny_config), str(folder), "train.lr=5e-2", *words])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["worse"] == bool(ended.value.code)
    return result


def test_a_merged_model_answers_as_its_adapter_does(tiny_config, trained, tmp_path, capsys):
    result = exported(tiny_config, tmp_path / "merged", capsys, "--dtype=fp32")
    assert (result["n"], result["same_answers"], result["worse"]) == (12, 12, False)
    assert result["em_before"] == result["em_after"]
    eval_loop.main([str(tmp_path / "merged"), "base.quant=none", *same_data(tiny_config), f"runs={tmp_path / 'again'}"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["em"] == result["em_after"]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"| merged, the same questions | {result['em_after']:.2f} | | 12 |" in card
    assert "| the adapter on its nf4 base, all questions | " in card
    assert "CC BY-SA 4.0" in card
    with pytest.raises(UserError, match="is there already"):
        export.main([str(tiny_config), str(tmp_path / "merged")])


def test_plain_transformers_and_plain_peft_give_the_same_logits(tiny_config, tiny_base, trained, tmp_path, capsys):
    tiny = tiny_config.read_text()
    tiny_config.write_text(tiny.replace("dtype: fp32", "dtype: fp32, quant: none"))
    train_loop.main([str(tiny_config), "train.lr=5e-2"])
    capsys.readouterr()
    exported(tiny_config, tmp_path / "merged", capsys, "--dtype=fp32")
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("Context: amber bridge", return_tensors="pt").input_ids
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    before = base(ids).logits
    adapter = sorted((tmp_path / "runs").glob("*-train-001"), key=lambda p: p.stat().st_mtime)[-1] / "best"
    peft = PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, peft(ids).logits, rtol=1e-4, atol=1e-4)
        assert (before - peft(ids).logits).abs().max() > 0.1


def test_a_merge_that_answers_worse_is_said_and_fails(tiny_config, trained, tmp_path, capsys, monkeypatch):
    texts = iter([["amber"] * 12, [""] * 12])
    found = lambda *args: dict(zip([e.id for e in args[-1]], next(texts), strict=True))  # noqa: E731
    monkeypatch.setattr(export, "answers", found)
    monkeypatch.setattr(export, "SURE", 1.1)
    result = exported(tiny_config, tmp_path / "merged", capsys)
    assert result["worse"] == (result["lost"] > 0)
    assert result["lost"] > 0


def test_what_has_no_adapter_is_refused(tiny_config, tmp_path):
    with pytest.raises(UserError, match="no adapter to merge"):
        export.main([str(tiny_config), str(tmp_path / "merged"), "lora=null"])
    with pytest.raises(UserError, match="make train MODEL=tiny"):
        export.main([str(tiny_config), str(tmp_path / "merged")])


@pytest.mark.parametrize("name", ["merged", "merged.old", "merged.partial"])
def test_nothing_that_is_there_is_touched(tiny_config, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is there already"):
        export.main([str(tiny_config), str(tmp_path / "merged")])
    assert (tmp_path / name).is_dir()
    with pytest.raises(UserError, match="OUT=folder"):
        export.main([str(tiny_config), ""])


@pytest.mark.parametrize("below", ["merged", "two/levels"])
def test_a_folder_that_cannot_be_is_refused_before_the_work(tiny_config, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is no folder to write to"):
        export.main([str(tiny_config), str(tmp_path / "file" / below)])


def same_data(tiny_config) -> list[str]:
    import yaml

    data = yaml.safe_load(tiny_config.read_text())["data"]
    return [f"data.{key}={value}" for key, value in data.items()] + ["base.dtype=fp32"]
