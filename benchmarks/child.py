"""A stack in a process of its own, so that none finds memory, clocks or patches that another has left."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import ROOT


def last_line(script: str, stack: str, job: Mapping[str, object], folder: Path) -> Any:
    """The JSON object that `benchmarks/SCRIPT.py STACK JOB.json` ends with, or {"failed": why}."""
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    command = [sys.executable, "-m", f"benchmarks.{script}", stack, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return {"failed": f"ended with {done.returncode}: {said[:200]}"}
