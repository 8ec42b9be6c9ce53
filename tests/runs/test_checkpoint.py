"""A checkpoint is whole or not there, and a damaged one is noticed."""

import hashlib
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

from common import files
from common.errors import UserError
from common.files import SUMS, beside, recover, replacing
from common.runs.checkpoint import State, load_state, load_training, save, unchanged, verified, verify, weights_sha256

import pytest
import torch
from safetensors import SafetensorError


def write(folder, text: str) -> None:
    with replacing(folder) as new:
        (new / "state.json").write_text(text)


def test_a_failed_write_leaves_the_previous_folder(tmp_path):
    write(tmp_path / "last", '{"step": 1}')
    with pytest.raises(OSError, match="disk"), replacing(tmp_path / "last") as new:
        (new / "state.json").write_text('{"step": 2}')
        raise OSError("disk full")
    assert load_state(tmp_path / "last") == State(step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_rename_that_fails_brings_the_previous_folder_back(tmp_path, monkeypatch):
    write(tmp_path / "last", '{"step": 1}')
    rename = Path.rename

    def fail(self, target):
        if self.name == "last.partial":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "last", '{"step": 2}')
    assert load_state(tmp_path / "last") == State(step=1)


def test_a_crash_between_the_renames_is_mended(tmp_path):
    write(tmp_path / "last", '{"step": 1}')
    (tmp_path / "last").rename(tmp_path / "last.old")
    assert load_state(tmp_path / "last") == State(step=1)


def test_what_lies_deeper_is_summed_too(tmp_path):
    with replacing(tmp_path / "last") as new:
        (new / "inner").mkdir()
        (new / "inner" / "file").write_text("whole")
        (new / "two  spaces").touch()
    verify(tmp_path / "last")
    (tmp_path / "last" / "inner" / "file").write_text("other")
    with pytest.raises(UserError, match="inner/file is damaged"):
        verify(tmp_path / "last")


@pytest.mark.parametrize("then", ["read", "written"])
def test_a_crash_after_the_renames_keeps_the_new_folder(tmp_path, then):
    write(tmp_path / "last", '{"step": 2}')
    write(tmp_path / "last.old", '{"step": 1}')
    if then == "read":
        recover(tmp_path / "last")
    else:
        write(tmp_path / "last", '{"step": 3}')
    assert not (tmp_path / "last.old").exists()
    assert load_state(tmp_path / "last") == State(step=2 if then == "read" else 3)


def test_only_the_training_mends_its_folder(tmp_path):
    """What lies beside an adapter that is read is someone's own, and may have any name."""
    for name in ("mine", "mine.old", "mine.partial"):
        write(tmp_path / name, "{}")
    assert verified(tmp_path / "mine") == tmp_path / "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine.old", "mine.partial"]


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "no sums", "empty sums"])
def test_damage_is_noticed(tmp_path, harm):
    folder = tmp_path / "last"
    write(folder, '{"step": 1}')
    file, sums = folder / "state.json", folder / SUMS
    if harm == "flip":
        file.write_text('{"step": 7}')
    elif harm == "truncate":
        file.write_bytes(file.read_bytes()[:3])
    elif harm == "delete":
        file.unlink()
    elif harm == "no sums":
        sums.unlink()
    else:
        sums.write_text("")
    with pytest.raises(UserError, match=r"last: .*(damaged|not a whole checkpoint)"):
        verify(folder)


def test_sums_are_in_the_format_of_sha256sum(tmp_path):
    write(tmp_path / "last", '{"step": 1}')
    subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=tmp_path / "last", check=True)


