"""A calibration beside an adapter serves that adapter, asked as it was calibrated, and nothing else."""

import json

from common.config import load
from common.errors import UserError
from common.metrics.calibration import Fitted, for_golds
from common.runs import calibrations
from common.runs.calibrations import Calibration

import pytest

FITTED = Fitted("temperature", ["logprob"], {"temperature": [2.0]})
WORDS = ("decode.spans=true", "decode.nbest=4")


def config(*words: str):
    return load("some/model", words)


@pytest.fixture
def adapter(tmp_path):
    """The folder of an adapter with a calibration."""
    asked = calibrations.asked(config(*WORDS))
    window = {**asked["window"], "tokenizer": "its hash"}
    must = {"prompt": asked["prompt"], "window": window, "decoding": asked["decoding"], "data": "d"}
    evaluation = {"must_match": must, "result": {"adapter_sha256": "a" * 64}}
    calibrations.write(tmp_path, Calibration(FITTED, 3, 0.5), evaluation, {"way": "dev", "questions": 300})
    return tmp_path


def test_what_was_written_is_read_again(adapter):
    found = calibrations.read(adapter, "a" * 64, config(*WORDS))
    assert found == Calibration(FITTED, 3, 0.5)
    half = 2.718281828**-0.5
    assert found({"logprob": -1.0}) == pytest.approx(for_golds(half, 3, 0.5)) != pytest.approx(half)
    assert Calibration(FITTED)({"logprob": -1.0}) == pytest.approx(half), "one gold answer needs no correction"
    written = json.loads((adapter / "calibration.json").read_text())
    assert (written["way"], written["questions"], written["schema"]) == ("dev", 300, 1)


def test_a_feature_that_an_answer_does_not_have_leaves_it_without(adapter):
    found = calibrations.read(adapter, "a" * 64, config(*WORDS))
    assert found.of({"logprob": -1.0}) == found({"logprob": -1.0})
    assert found.of({"mean": -1.0}) is found.of(None) is None


def test_none_is_none(tmp_path):
    assert calibrations.read(tmp_path, "a" * 64, config()) is None
    assert calibrations.read(None, None, config()) is None
    assert calibrations.find(None, None, config()) is None
    with pytest.raises(UserError, match=r"ask\.least needs a calibration of the adapter: make calibrate MODEL=model"):
        calibrations.needed(tmp_path, "a" * 64, config("ask.least=0.5"))


@pytest.mark.parametrize(
    ("sha256", "words", "told"),
    [
        ("b" * 64, WORDS, r"of another adapter, whose weights have sha256 aaaaaaaaaaaa; make calibrate MODEL=model"),
        ("a" * 64, (*WORDS, "prompt.order=both"), r'of another prompt: "\w+", and this is "\w+"; ask as it was'),
        ("a" * 64, (*WORDS, "window.context=300"), r"of another window: .*\"context\": 416.*\"context\": 300"),
        ("a" * 64, (*WORDS, "decode.choose=risk"), r"of another decoding: .*and this is .*\"choose\": \"risk\""),
        ("a" * 64, (), r"of another decoding: .*and this is \{\}; ask as it was calibrated, or make calibrate"),
    ],
)
def test_another_adapter_prompt_window_or_decoding_is_refused(adapter, capsys, sha256, words, told):
    with pytest.raises(UserError, match=told):
        calibrations.read(adapter, sha256, config(*words))
    assert calibrations.find(adapter, sha256, config(*words)) is None
    assert capsys.readouterr().err.startswith(f"note: {adapter}/calibration.json: of another ")
    with pytest.raises(UserError, match=told):
        calibrations.needed(adapter, sha256, config(*words, "ask.least=0.5"))


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"asked": {}, "adapter_sha256": "a", "schema": 9}',
        '{"asked": {}, "adapter_sha256": "a", "schema": 1, "fitted": {"kind": "other"}, "golds": 1, "exponent": 0}',
        '{"asked": {}, "adapter_sha256": "a", "schema": 1, "golds": 1, "exponent": 0, '
        '"fitted": {"kind": "temperature", "names": ["logprob"], "numbers": {}}}',
    ],
)
def test_what_is_no_calibration_is_named(adapter, text):
    (adapter / "calibration.json").write_text(text)
    with pytest.raises(UserError, match=r"calibration\.json: not a calibration \(.*\); delete it, or make calibrate"):
        calibrations.read(adapter, "a" * 64, config(*WORDS))


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibrations, "write_text", full)
    evaluation = {"must_match": {"prompt": "p", "window": {}}, "result": {"adapter_sha256": None}}
    with pytest.raises(UserError, match=r"calibration\.json: cannot be written \(No space left on device\)"):
        calibrations.write(tmp_path, Calibration(FITTED), evaluation, {})


def test_calibrated_answers_of_an_evaluation(tmp_path):
    evaluation = {"folder": str(tmp_path)}
    assert calibrations.of_answers(evaluation) is None
    (tmp_path / "confidence.json").write_text('{"q": 0.25}')
    assert calibrations.of_answers(evaluation) == {"q": 0.25}
    (tmp_path / "confidence.json").write_text("[0.25]")
    assert calibrations.of_answers(evaluation) is None
