"""GPU memory of training and decoding, counted in bytes before they start, and the sizes that a budget allows.

`make test-gpu` compares counts with torch's allocator and with NVML; docs/results.md has both.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from common.config import Eval, Train
from common.errors import UserError
from common.model.llama import Model

import torch

BUDGET = "eval.memory_budget_gib or, in a training, train.memory_budget_gib"  # the config keys to raise, for errors
GIB, FP32 = 2**30, 4  # bytes
# what a process takes beside torch's allocator: CUDA's context, and kernels that are loaded as they are met. For
# Llama-2-7B's shapes on an H200 (docs/log.md)
CONTEXT, KERNELS = int(0.60 * GIB), int(0.22 * GIB)
# of what is free, what "auto" leaves to other processes, such as a desktop
MARGIN = int(0.13 * GIB)
# a margin for fragmentation: the allocator cannot use gaps between tensors
USABLE_SHARE = 0.97
# what a pack costs in time, in tokens that go forward once: dequantising all matrices (bytes against operations, so
# cards differ little), and all that does not grow with its tokens. Measured on an H200, docs/log.md
DEQUANTISED, LAUNCHED = 170, 240
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


# what is allocated between two steps, while an evaluation runs
STAY = ("base", "held matrices", "adapter", "optimizer")


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
    dropout: bool = False  # of the adapter's input

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
        dropout = any(adapter.lora_dropout for adapter in getattr(model, "peft_config", {}).values())
        return cls(base, lora, *sizes, model.dtype.itemsize, dropout)

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
        # a linear's input after dropout, at its largest that of the last product
        work += self.item * max(self.intermediate, self.hidden, self.query) * tokens if self.dropout else 0
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


def limit_bytes(budget: float | str, device: torch.device) -> int:
    """Bytes that torch's allocator may take on a GPU: what is free, and this process's already, less a margin.

    `budget`, unless "auto", limits the whole process, as nvidia-smi shows it, in GiB. A limit that is in force
    (`keep_to`) stays: since it was set, CUDA has loaded kernels into the margin.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    in_force = torch.cuda.get_per_process_memory_fraction(device)
    available = int(in_force * total) if in_force < 1 else free + torch.cuda.memory_reserved(device) - KERNELS - MARGIN
    return available if isinstance(budget, str) else min(available, int(budget * GIB) - CONTEXT - KERNELS)


def usable_bytes(limit: int, device: torch.device) -> int:
    """The bytes of `limit` that tensors can take: without the gaps that are between them by now, and those to come."""
    gaps = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(USABLE_SHARE * limit) - gaps


def keep_to(limit: int, device: torch.device) -> None:
    """Let torch's allocator take no more than `limit` bytes: it gives cached ones back, or runs out of memory."""
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, limit) / total), device)