def test_every_file_is_on_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    """Else a power cut would leave a folder of the right name with empty files."""
    done: list[tuple[str, str, bytes]] = []
    flush, rename = os.fsync, Path.rename

    def flushed(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        done.append(("flushed", str(path.relative_to(tmp_path)), path.read_bytes()))
        flush(fd)

    def renamed(self, target):
        done.append(("renamed", self.name, b""))
        return rename(self, target)

    write(tmp_path / "last", "before")
    monkeypatch.setattr(files.os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    with replacing(tmp_path / "last") as new:
        (new / "inner").mkdir()
        (new / "inner" / "b").write_bytes(b"2")
        (new / "a").write_bytes(b"1")
    sums = "".join(
        f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in (("a", b"1"), ("inner/b", b"2"))
    )
    assert done == [
        ("flushed", "last.partial/a", b"1"),
        ("flushed", "last.partial/inner/b", b"2"),
        ("flushed", "last.partial/SHA256SUMS", sums.encode()),
        ("renamed", "last", b""),
        ("renamed", "last.partial", b""),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["SHA256SUMS", "a", "inner"]


def test_what_an_earlier_crash_left_half_written_is_not_in_the_new_folder(tmp_path):
    (tmp_path / "deep" / "last.partial").mkdir(parents=True)
    (tmp_path / "deep" / "last.partial" / "stale").touch()
    write(tmp_path / "deep" / "last", "{}")
    assert sorted(path.name for path in (tmp_path / "deep" / "last").iterdir()) == ["SHA256SUMS", "state.json"]
    write(tmp_path / "not" / "there yet" / "last", "{}")
    verify(tmp_path / "not" / "there yet" / "last")


def test_an_interrupt_leaves_the_previous_folder_and_nothing_half_written(tmp_path):
    write(tmp_path / "last", '{"step": 1}')
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "last") as new:
        (new / "state.json").write_text("{}")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    assert load_state(tmp_path / "last") == State(step=1)


def test_what_failed_is_told_and_not_that_nothing_is_left_to_remove(tmp_path):
    with pytest.raises(OSError, match="disk"), replacing(tmp_path / "last") as new:
        new.rmdir()
        raise OSError("disk full")


def test_a_damaged_state_is_not_gone_on_from(tmp_path):
    write(tmp_path / "last", '{"step": 1}')
    (tmp_path / "last" / "state.json").write_text('{"step": 7}')
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        load_state(tmp_path / "last")


def test_a_first_write_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="disk"), replacing(tmp_path / "last"):
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_what_a_crash_between_the_renames_left_is_the_previous_one_when_the_next_write_begins(tmp_path):
    write(tmp_path / "last", "1")
    (tmp_path / "last").rename(tmp_path / "last.old")
    with pytest.raises(OSError, match="disk"), replacing(tmp_path / "last"):
        raise OSError("disk full")
    assert (tmp_path / "last" / "state.json").read_text() == "1"
    (tmp_path / "last").rename(tmp_path / "last.old")
    write(tmp_path / "last", "2")
    assert (tmp_path / "last" / "state.json").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_folder_is_written_beside_itself():
    assert beside(Path("runs/x/best")) == (Path("runs/x/best.partial"), Path("runs/x/best.old"))


def test_the_damaged_file_is_named_and_what_to_do(tmp_path):
    with replacing(tmp_path / "last") as new:
        for name in "abc":
            (new / name).write_text(name)
    (tmp_path / "last" / "b").write_text("x")
    with pytest.raises(UserError, match="last: b is damaged; delete the folder or use FRESH=1"):
        verify(tmp_path / "last")
    (tmp_path / "last" / "SHA256SUMS").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not a whole checkpoint"):
        verify(tmp_path / "last")
    (tmp_path / "last" / "SHA256SUMS").write_text("")
    with pytest.raises(UserError, match="last: SHA256SUMS is damaged"):
        verify(tmp_path / "last")


def test_an_adapter_is_checked_where_it_has_sums_and_may_have_none(tmp_path):
    assert verified(None) is None
    (tmp_path / "others").mkdir()
    assert verified(tmp_path / "others") == tmp_path / "others"
    write(tmp_path / "ours", "{}")
    assert verified(tmp_path / "ours") == tmp_path / "ours"
    (tmp_path / "ours" / "state.json").write_text("[]")
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        verified(tmp_path / "ours")


# ---- a training's own ------------------------------------------------------------------------------------------------


def adapter(*, fails: Exception | None = None, readme: bool = True):
    """What is like a PEFT model to `save`."""

    def save_pretrained(folder: Path, **options: bool) -> None:
        if fails:
            raise fails
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "adapter_config.json").write_text(json.dumps(options))
        if readme:
            (folder / "README.md").write_text("a template")

    return SimpleNamespace(save_pretrained=save_pretrained)


def parts() -> dict[str, torch.nn.Module]:
    return {"optimizer": torch.nn.Linear(2, 1), "average": torch.nn.Linear(1, 1)}


@pytest.mark.parametrize("readme", [True, False])
def test_a_saved_training_has_all_that_is_needed_to_go_on(tmp_path, readme):
    state, training, others = State({"config": "c0ffee"}, step=3, best_em=0.0), parts(), parts()
    save(tmp_path / "last", adapter(readme=readme), state, {"system": "x"}, training)
    names = {
        "SHA256SUMS",
        "adapter_config.json",
        "adapter_model.safetensors",
        "state.json",
        "trained_with.json",
        "training.pt",
    }
    assert json.loads((tmp_path / "last" / "trained_with.json").read_text()) == {"system": "x"}
    assert {path.name for path in (tmp_path / "last").iterdir()} == names
    assert json.loads((tmp_path / "last" / "adapter_config.json").read_text()) == {"save_embedding_layers": False}
    saved = json.loads((tmp_path / "last" / "state.json").read_text())
    assert saved == {
        "identity": {"config": "c0ffee"},
        "step": 3,
        "evaluated": 0,
        "best_em": 0.0,
        "best_f1": None,
        "best_loss": None,
        "best_step": None,
        "waited": 0,
        "seconds": 0.0,
        "evaluation_seconds": 0.0,
        "peak": {},
    }
    assert (tmp_path / "last" / "state.json").read_text() == json.dumps(saved, indent=1) + "\n"
    assert load_state(tmp_path / "last") == state
    load_training(tmp_path / "last", others)
    for name, part in training.items():
        assert part.state_dict().keys() == others[name].state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(part.parameters(), others[name].parameters(), strict=True))
    save(tmp_path / "best", adapter(), state, {})
    assert {path.name for path in (tmp_path / "best").iterdir()} == names - {"training.pt"}
    save(tmp_path / "last", adapter(), state, {}, {})  # without an optimizer's state it is no less a training's
    assert (tmp_path / "last" / "training.pt").exists()


