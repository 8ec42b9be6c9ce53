"""`python -m scripts.doctor` prints what this machine can run, what stands in the way, and the next command to type.

It must work where nothing else does, so it imports the standard library alone until it has found the packages.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from common.errors import UserError, first_line
from common.files import ROOT

BUNDLE = ROOT / "bundle.tar"
LEAST_GIB = 3  # of disk: the environment and a small model
MARKS = {"ok": "ok", "note": "--", "no": "no", "wrong": "!!"}


class Finding(NamedTuple):
    about: str
    state: str  # ok; note: worth knowing; no: something cannot run here; wrong: to be mended first
    text: str
    fix: str = ""  # the next command to type


def machine() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036 - an older one gets as far as this line
        yield Finding("python", "wrong", f"{version}, and 3.11 is the least", "make setup PYTHON=python3.12")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding("machine", "ok", f"Python {version}, {os.cpu_count()} CPU threads, {memory:.0f} GiB of memory")
    free = shutil.disk_usage(ROOT).free / 2**30
    what = f"{free:.0f} GiB free here"
    if free < LEAST_GIB:
        yield Finding("disk", "no", f"{what}: the environment and a small model take {LEAST_GIB} GiB")
    else:
        cache = os.environ.get("HF_HUB_CACHE", f"{os.environ.get('HF_HOME', '~/.cache/huggingface')}/hub")
        yield Finding("disk", "ok", f"{what}; Llama-2-7B takes 13 GiB where its weights are kept ({cache})")


def gpus() -> Iterator[Finding]:
    """The GPUs by the driver's own tool, before torch is asked."""
    found = _nvidia_smi()
    for name, total, free, driver in found:
        yield Finding("GPU", "ok", f"{name}, {total / 1024:.0f} GiB, {free / 1024:.0f} GiB of it free, driver {driver}")
    if not found:
        yield Finding("GPU", "note", "none that nvidia-smi knows; the demo and the tests run on a CPU")


def packages() -> Iterator[Finding]:
    """The installed versions against the ranges of pyproject.toml."""
    if not (ROOT / ".venv" / ".ready").exists():
        setup = f"make {'unbundle' if BUNDLE.exists() else 'setup'}"
        yield Finding("packages", "note", "not set up yet; once they are, this says what can run here", setup)
        return
    import tomllib  # absent from an older Python, which `machine` has named by now

    from packaging.requirements import Requirement

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    odd = []
    for requirement in map(Requirement, wanted):
        try:
            installed = importlib.metadata.version(requirement.name)
            if not requirement.specifier.contains(installed, prereleases=True):
                odd.append(f"{requirement.name} {installed} is not {requirement.specifier}")
        except importlib.metadata.PackageNotFoundError:
            odd.append(f"{requirement.name} is missing")
    if odd:
        yield Finding("packages", "wrong", "; ".join(odd), "rm -rf .venv && make setup")
    else:
        yield Finding("packages", "ok", f"all {len(wanted)} within their ranges")


def torch_and_cuda() -> Iterator[Finding]:
    """Whether torch, bitsandbytes, the driver and the GPU fit together: each computes something."""
    import torch

    version, built, gpu = torch.__version__, torch.version.cuda, _nvidia_smi()
    # the newest CUDA that the driver runs
    supports = next(iter(re.findall(r"CUDA Version: ([\d.]+)", _driver())), None)
    if gpu and not built:
        yield Finding("torch", "wrong", f"{version} is a CPU build, and there is a GPU", _setup_for(supports))
        return
    if gpu and not torch.cuda.is_available():
        old = supports and built and int(built.partition(".")[0]) > int(supports.partition(".")[0])
        why = f"the driver supports CUDA {supports} and torch was built for {built}" if old else "torch finds no GPU"
        advice = "update the driver, or take a torch built for its CUDA" if old else "does another program hold it?"
        yield Finding("torch", "wrong", f"{version}: {why}; {advice}", _setup_for(supports) if old else "nvidia-smi")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    try:
        a = torch.randn(64, 64, device=device)
        (a @ a).sum().item()
    except RuntimeError as error:
        yield Finding("torch", "wrong", f"{version} cannot multiply on {where}: {first_line(error, 160)}", "nvidia-smi")
        return
    yield Finding("torch", "ok", f"{version} computes on {where}")
    import bitsandbytes as bnb

    try:
        packed, state = bnb.functional.quantize_4bit(a, quant_type="nf4", compress_statistics=True)
        error_4bit = (bnb.functional.dequantize_4bit(packed, state) - a).abs().mean().item()
        assert 0 < error_4bit < 0.2, f"NF4 is off by {error_4bit}"  # about 0.07 for normal weights
        weight = torch.nn.Parameter(torch.ones(8192, device=device))
        optimizer = bnb.optim.PagedAdamW8bit([weight], lr=1e-3)
        weight.sum().backward()
        optimizer.step()
    except Exception as error:  # a missing library, a missing kernel, a wrong result: each its own kind
        text = f"{bnb.__version__} does not work with CUDA {built}: {first_line(error, 160)}"
        yield Finding("bitsandbytes", "wrong", text, ".venv/bin/python -m bitsandbytes")
        return
    yield Finding("bitsandbytes", "ok", f"{bnb.__version__}: NF4 and the 8-bit optimizer work there")
    if device.type == "cuda":
        half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16 with loss scaling"
        yield Finding("precision", "ok", f"base.dtype=auto computes in {half}")


