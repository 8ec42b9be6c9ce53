"""Adapters fit their base or are refused, and whatever PEFT's adapter it is, it answers as by PEFT."""

import copy
import json
import shutil

from common.config import Base, Lora, load
from common.decode import predict
from common.decode.answers import stop_tokens
from common.errors import UserError
from common.model.adapter import add_lora, load_adapter, load_weights
from common.model.identity import identify
from common.model.llama import beyond_lora, unsupported_reason
from common.model.load import load_base, load_tokenizer
from common.runs import adapters
from tests.decode.test_predict import LIMIT, demo_trees, generated
from tests.model.test_load import nf4
from tests.model.test_pack import CPU, lora_model

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


@pytest.fixture
def adapter(tiny_base, tmp_path):
    model = lora_model(tiny_base, "nf4")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_saved_adapter_gives_the_same_logits_here_and_in_plain_peft(adapter, tiny_base):
    from peft import PeftModel

    ids = torch.arange(5, 25)[None]
    ours = load_adapter(load_base(nf4(tiny_base), CPU), adapter, nf4(tiny_base))
    plain = PeftModel.from_pretrained(load_base(nf4(tiny_base), CPU), adapter)
    without = load_base(nf4(tiny_base), CPU)
    assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert not torch.equal(ours(input_ids=ids).logits, without(input_ids=ids).logits)


def test_what_another_tool_set_in_an_adapters_configuration_is_kept(adapter, tiny_base):
    from peft import PeftModel

    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    ids = torch.arange(5, 25)[None]
    ours = load_adapter(load_base(nf4(tiny_base), CPU), adapter, nf4(tiny_base))
    plain = PeftModel.from_pretrained(load_base(nf4(tiny_base), CPU), adapter)
    assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("config", ["{}", "[]", '{"peft_type": "NONE"}', '{"r": 4'])
def test_a_configuration_that_is_none_is_refused(adapter, tiny_base, config):
    (adapter / "adapter_config.json").write_text(config)
    with pytest.raises(UserError, match="not a whole adapter"):
        load_adapter(load_base(nf4(tiny_base), CPU), adapter, nf4(tiny_base))


def test_an_adapter_of_another_base_is_refused_by_name(adapter, tiny_base):
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "meta-llama/Llama-2-7b-hf"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    says = rf"^{adapter}: it was trained on meta-llama/Llama-2-7b-hf, not on {tiny_base}; .*FORCE=1"
    with pytest.raises(UserError, match=says):
        load_adapter(load_base(nf4(tiny_base), CPU), adapter, nf4(tiny_base))
    load_adapter(load_base(nf4(tiny_base), CPU), adapter, nf4(tiny_base), force=True)


def test_an_adapter_of_other_shapes_is_refused(adapter, tiny_base, tmp_path):
    moved = tmp_path / "tiny-llama"  # the name fits, the shapes do not
    moved.mkdir()
    settings = json.loads((tiny_base / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**settings, "intermediate_size": 256}))
    base = Base(str(moved), quant="none", dtype="fp32", random_weights=True)
    with pytest.raises(
        UserError,
        match=rf"^{adapter}: it was trained on another base, {tiny_base}: intermediate_size is 256, was 128; ",
    ):
        load_adapter(load_base(base, CPU), adapter, base)


