"""The gate raises an alarm for what is worse, names it, and raises none for noise."""

import json
from dataclasses import replace
from pathlib import Path

from common.config import Rules, load
from common.errors import UserError
from common.runs import regression
from common.runs.regression import Check
from tests.metrics.test_stats import robust

import numpy as np
import pytest
from scipy import special

RULES = Rules()
MIB = 2**20
CONFIG = load("smollm2-qlora").to_dict()
WINDOW = {"context": 416, "tokenizer": "0123456789ab"}
USUAL = np.random.default_rng(7).lognormal(0, 0.3, 100)
# by article: what each question scores, accepted and new
EM = {"a": [(1, 1), (1, 0), (0, 0)], "b": [(1, 0), (1, 1)], "c": [(0, 1), (1, 0), (1, 0), (1, 1)], "d": [(1, 0)]}
F1 = {
    "a": [(1, 1), (1, 0.5), (0, 0)],
    "b": [(1, 0.25), (1, 1)],
    "c": [(0.5, 1), (1, 0), (1, 0.75), (1, 1)],
    "d": [(1, 0.5)],
}
SAME = {article: [(was, was) for was, _ in rows] for article, rows in EM.items()}


def stored(folder: Path, kind: str, result: dict, seed: int = 0, system: str = "s", **change) -> Path:
    """Write the record of a finished run; returns its folder."""
    run = folder / f"{system}-s{seed}-{kind}-{change.get('number', 1)}"
    run.mkdir(parents=True)
    found = {
        "schema": 2,
        "kind": kind,
        "system": system,
        "seed": seed,
        "created": f"2026-01-0{change.get('number', 1)}",
        "must_match": {"data": "d", "prompt": "p", "window": WINDOW} | change.get("must", {}),
        "config": CONFIG,
        "may_differ": {"device": {"name": change.get("device", "a card")}},
        "result": result,
    }
    (run / "record.json").write_text(json.dumps(found))
    return run


def peak(mib: float | None) -> dict:
    return {"peak": {"allocated_bytes": mib and int(mib * MIB), "reserved_bytes": 9, "rss_bytes": 2**40}}


