"""When a training stops, and which evaluation is its best. EM in percent."""

from common.config import EarlyStop


class EarlyStopping:
    """Patience over evaluations. A resumed training passes the best EM and the evaluations waited since."""

    def __init__(self, options: EarlyStop, best_em: float | None = None, waited: int = 0):
        self.options, self.best_em, self.waited = options, best_em, waited

    def update(self, em: float | None, replace: bool = False) -> bool:
        """True if this evaluation is the new best: a gain of `min_delta` points or more, above 0.

        `em` is None for random weights; each evaluation is then the best. `replace` takes `em` whatever it is.
        """
        best = self.best_em
        better = em is None or best is None or (em > best and em >= best + self.options.min_delta) or replace
        self.best_em, self.waited = (em, 0) if better else (best, self.waited + 1)
        return better

    @property
    def over(self) -> bool:
        return self.waited >= self.options.patience
