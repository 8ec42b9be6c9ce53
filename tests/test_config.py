"""A configuration is exactly what its file and overrides say, or it is refused with file, line and key."""

import ast
import contextlib
import dataclasses
import typing

from common.config import CONFIGS, Base, Config, Window, apart_from_memory, find, flat, load
from common.config_file import known_keys
from common.errors import UserError
from tests.conftest import ROOT

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

MINIMAL = "system: x\nbase:\n  path: some/model\n"
HOSTED = ("window.tokenizer=any", "api.url=http://any")
ALIKE = {"base": (), "api": (*HOSTED, "api.usd_per_million_read=1"), "lora": ("lora.rank=4",)}


@pytest.fixture
def config(tmp_path):
    """Write YAML after the minimal keys, and load it with overrides."""

    def load_text(text: str = "", *overrides: str, head: str = MINIMAL) -> Config:
        path = tmp_path / "t.yaml"
        path.write_text(head + text)
        return load(str(path), overrides)

    return load_text


def beside(key: str) -> tuple[str, ...]:
    """What a model as it is needs so that this key may be set."""
    searched = ("decode.spans=true", "decode.nbest=8")
    needed = ALIKE | {"decode.nbest": searched[:1], "decode.length_exponent": searched}
    return needed.get(key) or needed.get("lora" if key == "adapter" else key.partition(".")[0], ())


def refusal(key: str, value: str) -> str | None:
    """The line that an override is refused with; None where it is taken."""
    try:
        load("some/model", [*beside(key), f"{key}={value}"])
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_of_the_repo_loads_and_is_named_as_its_file(path):
    assert load(path.stem).system == path.stem
    assert find(path.stem) == path


