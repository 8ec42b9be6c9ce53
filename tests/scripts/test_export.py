"""A merged model answers as its adapter does, for any tool, and says what it is."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import eval_loop
import train_loop
from common.config import Base, load
from common.data import prompt, squad
from common.data.squad import Dataset
from common.errors import UserError
from common.runs import adapters, checkpoint, record
from scripts import export
from tests.conftest import ROOT, squad_file
from tests.model.test_pack import lora_model
from tests.scripts.test_certify import scored

import bitsandbytes as bnb
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def once(tiny_base, tmp_path_factory):
    return scored(tmp_path_factory.mktemp("trained"), tiny_base, "train.lr=5e-2").parent


@pytest.fixture
def trained(once, tiny_config, tmp_path):
    """The same adapter for this test's config; its run folder."""
    shutil.copytree(once / "runs", tmp_path / "runs")
    shutil.copy(once / "tiny.yaml", tiny_config)
    tiny_config.write_text(tiny_config.read_text().replace(str(once / "runs"), str(tmp_path / "runs")))
    return next((tmp_path / "runs").glob("*-train-001"))


def exported(tiny_config, folder, capsys, *words: str) -> dict:
    with pytest.raises(SystemExit) as ended:
        export.main([str(tiny_config), str(folder), "train.lr=5e-2", *words])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["worse"] == bool(ended.value.code)
    return result


