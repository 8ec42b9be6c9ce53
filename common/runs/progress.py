"""Bars that also say how long all of it will take: of a training's steps, and of questions. Imports no torch."""

import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Protocol

from common.data.plan import Plan
from common.data.trees import Tree

from tqdm import tqdm

PROBE = 10  # steps, or questions, that are timed before the first forecast
PROBE_S = 5  # seconds of an evaluation before its forecast
# seconds of an evaluation's token in those of a step's, before one was timed: 0.036 and 0.060 ms for Llama-2-7B on an
# H200 (docs/log.md)
EVALUATION = 0.6


class Clock(Protocol):
    """The parts of a training's state that a forecast reads."""

    step: int
    evaluated: int  # step of the last evaluation
    evaluation_seconds: float  # of all evaluations


class Bar(tqdm):
    """tqdm over steps. After `PROBE` of them, and after each evaluation, a line says what is left and when it ends."""

    def __init__(self, state: Clock, plan: Plan, dev: Sequence[Tree] | None, disable: bool = False):
        """`dev`: the questions of the evaluations; None: there are none."""
        super().__init__(total=plan.total_steps, initial=state.step, desc="train", unit="step", disable=disable)
        self.state, self.every, self.evaluates = state, plan.train.eval_every, dev is not None
        step_tokens = sum(map(len, plan.rows(plan.trees))) / plan.steps_per_epoch
        # an evaluation takes as long as so many
        self.evaluation_steps = EVALUATION * sum(map(len, dev or ())) / step_tokens
        self.evaluation_s: float | None = None  # None: none was timed yet
        self.seconds: list[float] = []  # of each step
        self.before = time.perf_counter(), state.evaluation_seconds

    def update(self, n: float | None = 1) -> bool | None:
        now, evaluating = time.perf_counter(), self.state.evaluation_seconds
        evaluated = evaluating - self.before[1]
        if evaluated:
            self.evaluation_s = evaluated
        self.seconds.append(now - self.before[0] - evaluated)
        self.before = now, evaluating
        if not self.disable and (evaluated or len(self.seconds) == PROBE):
            self.write(self.forecast(), file=sys.stderr)
        return super().update(n)

    def forecast(self) -> str:
        """What is left after the state's step, and when it ends."""
        step, total = self.state.step, self.total or 0
        step_s = median(self.seconds)
        if not self.evaluates:
            return f"{until((total - step) * step_s)}: {total - step:,} steps"
        guess = self.evaluation_s is None
        evaluation_s = step_s * self.evaluation_steps if self.evaluation_s is None else self.evaluation_s
        # at multiples of `every`, the one at this step included, and at the end
        evaluations = -(-total // self.every) - (step - 1) // self.every
        stepping, evaluating = (total - step) * step_s, evaluations * evaluation_s
        return (
            f"{until(stepping + evaluating)} or an early stop: {total - step:,} steps "
            f"{duration(stepping)}, {evaluations} evaluation{'s' * (evaluations != 1)} of {'about ' * guess}"
            f"{duration(evaluation_s)}"
        )


class QuestionBar(tqdm):
    """tqdm over questions. `PROBE_S` seconds after the first, which waits for compilers, a line says what is left."""

    first: tuple[float, float] | None = None  # when the first were shown, and how many
    said = False

    def update(self, n: float | None = 1) -> bool | None:
        shown, now = super().update(n), time.perf_counter()
        self.first = self.first or (now, self.n)
        began, before = self.first
        if not (self.said or self.disable or not self.total) and self.n >= before + PROBE and now >= began + PROBE_S:
            self.said = True
            left = (now - began) * (self.total - self.n) / (self.n - before)
            self.write(f"{until(left)}: {self.total - self.n:,} {self.unit}s", file=sys.stderr)
        return shown


def until(seconds: float) -> str:
    """A duration, and the time of day at its end, for people."""
    far = seconds > 20 * 3600  # another day, or nearly
    end = time.strftime("%a %H:%M" if far else "%H:%M", time.localtime(time.time() + seconds))
    return f"{duration(seconds)} to go, until {end}"


def duration(seconds: float) -> str:
    """As people say it: 40 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
