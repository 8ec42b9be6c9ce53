"""A sweep's runs are what its file says, each once, and what is done is what records say."""

from common.config import Rules, Sweep
from common.data.squad import Dataset
from common.errors import UserError
from common.runs import preflight, record, sweeps
from tests.conftest import ROOT

import pytest


@pytest.fixture
def sweep(tmp_path):
    """Write a sweep's YAML beside two systems, one without an adapter; returns its path."""

    def make(**keys: object):
        for name, lora in (("raw", "null"), ("tuned", "{rank: 4}")):
            (tmp_path / f"{name}.yaml").write_text(
                f"system: {name}\nbase: {{path: somewhere}}\nlora: {lora}\nruns: {tmp_path / 'runs'}\n"
            )
        keys = {"systems": [str(tmp_path / "raw.yaml"), str(tmp_path / "tuned.yaml")], **keys}
        file = tmp_path / "sweep.yaml"
        file.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
        return file

    return make


def finish(config, kind: str, seconds: float = 60.0, **result: float):
    run = record.new_run(config, kind)
    data = Dataset([], "x.json")
    record.write(run, config, kind, data, {"name": "a test"}, {"seconds": seconds, **result})
    return run


def test_a_plan_has_every_seed_and_variant_and_what_has_no_adapter_once(sweep):
    planned, _ = sweeps.plan(sweep(seeds=[0, 1], variants='["", "train.lr=1e-3"]'), ["data.dev_questions=5"])
    names = [(job.config.system, job.config.seed, job.config.train.lr) for job in planned]
    assert names == [("raw", 0, 2e-4), *(("tuned", seed, lr) for seed in (0, 1) for lr in (2e-4, 1e-3))]
    assert all(job.config.data.dev_questions == 5 for job in planned)


def test_an_override_can_be_of_one_system(sweep):
    file = sweep(systems="[raw7b, qlora7b]", overrides='["raw7b:base.quant=none"]')
    (raw, tuned), _ = sweeps.plan(file, ["qlora7b:train.lr=1e-3", "data.dev_questions=5"])
    assert (raw.config.base.quant, tuned.config.base.quant) == ("none", "nf4")
    assert (tuned.config.train.lr, raw.config.data.dev_questions) == (1e-3, 5)
    file = sweep(systems="[raw7b, qlora7b]", variants='["", "qlora7b:lora.rank=64 qlora7b:system=wide"]')
    assert [job.config.system for job in sweeps.plan(file)[0]] == ["raw7b", "qlora7b", "wide"]
    with pytest.raises(UserError, match="raw8b is none of raw7b, qlora7b"):
        sweeps.plan(file, ["raw8b:base.quant=none"])


def test_shots_are_filled_in_as_the_scripts_do(sweep, tmp_path, train_file):
    file = sweep(
        kinds="[eval]", overrides=f'["data.train={train_file}", "prompt.shots=1"]', systems=f"[{tmp_path / 'raw.yaml'}]"
    )
    (job,), chosen = sweeps.plan(file)
    assert "Answer:" in job.config.prompt.before
    finish(preflight.with_shots(sweeps.load(job.system, job.overrides)), "eval")
    assert sweeps.left(job, chosen.kinds) == []


def test_a_variant_that_changes_more_than_training_is_one_of_systems_without_an_adapter_too(sweep):
    planned, _ = sweeps.plan(sweep(variants='["", "prompt.order=both train.lr=1e-3"]'))
    assert [(job.config.system, job.config.prompt.order) for job in planned] == [
        ("raw", "context"),
        ("tuned", "context"),
        ("raw", "both"),
        ("tuned", "both"),
    ]


def test_what_follows_a_training_answers_with_its_adapter_whatever_else_was_trained(sweep):
    (_, one, other), chosen = sweeps.plan(sweep(variants='["", "train.lr=1e-3"]'))
    assert [kind for kind, _ in sweeps.left(one, chosen.kinds)] == ["train", "eval"]
    run = finish(one.config, "train")
    finish(other.config, "train")  # later, of the same system and seed
    ((kind, words),) = sweeps.left(one, chosen.kinds)
    assert (kind, words[-1]) == ("eval", f"adapter={run / 'best'}")
    scored = sweeps.load(one.system, words)
    finish(scored, "eval")
    assert sweeps.left(one, chosen.kinds) == []
    assert [kind for kind, _ in sweeps.left(other, chosen.kinds)] == ["eval"]
    finish(one.config, "train")  # anew: what was scored was another adapter
    assert [kind for kind, _ in sweeps.left(one, chosen.kinds)] == ["eval"]


