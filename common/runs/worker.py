"""One process that runs scripts one after the other, each as `python SCRIPT …` would: `common.runs.pool` starts it.

Imports, CUDA's context and compiled kernels stay, which saves half a minute a run on a GPU. What a script decides its
numbers by does not: tests compare the weights and answers of a second run here with those of a run of its own, bit for
bit. After a script that fails, the process ends.
"""

import contextlib
import gc
import json
import os
import runpy
import sys
import traceback
from pathlib import Path


def run(script: str, words: list[str], log: str) -> int:
    """The exit code of a script; what it prints is appended to the file `log`."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for out in (1, 2):
        os.dup2(file, out)
    os.close(file)
    sys.argv, sys.path[0] = [script, *words], os.path.dirname(script)
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def forget() -> None:
    """Frees what a script has left: its model, its run, its limit of GPU memory, its precision, its peaks."""
    if found := sys.modules.get("common.runs.record"):
        found.release()
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()
    gc.collect()
    gc.freeze()  # what is left is imported modules, which later collections need not look at
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # not on every system
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set


def main(argv: list[str]) -> None:
    # stdin has the commands, and no script may read them
    commands, nothing = os.fdopen(os.dup(0), encoding="utf-8"), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    with os.fdopen(int(argv[0]), "w") as replies:
        for line in commands:
            code = run(*json.loads(line))
            print(code, file=replies, flush=True)
            if code:
                sys.exit(code)
            forget()


if __name__ == "__main__":
    main(sys.argv[1:])
