"""The adapter that answers is the one that was trained for it, and it is asked as it was trained."""

import json
import shutil

from common.config import load
from common.config_file import given_keys
from common.data.squad import Answer, Dataset, Example
from common.errors import UserError
from common.runs import adapters, record
from common.runs.adapters import choose, folder_of, newest, newest_system, settings_of, trained_with

import pytest

DATA = Dataset([Example("q1", "T", "An amber canal.", "Which canal?", (Answer("amber", 3),))], "dev.json")
SYSTEM = "smollm2-qlora"


@pytest.fixture
def config(tmp_path):
    def with_overrides(*overrides: str):
        return load(SYSTEM, [f"runs={tmp_path / 'runs'}", *overrides])

    return with_overrides


@pytest.fixture(autouse=True)
def code(monkeypatch):
    """A commit without asking git, and no versions, which take as long as the rest of a test."""
    monkeypatch.setattr(record, "code", lambda: ("c0ffee", True))
    monkeypatch.setattr(record, "PACKAGES", ())


def finish(config, kind: str = "train"):
    run = record.new_run(config, kind)
    return run, record.write(run, config, kind, DATA, {"name": "CPU"}, {"em": 50.0})


def stored(folder, config, **other):
    """An adapter's folder as `train_loop` leaves it, without weights."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    settings = settings_of(config, "of data", {"name": "a base"}, "of a tokenizer") | other
    (folder / adapters.SETTINGS).write_text(json.dumps(settings))
    return folder


# ---- which one -----------------------------------------------------------------------------------------------------


def test_the_adapter_is_that_of_the_newest_training_of_the_same_system_seed_base_lora_and_prompt(config):
    assert newest(load("smollm2-raw")) is None
    with pytest.raises(UserError, match=rf"no finished training.*make train MODEL={SYSTEM}"):
        newest(config())
    finish(config("seed=1"))
    finish(config("lora.rank=4"))
    finish(config("base.quant=fp4"))
    record.new_run(config(), "train")  # not finished
    with pytest.raises(UserError, match="no finished training"):
        newest(config())
    run, _ = finish(config("train.lr=1e-5"))
    assert newest(config("data.dev_questions=5")) == run / "best"
    other, written = finish(config("train.lr=1e-4"))
    (other / "record.json").write_text(json.dumps(written | {"created": "2999-01-01T00:00:00+00:00"}))
    assert newest(config()) == other / "best"
    assert newest(config("train.lr=1e-5", "data.dev_questions=5")) == run / "best"
    shutil.rmtree(other)
    # that adapter has learned another prompt
    with pytest.raises(UserError, match=rf"no finished training.*{run} has prompt\.order=both\)"):
        newest(config("prompt.order=question"))
    written = json.loads((run / "record.json").read_text())
    del written["config"]["prompt"]  # as in records from before there was a choice
    (run / "record.json").write_text(json.dumps(written))
    assert newest(config("prompt.order=context")) == run / "best"


def test_an_adapter_of_other_data_or_another_window_comes_after_one_that_was_trained_so(config):
    asked = ("train.lr=1e-4", "data.train_paragraphs=9")
    run, written = finish(config(*asked))
    (run / "record.json").write_text(json.dumps(written | {"created": "2000-01-01T00:00:00+00:00"}))
    for other in ("data.train_paragraphs=8", "window.context=300", "data.fix_offsets=true"):
        finish(config(*asked, other))
    assert newest(config(*asked)) == run / "best"


def test_a_training_that_went_on_with_other_memory_was_trained_so(config):
    run, written = finish(config("train.lr=1e-4", "train.memory_budget_gib=20", "train.pack_tokens=512"))
    (run / "record.json").write_text(json.dumps(written | {"created": "2000-01-01T00:00:00+00:00"}))
    other, _ = finish(config("train.lr=2e-4"))
    assert newest(config("train.lr=1e-4", "train.memory_budget_gib=30")) == run / "best"
    assert newest(config("train.lr=1e-4", "train.memory_budget_gib=null")) == other / "best"


def test_who_has_no_training_is_told_what_is_nearest_and_what_to_do(config, tmp_path):
    with pytest.raises(UserError) as caught:
        newest(config())
    told = f"{SYSTEM} (seed 0) has no finished training under {tmp_path}/runs/ with this base, lora and prompt.order"
    rest = f": make train MODEL={SYSTEM}, or name an adapter with ADAPTER=folder"
    assert str(caught.value) == told + rest
    finish(config("lora.rank=4", "base.revision=an-older-one"))
    near, _ = finish(config("lora.rank=4", "seed=1"))
    finish(config("seed=1", "system=other"))
    finish(config("lora.rank=4"), "eval")  # no training
    with pytest.raises(UserError) as caught:
        newest(config())
    assert str(caught.value) == f"{told} ({near} has seed=1 lora.rank=4){rest}"
    assert newest(config("base.random_weights=true")) is None
    run, _ = finish(config("base.random_weights=true"))
    assert newest(config("base.random_weights=true")) == run / "best"


def test_a_system_without_lora_has_no_adapter():
    assert choose(load("smollm2-raw")) == adapters.Chosen(load("smollm2-raw"), None)


def test_without_one_that_matches_all_the_typed_keys_alone_have_to(config):
    """As after `make train ARGS=prompt.order=context`: ARGS need not be repeated."""
    run, _ = finish(config("prompt.order=context", "lora.rank=4"))
    stored(run / "best", config("prompt.order=context", "lora.rank=4"))
    found = choose(config(), {"runs"})
    assert (found.adapter, found.config) == (run / "best", config("prompt.order=context", "lora.rank=4"))
    assert found.taken == "prompt.order=context lora.rank=4"
    assert choose(config("lora.rank=4"), {"lora.rank"}).adapter == run / "best"
    for word in ("lora.rank=8", "prompt.order=question", "base.quant=fp4"):
        with pytest.raises(UserError, match="no finished training"):
            choose(config(word), given_keys([word]))
    for other in ("seed=1", "base.path=elsewhere"):
        with pytest.raises(UserError, match="no finished training"):
            choose(config(other), given_keys([other]))
    finish(config("prompt.order=context", "lora.rank=32"))
    with pytest.raises(UserError, match="no finished training"):  # of two that differ none is meant
        choose(config(), {"runs"})


@pytest.mark.parametrize("below", [False, True])
def test_a_folder_without_an_adapter_is_named_and_the_one_that_was_meant(tmp_path, below):
    if below:
        stored(tmp_path / "best", load(SYSTEM))
        stored(tmp_path / "last", load(SYSTEM))
    says = f"; adapters are in {tmp_path}/best, {tmp_path}/last: name one, such as ADAPTER={tmp_path}/best$"
    with pytest.raises(
        UserError, match=f"^adapter={tmp_path}: it holds no adapter_config.json, so no adapter" + below * says
    ):
        folder_of(str(tmp_path))


def test_a_named_adapter_wins_and_must_exist(config, tmp_path, monkeypatch):
    adapter = stored(tmp_path / "mine", config())
    finish(config())
    assert choose(config(f"adapter={adapter}")).adapter == adapter
    with pytest.raises(UserError, match=f"^adapter={tmp_path}/absent: no such folder$"):
        choose(config(f"adapter={tmp_path / 'absent'}"))
    with pytest.raises(UserError, match=r"adapter_config\.json: a file; name its folder$"):
        folder_of(str(adapter / "adapter_config.json"))


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(adapters.huggingface_hub, "snapshot_download", download)
    assert folder_of("me/an-adapter") == tmp_path
    files = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "trained_with.json"]
    assert asked == [("me/an-adapter", files)]
    monkeypatch.setattr(adapters.huggingface_hub, "snapshot_download", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(
        UserError, match=r"^adapter=me/an-adapter: no such folder here, and the hub gave none \(division"
    ):
        folder_of("me/an-adapter")


def test_newest_is_the_system_of_the_newest_training(config, tmp_path):
    runs = f"runs={tmp_path / 'runs'}"
    assert newest_system(["raw7b", runs]) == ["raw7b", runs]
    assert newest_system(["newest", runs]) == ["qlora7b", runs]
    old, written = finish(config())
    (old / "record.json").write_text(json.dumps(written | {"created": "2000-01-01T00:00:00+00:00"}))
    new, _ = finish(config("prompt.order=context"))
    finish(load("smollm2-raw", [runs]), "eval")
    stored(new / "best", config("prompt.order=context"))
    model, *words = newest_system(["newest", runs, "--context", "x"])
    assert words == [f'adapter="{new}/best"', runs, "--context", "x"]
    found = choose(load(model, words[:2]), given_keys(words[:2]))
    assert found.config.prompt.order == "context"
    assert found.adapter == new / "best"


# ---- how it is asked -----------------------------------------------------------------------------------------------


def test_prompt_window_lora_and_quantisation_are_those_of_the_training(config, tmp_path, capsys):
    was = config("prompt.order=question", "window.context=300", "window.answer=20", "lora.rank=4", "base.quant=fp4")
    adapter = stored(tmp_path / "a", was)
    word = f"adapter={adapter}"
    found = choose(config(word), given_keys([word]))
    taken = "prompt.order=question lora.rank=4 base.quant=fp4 window.context=300 window.answer=20"
    assert found.config == load(SYSTEM, [f"runs={tmp_path / 'runs'}", word, *taken.split()])
    assert (found.taken, found.forced) == (taken, "")
    assert found.trained_with["lora"]["rank"] == 4
    found.note()
    assert capsys.readouterr().err == f"note: {taken}, as {adapter} was trained\n"


def test_what_is_typed_alike_is_no_difference_and_nothing_is_noted(config, tmp_path, capsys):
    adapter = stored(tmp_path / "a", config())
    words = [f"adapter={adapter}", "prompt.order=both", "lora.rank=16"]
    found = choose(config(*words), given_keys(words))
    assert (found.config, found.taken, found.forced) == (config(*words), "", "")
    found.note()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("word", ["prompt.order=question", "base.quant=none", "base.double_quant=false", "lora.rank=8"])
def test_a_typed_prompt_base_or_lora_that_differs_is_refused_but_by_force(config, tmp_path, word):
    adapter = stored(tmp_path / "a", config())
    words = [f"adapter={adapter}", word]
    key = word.partition("=")[0]
    with pytest.raises(
        UserError, match=rf"^{adapter} was trained with {key}=\w+: leave that out of ARGS, or .*FORCE=1$"
    ):
        choose(config(*words), given_keys(words))
    found = choose(config(*words), given_keys(words), force=True)
    assert found.config == config(*words)
    assert found.forced.startswith(f"FORCE=1 {key}=")


@pytest.mark.parametrize("word", ["window.context=300", "window.overflow=chunk", "window.answer=48", "eval.parts=2"])
def test_a_window_and_how_is_decoded_may_be_chosen_anew(config, tmp_path, word):
    words = [f"adapter={stored(tmp_path / 'a', config())}", word]
    found = choose(config(*words), given_keys(words))
    assert (found.config, found.forced) == (config(*words), "")


def test_a_section_in_one_word_names_each_of_its_keys(config, tmp_path):
    words = [f"adapter={stored(tmp_path / 'a', config())}", "prompt={order: question}"]
    with pytest.raises(UserError, match=r"was trained with prompt\.order=both: "):
        choose(config(*words), given_keys(words))


def test_settings_of_before_a_key_have_its_default(config, tmp_path):
    adapter = stored(tmp_path / "a", config())
    settings = json.loads((adapter / adapters.SETTINGS).read_text())
    del settings["prompt"]["shots_seed"]
    (adapter / adapters.SETTINGS).write_text(json.dumps(settings))
    assert trained_with(adapter)["prompt"]["shots_seed"] == 0
    assert choose(config(f"adapter={adapter}")).taken == ""
    for damaged in ("[]", '{"prompt": 3}', '{"prompt": '):
        (adapter / adapters.SETTINGS).write_text(damaged)
        with pytest.raises(UserError, match=r"trained_with\.json"):
            trained_with(adapter)


def test_an_adapter_of_a_run_from_before_there_were_settings_has_those_of_its_record(config):
    run, _ = finish(config("prompt.order=context"))
    (run / "best").mkdir()
    (run / "best" / "adapter_config.json").write_text("{}")
    assert trained_with(run / "best")["prompt"]["order"] == "context"
    found = choose(config(f"adapter={run}/best"), {"adapter"})
    assert found.config.prompt.order == "context"


def test_another_tools_adapter_brings_its_lora_section(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 32, "target_modules": ["v_proj", "q_proj"]}')
    found = choose(load("some/model", [f"adapter={tmp_path}"]))
    assert (found.adapter, found.trained_with) == (tmp_path, None)
    assert (found.config.lora.rank, found.config.lora.alpha, found.config.lora.targets) == (8, 32, ("q_proj", "v_proj"))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert choose(load("some/model", [f"adapter={tmp_path}"])).config.lora is not None
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "OFT", "r": 0}')
    assert choose(load("some/model", [f"adapter={tmp_path}", "lora.rank=4"])).config.lora.rank == 4
    (tmp_path / "adapter_config.json").write_text('{"r": 0}')
    with pytest.raises(UserError, match=r"adapter_config\.json: rank: must be between"):
        choose(load("some/model", [f"adapter={tmp_path}"]))


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"lora": None},
        {"lora": {"rank": False}},
        {"lora": {"rank": 8, "tragets": ["q_proj"]}},
        {"prompt": None},
        {"prompt": {"order": "sideways"}},
        {"window": {"context": "x"}},
        {"window": {"context": 416.5}},
        {"base": {"path": 3}},
        {"train": {"lr": float("nan")}},
        {"early_stop": []},
    ],
)
def test_settings_that_are_damaged_are_one_line(config, tmp_path, damage):
    adapter = stored(tmp_path / "a", config())
    settings = json.loads((adapter / adapters.SETTINGS).read_text())
    (adapter / adapters.SETTINGS).write_text(json.dumps({**settings, **damage} if damage else {}))
    with pytest.raises(UserError, match=f"^{adapter}"):
        choose(config(f"adapter={adapter}"))
