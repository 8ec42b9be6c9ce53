"""What stands in the way is said before anything is downloaded, with what to do."""

import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

from common.config import Api, Base, Config, Window, load
from common.data import prompt
from common.data.squad import read
from common.errors import UserError
from common.runs import preflight
from tests.conftest import ROOT, squad_file

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LLAMA = Base("meta-llama/Llama-2-7b-hf", min_gpu_gib=8)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A machine with a 16 GiB GPU, an empty hub cache and a hub that says yes; nothing may be downloaded."""
    hub = SimpleNamespace(
        auth_check=Mock(),
        try_to_load_from_cache=Mock(return_value=None),
        model_info=Mock(return_value=SimpleNamespace(siblings=[])),
        snapshot_download=Mock(side_effect=AssertionError("downloads")),
    )
    for name, mock in vars(hub).items():
        monkeypatch.setattr(huggingface_hub, name, mock)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    set_gpu(monkeypatch, 16)
    return hub


def set_gpu(monkeypatch, gib: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gib is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu = SimpleNamespace(name="Some GPU", total_memory=(gib or 0) * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)


def refusal(kind: type[Exception]) -> Exception:
    response = httpx2.Response(401, request=httpx2.Request("GET", "https://huggingface.co"))
    return kind("no", response=response)


def test_no_gpu_is_said_first_with_the_way_out(hub, monkeypatch):
    set_gpu(monkeypatch, None)
    with pytest.raises(UserError, match=r"No CUDA device. qlora7b needs one with ≥ 8 GiB.*make demo"):
        preflight.check(Config("qlora7b", LLAMA))
    hub.auth_check.assert_not_called()


def test_a_gpu_that_is_too_small_is_named(hub, monkeypatch):
    set_gpu(monkeypatch, 6)
    with pytest.raises(UserError, match=r"Some GPU has 6.0 GiB. qlora7b needs ≥ 8 GiB"):
        preflight.check(Config("qlora7b", LLAMA))


def test_a_gated_licence_names_the_page_and_the_variable(hub):
    hub.auth_check.side_effect = refusal(GatedRepoError)
    with pytest.raises(UserError, match=r"gated.*https://huggingface.co/meta-llama/Llama-2-7b-hf.*HF_TOKEN"):
        preflight.check(Config("qlora7b", LLAMA))


def test_an_unknown_model_is_said_to_be_unknown(hub):
    hub.auth_check.side_effect = refusal(RepositoryNotFoundError)
    with pytest.raises(UserError, match="knows no such model"):
        preflight.check(Config("qlora7b", LLAMA))


@pytest.mark.parametrize(
    "error", [OfflineModeIsEnabled("off"), OSError("no route"), httpx2.ConnectError("no"), httpx2.ProxyError("no")]
)
def test_a_hub_out_of_reach_says_how_to_go_without(hub, error):
    hub.auth_check.side_effect = error
    with pytest.raises(UserError, match=r"hub cannot be reached.*base.path"):
        preflight.check(Config("qlora7b", LLAMA))


def test_a_full_disk_is_said_before_the_download(hub):
    file = SimpleNamespace(rfilename="model-00001-of-00002.safetensors", size=10**18)
    hub.model_info.return_value = SimpleNamespace(siblings=[file])
    with pytest.raises(UserError, match=r"takes .* GiB .*HF_HOME"):
        preflight.check(Config("qlora7b", LLAMA))


def test_what_fits_passes_and_cached_weights_need_no_hub(hub):
    preflight.check(Config("qlora7b", LLAMA))
    hub.auth_check.assert_called_once()
    hub.try_to_load_from_cache.return_value = "/cache/config.json"
    hub.auth_check.side_effect = LocalEntryNotFoundError("unreachable")
    preflight.check(Config("qlora7b", LLAMA))


def test_a_model_folder_needs_neither_hub_nor_gpu(hub, monkeypatch, tiny_base):
    set_gpu(monkeypatch, None)
    hub.auth_check.side_effect = AssertionError("asks the hub")
    preflight.check(Config("tiny", Base(str(tiny_base))))


def test_a_missing_model_folder_says_what_makes_it(hub, tmp_path):
    with pytest.raises(UserError, match="no such model folder"):
        preflight.check(Config("x", Base(str(tmp_path / "absent"))))
    with pytest.raises(UserError, match="make smollm2"):
        preflight.check(Config("x", Base("./.cache/other/smollm2")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        preflight.check(Config("x", Base(str(tmp_path / "empty"))))


def test_the_systems_of_seven_billion_weights_ask_for_a_gpu():
    assert load("qlora7b").base.min_gpu_gib == 7.5
    assert load("raw7b").base.min_gpu_gib > 0


def test_it_needs_nothing_that_others_have_imported():
    """The hub's package gives its modules only to who imports them; under pytest someone always has."""
    code = "import sys, types; sys.modules['torch'] = types.ModuleType('torch'); "  # which takes seconds
    code += "from common.runs import preflight; from common.config import Base; preflight.weights(Base('some/model'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert "UserError: base.path=some/model is not on this disk" in done.stderr


