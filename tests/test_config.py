"""A configuration is exactly what its file and overrides say, or it is refused with file, line and key."""

import ast
import dataclasses
import typing

from common.config import CONFIGS, Base, Config, load
from common.errors import UserError
from common.strict import known_keys
from tests.conftest import ROOT

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

MINIMAL = "system: x\nbase:\n  path: some/model\n"


@pytest.fixture
def config(tmp_path):
    """Write YAML after the minimal keys, and load it with overrides."""

    def load_text(text: str = "", *overrides: str, head: str = MINIMAL) -> Config:
        path = tmp_path / "t.yaml"
        path.write_text(head + text)
        return load(str(path), overrides)

    return load_text


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_of_the_repo_loads_and_is_named_as_its_file(path):
    assert load(path.stem).system == path.stem


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("lora:\n  rnk: 8\n", r't.yaml:5: unknown key "lora.rnk" — did you mean "lora.rank"\?'),
        ("trian:\n  lr: 1\n", r't.yaml:5: unknown key "trian" — did you mean "train"\?'),
        ("seed: 1\nseed: 2\n", r't.yaml:5: key "seed" stands here twice'),
        ("train:\n  lr: fast\n", r't.yaml:5: "train.lr" takes a number, not "fast"'),
        ("train:\n  lr: '2e-4'\n", r't.yaml:5: "train.lr" takes a number'),
        ("train:\n  lr: .nan\n", r't.yaml:5: "train.lr" takes a number'),
        ("seed: 016\n", r't.yaml:4: "seed" takes a whole number, not "016"'),
        ("seed: 1.0\n", r't.yaml:4: "seed" takes a whole number'),
        ("data:\n  fix_offsets: yes\n", r't.yaml:5: "data.fix_offsets" takes true or false, not "yes"'),
        ("adapter: off\n", r't.yaml:4: "adapter" takes a word, and YAML reads off as bool; quote it'),
        ("adapter: 2024\n", r't.yaml:4: "adapter" takes a word, and YAML reads 2024 as int'),
        ("early_stop:\n  split: test\n", r't.yaml:5: "early_stop.split" is one of dev, heldout, not "test"'),
        ("lora: 16\n", r't.yaml:4: "lora" is a section'),
        ("seed: {a: 1}\n", r't.yaml:4: "seed" takes a value, not a section'),
        ("lora:\n  targets: q_proj\n", r't.yaml:5: "lora.targets" takes a list'),
        ("seed: [1]\n", r't.yaml:4: "seed" takes one value, not a list'),
        ("train:\n  lr: -1.0\n", r"t.yaml:5: train.lr: must be > 0"),
        ("lora:\n  dropout: 1.0\n", r"t.yaml:5: lora.dropout: must be in \[0, 1\)"),
        ("seed: -1\n", r"t.yaml:4: seed: must be in \[0, 2\^32\)"),
        ("seed: [\n", r"t.yaml:5: not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_with_file_line_and_key(config, text, error):
    with pytest.raises(UserError, match=error):
        config(text)


def test_a_hub_id_or_a_folder_is_a_model_as_it_is(tmp_path):
    config = load("Qwen/Qwen3-0.6B", ["seed=3"])
    assert (config.system, config.base.path) == ("Qwen3-0-6B", "Qwen/Qwen3-0.6B")
    assert (config.base.quant, config.lora, config.seed) == ("nf4", None, 3)
    assert load(str(tmp_path)).base.path == str(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load("configs/qlora8b.yaml")


def test_a_missing_key_and_a_file_that_is_no_mapping_are_refused(config):
    with pytest.raises(UserError, match=r't\.yaml: missing key "base"'):
        config(head="system: x\n")
    with pytest.raises(UserError, match="expected `key: value` lines"):
        config(head="- a\n- b\n")


def test_numbers_are_read_by_the_keys_type_and_not_by_yamls_guess(config):
    assert config("train:\n  lr: 2e-4\n").train.lr == 2e-4
    assert config("lora:\n  alpha: 16\n").lora.alpha == 16.0
    assert config("seed: 1\n").seed == 1


def test_overrides_reach_every_depth_and_absent_sections(config):
    assert config("", "train.lr=1e-3").train.lr == 1e-3
    assert config("", "lora.rank=8").lora.rank == 8
    assert config("lora: null\n", "lora.rank=8").lora.rank == 8
    assert config("lora:\n  rank: 8\n", "lora=null").lora is None
    assert config("", "lora.targets=[q_proj, v_proj]").lora.targets == ("q_proj", "v_proj")
    assert config("", "data.dev_questions=null").data.dev_questions is None
    assert config("seed: 1\n", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("lora.rnk=8", r'override lora.rnk=8: unknown key "lora.rnk" — did you mean "lora.rank"'),
        ("seed=many", 'override seed=many: "seed" takes a whole number'),
        ("seed", '"seed": an override looks like'),
        ("=3", '"=3": an override looks like'),
        ("seed=[", "not valid YAML"),
        ("train.lr=0", "override train.lr=0: train.lr: must be > 0"),
    ],
)
def test_a_wrong_override_is_named(config, override, error):
    with pytest.raises(UserError, match=error):
        config("", override)


def test_an_unknown_model_names_the_nearest_and_all():
    with pytest.raises(UserError, match=r'unknown MODEL "qlora7" — did you mean "qlora7b"\?; known: .*raw7b'):
        load("qlora7")
    with pytest.raises(UserError, match="no such file"):
        load("absent.yaml")


def test_a_written_config_reads_back_equal(config):
    before = config("train:\n  lr: 2e-4\nlora:\n  targets: [q_proj]\n")
    assert config(head=yaml.safe_dump(before.to_dict())) == before


def scalars(cls: type = Config, prefix: str = "") -> list[tuple[str, object]]:
    """Every key with a value that differs from its default."""
    other = {int: 300, float: 0.4321, bool: None, str: "another"}
    out: list[tuple[str, object]] = []
    for key in known_keys(Config):
        hint: object = Config
        default: object = Config("x", Base("some/model"))
        for part in key.split("."):
            hints = typing.get_type_hints(next(h for h in (typing.get_args(hint) or (hint,)) if h is not type(None)))
            hint = hints[part]
            default = getattr(default, part, None)
        if typing.get_origin(hint) is tuple:
            out.append((key, "[q_proj]"))
            continue
        kind = next((h for h in (typing.get_args(hint) or (hint,)) if h in other), None)
        if kind:
            out.append((key, str(not default).lower() if kind is bool else other[kind]))
    return out


@pytest.mark.parametrize(("key", "value"), scalars())
def test_the_hash_changes_with_every_key_that_decides_the_result(config, key, value):
    section = key.partition(".")[0]
    words = ["lora.rank=16"]
    if section in ("api", "prompt"):  # of models without an adapter
        words = ["lora=null", "window.tokenizer=any", "api.url=http://any", "api.usd_per_million_read=1"]
    before = config("", *words).hash()
    value = "http://another" if key == "api.url" else value
    changed = config("", *words, f"{key}={value}")
    decides_nothing = key in ("runs", "tracker") or (section == "api" and key != "api.url")
    assert (changed.hash() == before) == decides_nothing


def test_a_run_keeps_its_folder_where_what_comes_after_it_or_its_memory_is_another(config):
    fused = ("lora.rank=16", "train.memory_budget_gib=8")
    plain = config("", *fused)
    memory = (
        "train.memory_budget_gib=20",
        "train.pack_tokens=512",
        "eval.memory_budget_gib=20",
        "eval.pass_tokens=99",
        "eval.parts=2",
    )
    for kind, same in (("train", (*memory, "bench.queries=9")), ("eval", ("bench.queries=9",)), ("bench", ())):
        words = (*memory, "bench.queries=9", "train.lr=9", "window.context=300", "train.memory_budget_gib=null")
        kept = tuple(word for word in words if config("", *fused, word).hash(kind) == plain.hash(kind))
        assert kept == same


@given(st.text(max_size=40))
def test_no_text_is_read_with_a_traceback(text):
    for key in ("train.lr", "seed", "adapter", "lora.targets", "data.fix_offsets", "early_stop.split", "lora"):
        try:
            loaded = load("qlora7b", [f"{key}={text}"])
        except UserError:
            continue
        assert dataclasses.is_dataclass(loaded)


def test_every_key_is_read_by_some_code():
    read = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "common").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and not (path.name == "config.py" and node.attr != "revision"):
                read.add(node.attr)
    unread = [key for key in known_keys(Config) if key.rpartition(".")[2] not in read]
    assert not unread
