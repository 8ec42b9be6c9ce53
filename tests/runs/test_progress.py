"""What is said of the time that is left is what is left."""

from types import SimpleNamespace

from common.config import Train
from common.data.plan import Plan
from common.data.trees import Branch, Tree
from common.runs import progress
from common.runs.progress import Bar, QuestionBar, duration

import pytest

TREES = [Tree([1] * 60, tuple(Branch(f"{i}.{q}", [2] * 15, [3] * 5) for q in range(2))) for i in range(40)]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only as told, and midnight at the start."""
    found = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: found.now)
    monkeypatch.setattr(progress.time, "time", lambda: found.now)
    monkeypatch.setattr(progress.time, "localtime", progress.time.gmtime)
    return found


def state(step: int = 0):
    return SimpleNamespace(step=step, evaluated=0, evaluation_seconds=0.0)


def steps(bar: Bar, clock, n: int, seconds: float, evaluating: float = 0.0) -> None:
    for _ in range(n):
        clock.now += seconds + evaluating
        bar.state.evaluation_seconds += evaluating
        bar.state.step += 1
        bar.update()


def said(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "to go" in line]


def test_after_a_probe_and_after_each_evaluation_a_line_says_what_is_left(clock, capsys):
    """80 questions at 2 a step: 40 steps of 100 tokens; an evaluation of 20 trees of 100 is 20 × 0.6 steps."""
    plan = Plan(TREES, Train(questions_per_step=2, eval_every=15), seed=0)
    bar = Bar(state(), plan, TREES[:20])
    steps(bar, clock, 9, 30)
    assert said(capsys) == []
    steps(bar, clock, 1, 30)
    # 30 steps of 30 s are 15 min; at 15, 30 and 40 evaluations of 12 steps, 6 min
    told = "33 min to go, until 00:38 or an early stop: 30 steps 15 min, 3 evaluations of about 6 min"
    assert said(capsys) == [told]
    steps(bar, clock, 5, 30)
    assert said(capsys) == []
    steps(bar, clock, 1, 30, evaluating=90)
    told = "15 min to go, until 00:24 or an early stop: 24 steps 12 min, 2 evaluations of 90 s"
    assert said(capsys) == [told]
    bar.close()


def test_the_step_in_the_middle_counts_and_not_the_first_which_compiles(clock, capsys):
    plan = Plan(TREES, Train(questions_per_step=2, eval_every=100), seed=0)
    bar = Bar(state(), plan, [])
    steps(bar, clock, 1, 500)
    steps(bar, clock, 9, 10)
    assert said(capsys) == ["5 min to go, until 00:14 or an early stop: 30 steps 5 min, 1 evaluation of about 0 s"]
    bar.close()


def test_where_nothing_is_evaluated_only_steps_are_left(clock, capsys):
    bar = Bar(state(), Plan(TREES, Train(questions_per_step=2, eval_every=15), seed=0), None)
    steps(bar, clock, 10, 30)
    assert said(capsys) == ["15 min to go, until 00:20: 30 steps"]
    bar.close()


def test_a_step_behind_an_evaluation_is_timed_without_it(clock, capsys):
    plan = Plan(TREES, Train(questions_per_step=2, eval_every=1), seed=0)
    bar = Bar(state(30), plan, [])
    steps(bar, clock, 1, 2, evaluating=7)
    told = "88 s to go, until 00:01 or an early stop: 9 steps 18 s, 10 evaluations of 7 s"
    assert said(capsys) == [told]
    bar.close()


def test_another_day_is_named(clock, capsys):
    plan = Plan(TREES, Train(questions_per_step=2, eval_every=100), seed=0)
    bar = Bar(state(), plan, [])
    steps(bar, clock, 10, 3600)
    assert "30 h 00 min to go, until Fri 16:00 or" in said(capsys)[0]
    bar.close()


def test_an_evaluation_that_is_due_at_once_is_still_to_come(clock, capsys):
    plan = Plan(TREES, Train(questions_per_step=2, eval_every=10), seed=0)
    bar = Bar(state(), plan, [])
    steps(bar, clock, 10, 1)
    assert "4 evaluations" in said(capsys)[0]
    bar.close()


def test_a_resumed_training_begins_where_it_was_and_other_ranks_say_nothing(clock, capsys):
    plan = Plan(TREES, Train(questions_per_step=2), seed=0)
    bar = Bar(state(20), plan, [])
    assert (bar.n, bar.total) == (20, 40)
    bar.close()
    capsys.readouterr()
    silent = Bar(state(), plan, [], disable=True)
    steps(silent, clock, 20, 1)
    silent.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "says"),
    [(0.2, "0 s"), (99.4, "99 s"), (100, "2 min"), (5_900, "98 min"), (6_000, "1 h 40 min"), (7_500, "2 h 05 min")],
)
def test_a_duration_as_people_say_it(seconds, says):
    assert duration(seconds) == says


def counted(clock, seconds: float, n: int = 40, total: int | None = 40, **more) -> int:
    """How many of `n` questions went by, each after so many seconds, the first after a minute."""

    def questions():
        clock.now += 60
        for i in range(n):
            clock.now += seconds
            yield i

    return sum(1 for _ in QuestionBar(questions(), "decode", total, unit="question", mininterval=0, **more))


@pytest.mark.parametrize(("seconds", "left", "end", "n"), [(2, 58, "00:02", 29), (0.25, 5, "00:01", 19)])
def test_an_evaluation_says_once_what_is_left_of_it_without_the_wait_for_the_first(
    clock, capsys, seconds, left, end, n
):
    """Ten questions after the first at least, and five seconds."""
    assert counted(clock, seconds) == 40
    assert said(capsys) == [f"{left} s to go, until {end}: {n} questions"]


@pytest.mark.parametrize("more", [{"total": None}, {"disable": True}, {"n": 10, "total": 10}, {"seconds": 0.1}])
def test_of_an_unknown_number_a_hidden_bar_or_a_short_evaluation_nothing_is_said(clock, capsys, more):
    counted(clock, **{"seconds": 2, **more})
    assert said(capsys) == []
