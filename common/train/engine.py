"""Forward and backward of packs: by fused layers within a memory budget, or by transformers' and PEFT's modules."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from common.config import Config, Train
from common.data.plan import Plan
from common.data.trees import Tree
from common.device import out_of_memory
from common.errors import UserError
from common.model import llama, load, memory, tree_mask, varlen
from common.model.llama import Model
from common.model.pack import IGNORED, Pack, PadSizes, build_pack
from common.runs import signals
from common.runs.results import Sizes
from common.train import dropout, first_use
from common.train.cuda_graphs import CapturedPacks
from common.train.fused import Fused, untrainable_reason

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor

CPU_PACK_TOKENS, GPU_PACK_TOKENS = 1024, 4096  # of layers that are not fused: logits and activations fit a 16 GB card
SAMPLE_STEPS = 32  # steps whose packs decide the sizes that packs are padded to


class Engine:
    """Adds a pack's gradient to `weights`. Chosen once, before training.

    Raises `UserError` where the budget does not hold the least that training takes, or the model cannot have one.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        config: Config,
        dev: Sequence[Tree],
        backward: Callable[[Tensor], None],
        rank: int = 0,
        ranks: int = 1,
    ):
        """`dev`: the questions of the evaluations that interrupt training."""
        model.train()
        self.config, self.train, self.dev, self.backward = config, config.train, dev, backward
        self.model, self.n_dev = model, len({branch.id for tree in dev for branch in tree.branches})
        if config.early_stop.by == "loss" and not dev:
            raise UserError("early_stop.by=loss: no question that selects has its first gold answer in the window")
        self.plan, self.rank, self.ranks = plan, rank, ranks
        self.device, self.dtype = next(model.parameters()).device, model.dtype
        self.pads: PadSizes | None = None  # packs are padded where CUDA graphs replay
        self.planned: memory.Planned | None = None  # on a GPU, by the fused layers
        self._captured: CapturedPacks | None = None
        self.dropout = 0.0  # of the fused layers
        self.trained_weights, self.frozen_weights = load.parameter_counts(model)
        tree_mask.need_embedded(model.config, plan.trees)
        if reason := "train.fused=false" if not self.train.fused else untrainable_reason(model):
            if isinstance(self.train.memory_budget_gib, float):
                by_hand = "train.memory_budget_gib=null, and train.pack_tokens and train.gradient_checkpointing by hand"
                raise UserError(f"train.memory_budget_gib needs the fused layers; not with {reason}: set {by_hand}")
            self._use_modules(model, reason)
            return
        _limit(self.train, self.device)  # before the check, which loads kernels: it stays in force
        if found := [*filter(None, gather_object([first_use.mismatch(model, plan.trees)]))]:  # of all ranks
            self._use_modules(model, found[0])
        else:
            self._use_fused_layers(model)

    def prepare(self, step: int) -> tuple[list[Tree], list[Pack]]:
        """(all trees of a step, this rank's share of them in packs on the host). Pure, so it may run ahead."""
        return self.plan.step(step), self._packs_of_step(step, self.rank)

    def seed_modules(self, step: int) -> None:
        """Seed the dropout of PEFT's modules for a step. The fused layers' packs have keys."""
        if self.config.lora and self.config.lora.dropout and not self.dropout:
            torch.manual_seed(random.Random(f"{self.config.seed} {step} {self.rank}").getrandbits(63))

    def __call__(self, pack: Pack, weight: float) -> Tensor:
        """The pack's loss [] on the device, each answer token (or question) times `weight`; adds to the gradients."""
        if self._captured:
            return self._captured(pack, weight)
        return self._forward_backward(pack.to(self.device), weight)

    @torch.no_grad()
    def loss(self, check: Callable[[], None] = lambda: None) -> float | None:
        """Mean loss per answer token of the questions `dev`, over all ranks: without label smoothing and dropout.

        `check` is called before each pack. None where it raised `signals.Stopped` on any rank.
        """
        own, training = None, self.model.training
        self.model.eval()
        with suppress(signals.Stopped), out_of_memory(self.memory_advice):
            sums = []
            for host_pack in self._packs(self.dev, self.rank):
                check()
                pack = host_pack.to(self.device)
                logits = self._logits(pack, pack.target_index).float()
                sums.append(F.cross_entropy(logits, pack.target_ids, ignore_index=IGNORED, reduction="sum"))
            own = math.fsum(x.item() for x in sums)
        self.model.train(training)
        parts = gather_object([own])
        if None in parts:
            return None
        mean = math.fsum(parts) / sum(len(b.answer_ids) for tree in self.dev for b in tree.branches)
        if not math.isfinite(mean):
            raise UserError(f"an evaluation's loss is {mean}; set base.dtype=bf16 or fp32, or lower train.lr")
        return mean

    def result(self) -> Sizes:
        return {
            "pack_tokens": self.pack_tokens,
            "kept_layers": self.keep_layers,
            "recomputed": self.recomputed,
            "counted_bytes": {**self.planned.stays, **self.planned.step} if self.planned else None,
            "planned_bytes": self.planned.peak if self.planned else None,
            "trained_weights": self.trained_weights,
            "frozen_weights": self.frozen_weights,
        }

    def _packs(self, trees: Sequence[Tree], rank: int) -> list[Pack]:
        parts = self.plan.share(trees, rank, self.ranks, self.pack_tokens)
        return [pack for part in parts for pack in (self.pads.packs(part) if self.pads else [build_pack(part)])]

    def _packs_of_step(self, step: int, rank: int) -> list[Pack]:
        """A rank's packs, each with the key of its dropout."""
        packs = self._packs(self.plan.step(step), rank)
        if not self.dropout:
            return packs
        keys = (dropout.pack_key(self.config.seed, step, rank, number) for number in range(len(packs)))
        return [replace(pack, dropout_key=key) for pack, key in zip(packs, keys, strict=True)]

    def _use_modules(self, model: Model, reason: str) -> None:
        train = self.train
        tree_mask.need_plain_span(model.config, max(tree.longest for tree in self.plan.trees))
        self.keep_layers, self.recomputed = model.config.get_text_config().num_hidden_layers, 0.0
        if train.gradient_checkpointing:
            self.keep_layers, self.recomputed = 0, 1.0
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.pack_tokens = train.pack_tokens or (CPU_PACK_TOKENS if self.device.type == "cpu" else GPU_PACK_TOKENS)
        self.description = f"layers by transformers and PEFT ({reason}), packs of {self.pack_tokens} tokens"
        more = "" if train.gradient_checkpointing else ", or set train.gradient_checkpointing=true"
        self.memory_advice = f"lower train.pack_tokens (now {self.pack_tokens}){more}"
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self._logits: Callable[[Pack, Tensor], Tensor] = lambda pack, keep: tree_mask.pack_logits(model, pack, keep)

    def _use_fused_layers(self, model: Model) -> None:
        train, plan, device = self.train, self.plan, self.device
        n_tokens = sum(map(len, plan.rows(plan.trees)))
        answer_share = sum(len(b.answer_ids) for tree in plan.trees for b in tree.branches) / n_tokens
        step_tokens = n_tokens / plan.steps_per_epoch / self.ranks
        for layer in llama.layers_of(model):
            llama.Layer(layer, model.dtype)  # merges its matrices, which leaves gaps: before memory is counted
        shapes, limit = memory.Shapes.of(model, llama.adapter_size(model)), _limit(train, device)
        # an evaluation runs between two steps, with the memory of their graphs
        evaluation, longest = self.config.eval_in_training, max((tree.longest for tree in self.dev), default=0)
        cache = max(memory.LEAST_CACHE_TOKENS, longest + self.config.window.answer)
        least = shapes.decoding_bytes(evaluation.pass_tokens or memory.LEAST_PASS_TOKENS, cache)
        choice = memory.choose(train, shapes, device, step_tokens, answer_share, limit, least)
        self.pack_tokens, self.keep_layers = choice.pack_tokens, choice.keep_layers
        self.description = choice.description
        graphs = varlen.kernels(device, model.dtype) is not None
        if device.type == "cuda":
            self.planned = memory.planned(choice, evaluation, shapes, limit, device, graphs)
        how = "lower" if isinstance(train.memory_budget_gib, float) else "set"
        self.memory_advice = f"lower train.pack_tokens (now {self.pack_tokens}), or {how} train.memory_budget_gib"
        layers = Fused(model, choice.keep_layers, choice.hold_layers)
        self.weights, self._logits, self.recomputed = [layers.flat], layers.logits, layers.recomputed
        self.dropout = layers.dropout
        if self.dropout:
            self.description += ", linears that share an input share its dropout mask (PEFT: a mask each)"
        if graphs:
            self.description += ", CUDA graphs"
            self._capture()
        if self.planned:
            self.description += f"\n{self.planned.table()}"

    @contextmanager
    def released(self) -> Iterator[None]:
        """Without the memory of CUDA graphs while the body runs: an evaluation takes it.

        Raises `UserError` where another process has taken it meanwhile.
        """
        if not self._captured:
            yield
            return
        self._captured.release()
        yield
        with out_of_memory(self.memory_advice):
            self._captured.capture()

    def _capture(self) -> None:
        """Captures one graph per padded size, from the packs of the first steps."""
        steps = range(min(SAMPLE_STEPS, self.plan.steps_per_epoch))
        packs = [pack for step in steps for pack in self._packs_of_step(step, self.rank)]
        packs = packs or [pack for step in steps for pack in self._packs_of_step(step, 0)]  # rank 0 always has a share
        self.pads = PadSizes.of(packs, self.pack_tokens)
        smallest = min(packs, key=lambda pack: pack.n_tokens)
        with out_of_memory(self.memory_advice):
            self._captured = CapturedPacks(self._forward_backward, self.weights, self.pads, smallest)

    def _forward_backward(self, pack: Pack, weight: Tensor | float) -> Tensor:
        """Loss [] of a pack on the device, times `weight`; its gradient is added."""
        logits, target = self._logits(pack, pack.target_index).float(), pack.target_ids
        smoothing = self.train.label_smoothing
        by_token = F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing)
        loss = (by_token if self.train.loss == "token" else by_token * pack.target_share).sum() * weight
        self.backward(loss)
        return loss.detach()


def _limit(train: Train, device: torch.device) -> int | None:
    """Bytes that tensors can take; torch's allocator is kept to them. None on a CPU, or without a budget."""
    if device.type != "cuda" or train.memory_budget_gib is None:
        return None
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(torch.zeros(1, device=device))  # NCCL takes its memory when it is first used
    limit = memory.limit_bytes(train.memory_budget_gib, device)
    memory.keep_to(limit, device)
    return memory.usable_bytes(limit, device)
