"""Bases stay frozen and exact, adapters fit or are refused."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from common.config import Api, Base, Config, Lora, Window, load
from common.data.tokens import Tokenizers
from common.decode import predict
from common.errors import UserError, first_line
from common.model import load as module
from common.model.load import (
    PROBE,
    AutoTokenizer,
    add_lora,
    compute_dtype,
    eos_ids,
    load_base,
    load_system,
    load_tokenizer,
    load_tokenizers,
    parameter_counts,
    random_weights,
    sources,
    tokenizer_sha256,
)
from common.runs import preflight
from tests.model.test_pack import gradient, lora_model, packed_loss, trees_of

import bitsandbytes as bnb
import pytest
import torch
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
    adapter = Path("adapter")
    assert load_system(Config("x", base, lora=lora, seed=7), adapter, CPU) == "trained"
    assert load_system(Config("x", base, lora=lora, seed=7), None, CPU) == "new"
    assert done == [("base on cpu", adapter, base, False), ("base on cpu", lora, 7)]
    load_system(Config("x", base, lora=lora), adapter, CPU, force=True)
    assert done[-1] == ("base on cpu", adapter, base, True)


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


def test_a_damaged_generation_config_is_one_line_for_it_holds_stop_tokens(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "harmed")
    file = tmp_path / "harmed" / "generation_config.json"
    file.write_text('{"eos_token_id": [1, 2')
    with pytest.raises(UserError, match=rf"^{file}:1: not valid JSON"):
        load_base(Base(str(tmp_path / "harmed"), quant="none"), CPU)


@pytest.mark.parametrize("force", [False, True])
def test_an_adapter_is_asked_with_the_tokenizer_that_it_was_trained_with(tiny_base, tmp_path, monkeypatch, force):
    base = Base(str(tiny_base), quant="none", dtype="fp32")
    config = Config("x", base, lora=Lora())
    own = tokenizer_sha256(load_tokenizer(str(tiny_base)))
    monkeypatch.setattr(module, "load_adapter", lambda *_: "loaded")
    for was, fits in ((own, True), ("another", force), (None, True)):
        monkeypatch.setattr(module.adapters, "trained_with", lambda folder, was=was: {"tokenizer_sha256": was})
        if fits:
            assert load_system(config, tmp_path, CPU, force) == "loaded"
        else:
            with pytest.raises(UserError, match=rf"^{tmp_path} was trained with another tokenizer than that of "):
                load_system(config, tmp_path, CPU, force)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards"])
def test_weights_of_a_base_in_8_bits_without_a_scale_are_no_numbers(tiny_base, tmp_path, dtype, kind):
    folder, name = tmp_path / "harmed", "model.layers.1.mlp.up_proj.weight"
    shutil.copytree(tiny_base, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name].to(dtype)
    if kind == "safetensors":
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        (folder / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    if kind == "shards":
        shards = {key: f"model-{1 + (key == name)}.safetensors" for key in weights}
        for file in set(shards.values()):
            save_file({key: weights[key] for key in weights if shards[key] == file}, folder / file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    with pytest.raises(UserError, match=rf"{name} is stored as \w+, and nothing says what numbers these are$"):
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


@pytest.mark.parametrize("eos", ["</s>", ["</s>"], [[1, 2]]])
def test_an_eos_that_is_no_token_is_one_line(eos):
    with pytest.raises(UserError, match=r"eos_token_id is .*; it must be a token's number"):
        eos_ids(1, SimpleNamespace(eos_token_id=eos))
