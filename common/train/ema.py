"""Exponential moving average (EMA) of the trained weights, which evaluations and checkpoints use.

After step n: mean = d * mean + (1 - d) * weights, with d = min(decay, (1 + n) / (10 + n)). So the average covers few
steps at first, as in TensorFlow's `tf.train.ExponentialMovingAverage` with `num_updates`
(https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage).
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
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for mean, weight in zip(self.mean, self.weights, strict=True):
            mean.lerp_(weight, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Swaps the average with the weights, in place, while the body runs: views of the weights change as well."""
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

    def state_dict(self) -> dict[str, object]:
        """`mean`: tensors like the weights; `steps`."""
        return {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies a `state_dict` in; raises `ValueError` for another number of weights."""
        self.steps = state["steps"]
        for mean, saved in zip(self.mean, state["mean"], strict=True):
            mean.copy_(saved)
