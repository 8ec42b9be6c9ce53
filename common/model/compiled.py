"""Elementwise code between matrix products: fused by `torch.compile` on a GPU, plain PyTorch on a CPU."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from common import torch_private

import torch
from torch import Tensor

Args = ParamSpec("Args")
Result = TypeVar("Result")


def compiled(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """`function`, compiled at its first call on a GPU, once for all numbers of rows of its matrices."""
    fused = torch.compile(function)  # compiles nothing yet

    @functools.wraps(function)
    def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        tensors = [x for x in args if isinstance(x, Tensor)]
        if not tensors[0].is_cuda:
            return function(*args, **kwargs)
        for x in (x for x in tensors if x.dim() > 1):
            torch_private.mark_dynamic(x)
        return fused(*args, **kwargs)

    return call
