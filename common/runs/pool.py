"""Jobs of a plan (`common.runs.sweeps`), each to its end, by a worker process a GPU. Imports no torch.

A script that fails is run once more, unless the mistake is the user's; the other jobs continue. SIGTERM and SIGINT are
passed on, and runs save.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

from common.config import Kind
from common.errors import UserError
from common.files import ROOT
from common.runs import signals, sweeps

import pynvml

SCRIPTS = {"train": "train_loop.py", "eval": "eval_loop.py", "bench": "bench_latency.py"}
WORKER = Path(__file__).with_name("worker.py")
TRIES, USERS_MISTAKE = 2, 2  # the latter is an exit code: trying again does not help
Ended = Callable[[sweeps.Job, bool, str, int, float], None]  # job, whether it is done, what was said, left, minutes


class Worker:
    """A process of `common.runs.worker` on one GPU, started when it is needed."""

    def __init__(self, gpu: str | None):
        self.gpu = gpu
        self.child: subprocess.Popen[str] | None = None
        self.replies: IO[str] | None = None
        self.serves = ""
        self.told: subprocess.Popen[str] | None = None  # the process that was told to end

    def run(self, script: str, words: Sequence[str], log: Path, serves: str) -> int:
        """The exit code of a script; negative where a signal ended it. What it prints is appended to `log`.

        Scripts that `serves` alike share a process.
        """
        if self.child and (self.child.poll() is not None or serves != self.serves):
            self.end()
        if not self.child:
            self._start(serves)
        assert self.child
        assert self.child.stdin
        assert self.replies
        try:
            print(json.dumps([script, list(words), str(log)]), file=self.child.stdin, flush=True)
            reply = self.replies.readline()
        except BrokenPipeError:
            reply = ""
        if reply.strip() == "0":
            return 0
        code = self.child.wait()  # it ends with what the script ended with
        self.end()
        return code or 1

    def _start(self, serves: str) -> None:
        ours, its = os.pipe()
        env = os.environ | ({"CUDA_VISIBLE_DEVICES": self.gpu} if self.gpu else {})
        command = [sys.executable, str(WORKER), str(its)]
        # a group of its own: Ctrl-C is for us, and we pass it on
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, text=True, env=env, pass_fds=(its,), start_new_session=True
        )
        os.close(its)
        self.replies, self.serves = os.fdopen(ours), serves

    def terminate(self) -> None:
        """Tell the process to save and end, once: a second signal ends it at once."""
        child = self.child  # another thread may end it meanwhile
        if child and child is not self.told:
            self.told = child
            child.terminate()

    def end(self) -> None:
        """Wait for the process to end, which it does when nothing more is asked of it."""
        if self.child and self.child.stdin and self.replies:
            with contextlib.suppress(BrokenPipeError):  # it has died with a command unread
                self.child.stdin.close()
            self.child.wait()
            self.replies.close()
        self.child = None


def run(waiting: Sequence[sweeps.Job], kinds: Sequence[Kind], workers: int, ended: Ended) -> tuple[int, dict[str, str]]:
    """Do what is left of the jobs, so many at a time: (128 + the number of a signal that came, else 0; failures).

    `failures` are last lines of scripts by the job's name. What `ended` raises stops the other jobs.
    """
    gpus = visible_gpus()
    slots = deque(Worker(gpus[i % len(gpus)] if gpus else None) for i in range(workers))
    all_slots, failed = list(slots), dict[str, str]()
    trainings: defaultdict[tuple[str, str], threading.Lock] = defaultdict(threading.Lock)

    def work(job: sweeps.Job) -> tuple[bool, str]:
        with trainings[job.config.runs, job.config.hash("train")]:  # jobs may share one
            return work_alone(job)

    def work_alone(job: sweeps.Job) -> tuple[bool, str]:
        """Do what is left of a job: (whether it is done, the last line that a script said)."""
        slot, said = slots.pop(), ""  # the one that was used last: its process is warm
        try:
            while steps := sweeps.left(job, kinds):
                kind, words = steps[0]
                for _ in range(TRIES):
                    if request.code:
                        return False, "stopped"
                    code, said = step(job, kind, words, slot)
                    if code in (0, USERS_MISTAKE):
                        break
                if code:
                    return False, "stopped" if request.code else f"{kind} failed: {said}"
                if sweeps.left(job, kinds) == steps:
                    return False, f"{kind} ended well and left no record: {said}"
            return True, said
        finally:
            slots.append(slot)

    began = time.monotonic()
    with signals.listen() as request, ThreadPoolExecutor(workers) as executor:
        pending = {executor.submit(work, job): job for job in waiting}
        try:
            while pending:
                done_now, _ = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                for future in done_now:
                    job, (done, said) = pending.pop(future), future.result()
                    if not done:
                        failed[job.name] = said
                    minutes = (time.monotonic() - began) / 60 / (len(waiting) - len(pending)) * len(pending)
                    ended(job, done, said, len(pending), minutes)
                for slot in all_slots if request.code else ():
                    slot.terminate()
        except BaseException:  # of `ended`: the other jobs save and stop
            request.code = request.code or 1
            raise
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in pending):
                for slot in all_slots:
                    slot.terminate()
                time.sleep(0.1)
            for slot in all_slots:
                slot.end()
    return request.code, failed


def step(job: sweeps.Job, kind: Kind, words: Sequence[str], worker: Worker) -> tuple[int, str]:
    """One script, to its end: (exit code, its last line, or error). What it says is kept in runs/logs/."""
    log = Path(job.config.runs) / "logs" / f"{job.config.system}-s{job.config.seed}-{job.config.hash()}-{kind}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    before = log.stat().st_size
    # a timing has a process for itself; others share one if their shapes are alike, and so their compiled kernels
    base = job.config.base
    serves = "" if kind == "bench" else json.dumps([base.path, base.revision, base.dtype])
    if kind == "bench":
        worker.end()
    code = worker.run(str(ROOT / SCRIPTS[kind]), [job.system, *words], log.resolve(), serves)
    said = log.read_bytes()[before:].decode(errors="replace").strip().splitlines() or ["it said nothing"]
    errors = [line for line in said if line.startswith("error:")] if code else []
    return code, (errors or said)[-1]


def at_a_time(asked: int | None) -> tuple[int, str]:
    """(jobs at a time: as many as GPUs, or one, unless `asked` for; the same in words)."""
    gpus = len(visible_gpus())
    workers = (gpus or 1) if asked is None else asked
    if workers < 1:
        raise UserError("--workers must be 1 or more")
    return workers, f"{workers} at a time on {gpus} GPU{'s' * (gpus != 1)}"


def visible_gpus() -> list[str]:
    """The values of CUDA_VISIBLE_DEVICES, one per GPU."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip() not in ("", "-1")]
    try:
        pynvml.nvmlInit()
        return [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def gpu_name() -> str | None:
    """The name of the first GPU, as torch has it; None without one."""
    gpus = visible_gpus()
    if not gpus:
        return None
    try:
        pynvml.nvmlInit()
        by_number = gpus[0].isdecimal()
        find = pynvml.nvmlDeviceGetHandleByIndex if by_number else pynvml.nvmlDeviceGetHandleByUUID
        return str(pynvml.nvmlDeviceGetName(find(int(gpus[0]) if by_number else gpus[0])))
    except pynvml.NVMLError:
        return None


def figures(line: str) -> str:
    """EM and F1, where a script's last line is a result that has them."""
    result = json.loads(line) if line.startswith("{") else {}
    return f"EM {result['em']:.2f} F1 {result['f1']:.2f}" if result.get("em") is not None else "done"