def evaluated(folder: Path, new: bool, em=EM, f1=F1, mib: float | None = 1000, accuracy=50.0, **more) -> Path:
    rows = [
        {
            "id": f"{article}{i}",
            "text": "",
            "hit_limit": False,
            "article": article,
            "em": bool(em[article][i][new]),
            "f1": f1[article][i][new],
        }
        for article in em
        for i in range(len(em[article]))
    ]
    run = stored(folder, "eval", {"em": accuracy, "f1": accuracy, "n": len(rows)} | peak(mib), **more)
    (run / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def timed(folder: Path, *processes, mib: float | None = 1000, load: float | None = None, ids=None, **more) -> Path:
    """With the seconds of each process's queries."""
    host = {} if load is None else {"host": {"load": load}}
    run = stored(folder, "bench", peak(mib) | host, **more)
    for i, seconds in enumerate(processes or (USUAL,)):
        natural = [{"total": float(s), "first": 99.0} for s in seconds]
        found = {"ids": list(ids or range(len(natural))), "modes": {"forced": natural[:1], "natural": natural}}
        (run / f"process-{i}.json").write_text(json.dumps(found))
    (run / "process-0.nvml.json").write_text("[]")
    return folder


@pytest.fixture
def both(tmp_path):
    return tmp_path / "accepted", tmp_path / "new"


@pytest.fixture
def compared_times(monkeypatch):
    """What is asked of `slower`, which then finds a ratio of 9 and the bound that is appended."""
    asked, bounds = [], []

    def slower(*of):
        asked.append(of)
        return 9.0, bounds[-1] if bounds else 1.0

    monkeypatch.setattr(regression, "slower", slower)
    return asked, bounds


def alarms(accepted: Path, new: Path, rules: Rules = RULES) -> dict[str, str]:
    return {check.what: check.words for check in regression.compare(accepted, new, rules) if not check.fine}


# ---- EM and F1 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "margin"), [("em", 20.0), ("f1", 7.0)])
def test_accuracy_is_an_alarm_where_a_test_by_articles_is_sure_of_more_than_the_margin(both, what, margin):
    accepted, new = (evaluated(folder, i) for i, folder in enumerate(both))
    table = {"em": EM, "f1": F1}[what]
    mean, error, df = robust({article: [b - a for a, b in rows] for article, rows in table.items()})
    p = special.stdtr(df, (mean + margin / 100) / error)
    rules = Rules(**{f"{what}_margin": margin})
    words = f"{what.upper()} {100 * mean:+.2f} over 1 seeds; p of more than {margin:g} lower {p:.2g}"
    for factor, fine in ((0.9999, True), (1.0001, False)):  # EM and F1: two tests share the level
        checks = regression.compare(accepted, new, replace(rules, false_alarms=2 * p * factor))
        assert [check for check in checks if check.what == what] == [Check("s", what, fine, words)]


def test_what_is_exactly_as_sure_as_is_asked_is_no_alarm(both, monkeypatch):
    accepted, new = (evaluated(folder, i) for i, folder in enumerate(both))
    monkeypatch.setattr(regression, "worse", lambda *of: 0.0005)
    assert alarms(accepted, new) == {}
    assert alarms(accepted, new, Rules(false_alarms=0.0010001)).keys() == {"em", "f1"}


def test_seeds_are_judged_by_each_questions_mean_over_them(both):
    for i, folder in enumerate(both):
        evaluated(folder, i)
        evaluated(folder, i, em=SAME, seed=1)
    (em, f1, _) = regression.compare(*both, RULES)
    for check, table, share in ((em, EM, 0.5), (f1, F1, 1)):
        mean, error, df = robust({article: [share * (b - a) for a, b in rows] for article, rows in table.items()})
        p = special.stdtr(df, (mean + 0.005) / error)
        assert check.words == (f"{check.what.upper()} {100 * mean:+.2f} over 2 seeds; p of more than 0.5 lower {p:.2g}")


def test_a_seed_that_was_asked_more_questions_adds_them(both):
    more = {"em": {"e": [(1, 0), (1, 1)]}, "f1": {"e": [(1, 0.5), (1, 1)]}}
    for i, folder in enumerate(both):
        evaluated(folder, i)
        evaluated(folder, i, **more, seed=1)
    both_seeds = {article: [(b - a) / 2 for a, b in rows] for article, rows in (EM | more["em"]).items()}
    mean, error, df = robust(both_seeds)
    words = f"EM {100 * mean:+.2f} over 2 seeds; p of more than 0.5 lower "
    assert regression.compare(*both, RULES)[0].words == f"{words}{special.stdtr(df, (mean + 0.005) / error):.2g}"


@pytest.mark.parametrize(
    ("articles", "clusters"),
    [
        ({"a": "c" + "a"}, [[row] for name in "ca" for row in EM[name]]),  # of one article, questions one by one
        ({"c": "c", "a": "a"}, [EM["c"], EM["a"]]),
    ],
)
def test_two_articles_at_least_make_a_test_by_articles(both, articles, clusters):
    em, f1 = ({a: [row for name in of for row in table[name]] for a, of in articles.items()} for table in (EM, F1))
    accepted, new = (evaluated(folder, i, em=em, f1=f1) for i, folder in enumerate(both))
    mean, error, df = robust({str(i): [b - a for a, b in rows] for i, rows in enumerate(clusters)})
    p = special.stdtr(df, (mean + 0.005) / error)
    assert regression.compare(accepted, new, RULES)[0].words.endswith(f"p of more than 0.5 lower {p:.2g}")


def test_random_weights_have_no_accuracy_to_judge(both):
    accepted, new = (evaluated(folder, i, accuracy=None) for i, folder in enumerate(both))
    assert [check.what for check in regression.compare(accepted, new, RULES)] == ["memory of eval"]


# ---- p95 -----------------------------------------------------------------------------------------------------------


def test_the_times_of_single_queries_of_every_process_and_seed_are_compared(both, compared_times):
    for i, folder in enumerate(both):
        timed(folder, [1.0 + i, 2.0, 3.0], [4.0, 5.0, 6.0 + i], ids=("x", "y", "z"))
        timed(folder, [7.0, 8.0 + i, 9.0], ids=("x", "y", "z"), seed=1)
    regression.compare(*both, Rules(false_alarms=0.002))
    ((old, new, q, alpha),) = compared_times[0]
    assert sorted(old) == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert sorted(new) == [[2, 2, 3], [4, 5, 7], [7, 9, 9]]
    assert (q, alpha) == (95, 0.002)


@pytest.mark.parametrize(("bound", "fine"), [(1.0, True), (1.25, True), (1.2501, False)])
def test_p95_is_an_alarm_by_its_bound_and_not_by_the_ratio(both, compared_times, bound, fine):
    compared_times[1].append(bound)
    accepted, new = (timed(folder) for folder in both)
    words = f"p95 9.000 times as long, at least {bound:.3f}; 1.25 is allowed"
    assert regression.compare(accepted, new, Rules(p95_ratio=1.25))[0] == Check("s", "p95", fine, words)


@pytest.mark.parametrize(("apart", "alarm"), [(0.1, False), (0.02, True)])
def test_what_may_be_the_processes_is_no_alarm(both, apart, alarm):
    """All queries took 1.2 times as long; processes are far apart, or as far as a 7B model's are."""
    for factor, folder in zip((1, 1.2), both, strict=True):
        timed(folder, *(factor * USUAL * (1 + apart * z) for z in (-1, 0, 1)))
    found = alarms(*both)
    assert found.keys() == ({"p95"} if alarm else set())
    assert alarms(*reversed(both)) == {}  # faster is no alarm


def test_a_timings_words_say_how_busy_the_host_was(both, tmp_path, compared_times):
    accepted, new = (timed(timed(folder, load=1 + 9 * i), load=2.5 + 9 * i, seed=1) for i, folder in enumerate(both))
    older = timed(timed(tmp_path / "older", seed=1), load=None)
    words = "p95 9.000 times as long, at least 1.000; 1.1 is allowed"
    assert regression.compare(accepted, new, RULES)[0].words == f"{words}; load of the host up to 11.5, then 2.5"
    for before, after in ((accepted, older), (older, new)):
        assert regression.compare(before, after, RULES)[0].words == words


def test_other_queries_are_no_comparison(both):
    accepted = timed(both[0], USUAL, USUAL)
    new = timed(both[1], USUAL, [*USUAL, 1, 2, 3])
    words = "other queries were timed than then (103, then 100): bench.queries=100 asks as many again; "
    assert regression.compare(accepted, new, RULES) == [
        Check("s", "comparable", False, words + "or accept what is new"),
        Check("s", "memory of bench", True, "peak of bench 1,000 MiB, +0; 256 more are allowed"),
    ]


def test_times_of_another_device_are_no_comparison_and_neither_is_their_memory(both):
    for i, folder in enumerate(both):
        timed(folder, USUAL * (1 + 9 * i), device=("a card", "z card")[i])
        timed(folder, USUAL, seed=1, device=("a card", "b card")[i], mib=9000)
    words = "timed on b card, z card, accepted on a card"
    assert regression.compare(*both, RULES) == [Check("s", "comparable", False, words)]


def test_accuracy_of_another_device_is_compared(both):
    accepted, new = (evaluated(folder, 0, device=f"card {i}") for i, folder in enumerate(both))
    assert [check.what for check in regression.compare(accepted, new, RULES)] == ["em", "f1", "memory of eval"]


def test_samples_that_are_gone_are_an_error(both):
    accepted, new = (timed(folder) for folder in both)
    (new / "s-s0-bench-1" / "process-0.json").unlink()
    with pytest.raises(UserError, match=r"new/s-s0-bench-1: its samples are gone"):
        regression.compare(accepted, new, RULES)


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mib", "fine", "words"),
    [
        (1300, True, "1,300 MiB, +100; 100.5 more are allowed"),
        (1300.5, True, "1,300 MiB, +100; 100.5 more are allowed"),  # half to even, both
        (1300.51, False, "1,301 MiB, +101; 100.5 more are allowed"),
        (700, True, "1,100 MiB, -100; 100.5 more are allowed"),  # of seed 1
    ],
)
@pytest.mark.parametrize("kind", ["eval", "bench"])
def test_memory_is_an_alarm_above_the_margin_by_the_highest_peak_of_all_seeds(
    both, compared_times, kind, mib, fine, words
):
    for folder, first, second in zip(both, (1200, mib), (500, 1100), strict=True):
        for seed, much in enumerate((first, second)):
            if kind == "eval":
                evaluated(folder, 0, mib=much, seed=seed)
            else:
                timed(folder, mib=much, seed=seed)
    checks = regression.compare(*both, Rules(memory_mib=100.5))
    assert checks[-1] == Check("s", f"memory of {kind}", fine, f"peak of {kind} {words}")