# ---- what is wrong is named with file, line and key ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("lora:\n  rnk: 8\n", '5: unknown key "lora.rnk" — did you mean "lora.rank"?'),
        ("lora: {rnk: 8}\n", '4: unknown key "lora.rnk" — did you mean "lora.rank"?'),
        ("trian:\n  lr: 1\n", '5: unknown key "trian" — did you mean "train"?'),
        ("xyzzy: 1\n", '4: unknown key "xyzzy"'),
        ("train:\n  seed: 1\n", '5: unknown key "train.seed" — did you mean "seed"?'),
        ("seed: 1\nseed: 2\n", '5: key "seed" stands here twice'),
        ("lora:\n  rank: 1\n  rank: 2\n", '6: key "lora.rank" stands here twice'),
        ("train:\n  lr: fast\n", '5: "train.lr" takes a number, not "fast"'),
        ("train:\n  lr: '2e-4'\n", '5: "train.lr" takes a number, not "2e-4"'),
        ("train:\n  lr: .nan\n", '5: "train.lr" takes a number, not ".nan"'),
        ("train:\n  lr: .inf\n", '5: "train.lr" takes a number, not ".inf"'),
        ("train:\n  lr: 1e309\n", '5: "train.lr" takes a finite number'),
        ("train:\n  lr: 1_0\n", '5: "train.lr" takes a number, not "1_0"'),
        ("train:\n  lr: ٣\n", '5: "train.lr" takes a number, not "٣"'),
        ("train:\n  lr: ３.５\n", '5: "train.lr" takes a number, not "３.５"'),
        ("train:\n  lr: 1e٣\n", '5: "train.lr" takes a number, not "1e٣"'),
        ("train:\n  lr: .\n", '5: "train.lr" takes a number, not "."'),
        ("train:\n  lr: true\n", '5: "train.lr" takes a number, not "true"'),
        ("seed: 016\n", '4: "seed" takes a whole number, not "016"'),
        ("seed: 1.0\n", '4: "seed" takes a whole number, not "1.0"'),
        ("seed: 0x10\n", '4: "seed" takes a whole number, not "0x10"'),
        ("seed: 1_000\n", '4: "seed" takes a whole number, not "1_000"'),
        ("seed: '1'\n", '4: "seed" takes a whole number, not "1"'),
        ("seed: ٣\n", '4: "seed" takes a whole number, not "٣"'),
        ("seed: ３\n", '4: "seed" takes a whole number, not "３"'),
        ("seed: true\n", '4: "seed" takes a whole number, not "true"'),
        ("seed: null\n", '4: "seed" takes a whole number, not "null"'),
        ("seed:\n", '4: "seed" takes a whole number, not ""'),
        (f"seed: {'9' * 18}\n", "4: seed: must be in [0, 2^32)"),
        (f"seed: -{'9' * 18}\n", "4: seed: must be in [0, 2^32)"),
        (f"seed: {'9' * 19}\n", '4: "seed" takes a number of at most 18 digits'),
        (f"seed: {'9' * 5000}\n", '4: "seed" takes a number of at most 18 digits'),
        ("data:\n  fix_offsets: yes\n", '5: "data.fix_offsets" takes true or false, not "yes"'),
        ("data:\n  fix_offsets: 'true'\n", '5: "data.fix_offsets" takes true or false, not "true"'),
        ("data:\n  fix_offsets: 1\n", '5: "data.fix_offsets" takes true or false, not "1"'),
        ("adapter: off\n", '4: "adapter" takes a word, and YAML reads off as bool; quote it'),
        ("adapter: 2024\n", '4: "adapter" takes a word, and YAML reads 2024 as int; quote it'),
        ("runs:\n", '4: "runs" takes a word, and YAML reads nothing as null; quote it'),
        ("early_stop:\n  split: test\n", '5: "early_stop.split" is one of dev, heldout, not "test"'),
        ("early_stop:\n  split: de\n", '5: "early_stop.split" is one of dev, heldout, not "de" — did you mean "dev"?'),
        ("early_stop:\n  split:\n", '5: "early_stop.split" is one of dev, heldout, not ""'),
        ("lora: 16\n", '4: "lora" is a section; set one of its keys, such as lora.rank'),
        ("train: null\n", '4: "train" is a section; set one of its keys, such as train.lr'),
        ("seed: {a: 1}\n", '4: "seed" takes a value, not a section'),
        ("seed: {a: {b: 1}}\n", '4: "seed" takes a value, not a section'),
        ("seed: {a: {}}\n", ' "seed" takes a value, not a section'),
        ("lora:\n  targets: q_proj\n", '5: "lora.targets" takes a list, such as [a, b]'),
        ("lora:\n  targets: [null]\n", '5: "lora.targets" takes a word, and YAML reads null as null; quote it'),
        ("lora:\n  targets: [[a]]\n", '5: "lora.targets" takes one value, not a list'),
        ("lora:\n  targets:\n  - {a: b}\n", '5: "lora.targets" takes one value, not a list'),
        ("seed: [1]\n", '4: "seed" takes one value, not a list'),
        ("train:\n  lr: -1.0\n", "5: train.lr: must be between 1e-12 and 100"),
        ("lora:\n  dropout: 1.0\n", "5: lora.dropout: must be in [0, 1)"),
        ("seed: -1\n", "4: seed: must be in [0, 2^32)"),
        ("api: {}\n", ' missing key "api.url"'),
        ("seed: [\n", "5: not valid YAML (expected the node content, but found '<stream end>')"),
        ("seed: 1\n--- a\n", "5: not valid YAML (but found another document)"),
        ("? [a]\n: b\n", "4: a key is one word; quote a value that begins with a brace or bracket"),
        ("seed: \x01\n", "?: not valid YAML (special characters are not allowed)"),
        ("seed: &a 1\nlora: {rank: *a}\n", "5: not valid YAML (*a is an alias; write the value itself)"),
        ("runs: &a [*a]\n", "4: not valid YAML (*a is an alias; write the value itself)"),
        ("lora: &a\n  rank: *a\n", "5: not valid YAML (*a is an alias; write the value itself)"),
        ("seed: !!int 3\n", "4: not valid YAML (tag:yaml.org,2002:int is a tag; write the value alone)"),
        ("seed: !é 3\n", "4: not valid YAML (expected URI, but found 'é')"),
        ("lora: !x {rank: 3}\n", "4: not valid YAML (!x is a tag; write the value alone)"),
        ("runs: " + "[" * 99, "4: not valid YAML (nested more than 20 deep)"),
        ("lora: " + "{a: " * 19 + "1" + "}" * 19, "4: not valid YAML (nested more than 20 deep)"),
        ("runs: " + "[" * 18 + "]" * 18, '4: "runs" takes one value, not a list'),
    ],
)
def test_what_is_wrong_is_named_with_file_line_and_key(config, tmp_path, text, error):
    with pytest.raises(UserError) as caught:
        config(text)
    assert str(caught.value) == f"{tmp_path}/t.yaml:{error}"


