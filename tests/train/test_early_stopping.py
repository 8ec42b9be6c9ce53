"""A training stops after `patience` evaluations without a gain of `min_delta` points."""

from common.config import EarlyStop
from common.train.early_stopping import EarlyStopping

import pytest


@pytest.mark.parametrize(
    ("min_delta", "ems", "better", "waited"),
    [
        (0.0, [50.0, 50.0, 50.1], "b.b", [0, 1, 0]),  # a gain is above zero
        (0.5, [50.0, 50.4, 50.5], "b.b", [0, 1, 0]),  # points, and the least of them counts
        (0.5, [50.0, 50.3, 50.4, 49.0], "b...", [0, 1, 2, 3]),  # all against the best, not the last
        (1.0, [60.0, 59.0, 61.0, 61.5, 62.0], "b.b.b", [0, 1, 0, 1, 0]),
    ],
)
def test_an_evaluation_is_better_by_a_gain_of_min_delta_points(min_delta, ems, better, waited):
    stopping = EarlyStopping(EarlyStop(patience=9, min_delta=min_delta))
    found = [(stopping.update(em), stopping.waited) for em in ems]
    assert found == [(mark == "b", n) for mark, n in zip(better, waited, strict=True)]
    assert stopping.best == max(em for em, mark in zip(ems, better, strict=True) if mark == "b")


def test_it_is_over_after_so_many_without_a_gain():
    stopping = EarlyStopping(EarlyStop(patience=2))
    over = []
    for em in (50.0, 40.0, 60.0, 40.0, 40.0):
        stopping.update(em)
        over.append(stopping.over)
    assert over == [False, False, False, False, True]


def test_a_resumed_training_waits_on():
    stopping = EarlyStopping(EarlyStop(patience=3, min_delta=0.1), best=70.0, waited=2)
    assert not stopping.over
    assert not stopping.update(70.0)
    assert stopping.over
    assert stopping.best == 70.0


def test_without_an_accuracy_each_evaluation_is_the_best():
    stopping = EarlyStopping(EarlyStop(patience=1))
    assert stopping.waited == 0
    assert [stopping.update(None) for _ in range(3)] == [True] * 3
    assert EarlyStopping(EarlyStop(), best=50.0).update(None)
    assert not stopping.over


def test_a_best_that_a_crash_left_is_replaced():
    stopping = EarlyStopping(EarlyStop(patience=1), best=80.0)
    assert stopping.update(60.0, replace=True)
    assert (stopping.best, stopping.waited) == (60.0, 0)


def test_by_loss_any_decrease_is_a_gain_and_nothing_else():
    stopping = EarlyStopping(EarlyStop(by="loss", patience=2, min_delta=50.0))
    found = [(stopping.update(loss), stopping.waited, stopping.over) for loss in (2.0, 1.999, 1.999, 2.5)]
    assert found == [(True, 0, False), (True, 0, False), (False, 1, False), (False, 2, True)]
    assert stopping.best == 1.999
    assert EarlyStopping(EarlyStop(by="loss"), best=1.0).update(3.0, replace=True)


def test_weights_may_be_kept_every_so_often_and_at_the_end_and_by_none_only_then():
    for by, steps in (("em", [3, 6, 9, 10]), ("loss", [3, 6, 9, 10]), ("none", [10])):
        stopping = EarlyStopping(EarlyStop(by=by))
        assert [step for step in range(1, 11) if stopping.due(step, 10, 3)] == steps


def test_a_bar_shows_the_best_under_its_name():
    for by, shown in (("em", {"best_em": 3.0}), ("loss", {"best_loss": 3.0}), ("none", {})):
        assert EarlyStopping(EarlyStop(by=by), best=3.0).shown == shown
