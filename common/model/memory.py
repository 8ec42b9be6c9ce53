"""GPU memory of training and decoding, counted in bytes before they start, and the sizes that a budget allows.

`make test-gpu` compares counts with torch's allocator; docs/results.md has both (8 GiB: 7.65 counted, 7.33 allocated).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from common.config import Eval, Train
from common.errors import UserError
from common.model.llama import Model

import torch

BUDGET = "eval.memory_budget_gib or, in a training, train.memory_budget_gib"  # the config keys to raise, for errors
GIB, FP32 = 2**30, 4  # bytes
# a margin for fragmentation: the allocator cannot use gaps between tensors
USABLE_SHARE = 0.9
# tokens of a pack in training; multiples of PACK_STEP, two tiles of a matrix product (below)
CPU_PACK_TOKENS, GPU_PACK_TOKENS, LEAST_PACK_TOKENS, PACK_STEP = 1024, 8192, 512, 256
# a margin: steps hold equally many questions, but not equally many tokens
STEP_MARGIN = 1.1
# a margin: packs differ in their share of answer tokens, which alone have logits
ANSWER_MARGIN = 1.15
# bytes of layer inputs and kept activations per byte of small tensors: 2 %, within what `make test-gpu` allows
SMALL_TENSORS = 50
# matrices of all layers are held dequantised, budget or not, if they take no more than this
HELD_BYTES = GIB
# tokens of a decoding pass; multiples of PASS_STEP, the rows of a matrix product's tile
# (https://docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication/index.html)
CPU_PASS_TOKENS, MOST_PASS_TOKENS, LEAST_PASS_TOKENS, PASS_STEP = 1024, 8192, 512, 128
# tokens of the KV cache, in passes: the passes during which a tree and its answers stay in it
CACHE_PASSES = 10
# tokens of the KV cache; the least is three of the least passes
CPU_CACHE_TOKENS, LEAST_CACHE_TOKENS = 16384, 1536
# of a pass's tokens, those that have logits: 10 % on SQuAD's dev set (66 of 653 thousand, docs/log.md), with a margin
LOGITS_SHARE = 0.25


@dataclass(frozen=True)
class Shapes:
    """The sizes of a Llama that decide its memory."""

    base_bytes: int  # the frozen base as stored, quantisation constants included
    lora: int  # trained weights
    layers: int
    hidden: int
    intermediate: int
    query: int  # heads × head width
    key: int  # key heads × head width
    vocabulary: int
    item: int  # bytes of a number in the compute dtype

    @classmethod
    def of(cls, model: Model, lora: int = 0) -> "Shapes":
        """Shapes of a loaded model of which `lora` weights are trained."""
        c, heads = model.config, model.config.num_attention_heads
        width = getattr(c, "head_dim", None) or c.hidden_size // heads
        key = width * (getattr(c, "num_key_value_heads", None) or heads)
        states = [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None)]
        constants = [t for s in states for t in (s.absmax, *((s.state2.absmax,) if s.nested else ()))]
        base = sum(x.nbytes for x in (*constants, *(p for p in model.parameters() if not p.requires_grad)))
        sizes = c.num_hidden_layers, c.hidden_size, c.intermediate_size, heads * width, key, c.vocab_size
        return cls(base, lora, *sizes, model.dtype.itemsize)

    @property
    def layer_matrices(self) -> int:
        """Bytes of one layer's seven matrices in the compute dtype."""
        return self.item * self.hidden * (2 * self.query + 2 * self.key + 3 * self.intermediate)

    @property
    def kept_per_token(self) -> int:
        """Bytes per token that a layer keeps beside its input: q, k, v, attention's output, the middle, gate, up."""
        return self.item * (2 * self.query + 2 * self.key + self.hidden + 2 * self.intermediate)

    @property
    def cache_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.key * self.item

    def training_bytes(self, tokens: int, answers: int, keep: int, hold: int, average: bool = False) -> dict[str, int]:
        """Peak bytes by purpose, with packs of `tokens`, `answers` of which have logits; `keep` and `hold` layers."""
        # of one layer's backward: its product, gate and up with two gradients; gradients around attention and MLP
        work = self.item * (4 * self.intermediate + 4 * self.hidden) * tokens
        work += 0 if hold == self.layers else self.layer_matrices
        work += 0 if keep == self.layers else self.kept_per_token * tokens
        inputs, kept = self.item * self.hidden * tokens * self.layers, self.kept_per_token * tokens * keep
        return {
            "base": self.base_bytes,
            "held matrices": hold * self.layer_matrices,
            # fp32 and gradient, a copy in the dtype and its gradient; the EMA, and a copy while it is evaluated
            "adapter": self.lora * (2 * FP32 + 2 * self.item + (2 * FP32 if average else 0)),
            "optimizer": 2 * self.lora,  # two moments of 8 bits
            "layer inputs": inputs,
            "kept activations": kept,
            "small tensors": (inputs + kept) // SMALL_TENSORS,
            # logits in the dtype and fp32, their log-softmax and its gradient
            "logits or one layer's work": max(work, (self.item + 3 * FP32) * self.vocabulary * answers),
        }

    def decoding_bytes(self, pass_tokens: int, cache_tokens: int, capture: bool = False) -> int:
        """Peak bytes of decoding beside base and adapter: KV cache, gate and up, one layer's work or the logits.

        `capture`: CUDA graphs keep gate, up and a layer's work once more, and add the buffers between them and a slot.
        """
        matrix = 2 * self.item * self.hidden * self.intermediate
        work = self.item * (5 * self.intermediate + 6 * self.hidden) * pass_tokens
        # in the dtype and fp32, and their log-softmax
        logits = (self.item + 2 * FP32) * self.vocabulary * math.ceil(pass_tokens * LOGITS_SHARE)
        adapter = 3 * self.item * self.lora // 2  # in the compute dtype; Bs that share an A's input are one matrix
        out = self.cache_per_token * cache_tokens + matrix + max(work, logits) + adapter
        buffers = self.item * (self.hidden + 2 * self.query) * pass_tokens
        return out + (matrix + work + buffers + self.cache_per_token if capture else 0)