def test_a_file_that_is_missing_no_mapping_or_no_text_is_refused(config, tmp_path):
    for head, error in (
        ("system: x\n", ': missing key "base"'),
        ("base: {path: p}\n", ': missing key "system"'),
        ("- a\n- b\n", ": expected `key: value` lines"),
        ("", ": expected `key: value` lines"),
        ("a\n", ": expected `key: value` lines"),
    ):
        with pytest.raises(UserError) as caught:
            config(head=head)
        assert str(caught.value) == f"{tmp_path}/t.yaml{error}"
    (tmp_path / "t.yaml").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"t\.yaml: cannot be read \('utf-8' codec can't decode byte 0xff"):
        load(str(tmp_path / "t.yaml"))
    for name in ("absent.yaml", "configs/qlora8b.yml", str(tmp_path / f"{'w' * 300}.yaml")):
        with pytest.raises(UserError, match=r"no such file$"):
            load(name)


def test_a_text_may_have_every_character_that_a_file_can_hold(config):
    text = 'a"b\\c\n\t{é} 😀 𝐀'
    assert config("prompt: {before: " + yaml.safe_dump(text, default_style='"') + "}").prompt.before == text
    assert config('prompt: {before: "a\\ud83d\\ude00b"}').prompt.before == "a😀b"  # as JSON writes it
    with pytest.raises(UserError, match=r't\.yaml:4: "prompt\.before" takes text that UTF-8 can hold$'):
        config('prompt: {before: "a\\ud83d"}')


# ---- overrides -----------------------------------------------------------------------------------------------------


def test_overrides_reach_every_depth_and_absent_sections(config):
    assert config("", "train.lr=1e-3").train.lr == 1e-3
    assert config("", "lora.rank=8").lora.rank == 8
    assert config("lora: null\n", "lora.rank=8").lora.rank == 8
    assert config("lora:\n  rank: 8\n  alpha: 3\n", "lora.rank=9").lora.alpha == 3
    assert config("lora:\n  rank: 8\n", "lora=null").lora is None
    assert config("lora:\n  rank: 8\n", "lora={alpha: 3}").lora == type(config("lora: {}").lora)(alpha=3.0)
    assert config("", "lora.targets=[q_proj, v_proj]").lora.targets == ("q_proj", "v_proj")
    for nothing in ("null", "~", "", "Null"):
        assert config("data: {dev_questions: 3}", f"data.dev_questions={nothing}").data.dev_questions is None
        assert config("lora: {}\nadapter: a", f"adapter={nothing}").adapter is None
    assert config("lora: {}\n", "adapter='null'").adapter == "null"
    assert config("seed: 1\n", "seed=2").seed == 2
    assert config("", "seed=2", "seed=3").seed == 3
    assert config("", "prompt.before='a=b'").prompt.before == "a=b"


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("lora.rnk=8", 'override lora.rnk=8: unknown key "lora.rnk" — did you mean "lora.rank"?'),
        ("rank=8", 'override rank=8: unknown key "rank" — did you mean "lora.rank"?'),
        ("train.lr.x=1", 'override train.lr.x=1: "train.lr" takes a value, not a section'),
        ("seed=many", 'override seed=many: "seed" takes a whole number, not "many"'),
        ("seed=", 'override seed=: "seed" takes a whole number, not ""'),
        ("seed", '"seed": an override looks like train.lr=1e-4'),
        ("=3", '"=3": an override looks like train.lr=1e-4'),
        ("a\nb", '"a\\nb": an override looks like train.lr=1e-4'),
        ("seed=[", "override seed=[: not valid YAML (expected the node content, but found '<stream end>')"),
        ("seed=&a [*a]", "override seed=&a [*a]: not valid YAML (*a is an alias; write the value itself)"),
        ("train.lr=0", "override train.lr=0: train.lr: must be between 1e-12 and 100"),
        ("lora={rank: 1, rank: 2}", 'override lora={rank: 1, rank: 2}:1: key "lora.rank" stands here twice'),
        ("lora={rnk: 1}", 'override lora={rnk: 1}:1: unknown key "lora.rnk" — did you mean "lora.rank"?'),
        (".".join("a" * 21) + "=1", "override " + ".".join("a" * 21) + "=1: nested more than 20 deep"),
        (".".join("a" * 20) + "=1", "override " + ".".join("a" * 20) + '=1: unknown key "a" — did you mean "ask"?'),
        ("seed=" + "w" * 75, f'override seed={"w" * 75}: "seed" takes a whole number, not "{"w" * 75}"'),
        ("seed=" + "w" * 81, f'override seed={"w" * 74}…: "seed" takes a whole number, not "{"w" * 79}…"'),
        ("w" * 81 + "=1", f'override {"w" * 79}…: unknown key "{"w" * 79}…"'),
        (
            "early_stop.split='a\nb'",
            'override early_stop.split=\'a\\nb\': "early_stop.split" is one of dev, heldout, not "a b"',
        ),
        ('adapter="\\e[0m"', 'override adapter="\\e[0m": adapter: must have no control characters and no line breaks'),
    ],
)
def test_a_wrong_override_is_named(config, override, error):
    with pytest.raises(UserError) as caught:
        config("", override)
    assert str(caught.value) == error


