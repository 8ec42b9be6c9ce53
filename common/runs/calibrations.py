"""The calibration that lies beside an adapter: `calibration.json`. Imports no torch.

It holds the map, what it was fitted on, and how the adapter must be asked for it to hold: prompt, window, decoding.
"""

import json
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.config import Config, without_unset
from common.data import prompt
from common.errors import UserError
from common.files import read_json, write_text
from common.metrics.calibration import KINDS, Features, Fitted, for_golds
from common.runs.results import Record, Section

NAME, SCHEMA = "calibration.json", 1
OF_ANSWERS = "confidence.json"  # beside an evaluation: {question id: probability}, by maps that were fitted without it


@dataclass(frozen=True)
class Calibration:
    """A map, and the number of gold answers that it was fitted for."""

    fitted: Fitted
    golds: int = 1  # more: the map is for one gold answer, and `for_golds` corrects it
    exponent: float = 0.0

    def of(self, answer: Features | None) -> float | None:
        """The probability that an answer is right, in [0, 1]; None where a feature is missing."""
        return self(answer) if answer and all(name in answer for name in self.fitted.names) else None

    def __call__(self, answer: Features) -> float:
        """The probability that an answer is right, in [0, 1]. Raises `UserError` where it has not all features."""
        found = float(self.fitted([answer])[0])
        return for_golds(found, self.golds, self.exponent) if self.golds > 1 else found


def asked(config: Config) -> Section:
    """Prompt, window and decoding, by which a calibration holds; `window.tokenizer` may have another name."""
    window = without_unset(config.window)
    return {
        "prompt": prompt.fingerprint(config.prompt),
        "window": {key: value for key, value in window.items() if key != "tokenizer"},
        "decoding": without_unset(config.decode),
    }


def asked_in(evaluation: Record) -> Section:
    """What `asked` returns, of an evaluation's record."""
    must = evaluation["must_match"]
    window = {key: value for key, value in must["window"].items() if key != "tokenizer"}
    return {"prompt": must["prompt"], "window": window, "decoding": must.get("decoding", {})}


def write(folder: Path, calibration: Calibration, evaluation: Record, facts: Section) -> Path:
    """Writes `calibration.json` into an adapter's folder; `facts` say how it was made. Raises `UserError`."""
    path = folder / NAME
    found = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "adapter_sha256": evaluation["result"]["adapter_sha256"],
        "asked": asked_in(evaluation),
        **asdict(calibration),
        **facts,
    }
    try:
        write_text(path, json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def of_answers(evaluation: Record) -> dict[str, float] | None:
    """The calibrated probabilities of an evaluation's answers, by id; None where it was not calibrated."""
    path = Path(evaluation["folder"]) / OF_ANSWERS
    found = read_json(path) if path.is_file() else None
    return found if isinstance(found, dict) else None


def find(adapter: Path | None, sha256: str | None, config: Config) -> Calibration | None:
    """The calibration beside an adapter that fits; None, with a note, where one does not."""
    try:
        return read(adapter, sha256, config)
    except UserError as error:
        print(f"note: {error}", file=sys.stderr)
        return None


def needed(adapter: Path | None, sha256: str | None, config: Config) -> Calibration:
    """The calibration beside an adapter, for `ask.least`. Raises `UserError` where there is none that fits."""
    if (found := read(adapter, sha256, config)) is None:
        raise UserError(f"ask.least needs a calibration of the adapter: make calibrate MODEL={config.system}")
    return found


def read(adapter: Path | None, sha256: str | None, config: Config) -> Calibration | None:
    """The calibration beside an adapter, None where there is none.

    Raises `UserError` for one of another adapter, prompt, window or decoding than `config`'s.
    """
    path = adapter / NAME if adapter else None
    if path is None or not path.is_file():
        return None
    again = f"make calibrate MODEL={config.system}"
    try:
        found: Any = read_json(path)
        was, adapter_was = found["asked"], found["adapter_sha256"]
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']}, not {SCHEMA}")
        if not isinstance(was, dict) or found["fitted"]["kind"] not in KINDS:
            raise ValueError("a field that no version writes")
        calibration = Calibration(Fitted(**found["fitted"]), found["golds"], found["exponent"])
        calibration(dict.fromkeys(calibration.fitted.names, 0.0))  # it has all its numbers
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a calibration ({error}); delete it, or {again}") from error
    if adapter_was != sha256:
        raise UserError(f"{path}: of another adapter, whose weights have sha256 {str(adapter_was)[:12]}; {again}")
    for name, now in asked(config).items():
        if was.get(name) != now:
            both = f"{json.dumps(was.get(name))}, and this is {json.dumps(now)}"
            raise UserError(f"{path}: of another {name}: {both}; ask as it was calibrated, or {again} with these ARGS")
    return calibration