@pytest.mark.parametrize("harm", ["a weight less", "a weight more"])
def test_weights_that_are_not_this_adapters_are_refused_by_name(adapter, tiny_base, harm):
    found = add_lora(load_base(nf4(tiny_base), CPU), Lora(rank=4), seed=0)
    weights = load_file(adapter / "adapter_model.safetensors")
    load_weights(found, weights, "here")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    if harm == "a weight less":
        del weights[name]
    else:
        weights = {**weights, name.replace("layers.1", "layers.2"): weights[name]}
    with pytest.raises(
        UserError, match=r"here: the adapter does not fit this base \(first odd weight: .*layers\.[12]\.mlp"
    ):
        load_weights(found, weights, "here")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_truncated_adapter_is_refused(adapter, tiny_base, file):
    whole = (adapter / file).read_bytes()
    (adapter / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole adapter"):
        load_adapter(load_base(nf4(tiny_base), CPU), adapter, nf4(tiny_base))


def test_unknown_lora_targets_are_named(tiny_base):
    with pytest.raises(UserError, match=r"lora\.targets"):
        add_lora(load_base(nf4(tiny_base), CPU), Lora(targets=("no_such_layer",)), seed=0)


# ---- files that are more, or other, than they should be ------------------------------------------------------------


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_an_adapter_whose_numbers_are_not_finite_is_refused_by_tensor(adapter, tiny_base, number):
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    weights[name][1, 2] = number
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"^{adapter}: {name} holds numbers that are not finite"):
        load_adapter(load_base(nf4(tiny_base), CPU), adapter, nf4(tiny_base))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", "a list", "an epoch more"])
def test_weights_that_are_no_dict_of_tensors_are_one_line(adapter, tiny_base, content):
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    if isinstance(content, bytes):
        (adapter / "adapter_model.bin").write_bytes(content)
    else:
        torch.save([1] if content == "a list" else {**weights, "epoch": 3}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"not a whole adapter|not a dict of tensors"):
        load_adapter(load_base(nf4(tiny_base), CPU), adapter, nf4(tiny_base))


@pytest.mark.parametrize(
    "setting",
    [{"target_modules": "("}, {"bias": "foo"}, {"init_lora_weights": "pissa_niter_4"}, {"alpha_pattern": [1]}],
)
def test_settings_of_an_adapter_that_cannot_be_are_one_line(adapter, tiny_base, setting):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **setting}))
    with pytest.raises(UserError, match=f"^{adapter}: "):
        load_adapter(load_base(nf4(tiny_base), CPU), adapter, nf4(tiny_base))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"lora_alhpa": 32}, r'lora_alhpa is nothing that PEFT [\d.]+ knows — did you mean "lora_alpha"\?$'),
        ({"use_rlsora": True}, r'use_rlsora .* did you mean "use_rslora"\?$'),
        ({"x\ny": 3}, r"x\\ny is nothing that PEFT [\d.]+ knows; FORCE=1 leaves it out, if it changes no answer$"),
        ({"use_rslora": "false"}, r'use_rslora is "false", and takes true or false$'),
        ({"use_dora": 0}, "use_dora is 0, and takes true or false$"),
        ({"lora_alpha": "32"}, r'lora_alpha is "32", and takes a number$'),
        ({"r": True}, "r is true, and takes a number$"),
        ({"lora_dropout": [0.1]}, r"lora_dropout is \[0\.1\], and takes a number$"),
    ],
)
def test_a_setting_that_peft_would_ignore_or_misread_is_refused(adapter, tiny_base, setting, says):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **setting}))
    with pytest.raises(UserError, match=f"^{adapter}/adapter_config.json: {says}"):
        loads(adapter, tiny_base)


@pytest.mark.parametrize("change", [{"lora_alpha": 99}, {"r": 2}, {"use_rslora": True}, {"target_modules": ["q_proj"]}])
def test_an_adapter_of_ours_has_the_settings_that_it_was_trained_with(adapter, tiny_base, change):
    recorded(adapter, "me/tiny-llama", identify(nf4(tiny_base)))
    loads(adapter, tiny_base)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(
        UserError, match=rf"{next(iter(change))} is .*, and trained_with\.json says .*was changed after"
    ):
        loads(adapter, tiny_base)