def available_bytes(device: torch.device) -> int:
    """Bytes that this process can allocate: free ones and those that it has reserved, less 10 % for fragmentation."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(USABLE_SHARE * (free + torch.cuda.memory_reserved(device)))


class Decoding(NamedTuple):
    pass_tokens: int  # at most
    cache_tokens: int  # that the KV cache holds
    capture: bool = False  # passes are captured as CUDA graphs


def decoding(options: Eval, shapes: Shapes, device: torch.device, capture: bool) -> Decoding:
    """Sizes of batched decoding within `options.memory_budget_gib`, or within free memory where that is less.

    Passes are captured if `capture`, and if the memory suffices. Raises `UserError` if not even the least sizes fit.
    """
    if device.type == "cpu":
        return Decoding(options.pass_tokens or CPU_PASS_TOKENS, CPU_CACHE_TOKENS)
    torch.cuda.empty_cache()
    # CUDA graphs keep their memory reserved, so nothing else can use it
    available = available_bytes(device) - torch.cuda.memory_reserved(device)
    budget = int(options.memory_budget_gib * GIB) - torch.cuda.memory_allocated(device)
    return fit(options, shapes, min(budget, available), capture)


def fit(options: Eval, shapes: Shapes, available: int, capture: bool = False) -> Decoding:
    """As `decoding`, within `available` bytes."""

    def cache_for(pass_tokens: int) -> int:
        return (available - shapes.decoding_bytes(pass_tokens, 0, capture)) // shapes.cache_per_token

    tokens = options.pass_tokens or MOST_PASS_TOKENS
    while not options.pass_tokens and tokens > LEAST_PASS_TOKENS and cache_for(tokens) < CACHE_PASSES * tokens:
        tokens -= PASS_STEP
    cache = min(cache_for(tokens), CACHE_PASSES * MOST_PASS_TOKENS)
    if cache >= LEAST_CACHE_TOKENS:
        return Decoding(tokens, cache, capture)
    if capture:
        return fit(options, shapes, available)
    least = shapes.decoding_bytes(options.pass_tokens or LEAST_PASS_TOKENS, LEAST_CACHE_TOKENS) / GIB
    leave = f"{options.memory_budget_gib:g} GiB leave {max(available, 0) / GIB:.1f}"
    raise UserError(f"decoding takes {least:.1f} GiB beside the base, and {leave}: raise {BUDGET}; or free the GPU")


class Choice(NamedTuple):
    pack_tokens: int
    keep_layers: int  # that keep all activations
    hold_layers: int  # that hold their matrices dequantised
    counted: dict[str, int]  # peak bytes by purpose
    description: str  # one sentence


def choose(
    train: Train,
    shapes: Shapes,
    device: torch.device,
    step_tokens: float,
    answer_share: float,
    free: int | None = None,
    evaluation: int = 0,
) -> Choice:
    """Pack size, and the layers that keep activations and hold matrices, within `train.memory_budget_gib`.

    A rank's average step has `step_tokens` tokens; `answer_share` of them have logits. The budget is at most `free`
    bytes. An evaluation between two steps takes `evaluation` bytes, which held matrices leave free as well: CUDA graphs
    are captured only if both fit, and save more. Raises `UserError` if not even the least sizes fit.
    """
    on_cpu = device.type == "cpu"
    largest = CPU_PACK_TOKENS if on_cpu else GPU_PACK_TOKENS
    even = STEP_MARGIN * step_tokens / math.ceil(step_tokens / largest)  # a step in one pack, or in a few equal ones
    tokens = train.pack_tokens or min(largest, PACK_STEP * math.ceil(even / PACK_STEP))
    hold = shapes.layers if shapes.layers * shapes.layer_matrices <= HELD_BYTES else 0
    keep = 0 if train.gradient_checkpointing else shapes.layers

    def count(tokens: int, keep: int, hold: int) -> dict[str, int]:
        answers = math.ceil(ANSWER_MARGIN * answer_share * tokens)
        return shapes.training_bytes(tokens, answers, keep, hold, train.average > 0)

    def total(tokens: int, keep: int, hold: int) -> int:
        return sum(count(tokens, keep, hold).values())

    if train.memory_budget_gib is not None and not on_cpu:
        free = free or 2**63
        budget = min(int(train.memory_budget_gib * GIB), free)
        given = f"train.memory_budget_gib={train.memory_budget_gib:g}, of which there are {budget / GIB:.1f}"
        hold = hold if total(tokens, 0, hold) <= budget else 0
        while total(tokens, 0, hold) > budget:
            if train.pack_tokens or tokens <= LEAST_PACK_TOKENS:
                least = f"{total(tokens, 0, 0) / GIB:.1f} GiB with everything recomputed"
                raise UserError(f"{given}: packs of {tokens} tokens take about {least}")
            tokens -= PACK_STEP
        permanent = sum(count(tokens, 0, hold)[name] for name in ("base", "held matrices", "adapter", "optimizer"))
        if (takes := permanent + evaluation) > budget:
            raise UserError(f"{given}: an evaluation between two steps takes {takes / GIB:.1f} GiB")
        # activations first: a GiB of them saves more time than a GiB of matrices
        keep = max(n for n in range(shapes.layers + 1) if total(tokens, n, hold) <= budget or n == 0)
        budget = min(budget, free - evaluation)
        hold = max(n for n in range(hold, shapes.layers + 1) if total(tokens, keep, n) <= budget or n == hold)
    counted, held = count(tokens, keep, hold), f" and {hold} their dequantised matrices" if hold else ""
    description = f"fused layers, {keep} of {shapes.layers} keep their activations{held}, packs of {tokens} tokens"
    if not on_cpu:
        parts = ", ".join(f"{name} {n / GIB:.2f}" for name, n in counted.items())
        description += f", about {sum(counted.values()) / GIB:.1f} GiB at the peak: {parts}"
    return Choice(tokens, keep, hold, counted, description)
