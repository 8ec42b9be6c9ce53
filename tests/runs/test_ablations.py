"""A family's runs are what its file says; what may not be compared is refused; what is missing is said."""

import json
from dataclasses import replace

from common.config import load
from common.data.squad import Dataset
from common.errors import UserError
from common.runs import ablations, outcomes, record, sweeps
from tests.conftest import squad_file

import pytest


@pytest.fixture
def family(tmp_path):
    """Write a family's file beside its system; returns its path."""
    train, dev = (squad_file(tmp_path / f"{name}.json", 6, 4, seed) for seed, name in enumerate(("train", "dev")))
    (tmp_path / "tuned.yaml").write_text(
        f"system: tuned\nbase: {{path: somewhere}}\nlora: {{rank: 4}}\nruns: {tmp_path / 'runs'}\n"
        f"data: {{train: {train}, dev: {dev}}}\n"
    )

    def make(name: str = "family", **keys: object):
        keys = {
            "why": "does it?",
            "baseline": '""',
            "variants": "[lora.rank=8]",
            "system": tmp_path / "tuned.yaml",
            **keys,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items() if value is not None))
        return path

    return make


def outcome(job: sweeps.Job, right: int, n: int = 40, device: str = "a card", **must_match: object) -> outcomes.Outcome:
    """As of a finished run that has the first `right` questions of four articles right."""
    config = job.config
    about = {"device": {"name": device}}
    must = record.must_match(config, Dataset([], "x"), None) | {"questions": n} | must_match
    common = {"system": config.system, "seed": config.seed, "random_weights": False, "may_differ": about}
    common |= {"config": config.to_dict(), "must_match": must}
    rows = {
        str(i): {"em": (i * 7) % n < right, "f1": 1.0 if (i * 7) % n < right else 0.5, "article": f"a{i % 4}"}
        for i in range(n)
    }
    sizes = {"trained_weights": config.lora.rank, "frozen_weights": 1000, "questions_per_s": 10.0, "gpu_bytes": None}
    sizes |= {"peak": {"rss_bytes": 2**30}, "start_seconds": 5.0}
    em, f1 = (100 * sum(row[name] for row in rows.values()) / n for name in ("em", "f1"))
    scored = {"em": em, "f1": f1, "n": n, "questions_per_s": 20.0}
    records = [{**common, "kind": kind, "result": result} for kind, result in (("train", sizes), ("eval", scored))]
    return outcomes.Outcome(outcomes.name_of(config), *records, rows)


def done(planned: ablations.Planned, right: dict[str, list[int]], **more) -> dict[str, outcomes.Outcome]:
    """Outcomes of each variant's seeds."""
    found = [
        outcome(job, n, **more)
        for variant, of_seeds in right.items()
        for job, n in zip(planned.jobs[variant], of_seeds, strict=False)
    ]
    return {one.name: one for one in found}


