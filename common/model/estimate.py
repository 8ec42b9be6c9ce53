"""The plan of a training on the GPU at hand, and about how long it will take, before anything is loaded."""

from common.config import CONFIGS, Config, Lora
from common.model import memory
from common.model.load import compute_dtype
from common.model.memory import Choice, Shapes
from common.model.nf4 import ABSMAX_BLOCK
from common.runs import gauges

import torch
from transformers import AutoConfig, PreTrainedConfig

# of SQuAD v1.1's train set by Llama-2's tokenizer, each paragraph once: tokens of an epoch, and those with logits
TOKENS, ANSWER_SHARE = 5_650_000, 0.1
QUESTIONS = 87_599
BLOCK = 64  # weights that share an absmax, as bitsandbytes quantises
# of a large product's speed, what a step reaches, the rest being attention, norms and the optimizer (docs/results.md)
REACHED = 0.6
SHAPES = {"meta-llama/Llama-2-7b-hf": "llama-2-7b"}  # bases whose shapes are known without their files


def shapes_of(c: PreTrainedConfig, lora: Lora, item: int) -> Shapes:
    """Shapes of a Llama in NF4 with double quantisation, and of an adapter; `item`: bytes of a number that computes."""
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    q, k = c.num_attention_heads * width, width * (c.num_key_value_heads or c.num_attention_heads)
    h, i, layers = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    sides = {"q": (h, q), "k": (h, k), "v": (h, k), "o": (q, h), "gate": (h, i), "up": (h, i), "down": (i, h)}
    weights = layers * sum(a * b for a, b in sides.values())
    constants = weights // BLOCK + memory.FP32 * weights // (BLOCK * ABSMAX_BLOCK)
    plain = h * (c.vocab_size * (1 if c.tie_word_embeddings else 2) + 2 * layers + 1)
    trained = sum(sum(sides[name.removesuffix("_proj")]) for name in lora.targets)
    sizes = layers, h, i, q, k, c.vocab_size
    base = weights // 2 + constants + item * plain
    return Shapes(base, layers * lora.rank * trained, *sizes, item, lora.dropout > 0)


def training(config: Config, device: torch.device) -> tuple[Choice, float]:
    """(the plan within what is free on a GPU, an epoch's minutes without its evaluations, about).

    Raises `UserError` where not even the least fits, `OSError` for a base whose shapes are not known.
    """
    assert config.lora
    dtype = compute_dtype(config.base, device)
    named = SHAPES.get(config.base.path)
    known = AutoConfig.from_pretrained(CONFIGS / "shapes" / named if named else config.base.path)
    shapes = shapes_of(known, config.lora, dtype.itemsize)
    limit = memory.usable_bytes(memory.limit_bytes("auto", device), device)
    least = shapes.decoding_bytes(memory.LEAST_PASS_TOKENS, memory.LEAST_CACHE_TOKENS)
    step_tokens = TOKENS * config.train.questions_per_step / QUESTIONS
    choice = memory.choose(config.train, shapes, device, step_tokens, ANSWER_SHARE, limit, least)
    forward = 2 * shapes.layers * shapes.layer_matrices / shapes.item  # operations a token
    steps = QUESTIONS / config.train.questions_per_step
    sizes = choice.pack_tokens, choice.keep_layers, choice.hold_layers
    operations = steps * forward * memory.step_time(shapes, step_tokens, *sizes)
    return choice, operations / (REACHED * products_per_second(device, dtype)) / 60


def products_per_second(device: torch.device, dtype: torch.dtype, n: int = 4096, seconds: float = 0.5) -> float:
    """Operations a second of a matrix product of size `n`, after a warm-up of as long."""
    a = torch.randn(n, n, dtype=dtype, device=device)
    for _ in range(2):
        began, count = gauges.now(device), 0
        while (took := gauges.now(device) - began) < seconds:
            for _ in range(8):
                a @ a
            count += 8
    return count * 2 * n**3 / took