def test_by_force_what_is_not_known_is_left_out_but_no_slip_of_the_pen(adapter, tiny_base, capsys):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for key in ("zzz_of_tomorrow", "use_foo", "new_setting", "load_in_8bit"):
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, key: 3}))
        with pytest.raises(UserError, match=f"{key} is nothing that PEFT .*; FORCE=1 leaves it out"):
            loads(adapter, tiny_base)
        load_adapter(load_base(nf4(tiny_base), CPU), adapter, nf4(tiny_base), force=True)
        assert f"note: {adapter}/adapter_config.json: {key} is left out" in notes(capsys)
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alhpa": 3}))
    with pytest.raises(UserError, match="did you mean"):
        load_adapter(load_base(nf4(tiny_base), CPU), adapter, nf4(tiny_base), force=True)


def test_a_weight_of_another_shape_is_named_with_both(adapter, tiny_base):
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    weights[name] = weights[name][:, :3].contiguous()
    save_file(weights, adapter / "adapter_model.safetensors")
    says = rf"does not fit this base \({name} has the shape \[128, 3\], \[128, 4\] is wanted\)$"
    with pytest.raises(UserError, match=says):
        loads(adapter, tiny_base)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_in_8_bits_without_a_scale_are_no_numbers(adapter, tiny_base, dtype):
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    weights[name] = weights[name].to(dtype)
    save_file(weights, adapter / "adapter_model.safetensors")
    word = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=rf"^{adapter}: {name} is stored as {word}, and nothing says what numbers"):
        loads(adapter, tiny_base)


def test_a_name_of_two_lines_is_told_in_one(adapter, tiny_base):
    recorded(adapter, "me/other\nnote: all is well")
    with pytest.raises(UserError) as caught:
        loads(adapter, tiny_base)
    assert "it was trained on me/other\\nnote: all is well, not on" in str(caught.value)


@pytest.mark.parametrize(
    "identity",
    [
        "a text",
        {"name": "x"},
        [1],
        {"name": "x", "shapes": [], "samples": {}},
        {"name": 5, "shapes": {}, "samples": {}},
    ],
)
def test_a_damaged_identity_is_one_line(adapter, tiny_base, identity):
    recorded(adapter, "me/tiny-llama", identity)
    with pytest.raises(UserError, match="what it says of its base is damaged"):
        loads(adapter, tiny_base)


# ---- adapters of every kind, as PEFT answers with them -------------------------------------------------------------