def test_a_family_has_a_job_for_each_variant_and_seed_the_baseline_first(family):
    path = family(
        variants='["lora.rank=8", "lora.rank=8  train.lr=1e-3"]', seeds="[3, 5]", overrides="[train.epochs=2]"
    )
    planned = ablations.plan(path, ["train.warmup=0.5"])
    assert list(planned.jobs) == ["as it is", "lora.rank=8", "lora.rank=8 train.lr=1e-3"]
    assert planned.baseline == "as it is"
    assert [job.config.seed for job in planned.all_jobs] == [3, 5] * 3
    assert {(job.config.train.epochs, job.config.train.warmup) for job in planned.all_jobs} == {(2, 0.5)}
    assert [job.config.lora.rank for job in planned.all_jobs] == [4, 4, 8, 8, 8, 8]
    assert planned.part(2).all_jobs == [planned.all_jobs[0], planned.all_jobs[2]]
    assert len(planned.part(None).all_jobs) == 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"baseline": None}, 'missing key "baseline"'),
        ({"why": '" "'}, "why: must not be empty"),
        ({"variants": "[]"}, "variants: name at least one"),
        ({"seeds": "[1, 1]"}, "seeds: name each seed once"),
        ({"variants": "[lora.rank=4]"}, 'variant "lora.rank=4" is the same run as "as it is"; leave one out'),
        ({"variants": "[lora.rank=8, lora.rank=8]"}, 'variant "lora.rank=8" is the same run as "lora.rank=8"'),
        ({"variants": '["lora.rank=8", "train.lr=2e-4 lora.rank=8"]'}, 'is the same run as "lora.rank=8"'),
        ({"variants": "[eval.memory_budget_gib=3]"}, "is the same run as"),
        ({"variants": "[data.dev_questions=5]"}, "changes the baseline's data, so their answers cannot be compared"),
        ({"variants": "[prompt.order=question]"}, "changes the baseline's prompt"),
        ({"variants": "[window.context=100 window.stride=50]"}, "changes the baseline's window"),
        ({"variants": "[decode.spans=true]"}, "changes the baseline's decoding"),
        ({"variants": "[data.dev_questions=5]", "changes": "[data]"}, "is one of prompt, window, decoding"),
        ({"variants": "[lora.rnk=5]"}, 'unknown key "lora.rnk"'),
        ({"equal_within": "0"}, "equal_within: must be between"),
    ],
)
def test_what_is_wrong_with_a_family_is_named_before_anything_runs(family, keys, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        ablations.plan(family(**keys))


def test_a_family_may_be_about_what_runs_mostly_share(family):
    for what, words in (("prompt", "prompt.order=both"), ("decoding", "decode.spans=true")):
        planned = ablations.plan(family(variants=f"[{words}]", changes=f"[{what}]"))
        assert planned.baseline in planned.jobs


def test_a_system_without_an_adapter_has_no_variants_of_its_training(family, tmp_path):
    (tmp_path / "raw.yaml").write_text("system: raw\nbase: {path: somewhere}\n")
    with pytest.raises(UserError, match=r"raw\.yaml has no lora section"):
        ablations.plan(family(system=tmp_path / "raw.yaml"))


def test_what_is_left_is_each_run_without_an_outcome_once(family):
    ranks = ablations.plan(family("ranks", seeds="[0, 1]"))
    formats = ablations.plan(family("formats", variants="[base.quant=fp4, lora.rank=16]", seeds="[0, 1]"))
    waiting = ablations.left([formats, ranks], {})
    assert len(waiting) == 8  # four variants: the baseline is the same
    quants = [job.config.base.quant for job in waiting]
    assert quants == sorted(quants, reverse=True)  # those of one base together
    some = done(ranks, {"as it is": [10, 20]})
    assert len(ablations.left([formats, ranks], some)) == 6


def test_the_time_is_counted_by_rates_of_this_device(family):
    planned = ablations.plan(family(variants='["train.epochs=3", "early_stop.by=none data.train_share=0.5"]'))
    known = [r for o in done(planned, {"as it is": [10]}).values() for r in (o.train, o.evaluation)]
    assert ablations.seconds(planned.all_jobs, known, "another card") is None
    assert ablations.seconds(planned.all_jobs, known[:1], "a card") is None
    # 24 questions of train by 10 a second, 24 of dev by 20: once within the first two trainings, and after each
    expected = 24 / 10 * (1 + 3 + 0.5) + 24 / 20 * (2 + 2 + 1) + 3 * 2 * 5.0
    assert ablations.seconds(planned.all_jobs, known, "a card") == pytest.approx(expected)
    capped = ablations.plan(family(overrides="[train.max_steps=1, train.questions_per_step=8]"))
    assert ablations.seconds(capped.all_jobs[:1], known, "a card") == pytest.approx(0.8 + 2.4 + 10)


def test_what_can_be_found_is_told_by_pairs_of_the_family_else_by_seeds_of_its_system(family):
    planned = ablations.plan(family(seeds="[0, 1, 2]"))
    assert ablations.smallest(planned, {}) is None
    seeds = ablations.smallest(planned, done(planned, {"as it is": [10, 25]}))
    own = ablations.smallest(planned, done(planned, {"as it is": [10, 25], "lora.rank=8": [30]}))
    assert seeds
    assert own
    assert seeds != own


def test_only_outcomes_of_the_same_questions_are_pairs(family):
    planned = ablations.plan(family())
    some = done(planned, {"as it is": [10]}) | done(planned, {"lora.rank=8": [30]}, n=20)
    assert ablations.smallest(planned, some) is None


def test_a_table_has_what_was_found_and_says_what_is_missing(family):
    planned = ablations.plan(family(variants="[lora.rank=8, lora.rank=16]", seeds="[0, 1]"))
    assert ablations.section(planned, {}) is None
    found = ablations.section(planned, done(planned, {"as it is": [10, 12], "lora.rank=8": [40, 40]}))
    head, base, better, absent = (dict(zip(found["table"][0], row, strict=True)) for row in found["table"])
    assert head["variant"] == "variant"
    assert (base["seeds"], base["verdict"], base["EM gain [95 %]"]) == ("2 of 2", "baseline", "–")
    assert base["EM"].startswith("27.50 ± ")
    assert found["costs"][1:3] == [
        ["as it is", "0.40%", "10", "1.00 GiB RSS"],
        ["lora.rank=8", "0.80%", "10", "1.00 GiB RSS"],
    ]
    assert found["costs"][3] == ["lora.rank=16", "–", "–", "–"]
    assert better["verdict"] == "better"
    assert 0 <= float(better["p"]) < 0.05 < float(better["p equal"])
    assert better["EM gain [95 %]"].startswith("+72.50 [")
    assert (absent["seeds"], absent["EM"], absent["verdict"]) == ("0 of 2", "–", "–")
    assert found["missing"] == "Missing: lora.rank=16 (seed 0, 1)"
    assert found["plot"].startswith("<svg")
    assert [text.partition(":")[0] for text in found["sentences"]] == ["lora.rank=8"]


def test_an_outcome_of_other_data_prompt_or_scorer_is_refused(family):
    planned = ablations.plan(family(variants="[lora.rank=8, lora.rank=16]"))
    for key in ("data", "scorer", "prompt"):
        some = done(planned, {"as it is": [10], "lora.rank=16": [20]})
        some |= done(planned, {"lora.rank=8": [40]}, **{key: "another"})
        rows = {
            row[0]: dict(zip(ablations.COLUMNS, row, strict=True)) for row in ablations.section(planned, some)["table"]
        }
        assert rows["lora.rank=8"]["verdict"].startswith(f"refused: another {key} than the baseline's; ")
        assert rows["lora.rank=8"]["EM gain [95 %]"] == "–"
        assert rows["lora.rank=16"]["EM gain [95 %]"] != "–"


def test_a_train_set_that_was_changed_in_place_is_refused(family):
    planned = ablations.plan(family(variants="[lora.rank=8, lora.rank=16]"))
    some = done(planned, {"as it is": [10], "lora.rank=8": [40], "lora.rank=16": [20]})
    for name, one in some.items():
        train = "old" if one.train["config"]["lora"]["rank"] != 8 else "new"
        result = {**one.train["result"], "identity": {"train": train}}
        some[name] = replace(one, train={**one.train, "result": result})
    rows = {row[0]: row[-1] for row in ablations.section(planned, some)["table"]}
    assert rows["lora.rank=8"].startswith("refused: another train set than the baseline's; ")
    assert not rows["lora.rank=16"].startswith("refused")


def test_seeds_of_a_baseline_on_other_questions_are_refused_and_no_pairs(family):
    planned = ablations.plan(family(seeds="[0, 1]"))
    first, second = (done(planned, {"as it is": [10, 12], "lora.rank=8": [20, 22]}, n=n) for n in (40, 20))
    mixed = {name: (second if one.evaluation["seed"] else first)[name] for name, one in first.items()}
    found = ablations.section(planned, mixed)
    assert found["table"][1][-1].startswith("refused: another questions than the baseline's")
    assert found["plot"] == ""
    other = ablations.plan(family("other", variants="[lora.rank=16]", baseline="lora.rank=32"))
    renamed = {f"{name} {n}": one for n, some in enumerate((first, second)) for name, one in some.items()}
    assert ablations.smallest(other, renamed)


@pytest.mark.parametrize("word", ["seed=5", "adapter=x", "system=y", "runs=z"])
def test_what_is_none_of_a_familys_settings_is_refused(family, word):
    for keys in ({"baseline": word}, {"variants": f"[{word}]"}, {"overrides": f"[{word}]"}):
        with pytest.raises(UserError, match=f"{word}: .* is none of a family's settings"):
            ablations.plan(family(**keys))


def test_random_weights_have_speed_and_memory_and_no_accuracy(family):
    planned = ablations.plan(family())
    some = {
        name: replace(o, rows={}, evaluation={**o.evaluation, "random_weights": True})
        for name, o in done(planned, {"as it is": [1], "lora.rank=8": [2]}).items()
    }
    found = ablations.section(planned, some)
    assert "random weights: no accuracy" in found["about"]
    assert [row[2] for row in found["table"][1:]] == ["–", "–"]
    assert found["costs"][1][-1] == "1.00 GiB RSS"
    assert found["plot"] == ""


def test_pages_are_of_systems_that_have_outcomes_the_familys_own_first():
    own = ablations.plan(sweeps.find("rank", "family"))
    other = ablations.plan(sweeps.find("rank", "family"), (), "qlora7b")
    some = done(own, {own.baseline: [10]}) | done(other, {other.baseline: [20]})
    strange = replace(next(iter(some.values())), name="x")
    strange = replace(strange, evaluation={**strange.evaluation, "system": "no system of configs"})
    found = {(s["name"], s["of"]): s for s in ablations.pages(some | {"x": strange})}
    assert list(found)[:2] == [("base", ""), ("base", " (qlora7b)")]  # the baseline is that of other families, too
    assert found["rank", ""]["again"] == "make ablate FAMILY=rank"
    assert found["rank", " (qlora7b)"]["again"] == "make ablate FAMILY=rank MODEL=qlora7b"
    assert found["rank", " (qlora7b)"]["id"] == "rank-qlora7b"
    assert {s["of"] for s in ablations.pages(some, {"qlora7b", "smollm2-raw"})} == {" (qlora7b)"}
    assert ablations.pages({}) == []


@pytest.mark.parametrize("name", ablations.names())
def test_every_family_of_the_repository_can_be_planned_for_its_system_and_others(name):
    planned = ablations.plan(sweeps.find(name, "family"))
    assert len(planned.jobs) >= 2
    for system in ("qlora7b", "tinyllama1b-qlora"):
        assert len(ablations.plan(planned.path, (), system).jobs) == len(planned.jobs)


def test_a_variant_that_a_system_cannot_take_is_named_with_its_family():
    with pytest.raises(
        UserError, match=r'window.yaml: variant "window.context=32 .*" of smollm2-qlora: .* tokens are left'
    ):
        ablations.plan(sweeps.find("window", "family"), (), "smollm2-qlora")


def test_families_are_named_and_a_mistyped_one_says_which_is_meant():
    assert {"rank", "targets", "dropout", "base", "window", "share", "epochs", "selection", "order"} <= set(
        ablations.names()
    )
    with pytest.raises(UserError, match='unknown family "rnak" — did you mean "rank"'):
        sweeps.find("rnak", "family")


def test_the_baseline_of_the_repository_is_one_epoch_with_the_paragraph_first():
    config = load("smollm2-ablation")
    assert (config.train.epochs, config.prompt.order, config.lora.rank) == (1, "context", 16)
    assert json.dumps(config.to_dict())
