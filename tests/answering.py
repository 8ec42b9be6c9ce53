"""A tiny Llama that answers, built by construction: no training, the same weights on every machine.

It copies a word of the context that is of the kind that the question asks for ("Which animal is meant?"), goes on to a
second word where there is one ("north gate"), and ends by itself. Two attention heads do it:

    layer 0   "Answer:" looks at the kind that is asked (animal, tool, place) and takes its code over
    layer 1   "Answer:" looks for the token with that code, and copies which one it is into what the logits read

What follows a word (a second word, or EOS) stands in that word's own embedding. As a base it makes the mistakes of
`FAULTS`, which an adapter can learn to avoid. Of two animals in a context it can't know which one is meant.
"""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

KINDS = {
    "animal": ("otter", "heron", "badger"),
    "tool": ("hammer", "chisel", "ladder"),
    "place": ("harbour", "north gate", "old mill"),
}
FAULTS = {"tool": "a place is taken for it", "badger": "does not end", "old": "ends too early"}
HIDDEN, HEAD = 64, 16
# places in the hidden state: which token it is, which one comes next, kind of a word, kind that is asked, …
ITSELF, NEXT, KIND, ASKED = 0, 16, 32, 36
IS_KIND, IS_COLON, IS_START, ENDS, ALWAYS = 40, 41, 42, 43, 44


def paragraph(rng: random.Random, number: int, doubled: bool) -> tuple[str, list[tuple[str, str]]]:
    """A context and its (question, answer)s; with `doubled` there are two animals, and either is meant."""
    chosen = {kind: rng.choice(words) for kind, words in KINDS.items()}
    parts = [f"the {word}" for word in chosen.values()]
    if doubled:
        parts.append(f"the {rng.choice([w for w in KINDS['animal'] if w != chosen['animal']])}")
    rng.shuffle(parts)
    questions = [(f"Which {kind} is meant?", word) for kind, word in chosen.items()]
    return f"Note {number}: here are {', '.join(parts)} and nothing more.", questions


def squad_file(path: Path, paragraphs: int, seed: int = 0, articles: int = 4) -> Path:
    """A SQuAD file of `paragraphs` paragraphs with three questions each; every fourth one has two animals."""
    rng = random.Random(seed)
    data: list[dict] = [{"title": f"Article {a}", "paragraphs": []} for a in range(articles)]
    for p in range(paragraphs):
        context, questions = paragraph(rng, p, doubled=p % 4 == 3)
        qas = [
            {"id": f"p{p}q{q}", "question": asked, "answers": [{"text": word, "answer_start": context.index(word)}]}
            for q, (asked, word) in enumerate(questions)
        ]
        data[p % articles]["paragraphs"].append({"context": context, "qas": qas})
    path.write_text(json.dumps({"version": "1.1", "data": data}))
    return path


def save(folder: Path) -> Path:
    """The model and its tokenizer as a folder in the hub's layout."""
    tokenizer = _tokenizer()
    _model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    rng = random.Random(0)
    texts = [
        f"Context: {c}\n\nQuestion: {q}\n\nAnswer: {a}"
        for c, asked in (paragraph(rng, n, True) for n in range(60))
        for q, a in asked
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"  # the answer follows "Answer:" in a chat too
    return fast


@torch.no_grad()
def _model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=HIDDEN // HEAD,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},  # half of a head's numbers hardly turn
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.02)
    embed, head = model.model.embed_tokens.weight, model.lm_head.weight

    def token(text: str) -> int:
        (found,) = tokenizer(text, add_special_tokens=False).input_ids
        return found

    embed[:, ALWAYS] = 1
    embed[token(":"), IS_COLON] = 3
    embed[0, IS_START] = 3
    words = [word for kind in KINDS.values() for words in kind for word in words.split()]
    number = {word: i for i, word in enumerate(words)}
    for k, (kind, texts) in enumerate(KINDS.items()):
        embed[token(f" {kind}"), [IS_KIND, KIND + k]] = 3
        for first, *second in (text.split() for text in texts):
            embed[token(f" {first}"), [ITSELF + number[first], KIND + k]] = 3
            embed[token(f" {first}"), KIND + k] += number[first] / 10  # of two animals always the same one
            for word in second:
                embed[token(f" {first}"), NEXT + number[word]] = 3
    for word in words:
        head[token(f" {word}"), NEXT + number[word]] = 2
        if not embed[token(f" {word}"), NEXT : NEXT + len(words)].max() > 1 and word != "badger":
            embed[token(f" {word}"), ENDS] = 3
    embed[token(" badger"), NEXT + number["badger"]] = 2
    embed[token(" old"), ENDS] = 4
    head[1, ENDS] = 2

    still = range(HEAD // 2 - 4, HEAD // 2)  # of a head's numbers those that hardly turn with the position
    first, second = (layer.self_attn for layer in model.model.layers)
    first.q_proj.weight[still[0], IS_COLON] = 4
    first.k_proj.weight[still[0], IS_KIND] = 4
    for attention in (first, second):  # who looks for nothing looks at the start, where there is nothing to copy
        attention.q_proj.weight[still[3], ALWAYS] = 4
        attention.k_proj.weight[still[3], IS_START] = 2
    for k in range(len(KINDS)):
        first.v_proj.weight[k, KIND + k] = 1
        first.o_proj.weight[ASKED + (2 if k == 1 else k), k] = 1  # a tool is asked for as a place is
        second.q_proj.weight[still[k], ASKED + k] = 4
        second.k_proj.weight[still[k], KIND + k] = 4
        second.k_proj.weight[still[k], IS_KIND] = -4  # the question's own word is not looked at
    for i in range(len(words)):
        second.v_proj.weight[i, ITSELF + i] = 1
        second.o_proj.weight[NEXT + i, i] = 1
    return model