@pytest.mark.parametrize("gone", [0, 1])
def test_a_resident_set_is_not_judged(both, compared_times, gone):
    for i, folder in enumerate(both):
        evaluated(folder, 0, mib=None if i == gone else 9000 * i + 1)
        timed(folder, mib=None if i == gone else 9000 * i + 1)
    assert {check.what for check in regression.compare(*both, RULES)} == {"em", "f1", "p95"}


# ---- what is compared with what ------------------------------------------------------------------------------------


@pytest.fixture
def four(both):
    """Evaluations of two systems and timings of two, and a training, accepted and new."""
    for folder in both:
        for system in ("s", "t"):
            evaluated(folder, 0, system=system)
            timed(folder, system=system)
        stored(folder, "train", {"em": 1.0} | peak(1), system="u")
    return both


def test_what_is_as_good_passes(four):
    checks = regression.compare(*four, RULES)
    assert sorted((check.system, check.what) for check in checks) == [
        (system, what) for system in "st" for what in ("em", "f1", "memory of bench", "memory of eval", "p95")
    ]
    assert all(check.fine for check in checks)


@pytest.mark.parametrize(
    ("kinds", "found"), [(("bench",), {"p95", "memory of bench"}), (("eval",), {"em", "f1", "memory of eval"})]
)
def test_kinds_can_be_compared_alone(four, compared_times, kinds, found):
    checks = regression.compare(*four, RULES, kinds)
    assert {check.what for check in checks} == found
    assert {check.system for check in checks} == {"s", "t"}


