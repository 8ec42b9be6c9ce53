"""From evaluations to a calibration that asking and evaluating use, on a model that answers."""

import json
import shutil
from pathlib import Path

import eval_loop
import train_loop
from common.data import squad
from common.errors import UserError
from common.metrics import calibration, confidence
from common.runs import record
from scripts import ask, calibrate
from tests import answering
from tests.conftest import answering_yaml
from tests.test_train_loop import last_json

import pytest

SEARCHED = ["decode.spans=true", "decode.nbest=3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, answering_base):
    """A system with an adapter, evaluated on dev by search and freely, and on held-out articles."""
    folder = tmp_path_factory.mktemp("calibrate")
    config = str(answering_yaml(folder, answering_base))
    train = ["train.max_steps=8", "early_stop.split=heldout", "early_stop.heldout_share=0.3", "early_stop.by=none"]
    train_loop.main([config, *train])
    for words in (SEARCHED, [], [*SEARCHED, "data.split=heldout"]):
        eval_loop.main([config, *words])
    return folder, config


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """A copy, for what is written into it."""
    folder, config = trained
    shutil.copytree(folder / "runs", tmp_path / "runs")
    return config, tmp_path / "runs"


def evaluations(runs: Path) -> list[dict]:
    """On dev by search and freely, on held-out articles by search, and what came later."""

    def key(r: dict) -> tuple:
        decode, split = r["config"]["decode"], r["config"]["data"]["split"]
        return r["folder"].endswith("002"), split == "heldout", not decode["nbest"], r["folder"]

    return sorted((r for r in record.read_all(runs) if r["kind"] == "eval"), key=key)


def told(capsys, *words: str) -> tuple[str, dict]:
    calibrate.main([str(word) for word in words])
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_figures_are_those_of_cross_fitted_maps_and_the_map_is_kept_and_used(runs, capsys):
    config, folder = runs
    out, found = told(capsys, config, f"runs={folder}", *SEARCHED)
    evaluation, *_ = evaluations(folder)
    assert "note: 48 questions tell little: their EM alone is known to [" in out
    assert found["page"] == f"{evaluation['folder']}/calibration-dev.md"
    page = Path(found["page"]).read_text()
    assert page.startswith(f"# Calibration of answering, 48 questions of {evaluation['may_differ']['data_source']}\n\n")
    # ---- the figures, by the pieces
    rows = record.read_questions(evaluation)
    asked = {e.id: e.question for e in squad.read(evaluation["may_differ"]["data_source"], "dev").examples}
    known = {id_: calibration.features(row, asked[id_]) for id_, row in rows.items()}
    right = {id_: row["em"] for id_, row in rows.items()}
    article = {id_: row["article"] for id_, row in rows.items()}
    crossed = calibration.cross_fitted("features", known, right, article, "share")
    expected = confidence.figures(crossed, right, article)
    assert found["figures"] == pytest.approx({name: figure.value for name, figure in expected.items()})
    assert json.loads((Path(evaluation["folder"]) / "confidence.json").read_text()) == pytest.approx(crossed)
    for name in ("logprob", "least", "share", "entropy", "none", "temperature", "platt", "isotonic", "features"):
        assert f"\n| {name} |" in page
        assert f"\n{name} " in out
    assert found["thresholds"]["80"] == calibration.threshold(crossed, right, 80)
    # ---- the map, which is of all answers, is what asking and evaluating use
    fitted = calibration.fit("features", [*known.values()], [*right.values()], "share")
    eval_loop.main([config, f"runs={folder}", *SEARCHED])
    again = Path(last_json(capsys)["run"]) / "questions.jsonl"
    for row in map(json.loads, again.read_text().splitlines()):
        assert row["confidence"] == pytest.approx(fitted([known[row["id"]]])[0], abs=1e-5)
    note = "Note 1: at the north gate the otter is resting."
    words = [config, f"runs={folder}", *SEARCHED, "--context", note, "--question", "Which animal is meant?"]
    ask.main(words)
    *lines, last = capsys.readouterr().out.splitlines()
    answer = json.loads(last)
    assert answer["calibrated"] is True
    assert f"; confidence {answer['confidence']:.0%}, calibrated; " in lines[-1]
    assert answer["nbest"][0][0] == answer["answer"] == lines[0] == "otter"
    ask.main([*words, "ask.least=1"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0] == f"(not sure: {answer['confidence']:.0%} < 100%)"
    assert lines[1].startswith("no answer is given; confidence ")
    withheld = json.loads(last)
    assert [withheld[key] for key in ("answer", "span", "nbest", "abstained")] == ["", None, None, True]
    # ---- a map that reads what these answers do not have leaves them as they are
    path = Path(found["calibration"])
    path.write_text(path.read_text().replace('"entropy"', '"another feature"'))
    eval_loop.main([config, f"runs={folder}", *SEARCHED])
    assert '"confidence"' not in (Path(last_json(capsys)["run"]) / "questions.jsonl").read_text()
    ask.main(words)
    assert "calibrated" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"ask\.least: the calibration reads what this answer does not have"):
        ask.main([*words, "ask.least=0.5"])
    # ---- ask.least is of questions: an evaluation is not lost to it
    path.write_text("{}")
    eval_loop.main([config, f"runs={folder}", *SEARCHED, "ask.least=0.5"])
    assert last_json(capsys)["n"] == 48


def test_maps_are_fitted_to_held_out_articles_and_corrected_for_several_golds(runs, tmp_path, capsys):
    config, folder = runs
    words = [config, f"runs={folder}", *SEARCHED, "--way", "heldout", "--map", "platt"]
    out, found = told(capsys, *words)
    *_, held = evaluations(folder)
    assert f"fitted to {held['folder']}:" in out
    assert found["questions"] == held["result"]["n"]
    assert "golds" not in out, "dev has one too"
    mapped = json.loads((Path(found["page"]).parent / "confidence.json").read_text())
    eval_loop.main([config, f"runs={folder}", *SEARCHED, "data.split=heldout"])
    assert '"confidence"' not in (Path(last_json(capsys)["run"]) / "questions.jsonl").read_text(), "one gold answer"
    kept = json.loads(Path(found["calibration"]).read_text())
    assert (kept["golds"], kept["fitted"]["kind"], kept["way"]) == (1, "platt", "heldout")
    # ---- dev with three gold answers, of which the first two agree
    dev = json.loads(Path(held["config"]["data"]["dev"]).read_text())
    for paragraph in (p for article in dev["data"] for p in article["paragraphs"]):
        for qa in paragraph["qas"]:
            word = next(w for w in paragraph["context"].split() if w != qa["answers"][0]["text"])
            other = {"text": word, "answer_start": paragraph["context"].index(word)}
            qa["answers"] = [*qa["answers"] * 2, other]
    (tmp_path / "dev3.json").write_text(json.dumps(dev))
    data = f"data.dev={tmp_path}/dev3.json"
    eval_loop.main([config, f"runs={folder}", data, *SEARCHED])
    threefold = last_json(capsys)["run"]
    out, found = told(capsys, *words, data, "--evaluation", threefold)
    exponent = calibration.annotators_exponent(squad.read(f"{tmp_path}/dev3.json", "dev").examples)
    assert f"for 3 of them p becomes 1 − (1 − p) ** (3 ** {exponent:.2f})" in out
    for id_, p in json.loads((Path(found["page"]).parent / "confidence.json").read_text()).items():
        assert p == pytest.approx(calibration.for_golds(mapped[id_], 3, exponent), abs=1e-6)


def test_a_model_without_an_adapter_is_measured_and_nothing_is_kept(runs, capsys):
    config, folder = runs
    eval_loop.main([config, f"runs={folder}", "lora=null"])
    capsys.readouterr()
    out, found = told(capsys, config, f"runs={folder}", "lora=null")
    assert "Answering only what platt trusts" in out, "no search, so not by all features"
    assert "; no adapter, so nothing is kept\n" in out
    assert found["calibration"] is None
    assert Path(found["page"]).is_file()


def test_maps_can_read_the_sum_after_a_search_too(runs, capsys):
    config, folder = runs
    out, found = told(capsys, config, f"runs={folder}", *SEARCHED, "--score", "logprob", "--map", "temperature")
    assert "Probabilities by maps of logprob, " in out
    assert json.loads(Path(found["calibration"]).read_text())["fitted"]["names"] == ["logprob"]


def test_agreement_with_another_evaluation_is_a_score(runs, capsys):
    config, folder = runs
    _, freely, held = (r["folder"] for r in evaluations(folder))
    out, found = told(capsys, config, f"runs={folder}", *SEARCHED, "--other", freely)
    assert "\n| agree |" in Path(found["page"]).read_text()
    assert found["calibration"] is None
    assert "with --other nothing is kept: make ask asks once" in out
    with pytest.raises(UserError, match=r"of other questions than"):
        calibrate.main([config, f"runs={folder}", *SEARCHED, "--other", held])


def test_a_map_is_of_the_dev_set_that_is_configured_and_is_applied_to_other_questions(runs, tmp_path, capsys):
    config, folder = runs
    *_, held = (r["folder"] for r in evaluations(folder))
    other = answering.squad_file(tmp_path / "other.json", paragraphs=4, seed=7)
    eval_loop.main([config, f"runs={folder}", *SEARCHED, f"data.dev={other}"])  # newer, and of other questions
    eval_loop.main([config, f"runs={folder}", *SEARCHED, "data.dev_questions=5"])
    capsys.readouterr()
    out, found = told(capsys, config, f"runs={folder}", *SEARCHED, "--on", held)
    n, em = (record.read_one(Path(held) / "record.json")["result"][key] for key in ("n", "em"))
    assert found["n"] == 48
    assert f", held out, {n} questions, EM {em:.1f}:\n" in out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["decode.spans=true"], r"no evaluation of .*answering-dev\.json under .* asked so: make eval MODEL=answering"),
        (["--evaluation", "nowhere"], r"nowhere: no finished run is there; name the folder of an evaluation"),
        (["--evaluation", "{train}"], r"train-001: not an evaluation"),
        ([*SEARCHED, "--on", "{free}"], r"eval-001: another decoding than .*; evaluate it alike"),
        (["--evaluation", "{held}"], r"--evaluation .*: of data\.split=heldout; name one of data\.split=dev"),
        ([*SEARCHED, "--way", "heldout", "--fit", "{searched}"], r"--fit .*: of data\.split=dev; name one of data"),
        (["--score", "share"], r"--score share: .* has no search; evaluate with decode\.nbest"),
        ([*SEARCHED, "--fit", "{held}"], r"--fit names what --way heldout fits to; --way dev fits to dev itself"),
        (["lora=null"], r"answering has no evaluation of .*answering-dev"),
        (["--way", "heldout"], r"no evaluation of held-out articles .* the same ARGS data\.split=heldout"),
        (["--map", "other"], r"invalid choice"),
    ],
)
def test_what_is_missing_is_said_in_one_line(runs, words, error):
    config, folder = runs
    train = next(r["folder"] for r in record.read_all(folder) if r["kind"] == "train")
    searched, free, held = (r["folder"] for r in evaluations(folder))
    words = [word.format(train=train, searched=searched, free=free, held=held) for word in words]
    with pytest.raises(UserError, match=error) as caught:
        calibrate.main([config, f"runs={folder}", *words])
    assert "\n" not in str(caught.value)


def test_evaluations_that_say_too_little_are_refused(runs):
    config, folder = runs
    searched, *_ = (Path(r["folder"]) for r in evaluations(folder))
    whole = (searched / "questions.jsonl").read_text()
    (searched / "questions.jsonl").write_text(whole.replace('"logprob"', '"gone"', 2))
    with pytest.raises(UserError, match=r"2 of 48 answers have no log-probability"):
        calibrate.main([config, f"runs={folder}", *SEARCHED])
    (searched / "questions.jsonl").write_text(whole)
    found = json.loads((searched / "record.json").read_text())
    found["result"]["adapter_sha256"] = "0" * 64
    (searched / "record.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"of another adapter than .*/best"):
        calibrate.main([config, f"runs={folder}", *SEARCHED, "--evaluation", str(searched)])
