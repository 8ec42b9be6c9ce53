"""A tiny random Llama with a tokenizer of its own, small SQuAD files, and SmolLM2 as `make` left it."""

import json
import os
import random
import sys
from pathlib import Path

from common.data.tokens import Tokenizers

import pytest
from hypothesis import settings

# before torch: the tests' models are too small to share out, and threads that wait for each other spin
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork has none of its parent's threads, and would wait for them

settings.register_profile("repo", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("repo")

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / ".cache" / "smollm2-135m-instruct"


def same(tokenizer) -> Tokenizers:
    """A system whose own tokenizer cuts the text, too."""
    return Tokenizers(tokenizer, tokenizer)


@pytest.fixture(autouse=True)
def one_process_does_what_several_scripts_do():
    """Accelerate keeps a script's precision for the life of a process, and refuses another one."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state()


@pytest.fixture(scope="session", autouse=True)
def copies_of_quantised_bases(tmp_path_factory):
    """Of this session's own: tests make bases that nobody loads again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.model.quantised.FOLDER", tmp_path_factory.mktemp("quantised"))
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A folder with a 2-layer Llama (grouped heads, random weights) and a BPE tokenizer that adds BOS."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator((ROOT / "demo" / "train.json").read_text().splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.2,  # far from uniform, so that greedy answers differ from question to question
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def answering_base(tmp_path_factory) -> Path:
    """A tiny Llama that answers: it copies words of the context, ends by itself, and is sometimes wrong."""
    from tests import answering

    return answering.save(tmp_path_factory.mktemp("base") / "answering-llama")


def answering_yaml(folder: Path, base: Path) -> Path:
    """A YAML of a system on the answering base: EM 33 as it is, 77 after 8 steps of training, less after 16."""
    from tests import answering

    train = answering.squad_file(folder / "answering-train.json", paragraphs=32)
    dev = answering.squad_file(folder / "answering-dev.json", paragraphs=16, seed=1)
    path = folder / "answering.yaml"
    path.write_text(
        f"""\
system: answering
base: {{path: {base}, dtype: fp32}}
lora: {{rank: 4, alpha: 8}}
data: {{train: {train}, dev: {dev}}}
train: {{lr: 2e-2, questions_per_step: 8, max_steps: 16, epochs: 2, eval_every: 2, pack_tokens: 512}}
early_stop: {{patience: 99}}
bench: {{queries: 4, warmup_queries: 1, processes: 1}}
runs: {folder / "runs"}
"""
    )
    return path


@pytest.fixture
def answering_config(tmp_path, answering_base) -> Path:
    return answering_yaml(tmp_path, answering_base)


@pytest.fixture(scope="session")
def smollm2_base() -> Path:
    assert SMOLLM2.is_dir(), "run `make smollm2` (or `make test`, which does) first"
    return SMOLLM2


def squad_file(path: Path, paragraphs: int, questions: int, seed: int = 0) -> Path:
    """A small valid SQuAD file of invented words: `paragraphs` paragraphs of `questions` questions each."""
    rng = random.Random(seed)
    words = ["amber", "bridge", "canal", "delta", "ember", "forest", "granite", "harbour", "island", "jetty", "kiln"]
    data = []
    for p in range(paragraphs):
        context = f"Number {p}: " + " ".join(rng.choices(words, k=12)) + "."
        qas = []
        for q in range(questions):
            answer = rng.choice([word for word in words if word in context])
            qas.append(
                {
                    "id": f"p{p}q{q}",
                    "question": f"Which word is meant by {rng.choice(words)} {q}?",
                    "answers": [{"text": answer, "answer_start": context.index(answer)}],
                }
            )
        data.append({"title": f"Article {p % 3}", "paragraphs": [{"context": context, "qas": qas}]})
    path.write_text(json.dumps({"version": "1.1", "data": data}))
    return path


@pytest.fixture
def train_file(tmp_path) -> Path:
    return squad_file(tmp_path / "train.json", paragraphs=8, questions=4)


@pytest.fixture
def dev_file(tmp_path) -> Path:
    return squad_file(tmp_path / "dev.json", paragraphs=4, questions=3, seed=1)


@pytest.fixture
def tiny_config(tmp_path, tiny_base, train_file, dev_file) -> Path:
    """A YAML of a system on the tiny base, in NF4 on any machine, that writes below `tmp_path`."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""\
system: tiny
base: {{path: {tiny_base}, dtype: fp32}}
lora: {{rank: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]}}
data: {{train: {train_file}, dev: {dev_file}}}
train: {{lr: 1e-2, questions_per_step: 8, epochs: 2, eval_every: 2, pack_tokens: 256, gradient_checkpointing: false}}
early_stop: {{patience: 99}}
bench: {{queries: 4, warmup_queries: 1, processes: 1}}
runs: {tmp_path / "runs"}
"""
    )
    return path