@pytest.mark.parametrize("kinds", [regression.KINDS, ("bench",)])
def test_all_tests_of_a_run_share_the_level_also_where_one_kind_alone_is_compared(four, compared_times, kinds):
    regression.compare(*four, Rules(false_alarms=0.006), kinds)
    assert [alpha for *_, alpha in compared_times[0]] == [0.001, 0.001]  # EM and F1 of two, p95 of two


def test_what_must_match_and_does_not_is_an_alarm_by_itself_beside_memory(both):
    for i, folder in enumerate(both):
        evaluated(folder, i, must={"scorer": "x"})
        evaluated(folder, i, seed=1, must={"data": "de"[i], "prompt": "pq"[i], "scorer": "x"}, mib=4000 * i + 1)
    words = "data is e, accepted was d; prompt is q, accepted was p"
    assert regression.compare(*both, RULES) == [
        Check("s", "comparable", False, words),
        Check("s", "memory of eval", False, "peak of eval 4,001 MiB, +3,001; 256 more are allowed"),
    ]


def test_timings_of_other_settings_are_not_compared(both, compared_times):
    accepted, new = (timed(folder, must={"prompt": "pq"[i]}) for i, folder in enumerate(both))
    assert alarms(accepted, new) == {"comparable": "prompt is q, accepted was p"}
    assert compared_times[0] == []


