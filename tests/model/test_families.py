"""Models of other families, tiny and random, answer as `model.generate` does: another tokenizer, BOS or none, an EOS of
their own, grouped heads, biases, norms, windows, tied embeddings."""

from common.config import Base, Eval
from common.decode import predict
from common.decode.answers import stop_tokens
from common.decode.predict import answer_trees
from common.errors import UserError
from common.model.load import load_base, load_tokenizer
from tests.decode.test_predict import CPU, LIMIT, demo_trees, generated

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2PreTrainedModel,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
FAMILIES = {  # configuration, whether the tokenizer adds BOS, the engine
    "llama-2": (LlamaConfig(**SIZES, num_key_value_heads=4), True, "stream"),
    "llama-3": (LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=LLAMA3), True, "stream"),
    "tinyllama": (LlamaConfig(**SIZES, num_key_value_heads=1), True, "stream"),
    "qwen2": (Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True), False, "plain"),
    "qwen3": (Qwen3Config(**SIZES, num_key_value_heads=2), False, "plain"),
    "mistral": (MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4096), True, "plain"),
    "gemma": (GemmaConfig(**SIZES, num_key_value_heads=1), True, "plain"),
    "gemma-3": (
        Gemma3TextConfig(**SIZES, num_key_value_heads=2, sliding_window=4096, tie_word_embeddings=False),
        True,
        "plain",
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request, tiny_base, tmp_path):
    """(name, folder)"""
    config, bos, _ = FAMILIES[request.param]
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    if not bos:
        tokenizer.backend_tokenizer.post_processor = type(tokenizer.backend_tokenizer.post_processor)(single="$A")
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return request.param, tmp_path


def test_every_answer_equals_generate(family):
    name, folder = family
    _, bos, engine = FAMILIES[name]
    model, tokenizer = load_base(Base(str(folder), quant="none", dtype="fp32"), CPU), load_tokenizer(str(folder))
    assert predict.engine_of(model, Eval()) == engine
    trees, stops = demo_trees(tokenizer, 2), stop_tokens(tokenizer)
    assert all((tree.prefix_ids[0] == 0) == bos for tree in trees)
    answers = answer_trees(model, tokenizer, trees, stops, LIMIT, progress=None)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for tree in trees:
        for branch in tree.branches:
            assert answers[branch.id].token_ids == generated(plain, tokenizer, tree, branch, stops)
    assert len({tuple(answer.token_ids) for answer in answers.values()}) > 1


def test_four_bits_of_every_family_answer(family):
    name, folder = family
    model, tokenizer = load_base(Base(str(folder), dtype="fp32"), CPU), load_tokenizer(str(folder))
    answers = answer_trees(model, tokenizer, demo_trees(tokenizer, 1), stop_tokens(tokenizer), LIMIT, progress=None)
    assert len(answers) == 5
    assert all(answer.token_ids for answer in answers.values()), name


@pytest.mark.parametrize("transformers_lets_it_pass", [False, True])
def test_what_cannot_attend_over_trees_is_refused(tmp_path, monkeypatch, transformers_lets_it_pass):
    if transformers_lets_it_pass:  # as 5.17 does
        monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    config = Gemma2Config(**SIZES, num_key_value_heads=2, vocab_size=500, pad_token_id=2)  # it caps its scores
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="Gemma2ForCausalLM does not support"):
        load_base(Base(str(tmp_path), quant="none", dtype="fp32"), CPU)
