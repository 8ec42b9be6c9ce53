"""Tries mutants of one file in a copy of the tree: stdin has their code as a JSON list, stdout gets what killed each.

    python worker.py COPY FILE TEST ...

Each is tried in a fork of this process, which has imported the libraries and nothing of ours.
"""

import contextlib
import gc
import importlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

LIBRARIES = (  # imported before the forks, once
    "accelerate",
    "bitsandbytes",
    "datasets",
    "httpx2",
    "hypothesis",
    "peft",
    "scipy.stats",
    "tokenizers",
    "torch",
    "transformers.models.llama.modeling_llama",
    "yaml",
)
SLOWEST, LEAST_S = 4, 10  # a test that takes so many times as long as unmutated, and so many seconds more, never ends


class Seen:
    """A pytest plugin: the fastest killers first; which test failed, and how long each took."""

    def __init__(self, killers: Counter[str], seconds: dict[str, float]):
        self.killers, self.before = killers, seconds
        self.failed: str | None = None
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: (-self.killers[item.nodeid], self.before.get(item.nodeid, 0.0)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.before:  # seconds of CPU, for other mutants may be at work beside this one
            signal.setitimer(signal.ITIMER_PROF, SLOWEST * self.before.get(nodeid, 0.0) + LEAST_S)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid


def tried(tests: list[str], killers: Counter[str], seconds: dict[str, float], limit: float) -> tuple[str | None, dict]:
    """What failed in a fork, None where nothing did; and how many seconds each test took."""
    with tempfile.TemporaryFile("w+") as told:
        child = os.fork()
        if not child:
            code = 3
            try:
                os.setsid()
                nowhere = os.open(os.environ.get("MUTATION_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
                seen = Seen(killers, seconds)
                code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], [seen]))
                json.dump([seen.failed, seen.seconds], told)
                told.flush()
            finally:
                os._exit(code)
        end = time.monotonic() + limit
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            late = not pid and time.monotonic() > end
            if pid or late:
                break
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what a test has started, too
        if late:
            os.waitpid(child, 0)
            return "(does not end)", {}
        told.seek(0)
        text = told.read()
    if not text:
        return f"(ends with {status})", {}
    failed, took = json.loads(text)
    return failed or (None if status == 0 else f"(ends with {status})"), took


def main() -> None:
    copy, name, *tests = sys.argv[1:]
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # as common/__init__.py does
    for library in LIBRARIES:
        importlib.import_module(library)
    os.chdir(copy)
    sys.path.insert(0, copy)
    sys.path = [path for path in sys.path if path != str(Path(__file__).parent)]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # half a second each
    codes = json.load(sys.stdin)
    gc.freeze()  # collections of a fork pass over what came before it
    file = Path(copy) / name
    source = file.read_text()
    began = time.monotonic()
    failed, seconds = tried(tests, Counter(), {}, 1800)
    if not failed:  # once more in the order in which mutants meet them, the fastest first
        failed, _ = tried(tests, Counter(), seconds, 1800)
    limit = SLOWEST * (time.monotonic() - began) + LEAST_S  # of one that waits
    if failed:
        print(failed)
        sys.exit(1)
    killers: Counter[str] = Counter()
    out = []
    for i, code in enumerate(codes, 1):
        file.write_text(code)
        os.utime(file, (i, i))  # a second of its own, or what was compiled for the last one would be taken for it
        failed, _ = tried(tests, killers, seconds, limit)
        out.append(failed)
        if failed and not failed.startswith("("):
            killers[failed] += 1
    file.write_text(source)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
