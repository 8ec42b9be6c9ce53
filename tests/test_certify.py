"""What was measured is certified as it is, and nothing that was changed since is."""

import json
import shutil

import certify
import eval_loop
import train_loop
from common import prompt
from common.errors import UserError
from tests.conftest import squad_file

import pytest
import yaml
from safetensors.torch import load_file, save_file


@pytest.fixture
def run(tiny_config, tmp_path, capsys):
    """A scored adapter's evaluation."""
    train_loop.main([str(tiny_config)])
    eval_loop.main([str(tiny_config)])
    capsys.readouterr()
    (folder,) = (tmp_path / "runs").glob("*-eval-001")
    return folder


def certified(capsys, run, *overrides: str) -> tuple[bool, dict[str, str], str]:
    with pytest.raises(SystemExit) as ended:
        certify.main([str(run), *overrides])
    out = capsys.readouterr().out
    said = json.loads(out.strip().splitlines()[-1])
    assert said["certified"] == (not ended.value.code) == (not said["misfits"])
    return said["certified"], said["misfits"], out


def edit(file, change) -> None:
    kind = yaml if file.suffix == ".yaml" else json
    content = kind.safe_load(file.read_text()) if kind is yaml else json.loads(file.read_text())
    change(content)
    file.write_text(yaml.safe_dump(content) if kind is yaml else json.dumps(content))


def test_an_evaluation_is_certified_as_it_is_and_no_change_to_it_is(run, tmp_path, capsys, monkeypatch):
    sure, _, out = certified(capsys, run)
    assert sure
    assert "CERTIFIED: EM" in out
    assert "0 of 12 differ" in out

    copy = tmp_path / "copy"
    adapter = tmp_path / "adapter"
    trained = json.loads((run / "record.json").read_text())["result"]["adapter"]

    def fresh():
        for folder, source in ((copy, run), (adapter, trained)):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)

    def weights_changed():
        weights = load_file(adapter / "adapter_model.safetensors")
        save_file({name: w * 1.5 for name, w in weights.items()}, adapter / "adapter_model.safetensors")

    for change, check in (
        (lambda: edit(copy / "predictions.json", lambda p: p.update(p0q0="else")), "answers"),
        (lambda: edit(copy / "record.json", lambda r: r["result"].update(em=99.0)), "score of the predictions"),
        (lambda: edit(copy / "record.json", lambda r: r["must_match"].update(scorer="another")), "scorer"),
        (lambda: edit(copy / "record.json", lambda r: r["may_differ"].update(tokenizer="another")), "tokenizer"),
        (lambda: edit(copy / "config.yaml", lambda c: c["window"].update(context=300)), "configuration"),
        (weights_changed, "adapter"),
        (lambda: edit(adapter / "adapter_config.json", lambda c: c.update(lora_alpha=64)), "adapter"),
    ):
        fresh()
        assert certified(capsys, copy, f"adapter={adapter}")[0], "a copy elsewhere is as good"
        change()
        sure, misfits, out = certified(capsys, copy, f"adapter={adapter}")
        assert not sure
        assert check in misfits
        assert "NOT CERTIFIED" in out

    other = squad_file(tmp_path / "other.json", paragraphs=4, questions=3, seed=2)
    sure, misfits, _ = certified(capsys, run, f"data.dev={other}")
    assert not sure
    assert {"data", "answers"} <= misfits.keys()

    changed = {"context": "Context: {}\n\nQ: {}\n\nAnswer:"}
    monkeypatch.setattr(prompt, "_ORDERS", changed)
    monkeypatch.setattr(prompt, "_QUESTION", "\n\nQ: {}\n\nAnswer:")
    sure, misfits, _ = certified(capsys, run)
    assert not sure
    assert {"prompt", "answers"} <= misfits.keys()


def test_what_cannot_be_certified_is_an_error(run, tmp_path):
    (training,) = (tmp_path / "runs").glob("*-train-001")
    for arguments, message in (
        ([tmp_path / "absent"], "no finished run is there"),
        ([training], "not an evaluation"),
        ([run, "window.context=100"], "only where things are"),
        ([run, "adapter=absent"], "absent"),
        ([run, "--questions", "0"], "at least one"),
    ):
        with pytest.raises(UserError, match=message):
            certify.main([str(a) for a in arguments])