@pytest.mark.parametrize(("gib", "fits"), [(7.99, False), (8, True), (8.01, True)])
def test_a_gpu_of_just_the_size_that_is_needed_will_do(hub, monkeypatch, gib, fits):
    set_gpu(monkeypatch, gib)
    if fits:
        preflight.gpu(LLAMA, "x")
    else:
        with pytest.raises(UserError, match=r"Some GPU has 8\.0 GiB\. x needs ≥ 8 GiB"):
            preflight.gpu(LLAMA, "x")
    set_gpu(monkeypatch, None)
    preflight.gpu(replace(LLAMA, min_gpu_gib=0), "x")


@pytest.mark.parametrize(
    ("cached", "random_weights", "whence"),
    [
        ((), False, "may be downloaded"),
        (("config.json",), False, "may be downloaded"),
        (("config.json",), True, "here"),
        (("model.safetensors",), True, "may be downloaded"),
        (("config.json", "model.safetensors"), False, "here"),
        (("config.json", "model.safetensors.index.json"), False, "here"),
        (("model.safetensors",), False, "may be downloaded"),
    ],
)
def test_weights_are_here_where_the_cache_has_config_and_weights_of_this_revision(hub, cached, random_weights, whence):
    hub.try_to_load_from_cache.side_effect = lambda path, name, revision: (
        f"/cache/{name}" if (path, revision) == (LLAMA.path, "v2") and name in cached else object()
    )
    base = replace(LLAMA, revision="v2", random_weights=random_weights)
    assert preflight.weights(base) == whence
    assert hub.auth_check.called == (whence != "here")
    assert hub.model_info.called == (whence != "here" and not random_weights)
    assert preflight.weights(replace(base, revision="v3")) == "may be downloaded"


@pytest.mark.parametrize(("free", "fits"), [(7 * 2**30, True), (7 * 2**30 - 1, False)])
def test_a_download_needs_room_for_all_weights_and_for_nothing_else(hub, monkeypatch, tmp_path, free, fits):
    files = [("a.safetensors", 3 * 2**30), ("b.safetensors", 4 * 2**30), ("c.safetensors", None), ("d.bin", 10**18)]
    hub.model_info.return_value = SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in files])
    monkeypatch.setattr(preflight.constants, "HF_HUB_CACHE", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: {tmp_path: SimpleNamespace(free=free)}[folder])
    base = replace(LLAMA, revision="v2")
    if fits:
        preflight.weights(base)
    else:
        with pytest.raises(
            UserError, match=rf"Llama-2-7b-hf takes 7\.0 GiB and {tmp_path} has 7\.0 GiB free: make room"
        ):
            preflight.weights(base)
    hub.model_info.assert_called_once_with(LLAMA.path, revision="v2", files_metadata=True)
    hub.auth_check.assert_called_once_with(LLAMA.path)


def test_a_revision_that_is_not_there_is_named(hub):
    hub.model_info.side_effect = refusal(RevisionNotFoundError)
    with pytest.raises(UserError, match=r"base\.revision=v9: meta-llama/Llama-2-7b-hf has no such revision"):
        preflight.weights(replace(LLAMA, revision="v9"))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("~/absent", "~/absent: no such model folder; set base.path to a model folder or a hub id"),
        ("./absent", "no such model folder"),
        ("/absent", "no such model folder"),
        ("one/two/three", "no such model folder"),
        (".cache/smollm2-of-mine", "no such model folder; make smollm2 fetches it"),
        ("no id", "no id: no such folder here, and no hub id looks like that"),
    ],
)
def test_a_path_that_is_none_is_no_hub_id(hub, path, words):
    with pytest.raises(UserError, match=words):
        preflight.weights(Base(path))
    hub.auth_check.assert_not_called()


