"""Two processes train and evaluate as one does. They are real ones, over gloo: forks of this one, which has imported
all that takes seconds to import."""

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import bench_latency
import eval_loop
import train_loop
from common.errors import UserError
from common.runs import checkpoint, launch, ranks
from tests.test_train_loop import metrics

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

forks = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that holds a GPU cannot be forked")


@contextlib.contextmanager
def forked(said: Path, body: Callable[[], object], **environment: str) -> Iterator[int]:
    """The id of a fork that runs `body`; what it says goes to `said`.out and `said`.err."""
    child = os.fork()
    if not child:
        code: object = 1
        try:
            for fd, kind in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{said}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
            os.environ.update(environment)
            AcceleratorState._reset_state(reset_partial_state=True)
            body()
            code = 0
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(int(code or 0))
    try:
        yield child
    finally:
        with contextlib.suppress(ChildProcessError):  # it was waited for
            if os.waitpid(child, os.WNOHANG)[0] == 0:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def ended(child: int, seconds: float = 60) -> int:
    """Its exit code."""
    end = time.monotonic() + seconds
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        assert time.monotonic() < end
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(found[1])


def of_two_ranks(folder: Path, body: Callable[[], object]) -> list[int]:
    """Exit codes of the two ranks that run `body`; what rank i says is in `folder`/i.out and i.err."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(forked(folder / str(i), body, RANK=str(i), LOCAL_RANK=str(i), **both)) for i in range(2)
        ]
        return [ended(child) for child in children]


@forks
def test_two_processes_do_as_one_does_save_when_told_to_end_and_one_goes_on(tiny_config, tmp_path, capsys):
    asked = [str(tiny_config), "lora=null"]
    arguments = [str(tiny_config), "train.epochs=2", "train.eval_every=4", "train.pack_tokens=100"]
    eval_loop.main([*asked, f"runs={tmp_path / 'eval one'}"])
    train_loop.main([*arguments, f"runs={tmp_path / 'one'}"])
    score = train_loop.score

    def told_to_end(*scored):
        os.kill(os.getpid(), signal.SIGTERM)  # as a launcher passes it on
        return score(*scored)

    def both() -> None:
        eval_loop.main([*asked, f"runs={tmp_path / 'eval two'}"])
        train_loop.score = told_to_end
        train_loop.main([*arguments, f"runs={tmp_path / 'two'}"])

    codes = of_two_ranks(tmp_path, both)
    first, second = ((tmp_path / f"{i}.out").read_text() for i in range(2))
    assert codes == [143, 143], (tmp_path / "0.err").read_text()
    assert (first.count(" steps of ~8 questions"), second) == (1, "")  # only the first rank speaks
    assert "on 2 × CPU" in first
    assert ["SIGTERM: saving" in (tmp_path / f"{i}.err").read_text() for i in range(2)] == [True, False]

    # every question was answered once, as one process does
    runs = [next((tmp_path / f"eval {n}").iterdir()) for n in ("one", "two")]
    assert len({(run / "predictions.json").read_text() for run in runs}) == 1
    assert json.loads((runs[1] / "record.json").read_text())["result"]["processes"] == 2

    # its steps were those of one, and one goes on
    two = next((tmp_path / "two").iterdir())
    checkpoint.verify(two / "last")
    capsys.readouterr()
    train_loop.main([*arguments, f"runs={tmp_path / 'two'}"])
    said = capsys.readouterr().out
    assert "going on after step 5" in said  # what was told in the evaluation is known with the next step's sums
    assert 0 < json.loads(said.splitlines()[-1])["idle_share"] < 1
    ours, theirs = metrics(two), metrics(next((tmp_path / "one").iterdir()))
    assert len(ours) == len(theirs) == 8 + 2
    for a, b in zip(ours, theirs, strict=True):
        if "loss" in a:
            assert a["questions"] == b["questions"]
            assert a["tokens"] == b["tokens"]
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        else:
            assert a == b


@forks
@pytest.mark.parametrize(("by", "steps"), [("loss", [2, 4]), ("none", [])])
def test_two_processes_keep_the_weights_that_one_does_by_loss_or_by_none(tiny_config, tmp_path, by, steps):
    arguments = [str(tiny_config), f"early_stop.by={by}", "train.epochs=1", "train.pack_tokens=100"]
    train_loop.main([*arguments, f"runs={tmp_path / 'one'}"])
    codes = of_two_ranks(tmp_path, lambda: train_loop.main([*arguments, f"runs={tmp_path / 'two'}"]))
    assert codes == [0, 0], (tmp_path / "0.err").read_text()
    one, two = (next((tmp_path / name).iterdir()) for name in ("one", "two"))
    mine, theirs = ([row for row in metrics(run) if "loss" not in row] for run in (one, two))
    assert [row["step"] for row in mine] == steps
    assert theirs == [row | {"dev_loss": pytest.approx(row["dev_loss"], rel=1e-4)} for row in mine]
    results = [json.loads((run / "record.json").read_text())["result"] for run in (one, two)]
    assert [result["best_step"] for result in results] == [4, 4]


@forks
def test_ranks_sum_gradients_and_numbers_share_items_out_and_notice_who_has_gone(tmp_path):
    def body() -> None:
        rank = ranks.join().process_index
        one, two, none = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 3, 1))
        one.grad = torch.tensor([1.0, 2.0]) * (rank + 1)
        two.grad = None if rank else torch.tensor([5.0, 6.0, 7.0])  # this rank had nothing to do
        sums = ranks.sum_gradients([one, two, none], torch.tensor(0.5), rank, rank > 0)
        alone = torch.nn.Parameter(torch.zeros(2))
        alone.grad = torch.tensor([10.0 + rank, 1.0])
        ranks.sum_gradients([alone], 0.0)
        gradients = [weight.grad.tolist() for weight in (one, two, none, alone)]
        taken = ["".join(ranks.take("abcdefg", "letters")), "".join(ranks.take("xyz", "more"))]
        said = {"sums": sums.tolist(), "gradients": gradients, "taken": taken, "count": ranks.count()}
        (tmp_path / f"{rank}.json").write_text(json.dumps(said))
        ranks.PartialState().wait_for_everyone()
        if rank:
            os._exit(9)
        try:
            while True:
                ranks.sum_gradients([one], 0.0)
        except UserError as error:
            sys.exit(f"{error}".startswith("another rank of this run has gone") and 7)

    assert of_two_ranks(tmp_path, body) == [7, 9], (tmp_path / "0.err").read_text()
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert first["count"] == second["count"] == 2
    assert first["sums"] == second["sums"] == [1.0, 1.0, 1.0]
    assert first["gradients"] == second["gradients"] == [[3, 6], [5, 6, 7], [0], [21, 2]]
    for mine, others, whole in zip(first["taken"], second["taken"], ("abcdefg", "xyz"), strict=True):
        assert sorted(mine + others) == list(whole)
        assert (list(mine), list(others)) == (sorted(mine), sorted(others))


RANK = """\
import os, signal, sys, time
from pathlib import Path
def save(*_):
    time.sleep(0.2)
    Path(sys.argv[1], f"saved by {os.environ['RANK']}").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