def test_a_training_of_another_kind_is_not_gone_on_with(tmp_path):
    save(tmp_path / "last", adapter(), State(), {}, parts())
    for training, other in (
        ({**parts(), "scaler": torch.nn.Linear(1, 1)}, "scaler"),
        ({"optimizer": torch.nn.Linear(2, 1)}, "average"),
        ({"optimizer": torch.nn.Linear(2, 1), "scaler": torch.nn.Linear(1, 1)}, "average, scaler"),
    ):
        before = [p.clone() for p in training["optimizer"].parameters()]
        with pytest.raises(UserError, match=rf"last: saved by a training of another kind \({other}\); set base\.dtype"):
            load_training(tmp_path / "last", training)
        assert all(torch.equal(a, b) for a, b in zip(before, training["optimizer"].parameters(), strict=True))


def test_an_optimizers_state_is_read_to_the_host_and_runs_no_code(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "load", lambda path, **options: seen.append((path, options)) or {})
    load_training(tmp_path, {})
    assert seen == [(tmp_path / "training.pt", {"map_location": "cpu", "weights_only": True})]


@pytest.mark.parametrize(
    "error", [OSError("No space left\non this device"), SafetensorError("No space left"), RuntimeError("No space left")]
)
def test_what_cannot_be_saved_is_one_line_and_leaves_what_was_there(tmp_path, error):
    save(tmp_path / "last", adapter(), State(step=1), {})
    with pytest.raises(
        UserError, match=r"last: could not be saved \(No space left\); its last whole state is untouched"
    ):
        save(tmp_path / "last", adapter(fails=error), State(step=2), {})
    assert load_state(tmp_path / "last") == State(step=1)
    with pytest.raises(UserError, match=rf"\({'x' * 120}\)"):
        save(tmp_path / "last", adapter(fails=OSError("x" * 130)), State(), {})
    with pytest.raises(ValueError, match="a mistake of ours"):
        save(tmp_path / "last", adapter(fails=ValueError("a mistake of ours")), State(), {})


def test_an_adapters_weights_are_known_by_their_sum_and_a_change_of_them_is_noticed(tmp_path):
    assert weights_sha256(None) is None
    assert weights_sha256(tmp_path) is None
    unchanged(None, None)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    was = weights_sha256(tmp_path)
    assert was == hashlib.sha256(b"weights").hexdigest()
    unchanged(tmp_path, was)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match="replaced while it was read, by a training that goes on"):
        unchanged(tmp_path, was)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.safetensors").mkdir()
    assert weights_sha256(tmp_path) is None


def test_a_record_gets_a_states_figures_rounded():
    state = State(
        {"config": "c"}, step=40, best_em=70.25, best_f1=80.5, best_step=30, seconds=100.26, peak={"rss_bytes": 7}
    )
    state.evaluation_seconds = 20.06
    assert state.result(questions=2560) == {
        "identity": {"config": "c"},
        "em": 70.25,
        "f1": 80.5,
        "dev_loss": None,
        "best_step": 30,
        "steps": 40,
        "questions": 2560,
        "seconds": 100.3,
        "evaluation_seconds": 20.1,
        "questions_per_s": 31.92,
        "peak": {"rss_bytes": 7},
    }


def test_a_state_keeps_what_selected_its_weights_and_one_from_before_losses_is_read(tmp_path):
    state = State(best_em=70.0, best_f1=80.0)
    assert state.best == 70.0
    state.keep(8, {"dev_loss": 0.5, "n": 3})
    assert (state.best, state.best_em, state.best_f1, state.best_loss, state.best_step) == (0.5, None, None, 0.5, 8)
    state.keep(9, {"em": 71.0, "f1": 81.0, "n": 3})
    assert (state.best, state.best_em, state.best_f1, state.best_loss, state.best_step) == (71.0, 71.0, 81.0, None, 9)
    state.keep(16, {})
    assert (state.best, state.best_step) == (None, 16)
    write(tmp_path / "last", '{"step": 3, "best_em": 70.0, "best_f1": 80.0, "best_step": 2}')
    assert load_state(tmp_path / "last") == State(step=3, best_em=70.0, best_f1=80.0, best_step=2)


def test_a_state_of_another_version_is_refused(tmp_path):
    write(tmp_path / "last", '{"step": 1, "of_the_future": 2}')
    with pytest.raises(UserError, match=r"last: saved by another version of this code \(.*of_the_future.*FRESH=1"):
        load_state(tmp_path / "last")
