"""What stands between matrix products, fused into few kernels on a GPU and left as it is on a CPU."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def compiled(part: Callable) -> Callable:
    """Compile `part` at its first call on a GPU, once for any number of tokens: the first dimension of every matrix."""
    fast = torch.compile(part)  # does nothing yet

    @functools.wraps(part)
    def call(*arguments: Any) -> Any:
        if not arguments[0].is_cuda:
            return part(*arguments)
        for x in arguments:
            if isinstance(x, Tensor) and x.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return fast(*arguments)

    return call
