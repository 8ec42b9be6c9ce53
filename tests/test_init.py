"""What importing `common` sets for the libraries that come after it."""

import os
import subprocess
import sys

from tests.conftest import ROOT

import pytest

CODE = "import common, os; print(os.environ.get('TRITON_CACHE_DIR'), os.environ.get('PYTORCH_ALLOC_CONF'))"
NAMES = ("TRITON_CACHE_DIR", "TRITON_HOME", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def seen(**set_before: str) -> list[str]:
    """Triton's cache folder and the allocator's settings, as a process has them after the import."""
    env = {name: value for name, value in os.environ.items() if name not in NAMES}
    run = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=env | set_before, capture_output=True, check=True)
    return run.stdout.decode().split()


@pytest.mark.parametrize("name", ["HOME", "TRITON_HOME"])
def test_all_processes_and_gpus_share_tritons_usual_folder(tmp_path, name):
    assert seen(**{name: str(tmp_path)})[0] == str(tmp_path / ".triton" / "cache")


def test_what_a_user_has_set_stays(tmp_path):
    mine = str(tmp_path / "mine")
    assert seen(TRITON_CACHE_DIR=mine, PYTORCH_ALLOC_CONF="backend:native") == [mine, "backend:native"]
    assert seen(PYTORCH_CUDA_ALLOC_CONF="backend:native")[1] == "None"


def test_without_a_home_to_write_to_nothing_is_set(tmp_path):
    assert seen(HOME=str(tmp_path / "none"))[0] == "None"
