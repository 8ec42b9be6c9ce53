"""Folders that are written whole or not at all, and checked when they are read.

A checkpoint is a plain PEFT adapter (`adapter_config.json`, `adapter_model.safetensors`), what it was trained with
(`trained_with.json`, see `common.runs.adapters`), a readable `state.json`, in `last/` also `training.pt` (the
optimizer's state, fp16's loss scale, the EMA), and `SHA256SUMS` over them (`sha256sum -c` reads it).
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError, first_line, way_on
from common.files import SUMS, recover, replacing, sha256
from common.runs import record
from common.runs.adapters import SETTINGS, WEIGHTS
from common.runs.results import Peak, Progress, Section

import torch
from peft import PeftModel
from safetensors import SafetensorError


@dataclass
class State:
    """The state a training resumes from, beside weights and optimizer: `state.json`."""

    # hashes of the configuration and the data; another one is another run
    identity: dict[str, str] = field(default_factory=dict)
    step: int = 0  # optimizer steps done
    evaluated: int = 0  # step of the last evaluation
    best_em: float | None = None  # percent, as best_f1
    best_f1: float | None = None
    best_loss: float | None = None  # per answer token, where that selects (early_stop.by=loss); then there is no EM
    best_step: int | None = None
    waited: int = 0  # evaluations without a gain
    seconds: float = 0.0  # of training, evaluations included
    evaluation_seconds: float = 0.0
    peak: Peak = field(default_factory=dict)

    @property
    def best(self) -> float | None:
        """What the kept weights were selected by: EM in percent, or loss."""
        return self.best_em if self.best_loss is None else self.best_loss

    def keep(self, step: int, row: Section) -> None:
        """Note that the weights of `step` are kept; `row`: the figures of their evaluation, if there was one."""
        self.best_em, self.best_f1, self.best_loss = (row.get(key) for key in ("em", "f1", "dev_loss"))
        self.best_step = step

    def result(self, questions: int) -> Progress:
        """Fields of the training's record; `questions`: trained on in all steps."""
        return {
            "identity": self.identity,
            "em": self.best_em,
            "f1": self.best_f1,
            "dev_loss": self.best_loss,
            "best_step": self.best_step,
            "steps": self.step,
            "questions": questions,
            "seconds": round(self.seconds, 1),
            "evaluation_seconds": round(self.evaluation_seconds, 1),
            "questions_per_s": round(questions / (self.seconds - self.evaluation_seconds), 2),
            "peak": self.peak,
        }


def claim(run: Path) -> None:
    """Keep other processes out of an unfinished run while this one lives; mend what a crash left of its checkpoints."""
    record.claim(run)
    recover(run / "last")
    recover(run / "best")


def verified(adapter: Path | None) -> Path | None:
    """The adapter folder, checked where it has checksums: one that another tool wrote has none."""
    if adapter and (adapter / SUMS).exists():
        verify(adapter)
    return adapter


def verify(folder: Path) -> None:
    """Raises `UserError` where a file is missing or not what was written."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
        damaged = [
            name for digest, _, name in (line.partition("  ") for line in lines) if sha256(folder / name) != digest
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}: not a whole checkpoint ({error})") from error
    if damaged or not lines:
        raise UserError(f"{folder}: {damaged[0] if damaged else SUMS} is damaged; delete the folder or use FRESH=1")


def save(
    folder: Path, model: PeftModel, state: State, settings: Section, training: dict[str, Any] | None = None
) -> None:
    """Writes adapter, `state` and `settings`; with `training` (name → what has a state_dict), all that a resume needs.

    Raises `UserError` where it cannot be written; what `folder` held is then still there.
    """
    try:
        with replacing(folder) as new:
            model.save_pretrained(new, save_embedding_layers=False)  # they are frozen
            (new / "README.md").unlink(missing_ok=True)  # PEFT's empty model-card template
            (new / "state.json").write_text(json.dumps(asdict(state), indent=1) + "\n")
            (new / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
            if training is not None:
                torch.save(
                    {name: part.state_dict() for name, part in training.items() if part is not None},
                    new / "training.pt",
                )
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save's own writer raises RuntimeError
        raise UserError(
            f"{folder}: could not be saved ({first_line(error, 120)}); its last whole state is untouched; "
            f"{way_on(error)}, then run the same command to go on"
        ) from error


def load_state(folder: Path) -> State:
    """The `state` that `save` got. For the training that owns the folder: what a crash left is mended first."""
    recover(folder)
    verify(folder)
    try:
        return State(**json.loads((folder / "state.json").read_text()))
    except TypeError as error:
        raise UserError(
            f"{folder}: saved by another version of this code ({error}); FRESH=1 starts a new run"
        ) from error


def load_training(folder: Path, training: dict[str, Any]) -> None:
    """What `save` got as `training`, from a verified `last/`, in place."""
    saved = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    training = {name: part for name, part in training.items() if part is not None}
    if saved.keys() != training.keys():
        other = ", ".join(sorted(saved.keys() ^ training.keys()))
        raise UserError(
            f"{folder}: saved by a training of another kind ({other}); set base.dtype as it was there, or FRESH=1"
        )
    for name, part in training.items():
        part.load_state_dict(saved[name])


def weights_sha256(adapter: Path | None) -> str | None:
    """None without an adapter, or where it has no weights: loading it says so."""
    files = [adapter / name for name in WEIGHTS if (adapter / name).is_file()] if adapter else []
    return sha256(files[0]) if files else None


def unchanged(adapter: Path | None, weights: str | None) -> None:
    """Raises `UserError` where an adapter no longer is what `weights_sha256` said: what was loaded may be another."""
    if weights_sha256(adapter) != weights:
        raise UserError(f"{adapter}: replaced while it was read, by a training that goes on; try again when it is done")
