"""The gate raises an alarm for what is worse, names it, and raises none for noise."""

import json
from dataclasses import replace

from common import gate, record
from common.config import load
from common.errors import UserError
from common.gate import Rules
from common.squad import Dataset
from common.stats import slower, worse

import numpy as np
import pytest

RULES = Rules()
N = 1000


@pytest.fixture
def measure(tmp_path):
    """Write a folder of evaluations and timings, as good as `em` and as fast as `ms` says; returns it."""
    rng = np.random.default_rng(0)
    hard = rng.random(N)  # of each question, the same every time
    usual = rng.lognormal(0, 0.3, 400)

    def make(
        name: str,
        em: float = 0.7,
        ms: float = 25.0,
        mib: int = 4000,
        words: tuple[str, ...] = (),
        seed: int = 1,
        busy: float | None = None,
    ):
        noise = np.random.default_rng(seed)
        for s in (0, 1):
            config = load("smollm2-qlora", [f"runs={tmp_path / name}", f"seed={s}", *words])
            right = hard + noise.normal(0, 0.05, N) < em
            peak = {"allocated_bytes": mib * 2**20, "rss_bytes": 1}
            run = record.new_run(config, "eval")
            rows = [
                {"id": str(i), "text": "", "hit_limit": False, "em": bool(x), "f1": float(x), "article": str(i % 40)}
                for i, x in enumerate(right)
            ]
            (run / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            result = {"em": 100 * right.mean(), "f1": 100 * right.mean(), "n": N, "peak": peak}
            record.write(run, config, "eval", Dataset([], "x.json"), {"name": "a card"}, result)
            run = record.new_run(config, "bench")
            for process in range(3):
                totals = ms / 1000 * usual * noise.normal(1, 0.02, 400)
                samples = {"ids": list(range(400)), "modes": {"natural": [{"total": t} for t in totals]}}
                (run / f"process-{process}.json").write_text(json.dumps(samples))
            record.write(
                run,
                config,
                "bench",
                Dataset([], "x.json"),
                {"name": "a card"},
                {"peak": peak} | ({"host": {"load": busy}} if busy else {}),
            )
        return tmp_path / name

    return make


def test_a_timings_words_say_how_busy_the_host_was(measure):
    quiet, busy, older = measure("quiet", busy=1.0), measure("busy", ms=50, busy=35.0), measure("older", ms=50)
    assert alarms(quiet, busy)["p95"].endswith("; load of the host up to 35.0, then 1.0")
    assert alarms(quiet, older)["p95"].endswith("is allowed")


def alarms(accepted, new) -> dict[str, str]:
    return {check.what: check.words for check in gate.compare(accepted, new, RULES) if not check.fine}


def test_what_is_as_good_passes_and_what_is_better_too(measure):
    accepted = measure("accepted")
    checks = gate.compare(accepted, measure("same", seed=2), RULES)
    assert {check.what for check in checks} == {"em", "f1", "p95", "memory of eval", "memory of bench"}
    assert all(check.fine for check in checks)
    assert gate.compare(accepted, accepted, RULES)
    assert alarms(accepted, accepted) == {}
    assert alarms(accepted, measure("better", em=0.8, ms=10, mib=1000, seed=3)) == {}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"em": 0.65}, {"em", "f1"}),
        ({"ms": 30.0}, {"p95"}),
        ({"mib": 4300}, {"memory of eval", "memory of bench"}),
        ({"words": ("window.context=300",)}, {"comparable"}),
        ({"words": ("prompt.order=question",)}, {"comparable"}),
    ],
)
def test_each_thing_that_is_worse_raises_its_alarm(measure, change, found):
    what = alarms(measure("accepted"), measure("new", seed=2, **change))
    assert what.keys() == found
    assert all(what.values())


def test_other_queries_are_no_comparison(measure):
    accepted, new = measure("accepted"), measure("new")
    file = next(new.glob("*-s1-*-bench-*/process-2.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ids": list(range(1000))}))
    words = alarms(accepted, new)["comparable"]
    assert words.startswith("other queries were timed than then (1000, then 400): bench.queries=400 ")


def test_times_of_another_device_are_no_comparison(measure):
    accepted, new = measure("accepted"), measure("new", ms=90)
    for file in new.glob("*-bench-*/record.json"):
        found = json.loads(file.read_text())
        found["may_differ"]["device"] = {"name": "another card"}
        file.write_text(json.dumps(found))
    assert alarms(accepted, new) == {"comparable": "timed on another card, accepted on a card"}


