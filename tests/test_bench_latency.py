"""Single queries: what is asked and when the clock runs, which process is reported, and every figure under its name."""

import json
import os
import random
import re
import runpy
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bench_latency
from common.config import load
from common.data import prompt, squad
from common.data.tokens import Tokenizers
from common.decode import hosted, single
from common.decode.answers import Generation
from common.errors import UserError
from common.runs import adapters, gauges, preflight, record, signals
from tests.decode.test_hosted import KEY, Host

import pytest
import torch

N = 101  # queries of a made-up process: p50, p90, p95 and p99 are then the 51st, 91st, 96th and 100th
CPU, GPU = SimpleNamespace(type="cpu"), SimpleNamespace(type="cuda")


@pytest.fixture
def config_file(tmp_path, dev_file) -> Path:
    """A system whose base is never loaded: tests put something in its place."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    path = tmp_path / "bench.yaml"
    path.write_text(
        f"system: one\nbase: {{path: {tmp_path / 'base'}, dtype: fp32}}\ndata: {{dev: {dev_file}}}\n"
        f"bench: {{queries: 5, warmup_queries: 2, processes: 3}}\nruns: {tmp_path / 'runs'}\n"
    )
    return path


def stepped(p50: float, p90: float, p95: float, p99: float) -> list[float]:
    """101 values, rising, with these percentiles; the interval of p95 is from the 91st to the 101st: p90 to p99."""
    return [p50] * 71 + [p90] * 22 + [p95] * 5 + [p99] * 3


def queries(total: tuple, first: tuple, each: tuple, **counts: int) -> list[dict]:
    """A mode's samples, from percentiles in milliseconds: in all, to the first token, and for each of 4 after it."""
    rows = [
        {
            "total": t / 1000,
            "first": f / 1000,
            "last": (f + 4 * e) / 1000,
            "tokens": 5,
            "passes": 2,
            "drafted": 15,
            "accepted": 3,
            **counts,
        }
        for t, f, e in zip(stepped(*total), stepped(*first), stepped(*each), strict=True)
    ]
    random.Random(1).shuffle(rows)
    return rows


def spread(p50: float, p90: float, p95: float, p99: float) -> dict:
    """What is reported of 101 values. Intervals are of ranks 41 to 61, 85 to 97 and 91 to 101; p99 has none."""
    return {
        "p50_ms": p50,
        "p50_interval_ms": [p50, p50],
        "p90_ms": p90,
        "p90_interval_ms": [p90, p95],
        "p95_ms": p95,
        "p95_interval_ms": [p90, p99],
        "p99_ms": p99,
        "p99_interval_ms": None,
    }


# by p95 the third is in the middle in natural mode, and the first in fixed; by no other percentile, mean or order
NATURAL = [
    queries((100, 200, 300, 900), (10, 11, 12, 13), (1, 2, 3, 4), accepted=6),
    queries((150, 160, 500, 600), (30, 31, 32, 33), (2, 3, 4, 5), accepted=9, tokens=6),
    queries((90, 310, 400, 450), (20, 50, 60, 70), (5, 6, 7, 8), passes=3),
]
FIXED = [
    queries((95, 311, 401, 451), (21, 51, 61, 71), (5.5, 6.5, 7.5, 8.5), drafted=0, accepted=0),
    queries((100, 200, 300, 900), (10, 11, 12, 13), (1, 2, 3, 4)),
    queries((150, 160, 500, 600), (30, 31, 32, 33), (2, 3, 4, 5)),
]


def gauge(allocated: int | None, reserved: int | None, rss: int | None) -> dict:
    return {"allocated_bytes": allocated, "reserved_bytes": reserved, "rss_bytes": rss}


def nvml(process: int | None, device: int, processes: int, joules: float | None, clock: list | None, *why: str) -> dict:
    return {
        "seconds": 1.0,
        "process_bytes": process,
        "device_bytes": device,
        "processes": processes,
        "energy_j": joules,
        "clock_mhz": clock,
        "throttled": list(why),
    }


MIB = 2**20
MADE_BY = {"engine": "drafts", "tokenizer": "t", "cutter": "c", "base_commit": None}
ON_CPU = [
    {"load": gauge(None, None, (3 - i) * MIB), "natural": gauge(None, None, (i + 1) * MIB)} for i in range(3)
]  # highest: 3 MiB each, of the first and of the last process
ON_GPU = [
    {"load": gauge(900 * MIB, 1000 * MIB, 1), "natural": gauge(100 * MIB, 500 * MIB, 9)},
    {"load": gauge(800 * MIB, 1200 * MIB, 3), "natural": gauge(300 * MIB, 400 * MIB, 8)},
    {"load": gauge(700 * MIB, 1100 * MIB, 2), "natural": gauge(200 * MIB, 600 * MIB, 7)},
]
BY_NVML = [
    {
        "start": nvml(1, 1, 1, 1.0, None),
        "load": nvml(None, 2000 * MIB, 1, None, None),
        "natural": nvml(1500 * MIB, 2500 * MIB, 1, 101.0, [100, 900, 2000], "power cap"),
    },
    {
        "load": nvml(1300 * MIB, 2100 * MIB, 2, 5.0, [1, 2, 3]),
        "natural": nvml(None, 2600 * MIB, 1, 707.0, [50, 1500, 1600], "hardware slowdown"),
    },
    {
        "load": nvml(1200 * MIB, 1900 * MIB, 1, None, None),
        "natural": nvml(1400 * MIB, 2400 * MIB, 1, 312.3456, [300, 1200.5, 1300], "power cap"),
    },
]