class Decoding(NamedTuple):
    pass_tokens: int  # at most
    cache_tokens: int  # that the KV cache holds
    capture: bool = False  # passes are captured as CUDA graphs

    def half(self) -> "Decoding":
        """Half the tokens of a pass, launched kernel by kernel, over a cache of half the size, but the least."""
        cache = min(self.cache_tokens, max(LEAST_CACHE_TOKENS, self.cache_tokens // 2))
        return Decoding(max(PASS_STEP, self.pass_tokens // 2), cache)


def decoding(options: Eval, shapes: Shapes, device: torch.device, capture: bool) -> Decoding:
    """Sizes of batched decoding within `options.memory_budget_gib`, or within free memory where that is less.

    Passes are captured if `capture`, and if the memory suffices. Raises `UserError` if not even the least sizes fit.
    """
    if device.type == "cpu":
        return Decoding(options.pass_tokens or CPU_PASS_TOKENS, CPU_CACHE_TOKENS)
    limit = limit_bytes(options.memory_budget_gib, device)
    return fit(options, shapes, usable_bytes(limit, device) - torch.cuda.memory_allocated(device), capture)


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
    takes, left = f"decoding takes {least:.1f} GiB beside the base", f"{max(available, 0) / GIB:.1f}"
    if options.memory_budget_gib == "auto":
        raise UserError(f"{takes}, and the GPU has {left}: free it")
    raise UserError(f"{takes}, and {options.memory_budget_gib:g} GiB leave {left}: raise {BUDGET}; or free the GPU")


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
    limit: int | None = None,
    evaluation: int = 0,
) -> Choice:
    """Pack size, and the layers that keep activations and hold matrices, that take the least time within `limit` bytes.

    A rank's average step has `step_tokens` tokens; `answer_share` of them have logits. An evaluation between two steps
    takes `evaluation` bytes beside what stays. `limit=None`: `train.gradient_checkpointing` decides. Raises `UserError`
    if not even the least sizes fit.
    """
    on_cpu = device.type == "cpu"
    largest = CPU_PACK_TOKENS if on_cpu else GPU_PACK_TOKENS
    held = shapes.layers if shapes.layers * shapes.layer_matrices <= HELD_BYTES else 0

    def count(tokens: int, keep: int, hold: int) -> dict[str, int]:
        answers = math.ceil(ANSWER_MARGIN * answer_share * tokens)
        return shapes.training_bytes(tokens, answers, keep, hold, train.average > 0)

    def chosen(tokens: int, keep: int, hold: int) -> Choice:
        matrices = f" and {hold} their dequantised matrices" if hold else ""
        kept = f"fused layers, {keep} of {shapes.layers} keep their activations{matrices}"
        return Choice(tokens, keep, hold, count(tokens, keep, hold), f"{kept}, packs of {tokens} tokens")

    def packs_of(n: int) -> int:  # tokens of a pack where a step has n equal ones
        return PACK_STEP * math.ceil(STEP_MARGIN * step_tokens / n / PACK_STEP)

    fewest = math.ceil(step_tokens / largest)
    if limit is None or on_cpu:
        keep = 0 if train.gradient_checkpointing else shapes.layers
        return chosen(train.pack_tokens or min(largest, packs_of(fewest)), keep, held)
    most = max(fewest, math.ceil(step_tokens / LEAST_PACK_TOKENS))
    sizes = sorted({train.pack_tokens or min(largest, packs_of(n)) for n in range(fewest, most + 1)})
    fitting = [
        (step_time(shapes, step_tokens, tokens, *layers), -tokens, layers)
        for tokens in sizes
        if (layers := _layers_that_fit(functools.partial(count, tokens), shapes.layers, held, limit, evaluation))
    ]
    given = f"train.memory_budget_gib={train.memory_budget_gib}, of which tensors can take {max(0, limit) / GIB:.1f}"
    if not fitting:
        counted = count(sizes[0], 0, 0)
        least = f"{sum(counted.values()) / GIB:.1f} GiB with everything recomputed"
        between = f"an evaluation between two steps {(sum(counted[k] for k in STAY) + evaluation) / GIB:.1f}"
        raise UserError(f"{given}: packs of {sizes[0]} tokens take about {least}, and {between}")
    _, tokens, (keep, hold) = min(fitting)
    return chosen(-tokens, keep, hold)


class Planned(NamedTuple):
    """What a training takes of its GPU, in bytes by purpose."""

    stays: dict[str, int]
    step: dict[str, int]  # while a step is computed, beside what stays
    evaluation: int  # while an evaluation interrupts, beside what stays
    margin: int  # is left free

    @property
    def peak(self) -> int:
        return sum(self.stays.values()) + max(sum(self.step.values()), self.evaluation)

    def table(self) -> str:
        """A line for each total and its parts."""
        stays = sum(self.stays.values())
        rows: tuple[tuple[str, int, dict[str, int]], ...] = (
            ("stays", stays, self.stays),
            ("a step", stays + sum(self.step.values()), {"stays": stays, **self.step}),
            ("an evaluation", stays + self.evaluation, {"stays": stays, "KV cache and passes": self.evaluation}),
            ("left free", self.margin, {}),
        )
        lines = [
            f"{name:>14} {total / GIB:6.2f}  {' + '.join(f'{what} {n / GIB:.2f}' for what, n in parts.items() if n)}"
            for name, total, parts in rows
            if total
        ]
        return "\n".join(("GPU memory as planned, in GiB", *map(str.rstrip, lines)))


def planned(
    choice: Choice, options: Eval, shapes: Shapes, limit: int | None, device: torch.device, capture: bool
) -> Planned:
    """`choice` and an evaluation as `decoding` then sizes it; `limit`: bytes that tensors can take."""
    stays = {name: n for name, n in choice.counted.items() if name in STAY}
    step = {name: n for name, n in choice.counted.items() if name not in STAY}
    budget = options.memory_budget_gib
    if limit is None:
        limit = usable_bytes(limit_bytes(budget, device), device)
    sizes = fit(options, shapes, limit - sum(stays.values()), capture)
    gaps = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    around = {"CUDA and its kernels": CONTEXT + KERNELS, **stays, "gaps": gaps}
    return Planned(around, step, shapes.decoding_bytes(*sizes), MARGIN if budget == "auto" else 0)


def _layers_that_fit(
    count: Callable[[int, int], dict[str, int]], layers: int, held: int, limit: int, evaluation: int
) -> tuple[int, int] | None:
    """(kept, held) layers: activations first, since a GiB of them saves more time than a GiB of matrices."""

    def fits(keep: int, hold: int) -> bool:
        counted = count(keep, hold)
        return max(sum(counted.values()), sum(counted[name] for name in STAY) + evaluation) <= limit

    least = next((n for n in (held, 0) if fits(0, n)), None)
    if least is None:
        return None
    keep = max(n for n in range(layers + 1) if fits(n, least))
    return keep, max(n for n in range(least, layers + 1) if fits(keep, n))


def step_time(shapes: Shapes, step_tokens: float, pack_tokens: int, keep: int, hold: int) -> float:
    """The time of a step, in tokens that go forward once.

    A backward pass takes as long as a forward pass: frozen weights have no gradient.
    """
    again = 1 - shapes.item * shapes.hidden * shapes.intermediate / shapes.layer_matrices  # all but the last product
    by_token = 2 + again * (1 - keep / shapes.layers)
    by_pack = LAUNCHED + DEQUANTISED * 2 * (1 - hold / shapes.layers)
    return step_tokens * by_token + math.ceil(STEP_MARGIN * step_tokens / pack_tokens) * by_pack
