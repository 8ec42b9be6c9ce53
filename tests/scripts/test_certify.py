"""What was measured is certified as it is, and nothing that was changed since is."""

import hashlib
import json
import shutil
from math import comb
from pathlib import Path
from types import SimpleNamespace

import eval_loop
import train_loop
from common.config import Decode
from common.data import prompt
from common.data.tokens import Tokenizers
from common.errors import UserError
from scripts import certify
from tests.conftest import squad_file

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file


def scored(folder: Path, base: Path, *words: str) -> Path:
    """A YAML of a tiny system in `folder`, whose adapter was trained and scored."""
    train, dev = (
        squad_file(folder / f"{name}.json", n, m, seed) for name, n, m, seed in (("train", 8, 4, 0), ("dev", 4, 3, 1))
    )
    file = folder / "tiny.yaml"
    file.write_text(
        f"system: tiny\nbase: {{path: {base}, dtype: fp32}}\nruns: {folder / 'runs'}\n"
        f"lora: {{rank: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]}}\ndata: {{train: {train}, dev: {dev}}}\n"
        "train: {lr: 1e-2, questions_per_step: 8, epochs: 2, eval_every: 4, pack_tokens: 256}\n"
    )
    train_loop.main([str(file), *words])
    eval_loop.main([str(file), *words])
    return file


@pytest.fixture(scope="module")
def once(tiny_base, tmp_path_factory):
    return scored(tmp_path_factory.mktemp("scored"), tiny_base).parent


@pytest.fixture
def run(once, tmp_path, capsys):
    """A scored adapter's evaluation."""
    shutil.copytree(once / "runs", tmp_path / "runs")
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


def rows_with(run, id_: str, **changes) -> str:
    """questions.jsonl, one of its rows changed."""
    rows = map(json.loads, (run / "questions.jsonl").read_text().splitlines())
    return "".join(json.dumps(row | changes if row["id"] == id_ else row) + "\n" for row in rows)


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

    fresh()
    assert certified(capsys, copy, f"adapter={adapter}")[0], "a copy elsewhere is as good"
    edit(copy / "config.yaml", lambda c: c["bench"].update(queries=7))
    assert certified(capsys, copy, f"adapter={adapter}")[0], "what no evaluation depends on may change"

    def weights_changed():
        weights = load_file(adapter / "adapter_model.safetensors")
        save_file({name: w * 1.5 for name, w in weights.items()}, adapter / "adapter_model.safetensors")

    for change, check in (
        (lambda: edit(copy / "predictions.json", lambda p: p.update(p0q0="else")), "answers"),
        (lambda: edit(copy / "record.json", lambda r: r["result"].update(em=99.0)), "score of the predictions"),
        (lambda: edit(copy / "record.json", lambda r: r["result"].update(f1=99.0)), "score of the predictions"),
        (lambda: edit(copy / "record.json", lambda r: r["result"].update(n=13)), "score of the predictions"),
        (lambda: edit(copy / "record.json", lambda r: r["must_match"].update(questions=13)), "questions"),
        (lambda: edit(copy / "record.json", lambda r: r["must_match"]["window"].update(answer=31)), "window"),
        (lambda: edit(copy / "record.json", lambda r: r["must_match"].update(scorer="another")), "scorer"),
        (lambda: edit(copy / "record.json", lambda r: r["may_differ"].update(tokenizer="another")), "tokenizer"),
        (lambda: edit(copy / "record.json", lambda r: r["result"].update(em=float("nan"))), "score of the predictions"),
        (lambda: (copy / "questions.jsonl").unlink(), "questions.jsonl"),
        (lambda: (copy / "questions.jsonl").write_text("{}\n"), "questions.jsonl"),
        (lambda: (copy / "questions.jsonl").write_text(rows_with(copy, "p0q0", em="else")), "questions.jsonl"),
        (lambda: edit(copy / "config.yaml", lambda c: c["window"].update(context=300)), "configuration"),
        (weights_changed, "adapter"),
        (lambda: edit(adapter / "adapter_config.json", lambda c: c.update(lora_alpha=64)), "adapter"),
    ):
        fresh()
        change()
        sure, misfits, out = certified(capsys, copy, f"adapter={adapter}")
        assert not sure
        assert check in misfits
        assert "NOT CERTIFIED" in out
        assert "\nCERTIFIED" not in out
        assert f"\n{check}: {misfits[check]}\n" in out

    other = squad_file(tmp_path / "other.json", paragraphs=4, questions=3, seed=2)
    sure, misfits, _ = certified(capsys, run, f"data.dev={other}")
    assert not sure
    assert {"data", "answers"} <= misfits.keys()

    changed = {"context": "Context: {}\n\nQ: {}\n\nAnswer:"}
    monkeypatch.setattr(prompt, "_ORDERS", changed)
    monkeypatch.setattr(prompt, "QUESTION", "\n\nQ: {}\n\nAnswer:")
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


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("n", [1, 3, 12])
def test_as_many_answers_may_differ_as_would_by_chance_and_in_fp32_none(run, tmp_path, capsys, monkeypatch, exact, n):
    """By chance a tenth differ, each by itself; so many that only one run in a thousand has more; never all of them."""
    chance = next(k for k in range(n + 1) if sum(comb(n, i) * 0.1**i * 0.9 ** (n - i) for i in range(k + 1)) >= 0.999)
    assert chance == {1: 1, 3: 2, 12: 5}[n]
    may = 0 if exact else min(chance, n - 1)
    texts = json.loads((run / "predictions.json").read_text())
    wrong: int

    def answers(*args, only) -> dict[str, SimpleNamespace]:
        assert len(set(only)) == n
        return {id_: SimpleNamespace(text=texts[id_] + "!" * (i < wrong)) for i, id_ in enumerate(only)}

    monkeypatch.setattr(certify.predict, "answers", answers)
    monkeypatch.setattr(certify, "in_fp32", lambda was: exact)
    for wrong in {may, min(may + 1, n)}:
        sure, misfits, out = certified(capsys, run, f"--questions={n}")
        assert sure == (wrong <= may)
        assert f"answers: {wrong} of {n} differ" in out
        different = json.loads(out.splitlines()[-1])["different"]
        assert len(different) == wrong
        if not sure:
            assert misfits["answers"].startswith(f"{wrong} of {n} differ, at most {may} may: {different[0]}: ")
            assert misfits["answers"].count(", was ") == min(3, wrong)


