"""Each setting decides what it should: the hashes of runs, and which adapter answers. Tables, with every key."""

import dataclasses
import functools
import json

from common.config import CONFIGS, Config, later, load, with_defaults
from common.config_file import known_keys
from common.data.squad import Dataset
from common.errors import UserError
from common.runs import adapters, record

import pytest

EVERY = (None, "train", "eval", "bench")
COMES_AFTER = (None, "bench")  # what only a timing reads
NOT_TRAIN = (None, "eval", "bench")  # memory that a training goes on with
ASKED = (None, "eval", "bench")  # how answers are decoded; a training evaluates freely
NONE = ()

# key: (another value, the kinds of run whose hash it changes, the adapter that answers where only this differs)
# "refused": none, it was trained for something else; "after": one that was trained exactly so is preferred; "newest":
# it makes no difference to a training
KEYS = {
    "system": ("other", EVERY, "refused"),
    "base.path": ("other", EVERY, "refused"),
    "base.revision": ("v2", EVERY, "refused"),
    "base.tokenizer": ("other", EVERY, "refused"),
    "base.random_weights": ("true", EVERY, "refused"),
    "base.quant": ("fp4", EVERY, "refused"),
    "base.double_quant": ("false", EVERY, "refused"),
    "base.dtype": ("fp16", EVERY, "newest"),
    "base.min_gpu_gib": ("8", EVERY, "newest"),
    "seed": ("1", EVERY, "refused"),
    "lora.rank": ("8", EVERY, "refused"),
    "lora.alpha": ("8", EVERY, "refused"),
    "lora.dropout": ("0.1", EVERY, "refused"),
    "lora.targets": ("[q_proj]", EVERY, "refused"),
    "api.url": ("http://other", EVERY, None),
    "api.key": ("OTHER", NONE, None),
    "api.concurrency": ("9", NONE, None),
    "api.tries": ("9", NONE, None),
    "api.timeout_s": ("9", NONE, None),
    "api.usd_per_million_read": ("9", NONE, None),
    "api.usd_per_million_written": ("9", NONE, None),
    "api.max_requests": ("9", NONE, None),
    "api.max_cost_usd": ("9", NONE, None),
    "api.omit": ("[stop]", NONE, None),
    "api.logprobs": ("true", EVERY, None),
    "adapter": ("other", EVERY, "newest"),
    "data.train": ("other.json", EVERY, "after"),
    "data.dev": ("other.json", EVERY, "newest"),
    "data.train_paragraphs": ("9", EVERY, "after"),
    "data.dev_questions": ("9", EVERY, "newest"),
    "data.fix_offsets": ("true", EVERY, "after"),
    "data.train_share": ("0.5", EVERY, "after"),
    "data.train_unit": ("question", EVERY, "after"),
    "data.split": ("heldout", EVERY, "newest"),
    "window.context": ("300", EVERY, "after"),
    "window.question": ("32", EVERY, "after"),
    "window.answer": ("48", EVERY, "after"),
    "window.overflow": ("chunk", EVERY, "after"),
    "window.stride": ("100", EVERY, "after"),
    "window.tokenizer": ("other", EVERY, "after"),
    "prompt.order": ("question", EVERY, "refused"),
    "prompt.chat": ("true", EVERY, None),
    "prompt.shots": ("2", EVERY, None),
    "prompt.shots_seed": ("2", EVERY, "newest"),
    "prompt.earlier": ("true", EVERY, None),
    "prompt.before": ("before", EVERY, None),
    "prompt.template": ('"{context} {question}"', EVERY, "refused"),
    "decode.spans": ("true", ASKED, "newest"),
    "decode.whole_words": ("true", ASKED, None),
    "decode.max_tokens": ("9", ASKED, "newest"),
    "decode.stop": ("eos", ASKED, "newest"),
    "decode.snap": ("true", ASKED, "newest"),
    "decode.nbest": ("9", ASKED, None),
    "decode.choose": ("risk", ASKED, None),
    "decode.length_exponent": ("0.5", ASKED, None),
    "train.lr": ("9", EVERY, "after"),
    "train.epochs": ("9", EVERY, "after"),
    "train.questions_per_step": ("9", EVERY, "after"),
    "train.pack_tokens": ("512", NOT_TRAIN, "newest"),
    "train.memory_budget_gib": ("9", NOT_TRAIN, "newest"),
    "train.loss": ("question", EVERY, "after"),
    "train.label_smoothing": ("0.2", EVERY, "after"),
    "train.share_prefixes": ("false", EVERY, "after"),
    "train.fused": ("false", EVERY, "after"),
    "train.warmup": ("0.2", EVERY, "after"),
    "train.weight_decay": ("0.2", EVERY, "after"),
    "train.average": ("0.2", EVERY, "after"),
    "train.max_grad_norm": ("0.2", EVERY, "after"),
    "train.gradient_checkpointing": ("false", EVERY, "after"),
    "train.eval_every": ("9", EVERY, "after"),
    "train.max_steps": ("9", EVERY, "after"),
    "early_stop.patience": ("9", EVERY, "after"),
    "early_stop.min_delta": ("0.2", EVERY, "after"),
    "early_stop.split": ("heldout", EVERY, "after"),
    "early_stop.heldout_share": ("0.2", EVERY, "after"),
    "early_stop.questions": ("9", EVERY, "after"),
    "early_stop.by": ("loss", EVERY, "after"),
    "ask.least": ("0.5", NONE, "newest"),
    "eval.engine": ("plain", EVERY, "newest"),
    "eval.memory_budget_gib": ("9", NOT_TRAIN, "newest"),
    "eval.pass_tokens": ("512", NOT_TRAIN, "newest"),
    "eval.parts": ("9", NOT_TRAIN, "newest"),
    "bench.queries": ("9", COMES_AFTER, "newest"),
    "bench.warmup_queries": ("9", COMES_AFTER, "newest"),
    "bench.processes": ("9", COMES_AFTER, "newest"),
    "runs": ("other", NONE, None),
    "tracker": ("wandb", NONE, "newest"),
}
DEFAULTS = {
    "system": "any",
    "base": {
        "path": "any",
        "revision": "main",
        "tokenizer": None,
        "random_weights": False,
        "quant": "nf4",
        "double_quant": True,
        "dtype": "auto",
        "min_gpu_gib": 0.0,
    },
    "seed": 0,
    "lora": None,
    "api": None,
    "adapter": None,
    "data": {
        "train": "rajpurkar/squad",
        "dev": "rajpurkar/squad",
        "train_paragraphs": None,
        "dev_questions": None,
        "fix_offsets": False,
        "train_share": 1.0,
        "train_unit": "article",
        "split": "dev",
    },
    "window": {"context": 416, "question": 64, "answer": 32, "overflow": "truncate", "stride": 208, "tokenizer": None},
    "prompt": {
        "order": "context",
        "chat": False,
        "shots": 0,
        "shots_seed": 0,
        "earlier": False,
        "before": "",
        "template": "",
    },
    "train": {
        "lr": 2e-4,
        "epochs": 1.0,
        "questions_per_step": 64,
        "pack_tokens": None,
        "memory_budget_gib": "auto",
        "loss": "token",
        "label_smoothing": 0.0,
        "share_prefixes": True,
        "fused": True,
        "warmup": 0.03,
        "weight_decay": 0.0,
        "average": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": True,
        "eval_every": 250,
        "max_steps": None,
    },
    "early_stop": {
        "patience": 4,
        "min_delta": 0.1,
        "split": "dev",
        "heldout_share": 0.05,
        "questions": None,
        "by": "em",
    },
    "decode": {
        "spans": False,
        "whole_words": False,
        "max_tokens": None,
        "stop": "line",
        "snap": False,
        "nbest": None,
        "choose": "mass",
        "length_exponent": 0.0,
    },
    "ask": {"least": 0.0},
    "eval": {"engine": "auto", "memory_budget_gib": 12.0, "pass_tokens": None, "parts": None},
    "bench": {"queries": 1000, "warmup_queries": 10, "processes": 3},
    "runs": "runs",
    "tracker": None,
}
OPTIONAL = {
    "lora": {
        "rank": 16,
        "alpha": 16.0,
        "dropout": 0.0,
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "api": {
        "url": "http://any",
        "key": "API_KEY",
        "concurrency": 8,
        "tries": 8,
        "timeout_s": 60.0,
        "usd_per_million_read": 0.0,
        "usd_per_million_written": 0.0,
        "max_requests": None,
        "max_cost_usd": None,
        "omit": [],
        "logprobs": False,
    },
}
TUNED = ("train.memory_budget_gib=8", "lora={}")
HOSTED = ("window.tokenizer=any", "api.url=http://any", "api.usd_per_million_read=1")


@functools.cache
def hashes(model: str, *overrides: str) -> dict[str | None, str]:
    config = load(model, overrides)
    return {kind: config.hash(kind) for kind in EVERY}


def test_the_table_has_every_key():
    assert sorted(KEYS) == sorted(known_keys(Config))


def needs(key: str) -> tuple[str, ...]:
    """Overrides without which a key of `decode` is refused."""
    spans, nbest = "decode.spans=true", "decode.nbest=8"
    needed = {"whole_words": (spans,), "nbest": (spans,), "choose": (spans, nbest), "length_exponent": (spans, nbest)}
    return needed.get(key.removeprefix("decode."), ())


@pytest.mark.parametrize("key", KEYS)
def test_a_hash_changes_with_what_decides_its_kind_of_run_and_with_nothing_else(key):
    value, kinds, _ = KEYS[key]
    section = key.partition(".")[0]
    words = {"api": HOSTED, "prompt": (), "decode": needs(key)}.get(section, TUNED)
    before, after = hashes("some/model", *words), hashes("some/model", *words, f"{key}={value}")
    assert [kind for kind in EVERY if before[kind] != after[kind]] == list(kinds)


def test_a_training_without_a_budget_is_another_one_for_its_layers_are():
    with_budget, without = (load("qlora7b", [f"train.memory_budget_gib={b}"]).hash("train") for b in ("24", "null"))
    assert with_budget == load("qlora7b").hash("train") != without


def test_hashes_are_what_they_were_or_no_run_that_exists_is_found():
    # a budget of 8 became auto: trainings are found as before, nothing looks for the others
    assert hashes("qlora7b", "train.memory_budget_gib=8") == {
        None: "fd035cf7",
        "train": "b890410b",
        "eval": "56773a21",
        "bench": "fd035cf7",
    }
    assert hashes("api8b") == {None: "96885afa", "train": "2d6f5198", "eval": "9d828e67", "bench": "96885afa"}
    assert hashes("smollm2-qlora", "train.memory_budget_gib=8", "seed=3", "bench.queries=9") == {
        None: "eb98369d",
        "train": "3532ccd7",
        "eval": "ff85be66",
        "bench": "eb98369d",
    }


HASHES = {  # of each configs/*.yaml: any run, train, eval, bench; for good, since published runs are found by them
    "api8b": "96885afa 2d6f5198 9d828e67 96885afa",
    "qlora7b": "531aa118 b890410b f6e15030 531aa118",
    "qlora7b-fast": "55e5063c 4af44c33 e1db87ad 55e5063c",
    "qlora7b-t4": "fd9fba95 06aa46d7 3a0e191e fd9fba95",
    "raw7b": "256f909b a2db2fce 508d8ef8 256f909b",
    "smollm2-ablation": "819d9789 312e3a55 7d014d77 819d9789",
    "smollm2-qlora": "dd562cd0 7e89ca4e fc911ad3 dd562cd0",
    "smollm2-raw": "ebb564e3 e3a598f6 a0e01dca ebb564e3",
    "tinyllama1b": "2d79e094 c124b611 0926be1b 2d79e094",
    "tinyllama1b-qlora": "f2038163 df15eee9 791926d0 f2038163",
}


@pytest.mark.parametrize("system", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_hashes_of_every_system_stay(system):
    assert " ".join(hashes(system).values()) == HASHES[system]


@pytest.mark.parametrize("section", ["train", "eval", "window", "prompt", "lora"])
def test_a_key_that_is_added_later_changes_a_hash_only_where_it_is_set(section):
    config = load("qlora7b")
    old = getattr(config, section)
    newer = dataclasses.make_dataclass("Newer", [("dummy", int, later(3))], bases=(type(old),), frozen=True)
    unset = dataclasses.replace(config, **{section: newer(**vars(old))})
    other = dataclasses.replace(config, **{section: newer(**vars(old), dummy=4)})
    for kind in EVERY:
        assert unset.hash(kind) == config.hash(kind) != other.hash(kind)
    data = Dataset([], "dev.json")
    was = record.must_match(config, data, None)
    assert record.must_match(unset, data, None) == was
    differ = {key for key, value in record.must_match(other, data, None).items() if value != was.get(key)}
    assert differ == ({"window"} if section == "window" else set())


def test_defaults_are_what_they_were_or_records_that_leave_them_out_mean_something_else():
    assert with_defaults({}) == DEFAULTS
    assert load("qlora7b", ["lora={}"]).to_dict()["lora"] == OPTIONAL["lora"]
    assert load("smollm2-raw", [*HOSTED[:2]]).to_dict()["api"] == OPTIONAL["api"]
    older = with_defaults({"system": "s", "seed": 3, "base": {"path": "p"}, "lora": {"rank": 8}, "train": {"lr": 1.0}})
    assert older == DEFAULTS | {
        "system": "s",
        "seed": 3,
        "base": DEFAULTS["base"] | {"path": "p"},
        "lora": {"rank": 8},
        "train": DEFAULTS["train"] | {"lr": 1.0},
    }


def trained(runs, name: str, created: str, *overrides: str):
    """A finished training's folder, as far as choosing an adapter looks at it."""
    config = load("some/model", [*TUNED, *overrides])
    folder = runs / name
    folder.mkdir(parents=True)
    kept = {"schema": 2, "kind": "train", "system": config.system, "seed": config.seed, "created": created}
    must, may = {"window": {"tokenizer": None}}, {}
    (folder / "record.json").write_text(
        json.dumps({**kept, "must_match": must, "may_differ": may, "config": config.to_dict()})
    )
    return folder


@pytest.mark.parametrize("key", [key for key, (_, _, answers) in KEYS.items() if answers])
def test_an_adapter_answers_where_it_was_trained_for_what_is_asked(key, tmp_path):
    value, _, expected = KEYS[key]
    own = trained(tmp_path, "own", "2026-01-01T00:00:00+00:00")
    other = trained(tmp_path, "other", "2026-01-02T00:00:00+00:00", f"{key}={value}")
    asked = load("some/model", [*TUNED, f"runs={tmp_path}"])
    found = adapters.newest(asked)
    assert found == (other if expected == "newest" else own) / "best"
    (own / "record.json").unlink()
    if expected == "refused":
        with pytest.raises(UserError, match="no finished training"):
            adapters.newest(asked)
    else:
        assert adapters.newest(asked) == other / "best"