Path(sys.argv[1], f"{os.getpid()} is rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}").touch()
time.sleep(60)
"""


@forks
@pytest.mark.parametrize("killed", [False, True])
def test_a_signal_is_passed_on_and_all_end_when_one_is_killed(tmp_path, monkeypatch, killed):
    (tmp_path / "rank.py").write_text(RANK)
    monkeypatch.setattr(sys, "argv", ["-m", "2", str(tmp_path / "rank.py"), str(tmp_path)])
    monkeypatch.delitem(sys.modules, "common.runs.launch")
    with forked(tmp_path / "launcher", lambda: runpy.run_module("common.runs.launch", run_name="__main__")) as launcher:
        end = time.monotonic() + 60
        while len(started := sorted(tmp_path.glob("* of 2"), key=lambda path: path.name.split()[3])) < 2:
            assert time.monotonic() < end
            time.sleep(0.02)
        os.kill(int(started[1].name.split()[0]) if killed else launcher, signal.SIGKILL if killed else signal.SIGTERM)
        code = ended(launcher)
    said = (tmp_path / "launcher.err").read_text()
    assert code == (137 if killed else 143), said
    assert said.endswith("rank 1 of 2 ended by SIGKILL, and the others with it\n" if killed else "")
    saved = sorted(path.name for path in tmp_path.glob("saved by *"))
    assert saved == (["saved by 0"] if killed else ["saved by 0", "saved by 1"])


@pytest.mark.parametrize(
    ("ended", "said", "code"),
    [
        ({0: (2, 5), 1: (-9, 5)}, "rank 1 of 2 ended by SIGKILL", 137),  # seen at once: the first died of the other
        ({0: (2, 5), 1: (-15, 5)}, "rank 0 of 2 ended with 2", 2),  # the launcher's own SIGTERM
        ({0: (1, 6), 1: (2, 5)}, "rank 1 of 2 ended with 2", 2),
        ({0: (-99, 5)}, "rank 0 of 2 ended by signal 99", 227),
    ],
)
def test_what_a_launch_died_of_is_one_line(monkeypatch, capsys, ended, said, code):
    def failed(*_):
        failures = {rank: ProcessFailure(rank, rank, exitcode, "") for rank, (exitcode, _) in ended.items()}
        for rank, failure in failures.items():
            failure.timestamp = ended[rank][1]
        raise ChildFailedError("train_loop.py", failures)

    monkeypatch.setattr(torchrun, "run", failed)
    with pytest.raises(SystemExit) as stop:
        launch.main(["2", "train_loop.py"])
    assert stop.value.code == code
    assert capsys.readouterr().err == f"{said}, and the others with it\n"


@pytest.mark.parametrize(
    ("cores", "processes", "set_before", "threads"),
    [(8, "2", None, "4"), (7, "2", None, "3"), (2, "4", None, "1"), (None, "1", None, "1"), (8, "2", "5", "5")],
)
def test_a_launch_shares_the_cores_out_and_gives_ranks_time_to_save(monkeypatch, cores, processes, set_before, threads):
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": set_before} if set_before else {})
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torchrun, "parse_args", lambda words: words)
    started: list[list[str]] = []
    monkeypatch.setattr(torchrun, "run", started.append)
    launch.main([processes, "train_loop.py", "--fresh", "x=1"])
    assert started == [["--standalone", f"--nproc-per-node={processes}", "train_loop.py", "--fresh", "x=1"]]
    assert os.environ == {"OMP_NUM_THREADS": threads, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "110"}


def test_a_launch_that_is_told_to_end_exits_as_its_ranks_do(monkeypatch):
    def told(*_):
        raise SignalException("told", signal.SIGTERM)

    monkeypatch.setattr(torchrun, "run", told)
    with pytest.raises(SystemExit) as stop:
        launch.main(["2", "train_loop.py"])
    assert stop.value.code == 143


@pytest.mark.parametrize("words", [[], ["2"], ["0", "x.py"], ["x", "y.py"], ["²", "y.py"]])
def test_a_launch_of_nothing_says_what_it_wants(words):
    with pytest.raises(UserError, match=r"PROCESSES=.*how many processes, 1 or more"):
        launch.main(words)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were asked for, and this machine has 1 GPUs"):
        ranks.join()


@pytest.mark.parametrize("wrong", [None, UserError("what is wrong")])
@pytest.mark.parametrize("first", [True, False])
def test_a_machines_first_rank_goes_first_and_nobody_waits_for_it_for_ever(monkeypatch, first, wrong):
    done: list[str] = []
    state = SimpleNamespace(is_local_main_process=first, wait_for_everyone=lambda: done.append("met"))
    monkeypatch.setattr(ranks, "PartialState", lambda: state)
    with contextlib.suppress(UserError), ranks.local_first():
        done.append("did")
        if wrong:
            raise wrong
    assert done == (["did", "met"] if first else ["met", "did"])


def test_a_launcher_that_starts_one_process_in_place_of_two_is_noticed(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"):  # as `accelerate launch --num_processes 2 --cpu` does
        monkeypatch.setenv(name, "set")
    with pytest.raises(UserError, match="started one process, not several; add --multi_gpu"):
        ranks.join()


def test_one_process_keeps_its_gradients_and_numbers():
    ranks.join()
    weight = torch.nn.Parameter(torch.ones(3))
    weight.sum().backward()
    assert ranks.sum_gradients([weight], torch.tensor(1.5), 2).tolist() == [1.5, 2]
    assert weight.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize("turns", ["abab", "aaaab", "abbbbbb", "b"])
def test_whoever_asks_takes_the_next_item_and_each_item_is_of_one(monkeypatch, turns):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    store = torch.distributed.HashStore()
    monkeypatch.setattr(ranks.torch_private, "default_store", lambda: store)
    both = {name: ranks.take("vwxyz", "a round") for name in "ab"}
    taken = [item for name in turns for item in [next(both[name], None)] if item]
    rest = [*both["b"], *both["a"]]
    assert "".join(taken + rest) == "vwxyz"
    assert "".join(ranks.take("vwxyz", "another")) == "vwxyz"


def test_single_queries_are_not_timed_by_several_processes(tiny_config, monkeypatch):

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="timed by one process"):
        bench_latency.main([str(tiny_config)])