@pytest.mark.parametrize(
    ("dtype", "device", "exact"),
    [
        ("fp32", "Some GPU", True),
        ("auto", "CPU of some kind", True),
        ("auto", "Some GPU", False),
        ("bf16", "CPU", False),
    ],
)
def test_what_was_computed_in_fp32_is_known(dtype, device, exact):
    was = {"config": {"base": {"dtype": dtype}}, "may_differ": {"device": {"name": device}}}
    assert certify.in_fp32(was) == exact


def test_a_certificate_is_of_both_computations_in_fp32(run, capsys, monkeypatch):
    texts = json.loads((run / "predictions.json").read_text())
    other = {id_: SimpleNamespace(text=text) for id_, text in {**texts, "p0q0": "else"}.items()}
    monkeypatch.setattr(certify.predict, "answers", lambda *args, only: other)
    assert not certified(capsys, run)[0]
    monkeypatch.setattr(certify, "compute_dtype", lambda base, device: torch.bfloat16)
    assert certified(capsys, run)[0]


def test_an_adapters_change_is_said(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert certify.changed(tmp_path, sha256) is None
    assert certify.changed(tmp_path, "other") == f"sha256 {sha256}, was other"
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  adapter_model.safetensors\n")
    assert "adapter_model.safetensors is damaged" in certify.changed(tmp_path, sha256)
    with pytest.raises(UserError, match="adapter=folder says where it is now"):
        certify.changed(tmp_path / "absent", sha256)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_hosted_models_answers_are_replayed_from_the_transcript_that_was_scored(tmp_path, monkeypatch, elsewhere):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
        (folder / "transcript.jsonl").write_text(f"of {folder.name}")
    folder = other if elsewhere else run
    sha256, closed = hashlib.sha256(f"of {folder.name}".encode()).hexdigest(), []

    def client(config, transcript, replay):
        assert (config, transcript, replay) == ("config", folder / "transcript.jsonl", True)
        return SimpleNamespace(transcript=transcript, close=lambda: closed.append(1))

    monkeypatch.setattr(certify.hosted, "Client", client)
    monkeypatch.setattr(certify, "prompt_texts", lambda *args: ([("q", f"prompt by {args[1]}")], {}))

    def ask_all(client, prompts: dict[str, str], progress: None):
        return {id_: SimpleNamespace(text=text.upper()) for id_, text in prompts.items()}

    monkeypatch.setattr(certify.hosted, "ask_all", ask_all)
    config = SimpleNamespace(window=None, prompt=None, decode=Decode())
    monkeypatch.setattr(certify.hosted, "Client", lambda c, *args, **kw: client("config", *args, **kw))
    for stated, misfit in ((sha256, None), ("other", f"sha256 {sha256}, was other")):
        result, found = {"replayed": str(other) if elsewhere else None, "transcript_sha256": stated}, {}
        assert certify.replayed(config, Tokenizers("own", "cutter"), run, result, ["example"], found) == {
            "q": "PROMPT BY CUTTER"
        }
        assert found == {"transcript": misfit}
    config.decode = Decode(snap=True)
    monkeypatch.setattr(certify, "parts_read", lambda *args: {"q": [("a prompt, it is said", 0)]})
    snapped = certify.replayed(config, Tokenizers("own", "cutter"), run, result, ["example"], {})
    assert snapped == {"q": "prompt"}, "as it was scored"
    assert len(closed) == 3
    (folder / "transcript.jsonl").unlink()
    with pytest.raises(UserError, match=rf"{folder.name}/transcript\.jsonl: no such file"):
        certify.replayed(config, "cutter", run, result, [], {})