# ---- systems -------------------------------------------------------------------------------------------------------


def test_a_hub_id_or_a_folder_is_a_model_as_it_is(tmp_path):
    config = load("Qwen/Qwen3-0.6B", ["seed=3"])
    assert config == Config("Qwen3-0-6B", Base("Qwen/Qwen3-0.6B"), seed=3)
    assert (config.base.quant, config.lora) == ("nf4", None)
    folder = tmp_path / "_a model: 😀, v2"
    folder.mkdir()
    assert load(str(folder)) == Config("a-model-v2", Base(str(folder)))
    folder = tmp_path / ("w" * 200)
    folder.mkdir()
    assert load(str(folder)).system == "w" * 100
    assert load("some/model", ["system=mine", "lora.rank=4"]).system == "mine"
    for name in ("a/b.yaml", "a/b.yml"):
        with pytest.raises(UserError, match=f"^{name}: no such file$"):
            load(name)


def test_a_name_of_configs_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw7b").mkdir()
    assert load("raw7b").base.path == "meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize("name", ["qlora7", "", "w" * 300, "a\nb", "\0", "a/b/c", "a/b c", "a b/c"])
def test_an_unknown_model_names_the_nearest_and_all(name):
    with pytest.raises(UserError) as caught:
        load(name)
    known = ", ".join(path.stem for path in sorted(CONFIGS.glob("*.yaml")))
    short = {"w" * 300: "w" * 79 + "…", "a\nb": "a\\nb", "\0": "\\x00"}.get(name, name)
    near = {"qlora7": ' — did you mean "qlora7b"?', "a\nb": ' — did you mean "raw7b"?'}.get(name, "")
    assert str(caught.value) == f'unknown MODEL "{short}"{near}; known: {known}, a .yaml file, a folder or a hub id'


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (("lora={}", "api.url=http://a"), "api: a hosted model has no lora section"),
        (("api.url=http://a",), "window.tokenizer: an api needs one to cut text by"),
        ((*HOSTED, "window.overflow=chunk"), "window.overflow: an api reads one window"),
        ((*HOSTED, "adapter=a"), "override adapter=a: adapter: a hosted model has none of ours"),
        (("prompt.earlier=true", "window.overflow=chunk"), "prompt.earlier: reads one window: truncate"),
        (
            ("prompt.earlier=true", "prompt.order=both"),
            "override prompt.earlier=true: prompt.earlier: needs order=context",
        ),
        *(
            ((f"prompt.{asked}", "lora={}"), "prompt: chat, shots and earlier are of models as they are, without lora")
            for asked in ("chat=true", "shots=1", "earlier=true", "before=a")
        ),
        (
            (*HOSTED, "api.max_cost_usd=1"),
            "override api.max_cost_usd=1: api.max_cost_usd: needs the prices: usd_per_million_read, …_written",
        ),
        (("window.stride=417",), "override window.stride=417: window.stride: must be between 1 and window.context"),
        (("window.stride=0",), "override window.stride=0: window.stride: must be between 1 and window.context"),
        (("decode.nbest=8",), "override decode.nbest=8: decode.nbest: needs decode.spans=true"),
        (("decode.choose=risk",), "override decode.choose=risk: decode.choose: needs decode.nbest"),
        (
            ("decode.spans=true", "decode.length_exponent=1"),
            "override decode.length_exponent=1: decode.length_exponent: needs decode.nbest",
        ),
        (
            ("decode.max_tokens=16", "window.answer=16"),
            "overrides: decode.max_tokens: must be less than window.answer, which is 16",
        ),
        (
            ("window.context=83", "window.stride=9", "prompt.order=both"),
            "prompt: in this order 15 tokens are left for the context; raise window.context",
        ),
        (
            ("window.context=19", "window.stride=9", "prompt.order=question"),
            "prompt: in this order 15 tokens are left for the context; raise window.context",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, error):
    with pytest.raises(UserError) as caught:
        load("some/model", overrides)
    assert str(caught.value) == (error if error.startswith("override") else f"overrides: {error}")


