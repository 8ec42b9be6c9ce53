"""Bases stay frozen and exact, adapters fit or are refused."""

import copy
import hashlib
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

from common.config import Api, Base, Config, Lora, Window, load
from common.data.tokens import Tokenizers
from common.decode import predict
from common.decode.answers import stop_tokens
from common.errors import UserError, first_line
from common.model import load as module
from common.model.identity import identify
from common.model.llama import beyond_lora, unsupported_reason
from common.model.load import (
    PROBE,
    AutoTokenizer,
    add_lora,
    compute_dtype,
    eos_ids,
    load_adapter,
    load_base,
    load_system,
    load_tokenizer,
    load_tokenizers,
    load_weights,
    parameter_counts,
    random_weights,
    sources,
    tokenizer_sha256,
)
from common.runs import preflight
from tests.decode.test_predict import LIMIT, demo_trees, generated
from tests.model.test_pack import gradient, lora_model, packed_loss, trees_of

import bitsandbytes as bnb
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
from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen2Config

CPU = torch.device("cpu")


def nf4(folder) -> Base:
    return Base(str(folder), quant="nf4", dtype="fp32")


def test_an_evaluation_pass_leaves_later_gradients_bit_equal(tiny_base):
    trees, tokenizer = trees_of(tiny_base, 2)
    model = lora_model(tiny_base, "nf4").train()
    packed_loss(model, [trees])
    before = gradient(model)
    predict.answer_trees(model, tokenizer, trees, [], 3, progress=None)
    packed_loss(model, [trees])
    assert torch.equal(before, gradient(model))


def train_a_little(model, trees) -> tuple[torch.Tensor, torch.Tensor]:
    """(first loss, last loss) of four steps on the same pack."""
    optimizer = bnb.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(packed_loss(model, [trees]))
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[-1]


def four_bit_bytes(model) -> list[torch.Tensor]:
    return [m.weight.data.clone() for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]


def test_training_leaves_the_quantised_base_as_it_was(tiny_base):
    trees, _ = trees_of(tiny_base, 2)
    model = lora_model(tiny_base, "nf4")
    before = four_bit_bytes(model)
    assert len(before) == 2 * 7
    first, last = train_a_little(model, trees)
    assert last < first
    assert all(torch.equal(a, b) for a, b in zip(before, four_bit_bytes(model), strict=True))


def test_checkpointing_changes_no_gradient(tiny_base):
    trees, _ = trees_of(tiny_base, 2)
    model = lora_model(tiny_base, "nf4").train()
    packed_loss(model, [trees])
    plain = gradient(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packed_loss(model, [trees])
    torch.testing.assert_close(plain, gradient(model), rtol=1e-5, atol=1e-6)


def test_the_seed_decides_the_adapters_start(tiny_base):
    def start(seed: int) -> torch.Tensor:
        model = add_lora(load_base(nf4(tiny_base), CPU), Lora(), seed)
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


def test_a_new_adapter_is_as_configured_and_changes_nothing_yet(tiny_base):
    """A is uniform(±1 / √inputs), as PEFT has it; B is zero; both fp32."""
    base = load_base(Base(str(tiny_base), quant="none", dtype="bf16"), CPU)
    ids = torch.arange(5, 25)[None]
    before = base(input_ids=ids).logits
    found = add_lora(base, Lora(rank=3, alpha=7, dropout=0.25, targets=("q_proj", "down_proj")), seed=0)
    weights = {name: p for name, p in found.named_parameters() if p.requires_grad}
    assert len(weights) == 2 * 2 * 2
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        if "lora_A" in name:
            inputs = 128 if "down_proj" in name else 64
            assert weight.shape == (3, inputs)
            assert 0.95 < weight.abs().max() * inputs**0.5 <= 1
            assert weight.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.15)
        else:
            assert weight.shape == (64, 3)
            assert not weight.any()
    assert torch.equal(found.eval()(input_ids=ids).logits, before)
    settings = found.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout, settings.bias) == (3, 7, 0.25, "none")
    assert (settings.target_modules, settings.task_type) == ({"q_proj", "down_proj"}, "CAUSAL_LM")