def noisy(base, config, folder):
    """An adapter of PEFT's kind `config` on `base`, no weight of it where it began, saved; what it answers."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    noise = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.15 * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(plain, str(folder)).eval()


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = {"target_modules": ["q_proj", "v_proj"]}
KINDS = {  # of each, whether the fast layers compute it, and whether export merges it
    "LoRA": (LoraConfig(r=4, target_modules=SEVEN), True, True),
    "LoRA with rank-stabilised scales": (LoraConfig(r=4, use_rslora=True, **QV), True, True),
    "LoRA on the head too": (LoraConfig(r=4, target_modules=["q_proj", "lm_head"]), False, True),
    "LoRA of several ranks": (LoraConfig(r=4, rank_pattern={"q_proj": 2}, **QV), False, True),
    "LoRA with biases": (LoraConfig(r=4, lora_bias=True, **QV), False, False),
    "LoRA and the base's norms": (LoraConfig(r=4, modules_to_save=["norm"], **QV), False, False),
    "LoRA and a whole head": (LoraConfig(r=4, modules_to_save=["lm_head"], **QV), False, False),
    "LoRA and trained tokens": (LoraConfig(r=4, trainable_token_indices=[5, 6, 30], **QV), False, False),
    "LoRA on embeddings": (LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]), False, False),
    "LoRA over repeated layers": (LoraConfig(r=4, layer_replication=[(0, 2), (0, 2)], **QV), False, False),
    "DoRA": (LoraConfig(r=4, use_dora=True, **QV), False, False),
    "IA3": (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), False, False),
    "AdaLoRA": (AdaLoraConfig(init_r=4, target_r=2, total_step=9, **QV), False, False),
    "VeRA": (VeraConfig(r=4, **QV), False, False),
    "LoHa": (LoHaConfig(r=4, **QV), False, False),
    "LoKr": (LoKrConfig(r=4, **QV), False, False),
    "OFT": (OFTConfig(r=0, oft_block_size=8, **QV), False, False),
    "HRA": (HRAConfig(r=4, **QV), False, False),
    "norms": (LNTuningConfig(target_modules=["norm"]), False, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_adapter_of_single_tokens_answers_as_by_peft(tiny_base, tmp_path, kind):
    config, fast, merges = KINDS[kind]
    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    peft_model = noisy(tiny_base, config, tmp_path / "adapter")
    base = Base(str(tiny_base), quant="none", dtype="fp32")
    model = load_adapter(load_base(base, CPU), tmp_path / "adapter", base)
    assert (unsupported_reason(model) is None) == fast
    assert (beyond_lora(model) is None) == merges
    tokenizer = load_tokenizer(str(tiny_base))
    trees, stops = demo_trees(tokenizer, 1), stop_tokens(tokenizer, model)
    answers = predict.answer_trees(model, tokenizer, trees, stops, LIMIT, progress=None)
    for tree in trees:
        for branch in tree.branches:
            expected = generated(peft_model, tokenizer, tree, branch, stops)
            assert answers[branch.id].token_ids == expected, kind


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (PromptTuningConfig(num_virtual_tokens=3), "PROMPT_TUNING"),
        (PrefixTuningConfig(num_virtual_tokens=3), "PREFIX_TUNING"),
        (AdaptionPromptConfig(adapter_len=3, adapter_layers=1), "ADAPTION_PROMPT"),
        (LoraConfig(r=4, alora_invocation_tokens=[5, 6], **QV), "aLoRA"),
    ],
)
def test_an_adapter_that_is_more_than_its_tokens_is_refused_by_kind(tiny_base, tmp_path, config, named):
    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    base = Base(str(tiny_base), quant="none", dtype="fp32")
    with pytest.raises(UserError, match=rf"^{tmp_path}/adapter: {named} is no adapter of single tokens"):
        load_adapter(load_base(base, CPU), tmp_path / "adapter", base)


def test_what_an_adapters_file_lacks_is_named(tiny_base, tmp_path):
    config = LoraConfig(r=4, modules_to_save=["lm_head"], task_type="CAUSAL_LM", **QV)
    noisy(tiny_base, config, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: w for name, w in load_file(file).items() if "lora_" in name}, file)
    base = Base(str(tiny_base), quant="none", dtype="fp32")
    with pytest.raises(UserError, match=r"first odd weight: base_model\.model\.lm_head\.weight is not in its file"):
        load_adapter(load_base(base, CPU), tmp_path, base)


def test_weights_in_the_format_of_before_safetensors_are_read(adapter, tiny_base):
    ids = torch.arange(5, 25)[None]
    now = load_adapter(load_base(nf4(tiny_base), CPU), adapter, nf4(tiny_base))(input_ids=ids).logits
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert torch.equal(load_adapter(load_base(nf4(tiny_base), CPU), adapter, nf4(tiny_base))(input_ids=ids).logits, now)
    (adapter / "adapter_model.bin").write_bytes(b"no pickle")
    with pytest.raises(UserError, match="not a whole adapter"):
        load_adapter(load_base(nf4(tiny_base), CPU), adapter, nf4(tiny_base))
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"it holds none of adapter_model\.safetensors and adapter_model\.bin"):
        load_adapter(load_base(nf4(tiny_base), CPU), adapter, nf4(tiny_base))


# ---- which base it is ----------------------------------------------------------------------------------------------


def recorded(adapter, name, identity=None):
    """Another base's name in an adapter's settings, and another identity beside it."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": name}))
    if identity:
        lora = [f"lora.rank={settings['r']}", f"lora.alpha={settings['lora_alpha']}"]
        lora += [f"lora.targets={json.dumps(settings['target_modules'])}"]
        settings = adapters.settings_of(load("smollm2-qlora", lora), "of data", identity, "of a tokenizer")
        (adapter / adapters.SETTINGS).write_text(json.dumps(settings))