def test_one_seed_on_other_data_is_enough_for_an_alarm(measure):
    accepted, new = measure("accepted"), measure("new")
    file = next(new.glob("*-s1-*-eval-*/record.json"))
    found = json.loads(file.read_text())
    found["must_match"]["data"] = "another"
    file.write_text(json.dumps(found))
    assert "data is another" in alarms(accepted, new)["comparable"]


def test_a_difference_within_the_margin_is_none(measure):
    accepted = measure("accepted")
    assert alarms(accepted, measure("a little worse", em=0.697, ms=26.0, mib=4100, seed=2)) == {}


def test_a_resident_set_is_not_judged(measure):
    accepted = measure("accepted")
    for file in accepted.glob("*/record.json"):
        found = json.loads(file.read_text())
        found["result"]["peak"] = {"allocated_bytes": None, "rss_bytes": 1}
        file.write_text(json.dumps(found))
    checks = gate.compare(accepted, measure("new", mib=9000), RULES)
    assert {check.what for check in checks} == {"em", "f1", "p95"}


def test_what_was_not_measured_anew_is_an_error(measure, tmp_path):
    accepted, new = measure("accepted"), measure("new")
    next(new.glob("*-s1-*-eval-*/record.json")).unlink()
    with pytest.raises(UserError, match="eval of smollm2-qlora is missing for seed 1"):
        gate.compare(accepted, new, RULES)
    with pytest.raises(UserError, match="what was accepted is gone"):
        gate.compare(tmp_path / "absent", accepted, RULES)


def test_noise_raises_alarms_as_seldom_as_is_allowed():
    rng = np.random.default_rng(7)
    article = {str(i): str(i % 48) for i in range(1000)}
    worst = []
    for _ in range(400):  # at the very margin, where alarms are most frequent
        single, shared = rng.choice([1, 0, -1], 1000, p=[0.05, 0.9, 0.05]), rng.normal(0, 0.02, 48)
        off = single + np.resize(shared, 1000) - 0.01
        worst.append(worse(dict(zip(article, off.tolist(), strict=True)), article, margin=0.01))
    assert np.mean(np.array(worst) < 0.01) <= 0.03
    usual = rng.lognormal(0, 0.3, 400)
    low = [slower([usual], [usual * rng.normal(1.1, 0.05, 400)], 95, 0.01, draws=1000)[1] for _ in range(100)]
    assert np.mean(np.array(low) > 1.1) <= 0.05


def test_a_ratio_is_of_the_same_queries():
    ratio, low = slower([[1.0, 2.0, 3.0] * 50], [[1.2, 2.4, 3.6] * 50], 95, 0.001)
    assert ratio == pytest.approx(1.2)
    assert low == pytest.approx(1.2)
    with pytest.raises(ValueError, match="same queries"):
        slower([[1.0]], [[1.0, 2.0]], 95, 0.05)


def test_of_processes_the_one_in_the_middle_counts_and_how_far_they_are_apart():
    usual = np.tile([1.0, 2.0, 3.0], 50)
    held_up = [usual, usual * 9, usual]  # one process beside other work
    assert slower([usual] * 3, held_up, 95, 0.001)[0] == 1
    ratio, low = slower([usual, usual, 1.2 * usual], [1.2 * usual] * 3, 95, 0.001)
    assert ratio == pytest.approx(1.2)
    apart = np.log(1.2) / np.sqrt(3)  # standard deviation of the three
    assert low == pytest.approx(1.2 * np.exp(-np.sqrt(np.pi / 2 * apart**2 / 2 * 2 / 3)))
    with_three_times_as_many = slower([usual, usual, 1.2 * usual] * 3, [1.2 * usual] * 9, 95, 0.001)[1]
    assert low < with_three_times_as_many < ratio


def test_what_may_be_the_processes_is_no_alarm():
    """All queries took 1.2 times as long, and the processes are far apart, or as far as a 7B model's are."""
    usual = np.random.default_rng(7).lognormal(0, 0.3, 1000)
    for apart, alarm in ((0.1, False), (0.02, True)):
        old = [usual * (1 + apart * z) for z in (-1, 0, 1)]
        bound = slower(old, [1.2 * times for times in old], 95, 0.001, draws=1000)[1]
        assert (bound > RULES.p95_ratio) == alarm


@pytest.mark.parametrize("wrong", [{"em_margin": -1}, {"p95_ratio": 0.9}, {"false_alarms": 0}])
def test_rules_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be"):
        replace(RULES, **wrong)
