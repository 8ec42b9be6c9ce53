"""What training and decoding take on a GPU, counted before they start, and what a budget therefore allows.

Peak allocated bytes = frozen base + matrices that are held dequantised + LoRA weights, their gradient and optimizer
state + every layer's input + all activations of the layers that keep them + a fiftieth of these for what is small
(the adapter's products, log-sum-exps, the pack) + the larger of the logits and the work of one layer's backward.
`make test-gpu` compares the count with the allocator's own.
"""

import math
from dataclasses import dataclass
from typing import Any

from common.config import Eval, Train
from common.errors import UserError

import torch

BUDGET = "eval.memory_budget_gib or, in a training, train.memory_budget_gib"  # what a message says to turn
GIB = 2**30
CPU_PACK_TOKENS, GPU_PACK_TOKENS, LEAST_PACK_TOKENS = 1024, 8192, 512  # of fused layers, in training
MOST_PASS_TOKENS, LEAST_PASS_TOKENS, PASSES = 8192, 512, 10  # an answer with its neighbours lives about 10 passes
CPU_PASS_TOKENS, LEAST_ARENA_TOKENS, CPU_ARENA_TOKENS = 1024, 1536, 16384
DRAWN = 0.25  # of a pass's tokens, those that draw a next one: seldom as many
HELD_BYTES = 2**30  # dequantised matrices are held, budget or not, where all take no more than this