def test_a_merged_model_answers_as_its_adapter_does(tiny_config, tiny_base, trained, tmp_path, capsys):
    result = exported(tiny_config, tmp_path / "merged", capsys, "--dtype=fp32")
    assert (result["n"], result["same_answers"], result["worse"]) == (12, 12, False)
    assert result["em_before"] == result["em_after"]
    eval_loop.main([str(tmp_path / "merged"), "base.quant=none", *same_data(tiny_config), f"runs={tmp_path / 'again'}"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["em"] == result["em_after"]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"| merged, the same questions | {result['em_after']:.2f} | | 12 |" in card
    assert "| the adapter on its nf4 base, all questions | " in card
    tokens = AutoConfig.from_pretrained(tiny_base).vocab_size
    assert header(card).keys() == {"language", "library_name", "pipeline_tag"}
    assert f"a base of the shapes llama, 2 layers of 64, {tokens} tokens (a local copy named tiny-llama)" in card
    assert "was trained on train.json, on the base in nf4" in card
    assert "official rules, on dev.json:" in card
    assert not re.search(r"(^|[\s(`])/\w", card)  # a path of this machine
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


@pytest.mark.parametrize(
    ("lost", "gained", "p", "worse"),
    [
        (12, 0, 2 / 2**12, True),
        (8, 0, 2 / 2**8, True),  # 0.0078
        (7, 0, 2 / 2**7, False),  # 0.0156
        (0, 12, 2 / 2**12, False),
        (9, 1, 2 * (1 + 10) / 2**10, False),
        (0, 0, 1.0, False),
    ],
)
def test_a_merge_that_answers_worse_for_sure_is_said_and_fails(
    tiny_config, trained, tmp_path, capsys, monkeypatch, lost, gained, p, worse
):
    def answers(*args) -> dict[str, str]:
        asked.append(args[-1])
        right = {e.id: e.answers[0].text for e in args[-1]}
        first = len(asked) == 1
        return {
            id_: text if (first and i >= gained) or (not first and i < 12 - lost) else "wrong"
            for i, (id_, text) in enumerate(right.items())
        }

    asked: list = []
    monkeypatch.setattr(export, "texts", answers)
    with pytest.raises(SystemExit) as ended:
        export.main([str(tiny_config), str(tmp_path / "merged"), "train.lr=5e-2"])
    *_, line, last = capsys.readouterr().out.strip().splitlines()
    result = json.loads(last)
    assert (len(asked[0]), asked[0]) == (12, asked[1])
    before, after = 100 * (12 - gained) / 12, 100 * (12 - lost) / 12
    assert result == {
        "folder": str(tmp_path / "merged"),
        "em_before": pytest.approx(before),
        "em_after": pytest.approx(after),
        "n": 12,
        "same_answers": 12 - lost - gained,
        "lost": lost,
        "gained": gained,
        "p": pytest.approx(p),
        "worse": worse,
    }
    assert ended.value.code == int(worse)
    assert (
        f"{12 - lost - gained} of 12 answers are the same; EM {before:.2f} by the adapter, {after:.2f} merged" in line
    )
    assert line.endswith(f"(exact McNemar p = {p:.2g}){': WORSE' if worse else ''}")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"| the adapter, 12 questions, spread over the articles | {before:.2f} | | 12 |" in card
    assert f"| merged, the same questions | {after:.2f} | | 12 |" in card


def test_a_card_has_the_newest_evaluation_of_this_adapter_and_of_nothing_else(tmp_path, monkeypatch):
    adapter = tmp_path / "train" / "best"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    sha256 = checkpoint.weights_sha256(adapter)
    config = load("smollm2-qlora", [f"runs={tmp_path}", "window.context=300", "window.question=50"])
    dev = Dataset([], "dev.json")

    def evaluation(em: float, kind: str = "eval", adapter: str | None = sha256, words: tuple[str, ...] = (), **changes):
        must = {"data": dev.sha256, "prompt": prompt.fingerprint(config.prompt)}
        return {
            "kind": kind,
            "result": {"em": em, "f1": em + 1, "n": 99, "adapter_sha256": adapter},
            "must_match": must | changes,
            "config": load("smollm2-qlora", ["window.context=300", "window.question=50", *words]).to_dict(),
        }

    def card(*evaluations) -> str:
        monkeypatch.setattr(record, "read_all", lambda runs: list(evaluations) if runs == tmp_path else None)
        monkeypatch.setattr(record, "code", lambda: ("c0ffee0123456789", True))
        args = SimpleNamespace(dtype="fp16")
        export.write_card(tmp_path, args, config, adapter, dev, 61.004, 62.5, 7)
        return (tmp_path / "README.md").read_text()

    others = [
        evaluation(1, kind="bench"),
        evaluation(2, adapter="another"),
        evaluation(3, adapter=None),
        evaluation(4, data="other"),
        evaluation(5, prompt="other"),
        evaluation(6, words=("window.answer=16",)),
        evaluation(7, words=("base.quant=fp4",)),
        evaluation(8, decoding={"spans": True}),
    ]
    without, text = card(*others), card(evaluation(70.125), evaluation(71.256), *others)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows == [
        "| | EM | F1 | n |",
        "|---|---|---|---|",
        "| the adapter on its nf4 base, all questions | 71.26 | 72.26 | 99 |",
        "| the adapter, 7 questions, spread over the articles | 61.00 | | 7 |",
        "| merged, the same questions | 62.50 | | 7 |",
    ]
    assert [line for line in without.splitlines() if line.startswith("|")] == [*rows[:2], *rows[3:]]
    assert "`make export MODEL=smollm2-qlora` (code c0ffee0123, changed since); stored in fp16." in text
    assert f"The adapter's weights have the sha256\n{sha256}.\n" in text
    assert str(tmp_path) not in text
    assert "The adapter was trained on data that is not known here, on the base in nf4.\n" in text
    assert f"official rules, on dev of {export.SQUAD}:" in text
    assert f"or {config.window.answer} tokens, context and question cut to 350:" in text
    assert f"```\n{prompt.text('{context}', '{question}', config.prompt)}\n```" in text
    assert text.startswith("---\n")
    assert header(text) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert "# smollm2-qlora: HuggingFaceTB/SmolLM2-135M-Instruct with a LoRA adapter, merged\n" in text
    assert "licence holds for them: Apache-2.0.\nThe training data's licence: not known here.\n" in text
    some = "0.03 of the questions (articles at random) of the first 60 paragraphs of "
    for trained, share, words in (("null", 1, ""), ("60", 1, "the first 60 paragraphs of "), ("60", 0.03, some)):
        training = load("smollm2-qlora", [f"data.train_paragraphs={trained}", f"data.train_share={share}"])
        settings = adapters.settings_of(training, "of data", None, "of a tokenizer")
        (adapter / adapters.SETTINGS).write_text(json.dumps(settings))
        text = card()
        assert f"The adapter was trained on {words}SQuAD v1.1 (rajpurkar/squad), on" in text
        assert header(text)["datasets"] == ["rajpurkar/squad"]
        assert text.endswith("The training data's licence: CC BY-SA 4.0.\n")


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def local(folder: Path, **found) -> Base:
    """A base in a folder with this config.json."""
    folder.mkdir(parents=True)
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "vocab_size": 99}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **found}))
    return Base(str(folder))


@pytest.mark.parametrize(
    ("found", "id_"),
    [
        ({}, None),
        ({"_name_or_path": "meta-llama/Llama-2-7b-hf"}, "meta-llama/Llama-2-7b-hf"),
        ({"_name_or_path": "/models/llama"}, None),
        ({"_name_or_path": "./llama"}, None),
        ({"_name_or_path": "../models/llama"}, None),
        ({"_name_or_path": "configs/shapes"}, None),  # a folder that is here
        ({"_name_or_path": "llama"}, None),
        ({"_name_or_path": ""}, None),
        ({"_name_or_path": None}, None),
    ],
)
def test_a_local_base_is_named_by_the_hub_id_that_its_config_says(tmp_path, monkeypatch, found, id_):
    monkeypatch.chdir(ROOT)
    base = local(tmp_path / "secret" / "llama-copy", **found)
    assert export.hub_id(base) == id_
    words = "of the shapes llama, 3 layers of 64, 99 tokens (a local copy named llama-copy)"
    assert export.shapes_of(base) == f"a base {words}"
    untrue = replace(base, random_weights=True)
    assert export.hub_id(untrue) is None
    assert export.shapes_of(untrue) == f"random weights {words}"


