"""One CUDA graph per pack size: forward and backward as one launch, so that a GPU never waits for Python.

A graph replays the same kernels on the same addresses. Packs are therefore padded to a few sizes
(`common.model.pack.Room`) and copied into the tensors that the graph of that size was recorded with. A pack of any
other shape is computed without a graph, and takes memory beside theirs.
"""

from collections.abc import Callable

from common.model.pack import Pack, PadSizes

import torch
from torch import Tensor


class Graphed:
    """`work(pack, share)` → loss [], which also adds to the gradients of `weights`; replayed where a graph fits.

    All graphs are recorded here, the largest first, so that the others find room in its memory. `example` is any pack
    that fits `room` padded: recording computes nothing, but the run before it, which compiles and loads kernels, does.
    The weights' gradients are made here, once, and must be zeroed in place.
    """

    def __init__(
        self, work: Callable[[Pack, Tensor], Tensor], weights: list[torch.nn.Parameter], room: PadSizes, example: Pack
    ):
        self.work, self.weights = work, weights
        self.device = weights[0].device
        self.gradients = [torch.zeros_like(w) for w in weights]
        for weight, gradient in zip(weights, self.gradients, strict=True):
            weight.grad = gradient
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Pack, Tensor, Tensor]] = {}
        fitting = [n for n in reversed(room.tokens) if n >= len(example.input_ids)]
        packs = {size: pack.to(self.device) for size in fitting if (pack := room.pad(example, size))}
        share, pool = torch.zeros((), device=self.device), None
        for pack in packs.values():
            work(pack, share)
        for size, pack in packs.items():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what the runs took is not what the graphs take
            graph, mine = torch.cuda.CUDAGraph(), share.clone()
            with torch.cuda.graph(graph, pool=pool):
                loss = work(pack, mine)
            pool = graph.pool()
            self.graphs[size] = graph, pack, mine, loss
        for gradient in self.gradients:
            gradient.zero_()

    def __call__(self, pack: Pack, share: float) -> Tensor:
        """Loss of a pack that is still on the host, times `share`, as a tensor on the device."""
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            assert weight.grad is gradient, "graphs add to the gradients that they were recorded with"
        recorded = self.graphs.get(len(pack.input_ids))
        if recorded is None or recorded[1].shape != pack.shape:
            return self.work(pack.to(self.device), torch.full((), share, device=self.device))
        graph, into, mine, loss = recorded
        for target, source in zip(into.tensors(), pack.tensors(), strict=True):
            target.copy_(source)
        mine.fill_(share)
        graph.replay()
        return loss.clone()