@pytest.mark.parametrize("path", ["./absent", "/absent", "~/absent"])
def test_a_window_tokenizers_folder_is_not_asked_of_the_hub(hub, path, tmp_path, monkeypatch):
    hub.auth_check.side_effect = AssertionError("asks the hub")
    preflight.tokenizer(path)
    hub.try_to_load_from_cache.side_effect = lambda path, name: "there" if name == "tokenizer.json" else None
    preflight.tokenizer("some/model")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    hub.try_to_load_from_cache.side_effect = AssertionError("looks into the cache")
    preflight.tokenizer("mine")
    with pytest.raises(UserError, match="no hub id looks like that"):
        preflight.tokenizer("no id")


def test_a_hosted_models_weights_and_gpu_are_not_asked_for(hub, monkeypatch):
    set_gpu(monkeypatch, None)
    hub.auth_check.side_effect = AssertionError("asks the hub")
    config = Config("x", replace(LLAMA, quant="none"), window=Window(tokenizer="./t"), api=Api("http://host/v1"))
    preflight.check(config)


def test_a_file_is_no_model(hub, tmp_path):
    (tmp_path / "model").touch()
    with pytest.raises(UserError, match=r"base\.path=.*model: a file"):
        preflight.check(Config("x", Base(str(tmp_path / "model"))))


def test_the_tokenizer_that_cuts_the_text_must_be_had_too(hub, tmp_path, tiny_base):
    config = Config("x", Base(str(tiny_base)), window=Window(tokenizer="meta-llama/Llama-2-7b-hf"))
    hub.auth_check.side_effect = refusal(GatedRepoError)
    with pytest.raises(UserError, match=r"window.tokenizer=meta-llama/Llama-2-7b-hf is gated"):
        preflight.check(config)
    hub.auth_check.side_effect = OSError("no route")
    with pytest.raises(UserError, match=r"cannot be reached.*set window\.tokenizer to its folder"):
        preflight.check(config)
    preflight.check(replace(config, window=Window(tokenizer=str(tiny_base))))


def test_a_configuration_gets_the_shots_of_its_train_set(tmp_path):
    file = squad_file(tmp_path / "train.json", 6, 3)
    config = load("raw7b", [f"data.train={json.dumps(str(file))}", "data.train_paragraphs=1", "prompt.shots=1"])
    complete = preflight.with_shots(config)
    assert complete == replace(config, prompt=prompt.fill(config.prompt, read(str(file), "train").examples[:3]))
    assert complete.prompt.before.count("Answer:") == 1
    bare = load("raw7b", ["data.train=absent.json"])
    assert preflight.with_shots(bare) is bare


TYPED = [  # script, its words, what is said
    ("train_loop", "raw7b", "has no lora section"),
    ("train_loop", "qlora7b data.train=absent.json", "absent.json: no such file (data.train)"),
    ("train_loop", "qlora7b adapter=x", "a training makes its own"),
    ("eval_loop", "raw7", 'unknown MODEL "raw7" — did you mean "raw7b"?'),
    ("eval_loop", "raw7b evl.parts=3", 'unknown key "evl" — did you mean "eval"?'),
    ("eval_loop", "raw7b data.dev=absent.json", "absent.json: no such file (data.dev)"),
    ("eval_loop", "raw7b base.path=./absent data.dev=demo/dev.json", "./absent: no such model folder"),
    ("bench_latency", "qlora7b adapter=absent data.dev=demo/dev.json", "adapter=absent: no such folder"),
    ("bench_latency", "qlora7b runs=absent data.dev=demo/dev.json", "has no finished training under absent/"),
    ("ask", "qlora7b adapter=absent", "adapter=absent: no such folder"),
    ("export", "qlora7b /", "no folder to write is named"),
    ("export", "qlora7b tests", "tests is there already"),
]


@pytest.mark.parametrize(("script", "words", "said"), TYPED)
def test_what_was_typed_is_checked_without_torch(script, words, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "torch", None)  # to import it would fail
    with pytest.raises(UserError, match=re.escape(said)):
        preflight.typed(script, words.split())


def test_what_was_typed_right_is_let_through(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    preflight.typed("train_loop", ["qlora7b", "data.train=demo/train.json", "data.dev=demo/dev.json", "--fresh"])
    preflight.typed("eval_loop", ["raw7b", "data.dev=demo/dev.json"])
    (tmp_path / "adapter_config.json").write_text("{}")
    preflight.typed("export", ["qlora7b", str(tmp_path / "out"), f"adapter={tmp_path}", "data.dev=demo/dev.json"])


def test_a_mistake_is_one_line_of_the_check_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["preflight", "train_loop", "absent"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(preflight.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith('error: unknown MODEL "absent"')