def test_a_system_is_its_base_its_adapter_or_a_new_one_of_its_seed(tiny_base, monkeypatch):
    done = []
    monkeypatch.setattr(module, "load_base", lambda base, device: f"{base.path} on {device}")
    monkeypatch.setattr(module, "load_adapter", lambda *args: done.append(args) or "trained")
    monkeypatch.setattr(module, "add_lora", lambda *args: done.append(args) or SimpleNamespace(eval=lambda: "new"))
    base, lora = Base("base"), Lora(rank=2)
    assert load_system(Config("x", base), "adapter", CPU) == "base on cpu"
    assert load_system(Config("x", base, lora=lora, seed=7), "adapter", CPU) == "trained"
    assert load_system(Config("x", base, lora=lora, seed=7), None, CPU) == "new"
    assert done == [("base on cpu", "adapter", base, False), ("base on cpu", lora, 7)]
    load_system(Config("x", base, lora=lora), "adapter", CPU, force=True)
    assert done[-1] == ("base on cpu", "adapter", base, True)


def test_qlora7b_trains_the_share_of_llama_2_that_its_rank_and_targets_say():
    config = load("qlora7b")
    with torch.device("meta"):
        llama_2_7b = AutoModelForCausalLM.from_config(LlamaConfig())  # its defaults are Llama-2-7B's shapes
        llama_2_7b.requires_grad_(False)
        trained, frozen = parameter_counts(add_lora(llama_2_7b, config.lora, seed=0))
    assert trained == 39_976_960
    assert frozen == 6_738_415_616


def test_a_four_bit_weight_counts_as_one_weight(tiny_base):
    plain = parameter_counts(load_base(Base(str(tiny_base), quant="none", dtype="fp32"), CPU))
    assert parameter_counts(load_base(nf4(tiny_base), CPU)) == plain


@pytest.mark.parametrize("bf16", [True, False])
def test_compute_is_fp32_on_a_cpu_and_16_bits_as_a_gpu_has_them_unless_said_otherwise(monkeypatch, bf16):
    gpu, asked = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: asked.append(how) or bf16)
    assert compute_dtype(Base("x"), CPU) == torch.float32
    assert asked == []
    assert compute_dtype(Base("x"), gpu) == (torch.bfloat16 if bf16 else torch.float16)
    assert asked == [{"including_emulation": False}]
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        assert compute_dtype(Base("x", dtype=name), CPU) == compute_dtype(Base("x", dtype=name), gpu) == dtype


@pytest.mark.parametrize(("quant", "double", "dtype"), [("nf4", True, "fp32"), ("fp4", False, "bf16")])
def test_a_base_is_quantised_as_configured_and_frozen(tiny_base, quant, double, dtype):
    base = load_base(Base(str(tiny_base), quant=quant, double_quant=double, dtype=dtype), CPU)
    matrices = [m for m in base.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(matrices) == 2 * 7
    for m in matrices:
        state = m.weight.quant_state
        assert (state.quant_type, state.nested, m.compute_dtype) == (
            quant,
            double,
            compute_dtype(Base("x", dtype=dtype), CPU),
        )
        assert m.support_avx512bf16_for_cpu is False
    assert not base.training
    assert not any(p.requires_grad for p in base.parameters())
    assert base.dtype == base.lm_head.weight.dtype == compute_dtype(Base("x", dtype=dtype), CPU)


@pytest.mark.parametrize(
    ("config", "loaded", "own", "window"),
    [
        (Config("x", Base("b", revision="r")), [("b", "r")], 0, 0),
        (Config("x", Base("b", tokenizer="t")), [("t",)], 0, 0),
        (Config("x", Base("b"), window=Window(tokenizer="w")), [("b", "main"), ("w",)], 0, 1),
        (Config("x", Base("b", quant="none"), window=Window(tokenizer="w"), api=Api("http://host/v1")), [("w",)], 0, 0),
    ],
)
def test_text_is_cut_by_the_systems_own_tokenizer_unless_another_is_named(monkeypatch, config, loaded, own, window):
    asked: list[tuple] = []
    monkeypatch.setattr(module, "load_tokenizer", lambda *args: asked.append(args) or str(len(asked) - 1))
    assert load_tokenizers(config) == Tokenizers(str(own), str(window))
    assert asked == loaded


def test_a_tokenizer_without_eos_or_offsets_is_refused(monkeypatch):
    asked: list[tuple] = []
    made = SimpleNamespace(eos_token_id=0, is_fast=False)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **more: asked.append((args, more)) or made)
    with pytest.raises(UserError, match=r"base: its tokenizer has no tokenizer\.json"):
        load_tokenizer("base", "v2")
    assert asked == [(("base",), {"revision": "v2"})]
    made.eos_token_id = None
    with pytest.raises(UserError, match="base: its tokenizer has no EOS token"):
        load_tokenizer("base")
    assert asked[1][1] == {"revision": "main"}