def scaled(base, folder):
    """A base of other numbers."""
    shutil.copytree(base, folder)
    weights = {name: w * 1.05 for name, w in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def notes(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


def loads(adapter, folder):
    return load_adapter(load_base(nf4(folder), CPU), adapter, nf4(folder))


def test_the_same_base_under_another_name_is_taken_with_a_note(adapter, tiny_base, tmp_path, capsys):
    shutil.copytree(tiny_base, tmp_path / "a-copy")
    recorded(adapter, "me/tiny-llama", identify(nf4(tiny_base)) | {"name": "me/tiny-llama"})
    loads(adapter, tmp_path / "a-copy")
    assert notes(capsys) == [f"note: {tmp_path}/a-copy is the base of {adapter}, which knows it as me/tiny-llama"]
    loads(adapter, tiny_base)  # of the same name, and surely the same
    assert notes(capsys) == []


def test_another_base_of_the_same_name_is_refused(adapter, tiny_base, tmp_path):
    other = scaled(tiny_base, tmp_path / "tiny-llama")
    recorded(adapter, "me/tiny-llama", identify(nf4(tiny_base)) | {"name": "me/tiny-llama"})
    with pytest.raises(UserError, match=r"another base, me/tiny-llama: 6 of 6 sampled tensors have other numbers"):
        loads(adapter, other)
    recorded(adapter, str(tiny_base))  # whose folder is here, so it can be looked at
    (adapter / "trained_with.json").unlink()
    with pytest.raises(UserError, match=rf"another base, {tiny_base}: 6 of 6 sampled"):
        loads(adapter, other)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("me/tiny-llama", "is recorded as me/tiny-llama"),
        ("/gone/.cache/hub/models--me--tiny-llama/snapshots/0123abcd", "is recorded as /gone/.cache"),
        (None, "is not recorded"),
    ],
)
def test_without_an_identity_shapes_and_name_decide_with_a_note(adapter, tiny_base, capsys, name, says):
    recorded(adapter, name)
    loads(adapter, tiny_base)
    (note,) = notes(capsys)
    assert note.startswith(f"note: the base of {adapter} {says}")


OTHER_TOOLS = {  # what each writes into adapter_config.json beside PEFT's own fields
    "Unsloth": {
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        },
        "base_model_name_or_path": "unsloth/tiny-llama-bnb-4bit",
        "task_type": None,
    },
    "TRL": {"base_model_name_or_path": "me/tiny-llama", "modules_to_save": None, "task_type": "CAUSAL_LM"},
    "LLaMA-Factory": {
        "base_model_name_or_path": "/data/models/tiny-llama",
        "task_type": "CAUSAL_LM",
        "lora_dropout": 0.0,
    },
    "axolotl": {
        "base_model_name_or_path": "./tiny-llama",
        "lora_dropout": 0.05,
        "fan_in_fan_out": None,
        "peft_type": "LORA",
    },
    "another PEFT": {"base_model_name_or_path": "tiny-llama", "a_field_of_another_version": None},
}


@pytest.mark.parametrize("tool", OTHER_TOOLS)
def test_an_adapter_as_another_tool_writes_it_runs_in_the_fast_layers(tiny_base, tmp_path, tool):
    config = LoraConfig(r=4, target_modules=SEVEN, task_type="CAUSAL_LM")
    peft_model = noisy(tiny_base, config, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, **OTHER_TOOLS[tool]}))
    base = Base(str(tiny_base), quant="none", dtype="fp32")
    model = load_adapter(load_base(base, CPU), tmp_path, base)
    assert unsupported_reason(model) is None
    ids = torch.arange(5, 25)[None]
    assert torch.equal(model(input_ids=ids).logits, peft_model(input_ids=ids).logits)