def test_stored_adapters_can_answer(sweep, tmp_path):
    elsewhere = tmp_path / "runs"
    tuned = sweeps.load(str(sweep().parent / "tuned.yaml"), ["seed=1"])
    run = finish(tuned, "train")
    (run / "best").mkdir()
    (run / "best" / "adapter_config.json").write_text("{}")
    file = sweep(seeds=[1], kinds="[eval, bench]", adapters=str(elsewhere))
    (raw, found), chosen = sweeps.plan(file, [f"runs={tmp_path / 'new'}"])
    assert (raw.config.adapter, found.config.adapter) == (None, str(run / "best"))
    assert [words[-1] for _, words in sweeps.left(found, chosen.kinds)] == [f"adapter={run / 'best'}"] * 2
    with pytest.raises(UserError, match=r"seed 0\) has no finished training"):
        sweeps.plan(sweep(kinds="[eval]", adapters=str(elsewhere)))
    shapes = sweep(kinds="[bench]", adapters=str(elsewhere), overrides="[base.random_weights=true, lora.rank=8]")
    assert all(job.config.adapter is None for job in sweeps.plan(shapes)[0])  # random weights need none


@pytest.mark.parametrize("key", ["train.lr=1e-3", "lora.rank=8", "early_stop.patience=9", "data.train_share=0.1"])
def test_what_only_a_training_reads_makes_no_second_run_of_a_system_without_an_adapter(sweep, key):
    planned, _ = sweeps.plan(sweep(variants=f'["", "{key}"]'))
    assert [(job.config.system, job.variant) for job in planned] == [("raw", ""), ("tuned", ""), ("tuned", key)]
    planned, _ = sweeps.plan(sweep(), [key])
    assert [job.overrides for job in planned] == [("seed=0",), (key, "seed=0")]
    assert planned[0].config.lora is None


def test_a_job_is_known_by_its_system_variant_and_seed(sweep, tmp_path):
    (raw, _), _ = sweeps.plan(sweep(seeds="[3]"))
    assert raw.name == f"{tmp_path / 'raw.yaml'} seed=3"
    *_, last = sweeps.plan(sweep(seeds="[3, 4]", variants='["", "train.lr=1e-3  lora.rank=8"]'))[0]
    assert last.name == f"{tmp_path / 'tuned.yaml'} train.lr=1e-3 lora.rank=8 seed=4"
    assert last.overrides == ("train.lr=1e-3", "lora.rank=8", "seed=4")


def test_what_is_left_out_of_a_sweep_has_its_default(tmp_path):
    (tmp_path / "sweep.yaml").write_text("systems: [smollm2-qlora]\n")
    (job,), chosen = sweeps.plan(tmp_path / "sweep.yaml")
    assert chosen == Sweep(("smollm2-qlora",), (0,), ("",), (), ("train", "eval"), None, Rules())
    assert job.config.seed == 0


def test_adapters_that_are_named_are_not_looked_for(sweep, tmp_path):
    finish(sweeps.load(str(sweep().parent / "tuned.yaml")), "train")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    file = sweep(
        kinds="[train, eval, bench]", adapters=str(tmp_path / "runs"), overrides=f"[tuned:adapter={tmp_path}/mine]"
    )
    file.write_text(file.read_text().replace("tuned:adapter", f"{tmp_path}/tuned.yaml:adapter"))
    (raw, tuned), chosen = sweeps.plan(file, [f"runs={tmp_path / 'new'}"])
    assert (raw.config.adapter, tuned.config.adapter) == (None, f"{tmp_path}/mine")
    assert [word for word in tuned.overrides if word.startswith("adapter")] == [f"adapter={tmp_path}/mine"]
    assert [kind for kind, _ in sweeps.left(tuned, chosen.kinds)] == ["eval", "bench"]  # it needs no training