def data() -> Iterator[Finding]:
    from common.config import Data
    from common.data import squad

    if os.environ.get("SQUAD_DIR"):
        yield Finding("SQuAD", *_tried(lambda: ", ".join(str(squad.locate(Data().dev, s)) for s in squad.SPLITS)))
        return
    import huggingface_hub

    try:
        huggingface_hub.auth_check(Data().train, repo_type="dataset")
        yield Finding("SQuAD", "ok", f"the hub has it: {Data().train}")
    except Exception as error:  # its HTTP client has many kinds for a hub that is not there
        yield Finding("SQuAD", "no", f"the hub cannot be reached ({type(error).__name__}); set SQUAD_DIR to a copy")


def systems() -> Iterator[Finding]:
    """The weights of every base, then every system of configs/; of one that is hosted, its server."""
    from common.config import CONFIGS, load
    from common.runs import preflight

    import httpx2

    configs = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        try:
            configs[path.stem] = load(path.stem)
        except UserError as error:
            yield Finding("systems", "no", str(error))
    here = {name: config for name, config in configs.items() if not config.api}
    weights = {}
    for base in {config.base.path: config.base for config in here.values()}.values():
        state, text = weights[base.path] = _tried(preflight.weights, base)
        yield Finding("weights", state, f"{base.path}: {text}" if state == "ok" else text)
    for name, config in here.items():
        state, text = _tried(preflight.gpu, config.base, config.system)
        fix = ""
        if state == "ok" and weights[config.base.path][0] == "no":
            state, text = "no", f"needs the weights of {config.base.path}"
            gated = "is gated" in weights[config.base.path][1]  # all that is missing is an account that has the licence
            fix = "export HF_TOKEN=…" if gated and config.base.min_gpu_gib else ""
        elif state == "ok":
            state, text = _tried(preflight.check, config)
        yield Finding(name, state, "can run" if state == "ok" else text, fix)
    for name, api in ((name, config.api) for name, config in configs.items() if config.api):
        key = f"the key in {api.key} is {'set' if os.environ.get(api.key) else 'not set'}"
        try:
            httpx2.get(f"{api.url}/models", timeout=3)
            yield Finding(name, "ok", f"{api.url} answers; {key}")
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            yield Finding(name, "no", f"{api.url} cannot be reached ({error}); api.url=… names another; {key}")


def card() -> Iterator[Finding]:
    """What `make train` will do on this GPU, and about how long it will take."""
    import torch

    if not torch.cuda.is_available():
        return
    from common.config import load
    from common.model import estimate

    device = torch.device("cuda", torch.cuda.current_device())
    try:
        choice, minutes = estimate.training(load("qlora7b"), device)
    except (UserError, OSError, RuntimeError) as error:  # memory, unknown shapes, a GPU that fails
        yield Finding("make train", "no", f"qlora7b on this GPU: {first_line(error)}")
        return
    then = "make train tells more after ten steps"
    yield Finding("make train", "ok", f"qlora7b, {choice.description}; an epoch in about {minutes:.0f} min; {then}")


def _tried(check: Callable[..., object], *arguments: object) -> tuple[str, str]:
    """("ok", what `check` returns), or ("no", what it refuses)."""
    from common.runs import preflight

    try:
        return "ok", str(check(*arguments))
    except UserError as error:
        return "no", str(error).removesuffix(preflight.TRY).strip()


def next_command(findings: list[Finding]) -> str:
    """The first fix, or else the most that can run here."""
    states = {f.about: f.state for f in findings}
    trains = states.get("qlora7b") == states.get("SQuAD") == "ok" and states.get("make train") != "no"
    return next((f.fix for f in findings if f.fix), "make train" if trains else "make demo")


def main() -> int:
    findings: list[Finding] = []
    for check in (machine, gpus, packages, torch_and_cuda, data, systems, card):
        for finding in check():
            findings.append(finding)
            print(f"{MARKS[finding.state]}  {finding.about:14}  {finding.text}", flush=True)
        if any(f.fix for f in findings) and check is packages:
            break  # the other checks import packages
    print(f"\nnext: {next_command(findings)}")
    return 2 if any(f.state == "wrong" for f in findings) else 0


def _setup_for(supports: str | None) -> str:
    """The command that installs a torch for a driver that runs CUDA up to `supports`, so all of its major version."""
    major = int((supports or "12").partition(".")[0])
    return "nvidia-smi" if major < 12 else f"make setup CUDA={'cu130' if major >= 13 else 'cu126'}"


def _nvidia_smi() -> list[tuple[str, int, int, str]]:
    """(name, total MiB, free MiB, driver) of each GPU; empty without a driver."""
    out = _driver("--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits")
    rows = [line.split(", ") for line in out.splitlines() if line.count(", ") == 3]
    return [(name, int(total), int(free), driver) for name, total, free, driver in rows if total.isdigit()]


def _driver(*options: str) -> str:
    try:
        return subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


if __name__ == "__main__":
    sys.exit(main())