def test_bases_of_the_hub_its_cache_and_this_repository_have_their_hub_id(tmp_path, monkeypatch):
    assert export.hub_id(Base("owner/name")) == "owner/name"
    assert export.hub_id(Base("owner/name", random_weights=True)) is None
    assert export.shapes_of(Base("owner/name", random_weights=True)) == "random weights of the shapes of owner/name"
    cached = local(tmp_path / "models--owner--a--name" / "snapshots" / "c0ffee")
    assert export.hub_id(cached) == "owner/a--name"
    monkeypatch.chdir(cached.path)
    assert export.hub_id(replace(cached, path=".")) == "owner/a--name"
    monkeypatch.setattr(export.smollm2, "FOLDER", tmp_path / "smollm2")
    own = local(tmp_path / "smollm2", _name_or_path="other/name")
    monkeypatch.chdir(tmp_path)
    assert export.hub_id(own) == export.hub_id(Base("smollm2")) == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_licence_of_every_configured_base_is_known():
    own = {str(export.smollm2.FOLDER.relative_to(ROOT)): export.SMOLLM2}
    paths = [load(path.stem).base.path for path in (ROOT / "configs").glob("*.yaml")]
    assert {own.get(path, path) for path in paths} == export.LICENCES.keys()


def test_data_is_named_by_its_hub_id_or_its_file_and_never_by_a_path(tmp_path, monkeypatch):
    file = squad_file(tmp_path / "secret.json", paragraphs=2, questions=2)
    content = json.loads(file.read_text())
    assert export.data_name(str(file), "train") == export.data_name(str(file), "dev") == "secret.json"
    own = export.texts_sha256(squad.golds(str(file)))
    monkeypatch.setattr(export, "SQUAD_TEXTS", {"train": own, "dev": "other"})
    assert export.data_name(str(file), "train") == "SQuAD v1.1 (rajpurkar/squad)"
    assert export.data_name(str(file), "dev") == "secret.json"
    qas = content["data"][0]["paragraphs"][0]["qas"]
    qas[0] |= {"id": "another", "question": f" {qas[0]['question']} "}  # as some copies have them
    content["data"].reverse()
    file.write_text(json.dumps(content))
    assert export.data_name(str(file), "train") == "SQuAD v1.1 (rajpurkar/squad)"
    qas[0]["question"] += " Or not?"
    file.write_text(json.dumps(content))
    assert export.data_name(str(file), "train") == "secret.json"
    file.write_text("damaged")
    assert export.data_name(str(file), "train") == "secret.json"
    file.unlink()
    assert export.data_name(str(file), "train") == "secret.json"
    monkeypatch.setenv("SQUAD_DIR", str(tmp_path))  # it holds no SQuAD
    assert export.data_name("rajpurkar/squad", "train") == "SQuAD v1.1 (rajpurkar/squad)"
    assert export.data_name("rajpurkar/squad", "dev") == "dev of SQuAD v1.1 (rajpurkar/squad)"
    assert export.data_name("owner/other.v2", "dev") == "owner/other.v2"


def test_what_cannot_be_merged_by_its_two_matrices_is_refused():
    for change in ({"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}):
        model = SimpleNamespace(peft_config={"default": LoraConfig(**change)})
        with pytest.raises(
            UserError, match=f"LoRA's two matrices on linears are merged here.* has {next(iter(change))};"
        ):
            export.merged(model, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_weight_is_the_dequantised_one_and_the_scaled_product(tiny_base, dtype):
    model = lora_model(tiny_base, "nf4")  # rank 4, alpha 16
    found = export.merged(model, dtype)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    weight = layer.base_layer.weight
    dense = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert found[name].dtype == dtype
    torch.testing.assert_close(found[name], (dense + b @ a * (16 / 4)).to(dtype))
    assert (found[name].float() - dense).abs().max() > 1e-3
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).state_dict()
    assert found.keys() == plain.keys()
    for key in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        torch.testing.assert_close(found[key], plain[key].to(dtype))


@pytest.mark.parametrize(("asked", "n"), [(5, 5), (12, 12), (500, 12)])
def test_as_many_questions_as_asked_for_are_answered_before_and_after(
    tiny_config, trained, tmp_path, capsys, monkeypatch, asked, n
):
    monkeypatch.setattr(export, "texts", lambda *args: {e.id: "" for e in args[-1]})
    assert exported(tiny_config, tmp_path / "merged", capsys, f"--questions={asked}")["n"] == n
    with pytest.raises(UserError, match="--questions must be 1 or more"):
        export.main([str(tiny_config), str(tmp_path / "other"), "--questions=0"])


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
    data = yaml.safe_load(tiny_config.read_text())["data"]
    return [f"data.{key}={value}" for key, value in data.items()] + ["base.dtype=fp32"]