@pytest.fixture
def bench(config_file, monkeypatch, capsys):
    """Runs the script on made-up processes: (what it printed, the object on its last line)."""
    monkeypatch.setattr(os, "getloadavg", lambda: (1.25, 7.0, 8.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 6)

    def run(
        *words: str,
        device=CPU,
        peaks=ON_CPU,
        by_nvml=({}, {}, {}),
        natural=NATURAL,
        fixed=FIXED,
        made=MADE_BY,
        meanwhile=lambda: None,
    ):
        commands = []

        def measured(command: list[str]) -> int:
            i = len(commands)
            commands.append(command)
            modes = {"natural": natural[i]} | ({"fixed": fixed[i]} if fixed else {})
            found = {
                "ids": [f"q{j}" for j in range(N)],
                "modes": modes,
                "gauges": peaks[i],
                "made_by": made,
                "nvml": by_nvml[i],
            }
            Path(command[-1]).write_text(json.dumps(found))
            meanwhile()
            return 0

        monkeypatch.setattr(signals, "run", measured)
        monkeypatch.setattr(bench_latency, "pick_device", lambda: device)
        monkeypatch.setattr(bench_latency, "describe_device", lambda device: {"name": f"a {device.type}"})
        bench_latency.main([str(config_file), *words])
        out, err = capsys.readouterr()
        result = json.loads(out.splitlines()[-1])
        result |= {
            "commands": commands,
            "err": err,
            "noted": [line for line in err.splitlines() if line.startswith("note: ")],
        }
        return out, result

    return run


# ---- which process, and every figure -------------------------------------------------------------------------------


def test_of_each_mode_the_process_in_the_middle_by_p95_is_reported_with_every_figure_under_its_name(bench):
    _, result = bench()
    seconds = (71 * 90 + 22 * 310 + 5 * 400 + 3 * 450) / 1000  # 16.56
    assert result["natural"] == {
        "n": 101,
        "latency": spread(90, 310, 400, 450),
        "ttft": spread(20, 50, 60, 70),
        "tpot": spread(5, 6, 7, 8),
        "mean_tokens": 5,
        "mean_passes": 3,
        "drafts_accepted": 0.2,
        "queries_per_s": round(101 / seconds, 3),
        "processes_p95_ms": [300, 500, 400],
    }
    assert result["natural"]["queries_per_s"] == 6.099
    seconds = (71 * 95 + 22 * 311 + 5 * 401 + 3 * 451) / 1000
    assert result["fixed"] == {
        "n": 101,
        "latency": spread(95, 311, 401, 451),
        "ttft": spread(21, 51, 61, 71),
        "tpot": spread(5.5, 6.5, 7.5, 8.5),
        "mean_tokens": 5,
        "mean_passes": 2,
        "drafts_accepted": None,
        "queries_per_s": round(101 / seconds, 3),
        "processes_p95_ms": [401, 300, 500],
    }
    assert {key: result[key] for key in ("latency", "ttft", "tpot", "mean_tokens")} == {
        "latency": spread(90, 310, 400, 450),
        "ttft": spread(20, 50, 60, 70),
        "tpot": spread(5, 6, 7, 8),
        "mean_tokens": 5,
    }
    assert result["n"] == 101
    assert result["engine"] == "drafts"
    assert result["random_weights"] is False
    assert result["adapter"] is result["adapter_sha256"] is None
    assert result["host"] == {"cores": 6, "load": 1.25}
    assert result["phases"] == {"load": gauge(None, None, 3 * MIB), "natural": gauge(None, None, 3 * MIB)}
    assert result["peak"] == gauge(None, None, 3 * MIB)
    assert result["nvml_peak"] is None


def test_of_two_processes_the_slower_is_reported(bench):
    _, result = bench("bench.processes=2")
    assert re.findall("to go, until .*: (.*)", result["err"]) == ["1 more process"]
    assert result["natural"]["latency"] == spread(150, 160, 500, 600)
    assert result["natural"]["processes_p95_ms"] == [300, 500]
    assert result["natural"]["drafts_accepted"] == 0.6
    assert result["natural"]["mean_tokens"] == 6


def test_what_is_printed_without_a_gpu(bench):
    out, _ = bench()
    head = f"{'ms':26}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}   95 % interval of p95"
    assert out.splitlines()[:-1] == [
        "one on a cpu: 101 single queries in each of 3 processes, engine drafts",
        head,
        "natural, n = 101: the answer ends by itself; 5 tokens in 3 passes, 20% of drafts accepted",
        "  end to end                    90.0     310.0     400.0     450.0   [310.0, 450.0]",
        "  first token                   20.0      50.0      60.0      70.0   [50.0, 70.0]",
        "  per token after it             5.0       6.0       7.0       8.0   ",
        "  p95 of each process: 300.0, 500.0, 400.0 (66.7% apart)",
        "fixed, n = 101: always as many tokens as an answer may have; 5 tokens in 2 passes",
        "  end to end                    95.0     311.0     401.0     451.0   [311.0, 451.0]",
        "  first token                   21.0      51.0      61.0      71.0   [51.0, 71.0]",
        "  per token after it             5.5       6.5       7.5       8.5   ",
        "  p95 of each process: 401.0, 300.0, 500.0 (66.7% apart)",
        "host: 1.2 processes at work on 6 cores in the minute before",
        "no GPU, so no VRAM was measured; peak RSS 3 MiB, loading included",
    ]


def test_gauges_are_the_highest_of_all_processes_energy_and_clocks_those_in_the_middle(bench):
    out, result = bench(device=GPU, peaks=ON_GPU, by_nvml=BY_NVML)
    assert result["phases"] == {
        "load": {
            **gauge(900 * MIB, 1200 * MIB, 3),
            "process_bytes": 1300 * MIB,
            "device_bytes": 2100 * MIB,
            "processes": 2,
            "energy_j_per_query": None,
            "clock_mhz": [1, 2, 3],
            "throttled": [],
        },
        "natural": {
            **gauge(300 * MIB, 600 * MIB, 9),
            "process_bytes": 1500 * MIB,
            "device_bytes": 2600 * MIB,
            "processes": 1,
            "energy_j_per_query": 3.093,
            "clock_mhz": [300, 1200.5, 1300],
            "throttled": ["hardware slowdown", "power cap"],
        },
    }
    assert result["peak"] == gauge(900 * MIB, 1200 * MIB, 9)
    assert result["nvml_peak"] == {"process_bytes": 1500 * MIB, "device_bytes": 2600 * MIB}
    assert out.splitlines()[-5:-1] == [
        f"{'peak MiB':12}{'allocated':>11}{'reserved':>11}{'process':>11}{'device':>11}   joules a query, clock MHz",
        "load                900       1200       1300       2100   –, 1/2/3",
        "natural             300        600       1500       2600   3.1, 300/1200/1300",
        "throttled: hardware slowdown, power cap; processes on the GPU: 2, so others shared it",
    ]


def test_what_a_driver_does_not_say_is_printed_as_not_said(bench):
    silent = {"natural": nvml(None, 64 * MIB, 0, None, None)}
    out, result = bench(device=GPU, peaks=ON_GPU, by_nvml=[{}, silent, {}])
    assert result["phases"]["load"] == gauge(900 * MIB, 1200 * MIB, 3)
    assert result["phases"]["natural"] == {
        **gauge(300 * MIB, 600 * MIB, 9),
        "process_bytes": None,
        "device_bytes": 64 * MIB,
        "processes": None,
        "energy_j_per_query": None,
        "clock_mhz": None,
        "throttled": [],
    }
    assert result["nvml_peak"] == {"process_bytes": None, "device_bytes": 64 * MIB}
    assert out.splitlines()[-4:-1] == [
        "load                900       1200   not said   not said   –, –",
        "natural             300        600   not said         64   –, –",
        "throttled: no; processes on the GPU: not said",
    ]
    one = {"natural": nvml(None, 64 * MIB, 1, None, None)}
    assert "processes on the GPU: 1\n" in bench(device=GPU, peaks=ON_GPU, by_nvml=[one, {}, {}])[0]


def test_a_host_elsewhere_has_no_fixed_mode_and_times_of_its_own(config_file, bench, tmp_path):
    apart = {"passes": 0, "drafted": 0, "accepted": 0, "server": 0.25, "waited": 0.0}
    rows = [[{**q, **apart, "connect": 0.004 if i == 7 else None} for i, q in enumerate(mode)] for mode in NATURAL]
    nothing = [{"natural": gauge(None, None, None)}] * 3
    made = {**MADE_BY, "engine": "api"}
    words = ("api.url=http://h/v1", f"window.tokenizer={tmp_path / 'base'}")
    out, result = bench(*words, natural=rows, fixed=None, peaks=nothing, made=made)
    assert "fixed" not in result
    natural = result["natural"]
    assert (natural["mean_passes"], natural["drafts_accepted"]) == (0, None)
    assert natural["server"] == spread(250, 250, 250, 250)
    assert natural["waited"] == spread(0, 0, 0, 0)
    assert (natural["connect"]["p50_ms"], natural["connect"]["p99_ms"]) == (4, 4)
    assert natural["connect"]["p95_interval_ms"] is None
    assert out.splitlines()[:-1] == [
        "one on http://h/v1: 101 single queries in each of 3 processes, engine api",
        f"{'ms':26}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}   95 % interval of p95",
        "natural, n = 101: the answer ends by itself; 5 tokens",
        "  end to end                    90.0     310.0     400.0     450.0   [310.0, 450.0]",
        "  first token                   20.0      50.0      60.0      70.0   [50.0, 70.0]",
        "  per token after it             5.0       6.0       7.0       8.0   ",
        "  connecting                     4.0       4.0       4.0       4.0   ",
        "  by the host's own clock      250.0     250.0     250.0     250.0   ",
        "  waiting to try again           0.0       0.0       0.0       0.0   ",
        "  p95 of each process: 300.0, 500.0, 400.0 (66.7% apart)",
    ]
    assert record.read_one(Path(result["run"]) / "record.json")["may_differ"]["device"] == {"name": "http://h/v1"}


def test_answers_of_random_weights_are_said_to_be_replayed(bench):
    out, result = bench("base.random_weights=true")
    assert result["random_weights"] is True
    assert out.startswith("one (random weights) on a cpu: ")
    said = "natural, n = 101: a gold answer and EOS are replayed, for random weights never end; 5 tokens in 3 passes, "
    assert said in out
    assert "fixed, n = 101: always as many tokens as an answer may have; " in out
    plain, _ = bench("base.random_weights=true", made={**MADE_BY, "engine": "plain"})
    assert "natural, n = 101: the answer ends by itself; " in plain


def sample(total: float, first: float | None, last: float | None, tokens: int | None, **more) -> dict:
    return {
        "total": total,
        "first": first,
        "last": last,
        "tokens": tokens,
        "passes": 1,
        "drafted": 0,
        "accepted": 0,
        **more,
    }


def test_few_queries_have_percentiles_between_two_of_them_and_no_interval():
    found = bench_latency.summary(
        [
            sample(0.4, 0.10, 0.30, 3, passes=2, drafted=7, accepted=2),  # 100 ms a token
            sample(0.2, 0.05, 0.05, 1, passes=1, drafted=0, accepted=0),  # no token after the first
            sample(0.3, 0.08, None, 4, passes=2, drafted=0, accepted=0),  # read in windows
        ]
    )
    none = {f"p{q}_interval_ms": None for q in (50, 90, 95, 99)}
    assert found == {
        "n": 3,
        "mean_tokens": 2.67,
        "mean_passes": 1.67,
        "drafts_accepted": 0.2857,
        "queries_per_s": 3.333,
        "latency": {"p50_ms": 300, "p90_ms": 380, "p95_ms": 390, "p99_ms": 398, **none},
        "ttft": {"p50_ms": 80, "p90_ms": 96, "p95_ms": 98, "p99_ms": 99.6, **none},
        "tpot": {"p50_ms": 100, "p90_ms": 100, "p95_ms": 100, "p99_ms": 100, **none},
    }


def test_tokens_and_first_tokens_that_are_not_known_are_in_no_figure():
    found = bench_latency.summary(
        [
            sample(0.4, 0.10, 0.30, 3),  # 100 ms a token
            sample(0.4, 0.20, 0.30, None),
            sample(0.4, None, 0.40, 5),
        ]
    )
    assert (found["mean_tokens"], found["tpot"]["p50_ms"], found["ttft"]["p50_ms"]) == (4, 100, 150)
    none = bench_latency.summary([sample(0.4, None, 0.4, None)] * 2)
    assert (none["mean_tokens"], none["tpot"], none["ttft"]) == (None, None, None)


def test_figures_are_rounded_to_microseconds():
    found = bench_latency.summary([sample(0.1234567, 0.0123456, 0.0123456 + 2 / 3000, 3)])
    assert found["latency"]["p95_ms"] == 123.457
    assert found["ttft"]["p95_ms"] == 12.346
    assert found["tpot"]["p95_ms"] == 0.333
    assert found["queries_per_s"] == 8.1
    many = bench_latency.summary([sample((i + 1) / 7, 1 / 3, None, 1) for i in range(101)])
    assert many["latency"]["p95_interval_ms"] == [13000, 14428.571]
    assert many["tpot"] is None


def test_where_no_query_has_a_second_token_there_is_no_time_per_token(bench, capsys):
    short = [[{**q, "tokens": 1} for q in mode] for mode in NATURAL]
    out, result = bench(natural=short)
    assert result["tpot"] is None
    assert out.count("per token after it") == 1, "of the fixed mode"


def test_a_small_sample_is_said_to_be_too_small(bench):
    out, result = bench(natural=[mode[:5] for mode in NATURAL])
    assert result["natural"]["n"] == 5
    assert result["latency"]["p95_interval_ms"] is None
    assert out.count("   none: n = 5 is too small\n") == 2


# ---- the record ----------------------------------------------------------------------------------------------------


def test_the_record_holds_what_is_printed_last_and_what_was_measured_on(bench, dev_file):
    _, result = bench()
    commands, _, _ = (result.pop(key) for key in ("commands", "noted", "err"))
    run = Path(result["run"])
    assert run.name.endswith("-bench-001")
    written = record.read_one(run / "record.json")
    assert written["result"] == result
    assert (written["kind"], written["system"]) == ("bench", "one")
    assert written["may_differ"]["device"] == {"name": "a cpu"}
    assert (written["may_differ"]["engine"], written["may_differ"]["tokenizer"]) == ("drafts", "t")
    assert written["must_match"]["window"]["tokenizer"] == "c"
    assert written["must_match"]["data"] == squad.load(load(str(run / "config.yaml")).data, "dev").sha256
    files = [str(run / f"process-{i}.json") for i in range(3)]
    script = str(Path(bench_latency.__file__).resolve())
    assert [c[:2] for c in commands] == [[sys.executable, script]] * 3
    assert [c[-2:] for c in commands] == [["--measure", file] for file in files]
    assert all(Path(file).is_file() for file in files)


@pytest.fixture
def adapter(tmp_path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text("{}")
    return folder


LORA = "lora={rank: 4, alpha: 8, targets: [q_proj]}"


def test_processes_are_given_the_adapter_that_was_found_and_its_hash_is_kept(bench, adapter, monkeypatch, config_file):
    def chosen(config, given, force):
        return adapters.Chosen(config, adapter, None, "seed=1", "FORCE=1 seed=2")

    monkeypatch.setattr(adapters, "choose", chosen)
    _, result = bench(LORA)
    assert result["noted"] == [f"note: seed=1, as {adapter} was trained"]
    assert result["forced"] == "FORCE=1 seed=2"
    assert [c[2:-2] for c in result["commands"]] == [[str(config_file), LORA, f"adapter={adapter}"]] * 3
    assert result["adapter"] == str(adapter)
    # printf weights | sha256sum
    assert result["adapter_sha256"] == "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"


def test_an_adapter_that_is_replaced_meanwhile_ends_it(bench, adapter):
    weights = adapter / "adapter_model.safetensors"
    with pytest.raises(UserError, match="replaced while it was read"):
        bench(LORA, f"adapter={adapter}", meanwhile=lambda: weights.write_bytes(b"others"))


def test_a_damaged_adapter_is_not_timed(bench, adapter):
    (adapter / "SHA256SUMS").write_text("0000  adapter_model.safetensors\n")
    with pytest.raises(UserError, match=r"adapter_model.safetensors"):
        bench(LORA, f"adapter={adapter}")


# ---- one process or several, and how they end ----------------------------------------------------------------------


def test_a_single_process_is_this_one(config_file, monkeypatch, capsys, adapter):
    calls = []

    def measure(config, adapter, dev, file, force):
        calls.append((config.system, adapter, len(dev.examples), file.name, force))
        file.write_text(
            json.dumps(
                {
                    "ids": ["q"] * N,
                    "modes": {"natural": NATURAL[2], "fixed": FIXED[0]},
                    "gauges": ON_GPU[0],
                    "made_by": MADE_BY,
                    "nvml": BY_NVML[0],
                }
            )
        )

    monkeypatch.setattr(bench_latency, "measure", measure)
    monkeypatch.setattr(signals, "run", lambda command: pytest.fail("another process"))
    bench_latency.main([str(config_file), "bench.processes=1", LORA, f"adapter={adapter}"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["natural"]["processes_p95_ms"] == [400]
    assert result["phases"]["natural"]["energy_j_per_query"] == 1.0
    assert result["adapter"] == str(adapter)
    assert "  p95 of each process: 400.0 (0.0% apart)\n" in out
    assert calls == [("one", adapter, 12, "process-0.json", False)]


def test_help_says_what_each_word_is(capsys):
    with pytest.raises(SystemExit) as ended:
        bench_latency.main(["--help"])
    assert not ended.value.code
    said = " ".join(capsys.readouterr().out.split())
    assert "Latency and memory of single queries, one at a time, end to end. The method: docs/latency.md." in said
    assert "model a name in configs/, a YAML file, a folder or a hub id" in said
    assert "[key=value ...]" in said
    assert "--measure" not in said


def test_queries_are_of_dev(config_file, monkeypatch, tmp_path, dev_file):
    folder = tmp_path / "squad"
    folder.mkdir()
    (folder / "dev-v1.1.json").write_bytes(dev_file.read_bytes())
    monkeypatch.setenv("SQUAD_DIR", str(folder))
    found = []
    monkeypatch.setattr(bench_latency, "measure", lambda config, adapter, dev, file, force: found.append(dev.source))
    bench_latency.main([str(config_file), "data.dev=rajpurkar/squad", "--measure", str(tmp_path / "here.json")])
    assert found == [str(folder / "dev-v1.1.json")]


def test_the_script_is_started_with_its_arguments(config_file, monkeypatch):
    commands = []
    monkeypatch.setattr(signals, "run", lambda command: (commands.append(command), 143)[1])
    monkeypatch.setattr(sys, "argv", ["bench_latency.py", str(config_file), "bench.processes=2"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(bench_latency.__file__, run_name="__main__")
    assert ended.value.code == 143
    assert commands[0][2:-2] == [str(config_file), "bench.processes=2"]


def test_a_measuring_process_writes_where_it_is_told_and_makes_no_run(config_file, monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setattr(bench_latency, "measure", lambda *args, force: calls.append(args))
    monkeypatch.setattr(adapters.Chosen, "note", lambda chosen: pytest.fail("said once, by who started this"))
    bench_latency.main([str(config_file), "--measure", str(tmp_path / "here.json")])
    ((config, adapter, dev, file),) = calls
    assert (config.system, adapter, len(dev.examples), file) == ("one", None, 12, tmp_path / "here.json")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "runs").exists()


def test_a_hosted_model_is_measured_over_the_network(config_file, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(bench_latency, "measure_api", lambda *args: calls.append(args))
    words = ["api.url=http://h/v1", f"window.tokenizer={tmp_path / 'base'}"]
    bench_latency.main([str(config_file), *words, "--measure", str(tmp_path / "here.json")])
    ((config, dev, file),) = calls
    assert (config.api.url, len(dev.examples), file) == ("http://h/v1", 12, tmp_path / "here.json")


@pytest.mark.parametrize("code", [2, 129, 130, 143])
def test_a_measuring_process_that_has_said_why_ends_it_with_its_code(config_file, monkeypatch, code):
    monkeypatch.setattr(signals, "run", lambda command: code)
    with pytest.raises(SystemExit) as ended:
        bench_latency.main([str(config_file)])
    assert ended.value.code == code


@pytest.mark.parametrize(
    ("device", "more"), [(CPU, ""), (GPU, "; what NVML saw until then: {run}/process-1.nvml.json")]
)
def test_a_measuring_process_that_dies_is_named(config_file, monkeypatch, tmp_path, device, more):
    def second_dies(command: list[str]) -> int:
        Path(command[-1]).write_text("{}")
        return -9 if command[-1].endswith("process-1.json") else 0

    monkeypatch.setattr(signals, "run", second_dies)
    monkeypatch.setattr(bench_latency, "pick_device", lambda: device)
    with pytest.raises(UserError) as error:
        bench_latency.main([str(config_file)])
    (run,) = (tmp_path / "runs").iterdir()
    assert str(error.value) == "measuring process 2 of 3 ended with -9" + more.format(run=run)


def test_what_makes_no_sense_for_single_queries_is_refused(config_file, monkeypatch):
    with pytest.raises(UserError, match=r"prompt.earlier: a single question has no earlier ones"):
        bench_latency.main([str(config_file), "prompt.earlier=true"])
    with pytest.raises(UserError, match=r"decode.nbest: single queries are timed as they are answered greedily"):
        bench_latency.main([str(config_file), "lora=null", "decode.spans=true", "decode.nbest=2"])
    monkeypatch.setattr(preflight, "check", lambda config: pytest.fail("too late"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="timed by one process; start it without a launcher"):
        bench_latency.main([str(config_file)])
    monkeypatch.setenv("WORLD_SIZE", "1")

    def refused(config):
        raise UserError(f"{config.system} does not run here")

    monkeypatch.setattr(preflight, "check", refused)
    with pytest.raises(UserError, match="one does not run here"):
        bench_latency.main([str(config_file)])


def test_shots_are_filled_in_before_anything_is_timed(config_file, monkeypatch, tmp_path, train_file):
    calls = []
    monkeypatch.setattr(bench_latency, "measure", lambda *args, force: calls.append(args))
    words = [f"data.train={train_file}", "prompt.shots=1", "--measure", str(tmp_path / "here.json")]
    bench_latency.main([str(config_file), *words])
    assert calls[0][0].prompt.before.startswith("Context: Number ")


# ---- what is asked -------------------------------------------------------------------------------------------------


# 3, 1 and 1 of articles with 6, 3 and 3 questions, by the sha256 of the id within each; then Random(0).sample
ASKED = ["p2q2", "p3q1", "p0q0", "p0q2", "p1q1"]


def test_every_system_gets_the_same_queries_in_the_same_shuffled_order(config_file):
    config = load(str(config_file))
    dev = squad.load(config.data, "dev")
    assert [e.id for e in bench_latency.drawn(config, dev)] == ASKED
    other = load(str(config_file), ["system=other", "seed=7", "prompt.order=both"])
    assert [e.id for e in bench_latency.drawn(other, dev)] == ASKED
    everything = bench_latency.drawn(load(str(config_file), ["bench.queries=100"]), dev)
    assert sorted(e.id for e in everything) == sorted(e.id for e in dev.examples)
    assert [e.id for e in everything] != [e.id for e in dev.examples]


# ---- one process ---------------------------------------------------------------------------------------------------


@pytest.fixture
def process(config_file, monkeypatch, tmp_path):
    """Runs `measure` on an engine that takes 1 s for the first token, a second more with each query, then 30 ms for
    two more tokens and 10 ms for the text: what it wrote, and what happened in which order."""
    events, clock = [], {"now": 100.0, "asked": 0}

    def happens(name, result=None):
        return lambda *args, **kwargs: (events.append(name), result)[1]

    def ask(engine, tokenizers, example, config, forced, to_the_limit, tick):
        assert (engine, tokenizers, config) == (made["engine"], Tokenizers("tokenizer", "cutter"), made["config"])
        clock["asked"] += 1
        clock["now"] += clock["asked"]  # each takes longer by a second
        tick(1)
        clock["now"] += 0.03
        tick(2)
        clock["now"] += 0.01
        events.append((example.id, "to the limit" if to_the_limit else "natural", forced))
        answer = Generation([5, 6, 7], passes=2, drafted=15, accepted=1)
        windows = [answer, Generation([8], passes=1, drafted=4, accepted=2)] if example.id in made["long"] else [answer]
        return "text", windows, False

    @contextmanager
    def sampler(device, file):
        events.append(f"nvml {file.name}")
        yield lambda phase: events.append(f"begin {phase}")
        file.write_text('{"natural": {"energy_j": 7}}')

    def peaks(device):
        events.append("peaks")
        return gauge(None, None, sum(event == "peaks" for event in events))

    def engine(model, stops, window, options, beside, decode):
        events.append("engine")
        assert decode == made["config"].decode
        assert (model, stops, window, options) == ("model", [1, 2], made["config"].window, made["config"].eval)
        assert beside == 17
        return made["engine"]

    made = {"long": ()}
    monkeypatch.setattr(gauges, "now", lambda device: clock["now"])
    monkeypatch.setattr(gauges, "nvml_sampler", sampler)
    monkeypatch.setattr(gauges, "peaks", peaks)
    monkeypatch.setattr(gauges, "reset_peaks", happens("reset"))
    monkeypatch.setattr(bench_latency, "pick_device", lambda: CPU)
    monkeypatch.setattr(single, "ask", ask)
    monkeypatch.setattr(single, "engine", engine)
    monkeypatch.setattr(bench_latency, "stop_tokens", lambda tokenizer, model, decode: [1, 2])
    monkeypatch.setattr(bench_latency, "gold_ids", lambda tokenizer, text, limit: [tokenizer, text, limit])
    monkeypatch.setattr(prompt, "overhead", lambda tokenizer, options: 17)
    monkeypatch.setattr(bench_latency, "load_tokenizers", lambda config: Tokenizers("tokenizer", "cutter"))
    monkeypatch.setattr(bench_latency, "load_system", happens("load", "model"))
    monkeypatch.setattr(bench_latency, "sources", lambda model, both: {"of": [model, both.own, both.window]})
    monkeypatch.setattr(bench_latency, "FIXED", 3)

    def run(*words: str, engine: str = "drafts", long: tuple = ()):
        made.update(engine=SimpleNamespace(name=engine), long=long, config=load(str(config_file), words))
        dev = squad.load(made["config"].data, "dev")
        bench_latency.measure(made["config"], Path("adapter"), dev, tmp_path / "process-0.json")
        return json.loads((tmp_path / "process-0.json").read_text()), events

    return run


def test_a_process_loads_warms_up_in_every_mode_and_then_times_each_query(process, capsys):
    found, events = process()
    assert events == [
        "nvml process-0.nvml.json",
        "begin load",
        "reset",
        "load",
        "engine",
        "peaks",
        "reset",
        "begin warm up",
        ("p2q2", "natural", None),
        ("p2q2", "to the limit", None),
        ("p3q1", "natural", None),
        ("p3q1", "to the limit", None),
        "peaks",
        "reset",
        "begin natural",
        *((id_, "natural", None) for id_ in ASKED),
        "peaks",
        "reset",
        "begin fixed",
        *((id_, "to the limit", None) for id_ in ASKED[:3]),
        "peaks",
        "reset",
    ]
    bars = capsys.readouterr().err
    assert all(f"{name}: 100%" in bars for name in ("warm up", "natural", "fixed"))
    assert bars.count("0/2 [") == bars.count("0/3 [") == bars.count("0/5 [") == 1
    assert bars.count("query/s") >= 6
    # by the last warm-up's 3.04 s and 4.04 s: five natural queries, three of the fixed mode
    assert re.search(r"^27 s to go, until \d\d:\d\d: 8 queries of this process$", bars, re.MULTILINE)
    assert found["ids"] == ASKED
    assert found["gauges"] == {
        name: gauge(None, None, i) for i, name in enumerate(["load", "warm up", "natural", "fixed"], 1)
    }
    assert found["made_by"] == {"engine": "drafts", "of": ["model", "tokenizer", "cutter"]}
    assert found["nvml"] == {"natural": {"energy_j": 7}}
    assert list(found["modes"]) == ["natural", "fixed"]
    for mode, first in (("natural", [5, 6, 7, 8, 9]), ("fixed", [10, 11, 12])):  # the warm-up took 1 to 4 seconds
        assert found["modes"][mode] == [
            {
                "total": pytest.approx(s + 0.04),
                "first": pytest.approx(s),
                "last": pytest.approx(s + 0.03),
                "tokens": 3,
                "passes": 2,
                "drafted": 15,
                "accepted": 1,
            }
            for s in first
        ]


def test_a_query_that_is_read_in_windows_counts_all_of_them_and_has_no_time_per_token(process):
    found, _ = process(long=("p3q1",))
    other, windows, *_ = found["modes"]["natural"]
    assert other["last"] == pytest.approx(5.03)
    assert windows == {
        "total": pytest.approx(6.04),
        "first": pytest.approx(6),
        "last": None,
        "tokens": 4,
        "passes": 3,
        "drafted": 19,
        "accepted": 3,
    }


@pytest.mark.parametrize(("engine", "script"), [("drafts", ["tokenizer", "word", 20]), ("plain", None)])
def test_random_weights_are_given_gold_answers_where_an_answer_would_never_end(process, engine, script):
    _, events = process("base.random_weights=true", "window.answer=20", engine=engine)
    asked = [event for event in events if isinstance(event, tuple)]
    natural = [words for _, mode, words in asked if mode == "natural"]
    assert len(natural) == 7
    if script:
        assert all(words[0] == "tokenizer" and words[2] == 20 for words in natural)
        assert {words[1] for words in natural} <= {
            "amber",
            "bridge",
            "canal",
            "delta",
            "ember",
            "forest",
            "granite",
            "harbour",
            "island",
            "jetty",
            "kiln",
        }
    else:
        assert natural == [None] * 7
    assert [words for _, mode, words in asked if mode != "natural"] == [None] * 5


def test_a_warm_up_longer_than_the_queries_begins_again_and_none_is_none(process):
    _, events = process("bench.warmup_queries=7")
    begin, end = events.index("begin warm up"), events.index("begin natural")
    assert [event[0] for event in events[begin:end] if event[1] == "natural"] == [*ASKED, *ASKED[:2]]
    events.clear()
    process("bench.warmup_queries=0")
    at = events.index("begin warm up")
    assert events[at + 1 : at + 3] == ["peaks", "reset"]


def test_a_hundred_queries_are_timed_in_the_fixed_mode():
    assert bench_latency.FIXED == 100


def test_a_query_that_does_not_fit_says_what_to_lower(process, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(single, "engine", full)
    with pytest.raises(
        UserError, match=r"a single query does not fit beside the base: lower window.context, or base.q"
    ):
        process()


def test_a_process_without_a_gpu_has_no_gauges_of_one(process, monkeypatch):
    sampler = contextmanager(lambda device, file: iter([lambda phase: None]))
    monkeypatch.setattr(gauges, "nvml_sampler", sampler)
    assert process()[0]["nvml"] == {}


# ---- a hosted model ------------------------------------------------------------------------------------------------


class Client:
    """Answers after a second more each time; 12.5 s of waiting, as a host's rate limit makes it, are apart."""

    def __init__(self, clock: dict, log: list, *args, **how):
        self.clock, self.log, self.asked = clock, log, 0
        log.append((*args, how))

    def ask(self, text: str, id_: str) -> hosted.Reply:
        assert text in (f"asks {id_}", self.log[0][0].system)
        if text == self.log[0][0].system:
            raise UserError("no")
        self.asked += 1
        self.clock["now"] += 12.5 + self.asked
        self.log.append(text)
        connect = 0.5 if self.asked == 1 else None
        written = None if self.asked == 4 else 6
        return hosted.Reply("amber", False, 100, written, connect, self.asked - 0.75, self.asked, 0.125, 12.5)

    def close(self) -> None:
        self.log.append("closed")


@pytest.fixture
def at_host(config_file, monkeypatch, tmp_path):
    """Runs `measure_api` on such a client; cutting a text takes a quarter of a second."""
    clock, log = {"now": 100.0}, []

    def texts(examples, cutter, window, options):
        clock["now"] += 0.25
        assert (cutter, window, options) == ("cutter", config.window, config.prompt)
        return [(e.id, f"asks {e.id}") for e in examples], {}

    config = load(
        str(config_file),
        [
            "api.url=http://h/v1",
            f"window.tokenizer={tmp_path / 'base'}",
            "prompt.chat=true",
            "bench.queries=4",
            "window.answer=20",
        ],
    )
    monkeypatch.setattr(bench_latency.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(bench_latency, "prompt_texts", texts)
    monkeypatch.setattr(hosted, "Client", lambda *args, **how: Client(clock, log, *args, **how))
    monkeypatch.setattr(hosted, "counter", lambda tokenizer: f"by {tokenizer}")
    monkeypatch.setattr(hosted, "notes", lambda client, *of: ["{} were asked, {} answered".format(*map(len, of))])
    monkeypatch.setattr(bench_latency, "load_tokenizers", lambda config: Tokenizers("cutter", "cutter"))
    monkeypatch.setattr(bench_latency, "sources", lambda model, both: {"of": [model, both.own, both.window]})
    return config, squad.load(config.data, "dev"), log, tmp_path / "process-0.json"


def test_a_hosted_models_queries_are_asked_anew_after_a_warm_up_and_their_times_are_cut_and_reply(at_host, capsys):
    config, dev, log, file = at_host
    bench_latency.measure_api(config, dev, file)
    bars = capsys.readouterr().err
    assert "warm up: 100%" in bars
    assert "natural: 100%" in bars
    assert bars.count("query/s") == 4
    found = json.loads(file.read_text())
    ids = [e.id for e in bench_latency.drawn(config, dev)]
    assert log == [
        (config, file.parent / "transcript.jsonl", {"fresh": True, "count": "by cutter"}),
        *(f"asks {id_}" for id_ in [*ids[:2], *ids]),
        "closed",
    ]
    assert found == {
        "ids": ids,
        "modes": {
            "natural": [
                {
                    "first": n - 0.5,
                    "last": n + 0.25,
                    "total": n + 0.25,
                    "connect": None,
                    "server": 0.125,
                    "waited": 12.5,
                    "tokens": None if n == 4 else 6,  # not 1
                    "passes": 0,
                    "drafted": 0,
                    "accepted": 0,
                }
                for n in (3, 4, 5, 6)
            ]
        },
        "gauges": {"natural": gauge(None, None, None)},
        "made_by": {"engine": "api", "of": [None, "cutter", "cutter"]},
        "nvml": {},
        "notes": ["4 were asked, 4 answered"],
    }


def test_a_host_that_does_not_stream_has_no_first_token(at_host, monkeypatch):
    config, dev, _, file = at_host
    whole = hosted.Reply("amber", False, 100, 6, None, None, 2.0, None, 0.0, streamed=False)
    monkeypatch.setattr(Client, "ask", lambda self, text, id_: whole)
    bench_latency.measure_api(config, dev, file)
    samples = json.loads(file.read_text())["modes"]["natural"]
    assert [(q["first"], q["last"], q["total"]) for q in samples] == [(None, 2.25, 2.25)] * 4


def test_a_hosted_models_transcript_is_closed_where_asking_fails(at_host, monkeypatch):
    config, dev, log, file = at_host
    monkeypatch.setattr(bench_latency, "prompt_texts", lambda examples, *args: ([("", "one")], {}))
    with pytest.raises(UserError, match="no"):
        bench_latency.measure_api(config, dev, file)
    assert log[-1] == "closed"
    assert not file.exists()


def test_a_long_warm_up_of_a_hosted_model_begins_again(at_host):
    config, dev, log, file = at_host
    bench_latency.measure_api(replace(config, bench=replace(config.bench, warmup_queries=6)), dev, file)
    ids = [e.id for e in bench_latency.drawn(config, dev)]
    assert log[1:-1] == [f"asks {id_}" for id_ in [*ids, *ids[:2], *ids]]


# ---- the real thing ------------------------------------------------------------------------------------------------


def test_a_model_that_answers_is_timed_from_text_to_text(answering_config, monkeypatch, capsys):
    monkeypatch.setattr(bench_latency, "FIXED", 2)
    bench_latency.main([str(answering_config), "lora=null", "window.answer=16", "bench.queries=3"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    natural, fixed = result["natural"], result["fixed"]
    assert (natural["n"], fixed["n"], fixed["mean_tokens"]) == (3, 2, 16)
    assert 1 < natural["mean_tokens"] < 16, "answers end by themselves"
    assert 1 <= natural["mean_passes"] <= natural["mean_tokens"]
    assert natural["latency"]["p95_ms"] >= natural["latency"]["p50_ms"] > natural["ttft"]["p50_ms"] > 0
    assert natural["latency"]["p95_ms"] < fixed["latency"]["p50_ms"]
    assert list(result["phases"]) == ["load", "warm up", "natural", "fixed"]
    assert result["peak"]["rss_bytes"] > 2**20
    assert result["nvml_peak"] is None


def test_a_host_that_reports_no_tokens_has_no_mean(tmp_path, tiny_base, dev_file, monkeypatch, capsys):
    monkeypatch.setattr(hosted, "count_of", lambda value: None)
    host = Host()
    words = [f"api.url={host.url}", f"data.dev={dev_file}", f"window.tokenizer={tiny_base}", f"runs={tmp_path / 'r'}"]
    bench_latency.main(["api8b", *words, "bench.queries=2", "bench.warmup_queries=1", "bench.processes=1"])
    host.shutdown()
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["mean_tokens"] is None
    assert "natural, n = 2: the answer ends by itself; an unknown number of tokens" in lines


def test_a_hosted_models_single_queries_are_timed_over_the_network(tmp_path, tiny_base, dev_file, monkeypatch, capsys):
    monkeypatch.setenv("API_KEY", KEY)
    faults = ["429/0.2", None, None]
    host = Host(lambda: faults.pop() if faults else None)
    words = [f"api.url={host.url}", f"data.dev={dev_file}", f"window.tokenizer={tiny_base}", f"runs={tmp_path / 'r'}"]
    bench_latency.main(["api8b", *words, "bench.queries=4", "bench.warmup_queries=1", "bench.processes=1"])
    host.shutdown()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    natural = result["natural"]
    assert (result["n"], natural["n"], result["engine"]) == (4, 4, "api")
    assert natural["latency"]["p95_ms"] >= natural["ttft"]["p50_ms"] > 0
    assert natural["server"]["p50_ms"] == 250
    assert natural["waited"]["p99_ms"] > 190, "0.2 s of one, 3 % of the way from it to the next"
    assert "fixed" not in result
    assert host.most_at_once == 1
    assert len(list(hosted.read_transcript(Path(result["run"]) / "transcript.jsonl"))) == 6