@pytest.mark.parametrize(
    "overrides",
    [
        HOSTED,
        (*HOSTED, "api.max_cost_usd=1", "api.usd_per_million_read=0.1"),
        (*HOSTED, "api.max_cost_usd=1", "api.usd_per_million_written=0.1"),
        (*HOSTED, "api.max_cost_usd=0", "api.usd_per_million_written=1"),
        ("lora={}", "adapter=a"),
        ("lora={}", "window.overflow=chunk"),
        ("prompt.earlier=true",),
        ("prompt.shots=2", "window.overflow=chunk", "prompt.order=both"),
        ("window.stride=416",),
        ("window.stride=1",),
        ("window.context=16", "window.stride=9"),
        ("window.context=84", "window.stride=9", "prompt.order=both"),
        ("window.context=20", "window.stride=9", "prompt.order=question"),
    ],
)
def test_what_goes_together_is_taken(overrides):
    assert load("some/model", overrides)


def test_a_window_is_the_sum_of_its_parts_and_some_orders_spare_tokens_of_it():
    config = load("some/model", ["window.context=300", "window.question=40", "window.answer=20"])
    assert config.window.tokens == 360
    spare = {
        order: load("some/model", [f"prompt.order={order}"]).prompt.spare(Window(question=40))
        for order in ("context", "question", "both")
    }
    assert spare == {"context": 0, "question": 4, "both": 44}


def test_a_title_is_marked_where_weights_are_random():
    assert load("some/model").title == "model"
    assert load("some/model", ["base.random_weights=true"]).title == "model (random weights)"


def test_what_code_makes_of_a_configuration_is_checked_too():
    with pytest.raises(UserError, match=r"^runs: must not be empty$"):
        dataclasses.replace(load("some/model"), runs="")


# ---- values --------------------------------------------------------------------------------------------------------