# ---- random weights ------------------------------------------------------------------------------------------------


def test_random_weights_have_the_shapes_and_the_form_of_real_ones(tiny_base):
    real = load_base(nf4(tiny_base), CPU)
    made = load_base(replace(nf4(tiny_base), random_weights=True), CPU)
    assert parameter_counts(made) == parameter_counts(real)
    ours, theirs = ({name: (p.shape, p.dtype) for name, p in m.named_parameters()} for m in (made, real))
    assert ours == theirs
    matrices = [m for m in made.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len({m.weight.data.numpy().tobytes() for m in matrices}) == len(matrices) == 2 * 7  # no two alike
    assert made(input_ids=torch.arange(9)[None]).logits.std() > 0
    assert add_lora(made, Lora(), 0).peft_config["default"].base_model_name_or_path == str(tiny_base)


def test_random_weights_need_no_more_than_a_folders_config(tiny_base, tmp_path):
    shutil.copy(tiny_base / "config.json", tmp_path)
    base = replace(nf4(tmp_path), random_weights=True, tokenizer=str(tiny_base))
    preflight.check(Config("tiny", base))
    first, again = (load_base(base, CPU).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize(("name", "size"), [("llama-2-7b", 6_738_415_616), ("tinyllama-1.1b", 1_100_048_384)])
def test_the_shapes_of_gated_and_large_models_are_at_hand(name, size):
    _, _, weights = random_weights(Base(f"configs/shapes/{name}"))
    assert sum(w.numel() for w in weights.values()) == size
    assert len({w.untyped_storage().data_ptr() for w in weights.values() if w.dim() > 1}) == 1  # one buffer for all


def test_random_weights_are_normal_as_the_config_says_norms_one_and_biases_zero(tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(**sizes, **heads, initializer_range=0.125, tie_word_embeddings=True)
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(tmp_path)
    kind, found, weights = random_weights(Base(str(tmp_path)))
    assert (kind.__name__, found.vocab_size) == ("Qwen2ForCausalLM", 300)
    assert "lm_head.weight" not in weights  # tied: it is the embeddings
    for name, weight in weights.items():
        if weight.dim() > 1:
            assert weight.dtype == torch.bfloat16
            assert weight.float().std().item() == pytest.approx(0.125, rel=0.1)
            assert abs(weight.float().mean().item()) < 0.01
        else:
            assert (weight == (0 if name.endswith("bias") else 1)).all()
    assert any(name.endswith("bias") for name in weights)
    starts = [w.storage_offset() for w in weights.values() if w.dim() > 1]
    assert len(set(starts)) == len(starts) == 1 + 2 * 7


def test_a_tokenizers_fingerprint_is_the_hash_of_vocabulary_ids_text_and_eos(tiny_base):
    tokenizer = load_tokenizer(str(tiny_base))
    ids = tokenizer(PROBE).input_ids
    does = [sorted(tokenizer.get_vocab().items()), ids, tokenizer.decode(ids), 1]
    before = hashlib.sha256(json.dumps(does).encode()).hexdigest()
    assert tokenizer_sha256(tokenizer) == before
    other = load_tokenizer(str(tiny_base))
    other.add_tokens(["never in a text"])
    assert tokenizer_sha256(other) != before
    none = GenerationConfig()
    loaded = SimpleNamespace(config=SimpleNamespace(_commit_hash="c0ffee"), generation_config=none)
    sums = {"tokenizer": before, "cutter": tokenizer_sha256(other)}
    found = sources(loaded, Tokenizers(tokenizer, other))
    assert found == {**sums, "base_commit": "c0ffee", "eos_ids": [1]}
    loaded = SimpleNamespace(config=object(), generation_config=GenerationConfig(eos_token_id=[7, 1]))
    found = sources(loaded, Tokenizers(tokenizer, other))
    assert found == {**sums, "base_commit": None, "eos_ids": [1, 7]}
    assert sources(None, Tokenizers(tokenizer, other)) == {**sums, "base_commit": None}


def test_a_tokenizers_fingerprint_is_of_what_it_does_and_not_of_its_file(tiny_base):
    tokenizer = load_tokenizer(str(tiny_base))
    before = tokenizer_sha256(tokenizer)
    backend = tokenizer.backend_tokenizer
    form, splits = backend.to_str(), backend.pre_tokenizer
    backend.decoder = decoders.Sequence([backend.decoder])
    assert backend.to_str() != form
    assert tokenizer_sha256(tokenizer) == before
    backend.pre_tokenizer = pre_tokenizers.Sequence([splits, pre_tokenizers.Digits(individual_digits=True)])
    split = tokenizer_sha256(tokenizer)
    backend.pre_tokenizer = splits
    assert tokenizer_sha256(tokenizer) == before
    tokenizer.eos_token = "the"
    assert len({before, split, tokenizer_sha256(tokenizer)}) == 3


def test_a_tokenizer_of_more_tokens_than_the_base_embeds_is_refused(tiny_base, smollm2_base):
    with pytest.raises(UserError, match=r"base\.tokenizer.*more tokens"):
        load_base(replace(nf4(tiny_base), tokenizer=str(smollm2_base)), CPU)


# ---- adapters ------------------------------------------------------------------------------------------------------


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


def test_a_folder_without_a_model_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="no model could be loaded"):
        load_base(Base(str(tmp_path), quant="none"), CPU)
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("quant", ["nf4", "none"])
@pytest.mark.parametrize("harm", ["a weight less", "another shape"])
def test_a_base_that_is_not_whole_is_refused_and_not_made_up(tiny_base, tmp_path, quant, harm):
    folder = tmp_path / "harmed"
    shutil.copytree(tiny_base, folder)
    weights = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    if harm == "a weight less":
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        settings["intermediate_size"] = 256
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"harmed: no (whole model|model could be loaded)"):
        load_base(replace(nf4(folder), quant=quant), CPU)


def test_what_a_base_lacks_is_named_and_counted(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "harmed")
    weights = load_file(tiny_base / "model.safetensors")
    for more, name in (("", "up_proj"), (" and 1 more", "gate_proj"), (" and 2 more", "down_proj")):
        del weights[f"model.layers.1.mlp.{name}.weight"]
        save_file(weights, tmp_path / "harmed" / "model.safetensors", {"format": "pt"})
        with pytest.raises(
            UserError, match=rf"no whole model: model\.layers\.1\.mlp\.\w+_proj\.weight{more} is missing"
        ):
            load_base(Base(str(tmp_path / "harmed"), quant="none"), CPU)


def test_of_what_a_library_says_the_first_line_is_told():
    assert first_line(ValueError("\n one \ntwo")) == "one "
    assert first_line(ValueError("x" * 201)) == "x" * 200
    assert first_line(KeyError()) == "KeyError"


def test_smollm2_ends_answers_with_its_own_eos_and_pads_with_another_token(smollm2_base):
    tokenizer = load_tokenizer(str(smollm2_base))
    model_config = json.loads((smollm2_base / "config.json").read_text())
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", model_config["eos_token_id"])
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer("text").input_ids[0] != tokenizer.bos_token_id


def test_a_tokenizer_saved_with_truncation_and_padding_neither_cuts_nor_pads(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "base")
    saved = Tokenizer.from_file(str(tmp_path / "base" / "tokenizer.json"))
    saved.enable_truncation(8)
    saved.enable_padding(length=30)
    saved.save(str(tmp_path / "base" / "tokenizer.json"))
    text = "A long text about canals, bridges and harbours."
    backend = load_tokenizer(str(tmp_path / "base")).backend_tokenizer
    assert backend.encode(text).ids == load_tokenizer(str(tiny_base)).backend_tokenizer.encode(text).ids


# ---- numbers that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_an_adapter_whose_numbers_are_not_finite_is_refused_by_tensor(adapter, tiny_base, number):
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    weights[name][1, 2] = number
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"^{adapter}: {name} holds numbers that are not finite"):
        load_adapter(load_base(nf4(tiny_base), CPU), adapter, nf4(tiny_base))


