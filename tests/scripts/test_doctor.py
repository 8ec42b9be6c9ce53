"""The doctor works where nothing else does, tries what it praises, and ends with the command to type."""

import importlib.metadata
import shutil
import subprocess
import sys

from common.errors import UserError
from common.model import estimate, memory
from common.runs import preflight
from scripts import doctor
from tests.conftest import ROOT

import bitsandbytes
import huggingface_hub
import pytest
import torch


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """`nvidia_smi("12.4")`: a driver for that CUDA, with one GPU, as far as its tool tells."""

    def install(cuda: str) -> None:
        tool = tmp_path / "nvidia-smi"
        gpu, header = "Some GPU, 16384, 15000, 550.54", f"CUDA Version: {cuda}"
        tool.write_text(f'#!/bin/sh\ncase "$*" in *query*) echo "{gpu}";; *) echo "{header}";; esac\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return install


def states(check) -> dict[str, tuple[str, str]]:
    return {finding.about: (finding.state, finding.text) for finding in check()}


@pytest.mark.parametrize(("bundle", "command"), [(False, "make setup"), (True, "make unbundle")])
def test_with_the_standard_library_alone_it_names_the_first_command(tmp_path, bundle, command):
    for folder in ("common", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    if bundle:
        (tmp_path / "bundle.tar").touch()
    run = subprocess.run([sys.executable, "-S", "-m", "scripts.doctor"], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.endswith(f"\nnext: {command}\n")


def test_packages_out_of_range_or_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert states(doctor.packages)["packages"][0] == "ok"
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "gguf":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1.0" if name == "peft" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    (finding,) = doctor.packages()
    assert finding.state == "wrong"
    assert "peft 0.1.0 is not <0.22,>=0.21" in finding.text
    assert "gguf is missing" in finding.text
    assert "torch" not in finding.text


def test_a_gpu_is_listed_and_a_torch_without_cuda_beside_it_is_wrong(nvidia_smi, monkeypatch):
    nvidia_smi("12.4")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "Some GPU, 16 GiB" in states(doctor.gpus)["GPU"][1]
    (finding,) = doctor.torch_and_cuda()
    assert finding.state == "wrong"
    assert "CPU build" in finding.text
    assert finding.fix == "make setup CUDA=cu126"


def test_a_driver_older_than_torchs_cuda_is_wrong(nvidia_smi, monkeypatch):
    nvidia_smi("12.4")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = doctor.torch_and_cuda()
    assert finding.state == "wrong"
    assert "driver supports CUDA 12.4 and torch was built for 13.0" in finding.text
    assert finding.fix == "make setup CUDA=cu126"
    nvidia_smi("11.8")
    assert next(doctor.torch_and_cuda()).fix == "nvidia-smi"
    nvidia_smi("13.1")
    (finding,) = doctor.torch_and_cuda()
    assert "torch finds no GPU; does another program hold it?" in finding.text


def test_what_training_will_do_on_this_card_is_said(monkeypatch):
    assert list(doctor.card()) == [], "of a CPU nothing"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    choice = memory.Choice(2304, 32, 1, {}, "fused layers, 32 of 32 keep")
    monkeypatch.setattr(estimate, "training", lambda config, device: (choice, 41.7))
    (finding,) = doctor.card()
    assert finding.state == "ok"
    assert finding.text.startswith("qlora7b, fused layers, 32 of 32 keep; an epoch in about 42 min")

    for error in (UserError("2 GiB are too little"), RuntimeError("no kernel image\nmore"), OSError("no config.json")):

        def refuse(config, device, error=error):
            raise error

        monkeypatch.setattr(estimate, "training", refuse)
        (finding,) = doctor.card()
        assert finding.state == "no"
        assert finding.text == f"qlora7b on this GPU: {str(error).splitlines()[0]}"
        can = [doctor.Finding(about, "ok", "") for about in ("qlora7b", "SQuAD")]
        assert doctor.next_command([*can, finding]) == "make demo"
        assert doctor.next_command(can) == "make train"


def test_a_bitsandbytes_that_computes_nonsense_is_wrong(monkeypatch):
    monkeypatch.setattr(doctor, "_nvidia_smi", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {about: state for about, (state, _) in states(doctor.torch_and_cuda).items()} == {
        "torch": "ok",
        "bitsandbytes": "ok",
    }
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda packed, state: torch.zeros(64, 64) + 9)
    assert states(doctor.torch_and_cuda)["bitsandbytes"][0] == "wrong"


def test_weights_and_gpu_are_reported_apart(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda path: (_ for _ in ()).throw(OSError("no route")))
    findings = list(doctor.systems())
    weights = {finding.text.split()[0]: finding.state for finding in findings if finding.about == "weights"}
    assert weights["base.path=meta-llama/Llama-2-7b-hf"] == "no"
    assert weights[".cache/smollm2-135m-instruct:"] == "ok"
    found = {finding.about: (finding.state, finding.text) for finding in findings}
    assert found["qlora7b"] == ("no", "No CUDA device. qlora7b needs one with ≥ 7.5 GiB.")
    assert found["tinyllama1b"][1].startswith("needs the weights of TinyLlama")
    assert found["smollm2-qlora"] == ("ok", "can run")


@pytest.mark.parametrize("has_gpu", [True, False])
def test_where_only_a_licence_is_missing_the_next_command_sets_the_token(monkeypatch, has_gpu):
    def gated(base):
        raise UserError(f"base.path={base.path} is gated: accept its licence at …")

    def gpu(base, system):
        if base.min_gpu_gib and not has_gpu:
            raise UserError("No CUDA device.")

    monkeypatch.setattr(preflight, "weights", gated)
    monkeypatch.setattr(preflight, "gpu", gpu)
    findings = list(doctor.systems())
    assert doctor.next_command(findings) == ("export HF_TOKEN=…" if has_gpu else "make demo")


def test_squad_is_looked_for_where_the_scripts_look(monkeypatch, tmp_path):
    monkeypatch.setenv("SQUAD_DIR", str(tmp_path))
    assert states(doctor.data)["SQuAD"][0] == "no"
    for split in ("train", "dev"):
        (tmp_path / f"{split}-v1.1.json").write_text("{}")
    assert states(doctor.data)["SQuAD"] == ("ok", f"{tmp_path}/train-v1.1.json, {tmp_path}/dev-v1.1.json")


def test_the_next_command_is_the_first_fix_then_the_most_that_can_run():
    ok = [doctor.Finding(about, "ok", "") for about in ("SQuAD", "qlora7b")]
    assert doctor.next_command(ok) == "make train"
    assert doctor.next_command(ok[1:]) == "make demo"
    assert doctor.next_command([*ok, doctor.Finding("torch", "wrong", "", "mend it")]) == "mend it"
