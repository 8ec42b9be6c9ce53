"""One CUDA graph per padded size: the forward and backward pass of a pack as one launch, so that a GPU never waits.

A graph replays the same kernels on the same addresses. So packs are padded to a few sizes (`pack.PadSizes`) and copied
into the tensors that the graph of their size was captured with. A pack of another shape is computed without a graph,
and takes memory beside the graphs'. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
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
        # by tokens: the graph, the pack and weight that it reads, the loss that it writes
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Pack, Tensor, Tensor]] = {}
        fitting = [n for n in reversed(sizes.tokens) if n >= len(example.input_ids)]
        packs = {size: pack.to(self.device) for size in fitting if (pack := sizes.pad(example, size))}
        zero, pool = torch.zeros((), device=self.device), None
        for pack in packs.values():
            work(pack, zero)
        for size, pack in packs.items():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # a graph cannot use memory that the allocator caches for other work
            graph, weight = torch.cuda.CUDAGraph(), zero.clone()
            with torch.cuda.graph(graph, pool=pool):
                loss = work(pack, weight)
            pool = graph.pool()
            self.graphs[size] = graph, pack, weight, loss
        for gradient in self.gradients:
            gradient.zero_()

    def __call__(self, pack: Pack, weight: float) -> Tensor:
        """The loss [], on the device, of a pack on the host, times `weight`."""
        for parameter, gradient in zip(self.weights, self.gradients, strict=True):
            assert parameter.grad is gradient, "graphs add to the gradients that they were captured with"
        captured = self.graphs.get(len(pack.input_ids))
        if captured is None or captured[1].shape != pack.shape:
            return self.work(pack.to(self.device), torch.full((), weight, device=self.device))
        graph, inputs, captured_weight, loss = captured
        for target, source in zip(inputs.tensors(), pack.tensors(), strict=True):
            target.copy_(source)
        captured_weight.fill_(weight)
        graph.replay()
        return loss.clone()