def test_numbers_are_read_by_the_keys_type_and_not_by_yamls_guess(config):
    for text, value in (
        ("2e-4", 2e-4),
        ("1", 1.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("+.5e+0", 0.5),
        ("5E-1", 0.5),
        ("010", 10.0),
    ):
        read = config(f"train: {{lr: {text}}}").train.lr
        assert (read, type(read)) == (value, float)
    for text, value in (("1", 1), ("+5", 5), ("-0", 0), ("4294967295", 2**32 - 1)):
        read = config(f"seed: {text}\n").seed
        assert (read, type(read)) == (value, int)
    assert config("base: {path: a}", head="system: x\n").base.path == "a"
    assert config("runs: '2024'\n").runs == "2024"
    assert config("data: {fix_offsets: true}").data.fix_offsets is True
    assert config("data: {fix_offsets: false}").data.fix_offsets is False
    assert config("base: {path: a, quant: none}", head="system: x\n").base.quant == "none"
    assert config("early_stop: {split: 'heldout'}").early_stop.split == "heldout"


BOUNDS = {  # of each number the last value that is taken and the first that is not, on both sides
    "base.min_gpu_gib": ("0", "-1e-9", "10000", "10001"),
    "seed": ("0", "-1", "4294967295", "4294967296"),
    "lora.rank": ("1", "0", "4096", "4097"),
    "lora.alpha": ("0.001", "0.0009", "1e6", "1000001"),
    "lora.dropout": ("0", "-1e-9", "0.999", "1"),
    "api.concurrency": ("1", "0", "1000", "1001"),
    "api.tries": ("1", "0", "1000", "1001"),
    "api.timeout_s": ("0.001", "0.0009", "86400", "86401"),
    "api.usd_per_million_read": ("0", "-1e-9", "1000000", "1000001"),
    "api.usd_per_million_written": ("0", "-1e-9", "1000000", "1000001"),
    "api.max_requests": ("0", "-1", "1000000000", "1000000001"),
    "api.max_cost_usd": ("0", "-1e-9", "1e9", "1000000001"),
    "data.train_paragraphs": ("1", "0", "1000000000", "1000000001"),
    "data.dev_questions": ("1", "0", "1000000000", "1000000001"),
    "data.train_share": ("1e-9", "0", "1", "1.001"),
    "window.context": ("208", "15", "1000000", "1000001"),
    "window.question": ("16", "15", "1000000", "1000001"),
    "window.answer": ("16", "15", "1000000", "1000001"),
    "window.stride": ("1", "0", "416", "417"),
    "decode.max_tokens": (
        "1",
        "0",
        "31",
        "1000001",
    ),  # of window.answer=32; from there on it is refused as it should be
    "decode.nbest": ("1", "0", "100", "101"),
    "decode.length_exponent": ("0", "-1e-9", "2", "2.1"),
    "ask.least": ("0", "-1e-9", "1", "1.1"),
    "prompt.shots": ("0", "-1", "1000", "1001"),
    "prompt.shots_seed": ("0", "-1", "4294967295", "4294967296"),
    "train.lr": ("1e-12", "9e-13", "100", "101"),
    "train.epochs": ("0.0001", "0.00009", "1e4", "10001"),
    "train.questions_per_step": ("1", "0", "1000000", "1000001"),
    "train.pack_tokens": ("64", "63", "1000000", "1000001"),
    "train.memory_budget_gib": ("0.001", "0.0009", "1e4", "10001"),
    "train.label_smoothing": ("0", "-1e-9", "0.999", "1"),
    "train.warmup": ("0", "-1e-9", "1", "1.001"),
    "train.weight_decay": ("0", "-1e-9", "100", "101"),
    "train.average": ("0", "-1e-9", "0.9999", "1"),
    "train.max_grad_norm": ("1e-9", "9e-10", "1e9", "1000000001"),
    "train.eval_every": ("1", "0", "1000000000", "1000000001"),
    "train.max_steps": ("1", "0", "1000000000", "1000000001"),
    "early_stop.patience": ("1", "0", "1000000000", "1000000001"),
    "early_stop.min_delta": ("0", "-1e-9", "100", "101"),
    "early_stop.heldout_share": ("0.0001", "0.00009", "0.5", "0.51"),
    "early_stop.questions": ("1", "0", "1000000000", "1000000001"),
    "eval.memory_budget_gib": ("0.001", "0.0009", "1e4", "10001"),
    "eval.pass_tokens": ("64", "63", "1000000", "1000001"),
    "eval.parts": ("1", "0", "1024", "1025"),
    "bench.queries": ("1", "0", "1000000", "1000001"),
    "bench.warmup_queries": ("0", "-1", "1000000", "1000001"),
    "bench.processes": ("1", "0", "100", "101"),
}


def kinds(key: str) -> list[object]:
    """The types that a key takes."""
    hint: object = Config
    for part in key.split("."):
        section = next(h for h in (typing.get_args(hint) or (hint,)) if h is not type(None))
        hint = typing.get_type_hints(section)[part]
    words = (type(None), typing.Literal["auto"])
    return [h for h in (typing.get_args(hint) or (hint,)) if h not in words]


def test_every_number_has_bounds():
    assert sorted(BOUNDS) == sorted(key for key in known_keys(Config) if kinds(key) in ([int], [float]))


@pytest.mark.parametrize("key", BOUNDS)
def test_a_number_is_taken_within_its_bounds_and_refused_beyond_them(key):
    least, below, most, above = BOUNDS[key]
    for value in (least, most):
        assert refusal(key, value) is None
    for value in (below, above, "1" + "0" * 17 if kinds(key) == [int] else "1e308"):
        told = refusal(key, value)
        assert told
        assert told.startswith(f"override {key}={value}: {key}: must be ")


def test_bounds_are_told_as_they_are(config):
    for override, told in (
        ("lora.rank=0", "lora.rank: must be between 1 and 4,096"),
        ("train.epochs=1e308", "train.epochs: must be between 0.0001 and 10,000"),
        ("early_stop.min_delta=101", "early_stop.min_delta: must be between 0 and 100"),
        ("prompt.shots_seed=-1", "prompt.shots_seed: must be in [0, 2^32)"),
        ("train.average=1", "train.average: must be in [0, 1)"),
        ("data.train_share=0", "data.train_share: must be in (0, 1]"),
        ("train.label_smoothing=1", "train.label_smoothing: must be in [0, 1)"),
        ("eval.parts=10000000", "eval.parts: must be between 1 and 1,024"),
    ):
        with pytest.raises(UserError) as caught:
            config("", override)
        assert str(caught.value) == f"override {override}: {told}"


WORDS = (
    "adapter",
    "base.path",
    "base.revision",
    "base.tokenizer",
    "data.dev",
    "data.train",
    "runs",
    "tracker",
    "window.tokenizer",
)


@pytest.mark.parametrize("key", WORDS)
def test_a_name_or_path_has_characters_is_as_long_as_linux_takes_and_has_no_control_characters(key):
    for value in ("''", "' '", '"\\t"'):
        assert refusal(key, value) == f"override {key}={value}: {key}: must not be empty"
    for value in ("a\\nb", "a\\0b", "a\\e[0m", "a\\x7f", "a\\Lb", "a\\Pb", "a\\Nb"):
        told = refusal(key, f'"{value}"')
        assert told == f'override {key}="{value}": {key}: must have no control characters and no line breaks'
    for value in ("w" * 256, "a/" + "é" * 128, "/".join(["w" * 100] * 41)):
        assert (refusal(key, value) or "").endswith(f": {key}: too long: a name has at most 255 bytes, a path 4095")
    for value in ("w" * 255, "é" * 127, "/".join(["w" * 100] * 40), "a b/c", "..", "/", "~/x"):
        assert refusal(key, value if value != "~/x" else "'~/x'") is None
    assert refusal(key, "w" * 256 + "/a")


@pytest.mark.parametrize(
    ("key", "taken", "refused", "told"),
    [
        (
            "system",
            ["a", "A-1_b", "w" * 100],
            ["''", "-a", "_a", "a b", "a.b", "a/b", "é", "٣", "w" * 101, '"a\\n"'],
            "use letters, digits, - and _, at most 100",
        ),
        (
            "lora.targets",
            ["[a]", "[q_proj, layers.0.q-proj]", f"[{'w' * 255}]"],
            ["['']", "[a b]", "[a, é]", f"[{'w' * 256}]"],
            "no layer is called like that",
        ),
        ("lora.targets", ["[a, A]"], ["[a, a]", "[a, b, a]"], "name each layer once"),
        ("lora.targets", [], ["[]"], "name at least one layer"),
        (
            "api.key",
            ["A", "_a1", "w" * 100],
            ["''", "1a", "sk-1", "a b", "a=b", "é", "w" * 101],
            "is the name of an environment variable, not what it holds",
        ),
        (
            "api.url",
            [
                "http://a",
                "https://a.b:1/v1",
                "http://[::1]:80/v1",
                "http://u:p@a",
                f"http://a/{'w' * 2000}",
                "http://a?b=c",
            ],
            [
                "''",
                "a",
                "ftp://a",
                "'http://'",
                "http:///v1",
                "http://a b",
                "http://é",
                "'http://a:b'",
                "http://a:99999",
                "'http://['",
                "http://a^",
                f"http://a/{'w' * 2001}",
                "xhttp://a",
                "http://a/é",
            ],
            "must begin with http:// or https://, and name a host",
        ),
        ("prompt.before", ["''", '"\\0\\n"', "w" * 9999], [], ""),
    ],
)
def test_a_word_is_one_that_can_be_used(key, taken, refused, told):
    for value in taken:
        assert refusal(key, value) is None, value
    for value in refused:
        assert (refusal(key, value) or "").endswith(f": {key}: {told}"), value


ODD = (
    "",
    "''",
    "0",
    "-1",
    "1e308",
    "1e-300",
    "1000000000",
    "9" * 5000,
    "٣",
    "３.５",
    "null",
    "[]",
    "{}",
    "~",
    "&a [*a]",
    "&a {x: *a}",
    "w" * 300,
    "nan",
    ".inf",
    "true",
    "1_000",
    "0x10",
    '"\\0"',
    '"a\\nb"',
    '"\\e[1m"',
    "'/'",
    "..",
    "[" * 300,
    "{a: " * 300,
    "!!python/object:os.system x",
    "!!float 1",
    "*a",
    "1e5",
    "+5",
    "\x00",
    "\ud800",
    "[null]",
    "- a",
    "? a",
    "%TAG",
    "--- a\n--- b",
    '"\\ud800"',
    "?",
    "? [a]\n: b",
    "{[a]: b}",
    "{? {a: b} : c}",
    "<<: a",
    "a\nb",
)


ONE_OF_EACH_TYPE = {str(kinds(key)): key for key in known_keys(Config)}.values()


@pytest.mark.parametrize("key", [*ONE_OF_EACH_TYPE, "seed", "lora", "train", "api", "nope", "train.lr.x", ".", "a..b"])
def test_no_value_ends_in_a_traceback_or_in_two_lines(key):
    for value in ODD:
        told = refusal(key, value)
        assert told is None or (told.isprintable() and len(told) < 400)


@given(st.sampled_from([*known_keys(Config), "lora", "train"]), st.text(max_size=40))
def test_no_text_is_read_with_a_traceback(key, text):
    told = refusal(key, text)
    assert told is None or told.isprintable()


@given(st.text(max_size=60))
def test_no_file_is_read_with_a_traceback(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text("system: x\nbase: {path: p}\nlora:\n  " + text, encoding="utf-8", errors="replace")
    with contextlib.suppress(UserError):
        assert load(str(path))


# ---- round trips ---------------------------------------------------------------------------------------------------


def test_a_written_config_reads_back_equal(config):
    before = config("train:\n  lr: 2e-4\nlora:\n  targets: [q_proj]\n")
    assert config(head=yaml.safe_dump(before.to_dict())) == before
    assert before.to_dict()["lora"]["targets"] == ["q_proj"]


def test_a_configuration_is_flat_for_trackers():
    assert flat({"system": "s", "lora": {"rank": 8, "targets": ["a", "b"]}, "api": None, "list": [1]}) == {
        "system": "s",
        "lora.rank": 8,
        "lora.targets": "['a', 'b']",
        "api": None,
        "list": "[1]",
    }


def test_of_a_training_memory_decides_nothing_but_whether_there_is_a_budget():
    train = load("some/model", ["train.memory_budget_gib=8", "train.pack_tokens=512"]).to_dict()["train"]
    kept = apart_from_memory(train)
    assert kept == {key: value for key, value in train.items() if key != "pack_tokens"} | {"memory_budget_gib": True}
    assert apart_from_memory(train | {"memory_budget_gib": None})["memory_budget_gib"] is False


def test_every_key_is_read_by_some_code():
    read = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and not (path.name == "config.py" and node.attr != "revision"):
                read.add(node.attr)
    unread = [key for key in known_keys(Config) if key.rpartition(".")[2] not in read]
    assert not unread