@pytest.mark.parametrize("quant", ["nf4", "none"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_base_whose_numbers_are_not_finite_is_refused_by_tensor(tiny_base, tmp_path, quant, double, name):
    folder = tmp_path / "harmed"
    shutil.copytree(tiny_base, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[5] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"^{folder}: {name} holds numbers that are not finite"):
        load_base(replace(nf4(folder), quant=quant, double_quant=double), CPU)


# ---- bases that are quantised already ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "double"), [("fp4", False), ("nf4", True), ("nf4", False)])
def test_a_base_that_is_stored_in_4_bits_is_taken_for_what_it_is(tiny_base, tmp_path, kind, double):
    folder = tmp_path / "packed"
    load_base(replace(nf4(tiny_base), quant=kind, double_quant=double), CPU).save_pretrained(folder)
    stored = replace(nf4(folder), quant=kind, double_quant=double)
    ids = torch.arange(5, 25)[None]
    plain = load_base(replace(stored, path=str(tiny_base)), CPU)
    assert torch.equal(load_base(stored, CPU)(input_ids=ids).logits, plain(input_ids=ids).logits)
    fit = f"base.quant={kind} base.double_quant={str(double).lower()}"
    says = rf"packed is stored in 4-bit {kind} by bitsandbytes: set {fit}$"
    for other in ({"quant": "none"}, {"quant": "nf4" if kind == "fp4" else "fp4"}, {"double_quant": not double}):
        with pytest.raises(UserError, match=says):
            load_base(replace(stored, **other), CPU)


def test_a_base_that_is_quantised_by_another_method_is_refused_by_its_name(tiny_base, tmp_path):
    folder = tmp_path / "packed"
    shutil.copytree(tiny_base, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"^{folder} is quantised already, by gptq; "):
        load_base(nf4(folder), CPU)


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
        (adapter / "trained_with.json").write_text(json.dumps({"identity": identity}))


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
    "an older PEFT": {"base_model_name_or_path": "tiny-llama", "a_field_that_is_gone": 3},
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


# ---- files that are more, or other, than they should be ------------------------------------------------------------


@pytest.mark.parametrize("harm", ["a layer less in config.json", "a bias more", "a derived tensor"])
def test_tensors_that_the_model_has_no_place_for_are_named(tiny_base, tmp_path, harm):
    folder = tmp_path / "harmed"
    shutil.copytree(tiny_base, folder)
    settings, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    if harm == "a layer less in config.json":
        settings["num_hidden_layers"] = 1
        (folder / "config.json").write_text(json.dumps(settings))
    else:
        name = "q_proj.bias" if harm == "a bias more" else "rotary_emb.inv_freq"
        weights[f"model.layers.0.self_attn.{name}"] = torch.zeros(4)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if harm == "a derived tensor":
        load_base(Base(str(folder), quant="none"), CPU)
        return
    with pytest.raises(UserError, match=rf"^{folder}: model\.layers\..* stands? in its files and not in the model"):
        load_base(Base(str(folder), quant="none"), CPU)


@pytest.mark.parametrize(
    "damage", ["[]", '{"hidden_size": "64"}', '{"rms_norm_eps": null}', '{"hidden_act": "no such"}']
)
def test_a_damaged_config_is_one_line(tiny_base, tmp_path, damage):
    folder = tmp_path / "harmed"
    shutil.copytree(tiny_base, folder)
    found, settings = json.loads(damage), json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **found} if found else found))
    with pytest.raises(UserError, match=f"^{folder}: "):
        load_base(Base(str(folder), quant="none"), CPU)


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


def test_a_setting_that_is_not_known_is_named(adapter, tiny_base, capsys):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alhpa": 8}))
    loads(adapter, tiny_base)
    assert f"note: {adapter}/adapter_config.json sets what is not known here: lora_alhpa" in notes(capsys)


@pytest.mark.parametrize("identity", ["a text", {"name": "x"}, [1]])
def test_a_damaged_identity_is_one_line(adapter, tiny_base, identity):
    recorded(adapter, "me/tiny-llama", identity)
    with pytest.raises(UserError, match="what it says of its base is damaged"):
        loads(adapter, tiny_base)


@pytest.mark.parametrize("eos", ["</s>", ["</s>"], [[1, 2]]])
def test_an_eos_that_is_no_token_is_one_line(eos):
    with pytest.raises(UserError, match=r"eos_token_id is .*; it must be a token's number"):
        eos_ids(1, SimpleNamespace(eos_token_id=eos))
