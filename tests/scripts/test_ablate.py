"""`make ablate`: every variant is trained, scored and compared; a second call does what is missing, on any machine."""

import json
import shutil
from pathlib import Path

from common.errors import UserError
from common.runs import ablations
from scripts import ablate

import pytest
import yaml


def ablated(capsys, *arguments: object) -> tuple[int, str, dict]:
    with pytest.raises(SystemExit) as ended:
        ablate.main([str(a) for a in arguments])
    out = capsys.readouterr().out
    return int(ended.value.code), out, json.loads(out.strip().splitlines()[-1])


@pytest.fixture
def family(tmp_path, answering_config):
    """Write a family of short trainings of the answering base; returns its path."""

    def make(variants: list[str], **keys: object) -> Path:
        path = tmp_path / "family.yaml"
        overrides = ["train.max_steps=4", "train.eval_every=4", "data.dev_questions=40"]
        found = {"why": "does it?", "baseline": "", "variants": variants, "system": str(answering_config)}
        path.write_text(yaml.safe_dump({**found, "overrides": overrides, **keys}))
        return path

    return make


def test_what_fails_leaves_the_others_whole_and_outcomes_outlive_their_runs(family, tmp_path, capsys):
    variants = ["lora.rank=2", "window.tokenizer=/nowhere"]
    path, records = family(variants, seeds=[0, 1], changes=["window"]), tmp_path / "records"
    words = (path, f"--records={records}")
    ablate.main([*map(str, words), "--dry-run"])
    out = capsys.readouterr().out
    assert "family: 3 variants, 2 seeds, 0 runs done" in out
    assert "6 runs, 0 done; left: 6 runs of unknown length (--rehearse measures one of each family); 1 at a time" in out
    assert not records.exists()

    code, out, result = ablated(capsys, *words)
    assert code == 1
    assert len(result["failed"]) == 2
    assert all("window.tokenizer=/nowhere" in name for name in result["failed"])
    assert all("/nowhere" in said for said in result["failed"].values())
    assert "4 of 6 runs are done" in out
    page = (records / "README.md").read_text()
    assert "Missing: window.tokenizer=/nowhere (seed 0, 1)" in page
    rows = [line.split(" | ")[:2] for line in page.splitlines() if " of 2 | " in line]
    assert rows == [["| as it is", "2 of 2"], ["| lora.rank=2", "2 of 2"], ["| window.tokenizer=/nowhere", "0 of 2"]]
    assert (records / "family.svg").read_text().startswith("<svg")
    kept = sorted(records.glob("*.json"))
    assert len(kept) == 4
    assert all(file.stat().st_size < 20_000 for file in kept)
    assert not any(str(tmp_path / "runs") in file.read_text() for file in kept)

    # another machine: the outcomes alone
    shutil.rmtree(tmp_path / "runs")
    ablate.main([*map(str, words), "--dry-run"])
    assert "6 runs, 4 done; left: 2 runs, about 0.0 h" in capsys.readouterr().out
    family(variants[:1], seeds=[0, 1])
    before = [file.read_text() for file in kept]
    code, out, _ = ablated(capsys, *words)
    assert code == 0
    assert "4 runs, 4 done; left: nothing" in out
    assert "differences from " in out
    assert [file.read_text() for file in kept] == before
    assert not (tmp_path / "runs").exists()
    # an outcome that was not written, though its runs ended
    kept[0].unlink()
    code, _, _ = ablated(capsys, *words)
    text = kept[0].read_text()
    kept[0].unlink()
    code, out, _ = ablated(capsys, *words)
    assert code == 0
    assert json.loads(kept[0].read_text())["questions"] == json.loads(text)["questions"]
    assert len(list((tmp_path / "runs").glob("*/record.json"))) == 2


def test_a_setting_that_the_base_cannot_take_is_named_before_anything_runs(family, tmp_path):
    path = family(["lora.targets=[q_proj]", "lora.targets=[q_prj]"])
    with pytest.raises(UserError, match=r'family.yaml: variant "lora.targets=\[q_prj\]": .* no linear layer q_prj'):
        ablate.main([str(path), f"runs={tmp_path / 'runs'}"])
    with pytest.raises(UserError, match=r"seed=: the seeds are those of the family's file"):
        ablate.main([str(path), "seed=1"])
    with pytest.raises(UserError, match=r"adapter=: every run trains its own"):
        ablate.main([str(path), "adapter=somewhere"])
    with pytest.raises(UserError, match=r"absent.json: no such file"):
        ablate.main([str(family(["lora.rank=2"])), f"data.train={tmp_path / 'absent.json'}"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file; --records names a folder"):
        ablate.main([str(family(["lora.rank=2"])), f"--records={tmp_path / 'file'}"])
    assert not (tmp_path / "runs").exists()


def test_every_variant_of_every_family_trains_and_evaluates(answering_config, tmp_path, capsys):
    words = (f"--model={answering_config}", "--rehearse-all", "data.dev_questions=6", "train.questions_per_step=4")
    code, _, result = ablated(capsys, *words)
    assert (code, result["failed"]) == (0, {})
    page = (tmp_path / "runs" / "ablations" / "README.md").read_text()
    for name in ablations.names():
        assert f"## {name} (answering)\n" in page
    assert "Missing" not in page
    assert page.count("| 1 of 1 |") == sum(
        len(ablations.plan(ablations.sweeps.find(name, "family")).jobs) for name in ablations.names()
    )
    ablate.main([*words, "--dry-run"])
    assert f"{result['runs']} runs, {result['runs']} done; left: nothing" in capsys.readouterr().out