def test_a_colon_or_an_equals_sign_in_a_value_is_no_system(sweep):
    file = sweep(systems="[raw7b, qlora7b]", overrides='["runs=a:b=c", "qlora7b:base.path=x=y:z"]')
    (raw, tuned), _ = sweeps.plan(file, ["base.revision=main"])
    assert raw.overrides == ("runs=a:b=c", "base.revision=main", "seed=0")
    assert tuned.overrides == ("runs=a:b=c", "base.path=x=y:z", "base.revision=main", "seed=0")
    with pytest.raises(UserError, match=r"a:b:base\.path=x: a is none of raw7b, qlora7b"):
        sweeps.plan(file, ["a:b:base.path=x"])
    with pytest.raises(UserError, match=r'unknown key "raw7b"'):
        sweeps.plan(file, ["raw7b=1"])


def test_steps_come_in_the_order_of_work_whatever_order_they_are_named_in(sweep):
    (raw, tuned), chosen = sweeps.plan(sweep(kinds="[bench, eval, train]"))
    assert [kind for kind, _ in sweeps.left(tuned, chosen.kinds)] == ["train", "eval", "bench"]
    assert [kind for kind, _ in sweeps.left(raw, chosen.kinds)] == ["eval", "bench"]
    finish(raw.config, "eval")
    assert sweeps.left(raw, chosen.kinds) == [("bench", ["seed=0"])]


def test_an_unfinished_run_is_still_to_do(sweep):
    (raw, tuned), chosen = sweeps.plan(sweep(kinds="[eval]"))
    record.new_run(raw.config, "eval")
    assert [kind for kind, _ in sweeps.left(raw, chosen.kinds)] == ["eval"]
    assert [kind for kind, _ in sweeps.left(tuned, chosen.kinds)] == ["eval"], "of whatever was trained before"


def test_time_is_expected_from_what_is_on_record(sweep):
    planned, chosen = sweeps.plan(sweep(seeds=[0, 1, 2]))
    assert sweeps.expected_seconds(planned, chosen.kinds) == (0, 7)
    finish(planned[1].config, "train", 100)
    finish(planned[2].config, "train", 300)
    assert sweeps.expected_seconds(planned, chosen.kinds) == (200, 4)  # one training, and evaluations never seen
    finish(planned[2].config, "train", 500, start_seconds=40.5)  # until its first step
    assert sweeps.expected_seconds(planned, chosen.kinds) == (300, 4)  # the median of 100, 300 and 540.5
    finish(planned[2].config, "train", 500, start_seconds=40.5)
    assert sweeps.expected_seconds(iter(planned), chosen.kinds) == ((300 + 540.5) / 2, 4)
    finish(planned[0].config, "eval", 7)
    assert sweeps.expected_seconds(planned, chosen.kinds) == (420.25, 3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"adapters": "''"}, "sweep.yaml.*adapters: must not be empty"),
        ({"seeds": []}, "sweep.yaml.*seeds: name at least one"),
        ({"sedes": [1]}, 'sweep.yaml:2: unknown key "sedes" — did you mean "seeds"'),
        ({"kinds": "[trian]"}, "is one of train, eval, bench"),
        ({"variants": '["train.lrr=1"]'}, 'unknown key "train.lrr"'),
        ({"systems": "[qlora8b]"}, "unknown MODEL"),
    ],
)
def test_a_mistake_in_a_sweep_is_named(sweep, keys, message):
    with pytest.raises(UserError, match=message):
        sweeps.plan(sweep(**keys))


def test_a_sweep_is_found_by_name_or_path(tmp_path):
    assert sweeps.find("seeds") == ROOT / "configs" / "sweeps" / "seeds.yaml"
    for name in ("mine.yaml", "mine.yml"):
        (tmp_path / name).touch()
        assert sweeps.find(str(tmp_path / name)) == tmp_path / name
    for name in ("sedes", str(tmp_path / "absent.yaml")):
        with pytest.raises(UserError, match="known: lengths, orders, recipe, revalidate, seeds"):
            sweeps.find(name)


@pytest.mark.parametrize("name", sorted(file.stem for file in (sweeps.CONFIGS / "sweeps").glob("*.yaml")))
def test_every_sweep_that_comes_with_the_repo_can_be_planned(name):
    planned, _ = sweeps.plan(sweeps.find(name))
    assert planned
    assert len({job.name for job in planned}) == len(planned)
