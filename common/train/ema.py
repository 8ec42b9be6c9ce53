"""A running mean of trained weights: what is evaluated and kept, while training goes on with the last ones.

An exponential mean (EMA), over fewer steps at first: after n steps the decay is at most (1 + n) / (10 + n).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class EMA:
    def __init__(self, weights: Sequence[Tensor], decay: float):
        self.weights, self.decay, self.steps = list(weights), decay, 0
        self.mean = [w.detach().clone() for w in weights]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights in, after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for mean, weight in zip(self.mean, self.weights, strict=True):
            mean.lerp_(weight, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The mean where the weights are, views of them included; then they are back."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for mean, weight in zip(self.mean, self.weights, strict=True):
            before = weight.clone()
            weight.copy_(mean)
            mean.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for mean, saved in zip(self.mean, state["mean"], strict=True):
            mean.copy_(saved)
