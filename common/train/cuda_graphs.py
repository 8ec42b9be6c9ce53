"""One CUDA graph per padded size: the forward and backward pass of a pack as one launch, so that a GPU never waits.

A graph replays the same kernels on the same addresses. So packs are padded to a few sizes (`pack.PadSizes`) and copied
into the tensors that the graph of their size was captured with. Graphs keep the memory that they compute in, so they
are released for an evaluation, and for a pack of another shape, and captured again. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from collections.abc import Callable

from common.model.pack import Pack, PadSizes

import torch
from torch import Tensor

Work = Callable[[Pack, Tensor], Tensor]


class CapturedPacks:
    """Replays `work(pack, weight)` → loss [], which also adds to the gradients of `weights`.

    All graphs are captured here, the largest first, so that the others fit into its memory. `example`, any pack that
    fits `sizes`, is first computed once per size, which compiles and loads kernels. Gradients must be zeroed in place.
    """

    def __init__(self, work: Work, weights: list[torch.nn.Parameter], sizes: PadSizes, example: Pack):
        self.work, self.weights, self.device = work, weights, weights[0].device
        self.gradients = [torch.zeros_like(w) for w in weights]
        for parameter, gradient in zip(weights, self.gradients, strict=True):
            parameter.grad = gradient
        fitting = [n for n in reversed(sizes.tokens) if n >= len(example.input_ids)]
        # by tokens, the largest first: what a graph reads
        self.inputs = {size: pack.to(self.device) for size in fitting if (pack := sizes.pad(example, size))}
        self.weight = torch.zeros((), device=self.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by tokens, with the loss that it writes
        for pack in self.inputs.values():
            work(pack, self.weight)
        for gradient in self.gradients:
            gradient.zero_()
        self.capture()

    def capture(self) -> None:
        """Capture all graphs, which computes nothing."""
        pool = None
        for size, pack in self.inputs.items():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # a graph cannot use memory that the allocator caches for other work
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                loss = self.work(pack, self.weight)
            pool = graph.pool()
            self.graphs[size] = graph, loss

    def release(self) -> None:
        """Give the graphs' memory back, until `capture`."""
        torch.cuda.synchronize()
        self.graphs.clear()
        torch.cuda.empty_cache()

    def __call__(self, pack: Pack, weight: float) -> Tensor:
        """The loss [], on the device, of a pack on the host, times `weight`."""
        for parameter, gradient in zip(self.weights, self.gradients, strict=True):
            assert parameter.grad is gradient, "graphs add to the gradients that they were captured with"
        inputs = self.inputs.get(len(pack.input_ids))
        if inputs is None or inputs.shape != pack.shape:
            self.release()
            loss = self.work(pack.to(self.device), torch.full((), weight, device=self.device))
            self.capture()
            return loss
        for target, source in zip(inputs.tensors(), pack.tensors(), strict=True):
            target.copy_(source)
        self.weight.fill_(weight)
        graph, loss = self.graphs[len(pack.input_ids)]
        graph.replay()
        return loss.clone()
