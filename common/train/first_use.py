"""A check before the first step on a card not seen before: the fused layers against PEFT's modules, on one small tree.

The kernels that compute there are chosen by torch, Triton and bitsandbytes, for cards that nobody here could try. So
the tree's loss and the adapter's gradient are held against its questions as rows by transformers' and PEFT's modules.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from common.data.trees import Tree
from common.device import describe_device
from common.errors import first_line
from common.files import ROOT, write_text
from common.model import llama, tree_mask
from common.model.pack import Pack, build_pack
from common.train.fused import Fused

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

FOLDER = ROOT / ".cache" / "checked"
CODE = ("model", "train")  # the wings whose code computes
VERSIONS = ("torch", "triton", "bitsandbytes", "transformers", "peft")
QUESTIONS = 3  # of the tree, at most
SIZE_OF_B = 0.02  # standard deviation of its numbers
# the gradients' distance over their length, from which on they differ: 16 bits alone bring them 0.05 apart
FAR = {2: 0.2, 4: 0.01}  # by the bytes of a number


class Found(NamedTuple):
    loss: float  # by the fused layers
    expected: float  # by the modules; NaN where they overflow
    distance: float  # between the gradients, over the length of the modules'

    def near(self, most: float) -> bool:
        return abs(self.loss - self.expected) <= most * self.expected and self.distance <= most


def mismatch(model: PeftModel, trees: Sequence[Tree]) -> str | None:
    """Why this device must train by the modules; None if the fused layers agree with them, as far as can be told.

    The answer is kept in `FOLDER`, under all that decides it. The model is left as it was.
    """
    decides = _decides(model)
    path = FOLDER / f"{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # absent, or damaged
        return json.loads(path.read_text())["mismatch"]
    # one that branches, if there is one
    tree = min(trees, key=lambda tree: (len(tree.branches) < 2, len(tree)))
    where, wrong = describe_device(model.device)["name"], None
    try:
        found = compare(model, Tree(tree.prefix_ids, tree.branches[:QUESTIONS]))
        said = f"loss {found.loss:.4g} for {found.expected:.4g} of PEFT's modules, gradients {found.distance:.2%} apart"
        if not math.isfinite(found.expected):
            return None
        if not found.near(FAR[model.dtype.itemsize]):
            wrong = f"on {where} the fused layers compute something else: {said}"
    except torch.OutOfMemoryError:
        return None
    except Exception as error:  # compilers and kernels have many kinds
        wrong = said = f"on {where} the fused layers fail: {first_line(error, 160)}"
    print(f"fused layers at their first use on {where}: {said}", file=sys.stderr)
    with contextlib.suppress(OSError):  # a full disk, or a folder that is not ours: checked again next time
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"mismatch": wrong, "said": said, **decides}, indent=1) + "\n")
    return wrong


def compare(model: PeftModel, tree: Tree) -> Found:
    """`tree` by the fused layers, and its questions as rows by the modules. The model is left as it was."""
    groups = [group for layer in llama.layers_of(model) for group in llama.adapter_of(layer)[1]]
    weights = [p for a, b in groups for p in (*a, *b) if p.numel()]  # in the order of `Fused.flat`
    expected = 0.0
    before, generator = [p.detach().clone() for p in weights], torch.Generator().manual_seed(0)
    try:
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
        return Found(loss, expected, ((_gradient(fused.flat) - truth).norm() / truth.norm()).item())
    finally:
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


def _decides(model: PeftModel) -> dict[str, object]:
    """All that decides how the layers compute: the device, versions, the model's kind, this code."""
    files = sorted(path for wing in CODE for path in (ROOT / "common" / wing).glob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in files))
    quantised = {str(getattr(p, "quant_state", None) and p.quant_state.quant_type) for p in model.parameters()}
    config = model.config
    return {
        "device": describe_device(model.device),
        "versions": {name: _version(name) for name in VERSIONS},
        "code": code.hexdigest()[:32],
        "dtype": str(model.dtype),
        "quantised": sorted(quantised),
        "layers": [config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size],
        "heads": [config.num_attention_heads, config.num_key_value_heads],
        "adapter": [llama.adapter_of(layer)[0].shapes for layer in llama.layers_of(model)[:1]],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
