"""The fused layers against PEFT's modules on a small tree, before a card's first step (`common.model.first_use`)."""

import math
from collections.abc import Callable, Sequence

from common.data.trees import Tree
from common.model import first_use, llama, tree_mask
from common.model.first_use import Found
from common.model.pack import Pack, build_pack
from common.train.fused import Fused

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

QUESTIONS = 3  # of the tree, at most
SIZE_OF_B = 0.02  # standard deviation of its numbers
# the gradients' distance over their length, from which on they differ: bf16 alone brings Llama-2-7B's 0.10 apart, and
# kernels that are wrong 0.6 and more (docs/log.md)
FAR = {2: 0.3, 4: 0.01}  # by the bytes of a number


def mismatch(model: PeftModel, trees: Sequence[Tree]) -> str | None:
    """Why this device must train by the modules; None if the fused layers agree with them. The model stays as it is."""
    # one that branches, if there is one
    tree = min(trees, key=lambda tree: (len(tree.branches) < 2, len(tree)))
    return first_use.mismatch(
        model, "training", lambda: compare(model, Tree(tree.prefix_ids, tree.branches[:QUESTIONS]))
    )


def compare(model: PeftModel, tree: Tree) -> Found:
    """`tree` by the fused layers, its questions as rows by the modules, without dropout. The model stays as it is."""
    groups = [group for layer in llama.layers_of(model) for group in llama.adapter_of(layer)[1]]
    weights = [p for a, b in groups for p in (*a, *b) if p.numel()]  # in the order of `Fused.flat`
    before, generator, expected = [p.detach().clone() for p in weights], torch.Generator().manual_seed(0), 0.0
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.training]
    try:
        for module in dropouts:
            module.eval()
        with torch.no_grad():
            for p in (p for _, b in groups for p in b):  # a new B is zero, and then A has no gradient
                p.copy_(torch.randn(p.shape, generator=generator) * SIZE_OF_B)
        for branch in tree.branches:
            row = build_pack([Tree(tree.prefix_ids, (branch,))])
            expected += _backward(lambda pack, keep: tree_mask.pack_logits(model, pack, keep), row.to(model.device))
        truth = torch.cat([_gradient(p).flatten() for p in weights])
        if not truth.isfinite().all():
            expected = math.nan
        fused = Fused(model)
        loss = _backward(fused.logits, build_pack([tree]).to(model.device))
        distance = ((_gradient(fused.flat) - truth).norm() / truth.norm()).item()
        far = math.nan if math.isnan(distance) else max(distance, abs(loss - expected) / expected)
        return Found("loss and gradient: loss", loss, expected, far, FAR[model.dtype.itemsize])
    finally:
        for module in dropouts:
            module.train()
        for p, values in zip(weights, before, strict=True):
            p.data, p.grad = values, None
            p.requires_grad_(True)


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def _backward(logits: Callable[[Pack, Tensor], Tensor], pack: Pack) -> float:
    """The sum of the answer tokens' losses; adds to the gradients."""
    loss = F.cross_entropy(logits(pack, pack.target_index).float(), pack.target_ids, reduction="sum")
    loss.backward()
    return loss.item()