def test_what_was_not_measured_anew_is_an_error(both, tmp_path):
    accepted, new = both
    for seed in (0, 11, 2):
        evaluated(accepted, 0, seed=seed)
    evaluated(new, 0)
    evaluated(new, 0, seed=5)
    with pytest.raises(UserError, match=r"new: eval of s is missing for seed 2, 11$"):
        regression.compare(accepted, new, RULES)
    timed(accepted)
    with pytest.raises(UserError, match=r"new: bench of s is missing for seed 0$"):
        regression.compare(accepted, new, RULES, ("bench",))
    with pytest.raises(UserError, match=r"absent: what was accepted is gone; accept another one"):
        regression.compare(tmp_path / "absent", new, RULES)


def test_what_was_measured_in_vain_or_besides_is_ignored(both):
    accepted, new = (evaluated(folder, 0) for folder in both)
    evaluated(new, 1, system="another")
    assert alarms(accepted, new) == {}


def test_the_newest_of_each_seed_counts_and_of_what_is_accepted_that_which_was_measured_again(both):
    accepted, new = both
    assert regression.once_more(accepted) == accepted.with_name("accepted-again")
    for folder in both:
        timed(folder, mib=1000, number=2)
        timed(folder, mib=3000, number=1)
        timed(regression.once_more(folder), mib=500, number=1)
        evaluated(folder, 0, mib=700)
    found = {check.what: check.words.partition(";")[0] for check in regression.compare(accepted, new, RULES)}
    assert found["memory of bench"] == "peak of bench 1,000 MiB, +500"
    assert found["memory of eval"] == "peak of eval 700 MiB, +0"
    peaks = [regression.measured(accepted, again)["s", "bench"][0]["result"]["peak"] for again in (False, True)]
    assert [p["allocated_bytes"] for p in peaks] == [1000 * MIB, 500 * MIB]
    assert regression.measured(accepted) != regression.measured(accepted, again=True)


def test_an_alarm_of_p95_stands_only_if_it_is_raised_twice():
    first = [
        Check("s", "p95", False, "slow"),
        Check("t", "p95", False, "slower"),
        Check("u", "p95", True, "fast"),
        Check("v", "p95", False, "slowest"),
        Check("s", "memory of bench", False, "big"),
        Check("s", "em", False, "bad"),
    ]
    again = [
        Check("s", "memory of bench", True, "small"),
        Check("s", "p95", True, "quick"),
        Check("t", "p95", False, "still"),
        Check("u", "p95", False, "slow now"),
        Check("v", "memory of bench", True, "small"),
    ]
    assert regression.confirmed(first, again) == [
        Check("s", "p95", True, "slow; measured again: quick"),
        Check("t", "p95", False, "slower; measured again: still"),
        *first[2:],
    ]


# ---- rules ---------------------------------------------------------------------------------------------------------


def test_the_rules_are_those_that_are_documented():
    assert Rules(em_margin=0.5, f1_margin=0.5, p95_ratio=1.1, memory_mib=256, false_alarms=0.001) == RULES
    replace(RULES, em_margin=0, f1_margin=0, memory_mib=0, p95_ratio=1, false_alarms=0.999)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"em_margin": -0.1}, "em_margin: must be between 0 and 100"),
        ({"em_margin": 100.1}, "em_margin: must be between 0 and 100"),
        ({"f1_margin": -0.1}, "f1_margin: must be between 0 and 100"),
        ({"f1_margin": 100.1}, "f1_margin: must be between 0 and 100"),
        ({"memory_mib": -0.1}, "memory_mib: must be between 0 and 1,000,000,000"),
        ({"memory_mib": 1e308}, "memory_mib: must be between 0 and 1,000,000,000"),
        ({"p95_ratio": 0.99}, "p95_ratio: must be between 1 and 1,000"),
        ({"p95_ratio": 1e308}, "p95_ratio: must be between 1 and 1,000"),
        ({"false_alarms": 0}, r"false_alarms: must be in \(0, 1\)"),
        ({"false_alarms": 1}, r"false_alarms: must be in \(0, 1\)"),
    ],
)
def test_rules_that_make_no_sense_are_refused(wrong, key):
    with pytest.raises(ValueError, match=key):
        replace(RULES, **wrong)
