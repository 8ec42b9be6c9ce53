"""When a training stops, and which evaluation is its best."""

from dataclasses import dataclass
from typing import Any

from common.config import EarlyStop


@dataclass(frozen=True)
class Evaluation:
    """What the weights of a step are selected by."""

    value: float | None  # EM in percent, or loss, as `early_stop.by` says; None: random weights' EM, and by none
    row: dict[str, Any]  # for metrics.jsonl: em, f1, n; or dev_loss, n; or nothing
    predictions: str | None = None  # for predictions.json: answers by question id
    cut: float = 0.0  # share of the answers that ran into the limit


class EarlyStopping:
    """Patience over evaluations. A resumed training passes the best EM (or loss) and the evaluations waited since."""

    def __init__(self, options: EarlyStop, best: float | None = None, waited: int = 0):
        self.options, self.best, self.waited = options, best, waited

    def due(self, step: int, total: int, every: int) -> bool:
        """True if the weights after `step` of `total` may be kept: every so many steps and at the end; by none then."""
        return step == total or (self.options.by != "none" and step % every == 0)

    def update(self, value: float | None, replace: bool = False) -> bool:
        """True if this evaluation is the new best: a gain of `min_delta` points or more, above 0; any decrease of loss.

        `value` is None for random weights' EM and by none; each evaluation is then the best. `replace` takes `value`
        whatever it is.
        """
        better = replace or value is None or self.best is None or self._gains(value, self.best)
        self.best, self.waited = (value, 0) if better else (self.best, self.waited + 1)
        return better

    def _gains(self, value: float, best: float) -> bool:
        if self.options.by == "loss":
            return value < best
        return value > best and value >= best + self.options.min_delta

    @property
    def over(self) -> bool:
        return self.waited >= self.options.patience

    @property
    def shown(self) -> dict[str, Any]:
        """The best so far under its name, for a bar; empty by none."""
        return {} if self.options.by == "none" else {f"best_{self.options.by}": self.best}