@dataclass(frozen=True)
class Shapes:
    base_bytes: int  # the frozen base as it lies in memory
    lora: int  # trained weights
    layers: int
    hidden: int
    intermediate: int
    query: int  # heads × head width
    key: int
    vocabulary: int
    item: int  # bytes of one number of the compute dtype

    @classmethod
    def of(cls, model: Any, lora: int = 0) -> "Shapes":
        """Of a model as loaded, PEFT's or a plain one. `lora`: how many weights are trained."""
        c = model.config
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        base = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
        base += sum(_constants(p) for p in model.parameters())
        return cls(
            base, lora, c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.num_attention_heads * width,
            (getattr(c, "num_key_value_heads", None) or c.num_attention_heads) * width, c.vocab_size,
            model.dtype.itemsize,
        )  # fmt: skip

    @property
    def layer_matrices(self) -> int:
        """Bytes of one layer's seven matrices in the compute dtype."""
        return self.item * self.hidden * (2 * self.query + 2 * self.key + 3 * self.intermediate)

    @property
    def kept_per_token(self) -> int:
        """Bytes that a layer keeps beside its input: q, k, v, attention's output, the middle, gate and up."""
        return self.item * (2 * self.query + 2 * self.key + self.hidden + 2 * self.intermediate)

    def table(
        self, tokens: int, answers: int, keep_layers: int, hold_layers: int, average: bool = False
    ) -> dict[str, int]:
        """Peak allocated bytes by what they are for; `tokens` and `answers` (tokens, with EOS): of the largest pack."""
        work = self.item * (4 * self.intermediate + 4 * self.hidden) * tokens
        work += 0 if hold_layers == self.layers else self.layer_matrices
        work += 0 if keep_layers == self.layers else self.kept_per_token * tokens
        inputs = self.item * self.hidden * tokens * self.layers
        kept = self.kept_per_token * tokens * keep_layers
        return {
            "base": self.base_bytes,
            "held matrices": hold_layers * self.layer_matrices,
            # fp32 and gradient, the dtype's copy and its gradient; a running mean, and one more while it is evaluated
            "adapter": self.lora * (4 + 4 + 2 * self.item + (8 if average else 0)),
            "optimizer": 2 * self.lora,  # two moments of 8 bits
            "layer inputs": inputs,
            "kept activations": kept,
            "small tensors": (inputs + kept) // 50,
            # logits in the dtype and fp32, their log-softmax and its gradient
            "logits or one layer's work": max(work, (self.item + 12) * self.vocabulary * answers),
        }

    @property
    def kept_in_arena(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.layers * self.key * self.item

    def evaluation(self, pass_tokens: int, arena_tokens: int, record: bool = False) -> int:
        """Bytes that decoding takes beside base and adapter: the arena, gate and up, one layer's work, logits.

        `record`: also what graphs keep (gate and up and one layer's work once more), the buffers between them, a slot.
        """
        matrix = 2 * self.item * self.hidden * self.intermediate
        work = self.item * (5 * self.intermediate + 6 * self.hidden) * pass_tokens
        logits = (self.item + 8) * self.vocabulary * math.ceil(pass_tokens * DRAWN)
        adapter = 3 * self.item * self.lora // 2  # a copy in the compute dtype, Bs that share an A's input as one
        recorded = matrix + work + self.item * (self.hidden + 2 * self.query) * pass_tokens + self.kept_in_arena
        out = self.kept_in_arena * arena_tokens + matrix + max(work, logits) + adapter
        return out + recorded if record else out


@dataclass(frozen=True)
class Choice:
    pack_tokens: int
    keep_layers: int
    hold_layers: int
    counted: dict[str, int]  # the table of it
    sentence: str


def available_bytes(device: torch.device) -> int:
    """Bytes that this process may well allocate: what is free or its own, less a tenth for gaps between tensors."""
    unused, _ = torch.cuda.mem_get_info(device)
    return int(0.9 * (unused + torch.cuda.memory_reserved(device)))


@dataclass(frozen=True)
class Decoding:
    pass_tokens: int
    arena_tokens: int
    record: bool = False


def decoding(options: Eval, shapes: Shapes, device: torch.device, record: bool) -> Decoding:
    """Sizes of the passes and of the arena that `options.memory_budget_gib`, or what is free, leaves room for.

    `record`: passes are recorded, where that leaves room for it. Raises `UserError` where not even the least fits.
    """
    if device.type == "cpu":
        return Decoding(options.pass_tokens or CPU_PASS_TOKENS, CPU_ARENA_TOKENS)
    torch.cuda.empty_cache()
    left = available_bytes(device) - torch.cuda.memory_reserved(
        device
    )  # what graphs keep is reserved, and not to be had
    room = min(int(options.memory_budget_gib * GIB) - torch.cuda.memory_allocated(device), left)
    return fit(options, shapes, room, record)


def fit(options: Eval, shapes: Shapes, room: int, record: bool = False) -> Decoding:
    """The same for `room` bytes."""

    def arena_for(pass_tokens: int) -> int:
        return (room - shapes.evaluation(pass_tokens, 0, record)) // shapes.kept_in_arena

    most = PASSES * MOST_PASS_TOKENS
    tokens = options.pass_tokens or MOST_PASS_TOKENS
    while not options.pass_tokens and tokens > LEAST_PASS_TOKENS and arena_for(tokens) < PASSES * tokens:
        tokens -= 128
    arena = min(arena_for(tokens), most)
    if arena < LEAST_ARENA_TOKENS:
        if record:
            return fit(options, shapes, room)
        least = shapes.evaluation(options.pass_tokens or LEAST_PASS_TOKENS, LEAST_ARENA_TOKENS)
        raise UserError(
            f"decoding takes {least / GIB:.1f} GiB beside the base, and {options.memory_budget_gib:g} GiB leave "
            f"{max(room, 0) / GIB:.1f}: raise {BUDGET}; or free the GPU"
        )
    return Decoding(tokens, arena, record)


def choose(
    train: Train, shapes: Shapes, device: torch.device, step_tokens: float, answer_share: float,
    free: int | None = None, evaluation: int = 0,
) -> Choice:  # fmt: skip
    """Pack size and what to keep. `step_tokens`: of an average optimizer step on this rank; `answer_share`: of these.

    A budget above `free` (bytes) is taken for that. Matrices are held in what leaves an `evaluation` its bytes too, for
    graphs beside it save more. Raises `UserError` where not even the least fits the budget.
    """
    largest = CPU_PACK_TOKENS if device.type == "cpu" else GPU_PACK_TOKENS
    # a step in one pack, or in a few equal ones; a tenth more, since steps differ
    wanted = train.pack_tokens or min(
        largest, 256 * math.ceil(1.1 * step_tokens / math.ceil(step_tokens / largest) / 256)
    )
    hold = shapes.layers if shapes.layers * shapes.layer_matrices <= HELD_BYTES else 0
    keep = 0 if train.gradient_checkpointing else shapes.layers

    def table(tokens: int, keep: int, hold: int) -> dict[str, int]:
        return shapes.table(tokens, math.ceil(1.15 * answer_share * tokens), keep, hold, train.average > 0)

    def total(tokens: int, keep: int, hold: int) -> int:
        return sum(table(tokens, keep, hold).values())

    if train.memory_budget_gib is not None and device.type != "cpu":
        budget = min(int(train.memory_budget_gib * GIB), free or 2**63)
        hold = hold if total(wanted, 0, hold) <= budget else 0
        while total(wanted, 0, hold) > budget:
            if train.pack_tokens or wanted <= LEAST_PACK_TOKENS:
                least = total(wanted, 0, 0) / GIB
                raise UserError(
                    f"train.memory_budget_gib={train.memory_budget_gib:g}, of which there are {budget / GIB:.1f}: "
                    f"packs of {wanted} tokens take about {least:.1f} GiB with everything recomputed"
                )
            wanted -= 256
        # what is there throughout, and an evaluation between two steps
        static = sum(table(wanted, 0, hold)[name] for name in ("base", "held matrices", "adapter", "optimizer"))
        if static + evaluation > budget:
            raise UserError(
                f"train.memory_budget_gib={train.memory_budget_gib:g}, of which there are {budget / GIB:.1f}: an "
                f"evaluation between two steps takes {(static + evaluation) / GIB:.1f} GiB"
            )
        # a GiB of activations saves more than one of matrices
        keep = max(n for n in range(shapes.layers + 1) if total(wanted, n, hold) <= budget or n == 0)
        budget = min(budget, (free or 2**63) - evaluation)
        hold = max(n for n in range(hold, shapes.layers + 1) if total(wanted, keep, n) <= budget or n == hold)
    counted = table(wanted, keep, hold)
    sentence = f"fused layers, {keep} of {shapes.layers} keep their activations"
    sentence += (
        f" and {hold} their dequantised matrices, packs of {wanted} tokens" if hold else f", packs of {wanted} tokens"
    )
    if device.type != "cpu":
        sentence += f", about {sum(counted.values()) / GIB:.1f} GiB at the peak: "
        sentence += ", ".join(f"{name} {n / GIB:.2f}" for name, n in counted.items())
    return Choice(wanted, keep, hold, counted, sentence)


def _constants(parameter: Any) -> int:
    """Bytes of a 4-bit weight's quantisation constants."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return 0
    tensors = [state.absmax, *((state.state2.absmax,) if state.nested else ())]
    return sum(t.numel() * t.element_size() for t in tensors)
