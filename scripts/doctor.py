"""`python -m scripts.doctor`: what this machine can run, what stands in the way, and the next command to type.

It must work where nothing else does, so only the standard library is imported before it is known what is there.
"""

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from common.files import ROOT

BUNDLE = ROOT / "bundle.tar"


class Finding(NamedTuple):
    about: str
    state: str  # ok; note: worth knowing; no: something cannot run here; wrong: to be mended first
    text: str
    fix: str = ""  # the next command to type


def machine() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036 - whoever has an older one is to read this line
        yield Finding("python", "wrong", f"{version}, and 3.11 is the least", "make setup PYTHON=python3.12")
    yield Finding("machine", "ok", f"Python {version}, {os.cpu_count()} CPU threads, {_memory_gib():.0f} GiB of memory")
    free = shutil.disk_usage(ROOT).free / 2**30
    what = f"{free:.0f} GiB free here"
    if free < 3:
        yield Finding("disk", "no", f"{what}: the environment and a small model take 3 GiB")
    else:
        yield Finding("disk", "ok", f"{what}; Llama-2-7B takes 13 GiB where its weights are kept ({_hub_cache()})")


def gpus() -> Iterator[Finding]:
    """By the driver's own tool, before torch is asked."""
    found = _nvidia_smi()
    for name, total, free, driver in found:
        yield Finding("GPU", "ok", f"{name}, {total / 1024:.0f} GiB, {free / 1024:.0f} GiB of it free, driver {driver}")
    if not found:
        yield Finding("GPU", "note", "none that nvidia-smi knows; the demo and the tests run on a CPU")


def packages() -> Iterator[Finding]:
    """Installed versions against pyproject.toml's ranges."""
    if not (ROOT / ".venv" / ".ready").exists():
        setup = f"make {'unbundle' if BUNDLE.exists() else 'setup'}"
        yield Finding("packages", "note", "not set up yet; once they are, this says what can run here", setup)
        return
    import tomllib  # not in an older Python, which has been named by now

    from packaging.requirements import Requirement

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    odd = []
    for requirement in map(Requirement, wanted):
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            odd.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            odd.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if odd:
        yield Finding("packages", "wrong", "; ".join(odd), "rm -rf .venv && make setup")
    else:
        yield Finding("packages", "ok", f"all {len(wanted)} within their ranges")


def torch_and_cuda() -> Iterator[Finding]:
    """Do torch, bitsandbytes, the driver and the GPU fit together? Each is tried, not looked up."""
    import torch

    gpu, built, supports = _nvidia_smi(), torch.version.cuda, _driver_cuda()
    if gpu and not built:
        cuda = "cu130" if int((supports or "12").partition(".")[0]) >= 13 else "cu126"
        yield Finding(
            "torch", "wrong", f"{torch.__version__} is a CPU build, and there is a GPU",
            f".venv/bin/pip install --force-reinstall torch=={torch.__version__.partition('+')[0]} "
            f"--index-url https://download.pytorch.org/whl/{cuda}",
        )  # fmt: skip
        return
    if gpu and not torch.cuda.is_available():
        old = supports and built and int(built.partition(".")[0]) > int(supports.partition(".")[0])
        why = f"the driver supports CUDA {supports} and torch was built for {built}" if old else "torch finds no GPU"
        yield Finding(
            "torch", "wrong", f"{torch.__version__}: {why}; update the driver, or take a torch built for its CUDA",
            "nvidia-smi",
        )  # fmt: skip
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    try:
        a = torch.randn(64, 64, device=device)
        (a @ a).sum().item()
    except RuntimeError as error:
        yield Finding("torch", "wrong", f"{torch.__version__} cannot multiply on {where}: {_line(error)}", "nvidia-smi")
        return
    yield Finding("torch", "ok", f"{torch.__version__} computes on {where}")
    import bitsandbytes as bnb

    try:
        packed, state = bnb.functional.quantize_4bit(a, quant_type="nf4", compress_statistics=True)
        error_4bit = (bnb.functional.dequantize_4bit(packed, state) - a).abs().mean().item()
        assert 0 < error_4bit < 0.2, f"NF4 is off by {error_4bit}"
        weight = torch.nn.Parameter(torch.ones(8192, device=device))
        optimizer = bnb.optim.PagedAdamW8bit([weight], lr=1e-3)
        weight.sum().backward()
        optimizer.step()
    except Exception as error:  # a missing library, a missing kernel, a wrong result: each its own kind
        yield Finding(
            "bitsandbytes", "wrong", f"{bnb.__version__} does not work with CUDA {built}: {_line(error)}",
            ".venv/bin/python -m bitsandbytes",
        )  # fmt: skip
        return
    yield Finding("bitsandbytes", "ok", f"{bnb.__version__}: NF4 and the 8-bit optimizer work there")
    if device.type == "cuda":
        half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16 with loss scaling"
        yield Finding("precision", "ok", f"base.dtype=auto computes in {half}")


def data() -> Iterator[Finding]:
    from common.config import Data
    from common.data import squad
    from common.errors import UserError

    folder = os.environ.get("SQUAD_DIR")
    if folder:
        try:
            files = [str(squad.locate(getattr(Data(), split), split)) for split in squad.SPLITS]
            yield Finding("SQuAD", "ok", ", ".join(files))
        except UserError as error:
            yield Finding("SQuAD", "no", str(error))
        return
    import huggingface_hub

    try:
        huggingface_hub.auth_check(Data().train, repo_type="dataset")
        yield Finding("SQuAD", "ok", f"the hub has it: {Data().train}")
    except Exception as error:  # its HTTP client has many kinds for a hub that is not there
        yield Finding("SQuAD", "no", f"the hub cannot be reached ({type(error).__name__}); set SQUAD_DIR to a copy")


def systems() -> Iterator[Finding]:
    """The weights of every base, then every system of configs/."""
    from common.config import CONFIGS, load
    from common.errors import UserError
    from common.runs import preflight

    configs = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        try:
            configs[path.stem] = load(path.stem)
        except UserError as error:
            yield Finding("systems", "no", str(error))
    reachable = {}
    hosted = {name: config for name, config in configs.items() if config.api}
    configs = {name: config for name, config in configs.items() if not config.api}
    for base in {config.base.path: config.base for config in configs.values()}.values():
        try:
            yield Finding("weights", "ok", f"{base.path}: {preflight.weights(base)}")
            reachable[base.path] = True
        except UserError as error:
            yield Finding("weights", "no", str(error).removesuffix(preflight.TRY).strip())
    for name, config in configs.items():
        try:
            preflight.gpu(config.base, config.system)
        except UserError as error:
            yield Finding(name, "no", str(error).removesuffix(preflight.TRY).strip())
            continue
        if config.base.path not in reachable:
            yield Finding(name, "no", f"needs the weights of {config.base.path}")
            continue
        try:
            preflight.check(config)
            yield Finding(name, "ok", "can run")
        except UserError as error:
            yield Finding(name, "no", str(error).removesuffix(preflight.TRY).strip())
    for name, config in hosted.items():
        yield _endpoint(name, config.api)


def _endpoint(name: str, api: Any) -> Finding:
    """Whether somebody listens at an API's address."""
    import httpx2

    key = f"the key in {api.key} is {'set' if os.environ.get(api.key) else 'not set'}"
    try:
        httpx2.get(f"{api.url}/models", timeout=3)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        return Finding(name, "no", f"{api.url} cannot be reached ({error}); api.url=… names another; {key}")
    return Finding(name, "ok", f"{api.url} answers; {key}")


def next_command(findings: list[Finding]) -> str:
    to_do = next((f.fix for f in findings if f.fix), None)
    if to_do:
        return to_do
    ready = {f.about for f in findings if f.state == "ok"}
    return "make train" if {"qlora7b", "SQuAD"} <= ready else "make demo"


def main() -> int:
    findings: list[Finding] = []
    marks = {"ok": "ok", "note": "--", "no": "no", "wrong": "!!"}
    for check in (machine, gpus, packages, torch_and_cuda, data, systems):
        for finding in check():
            findings.append(finding)
            print(f"{marks[finding.state]}  {finding.about:14}  {finding.text}", flush=True)
        if any(f.fix for f in findings) and check is packages:
            break  # the rest could not be imported
    command = next_command(findings)
    print(f"\nnext: {command}")
    return 2 if any(f.state == "wrong" for f in findings) else 0


def _nvidia_smi() -> list[tuple[str, int, int, str]]:
    """(name, total MiB, free MiB, driver) of each GPU; none where there is no driver."""
    out = _run(
        "nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"
    )
    rows = [line.split(", ") for line in out.splitlines() if line.count(", ") == 3]
    return [(name, int(total), int(free), driver) for name, total, free, driver in rows if total.isdigit()]


def _driver_cuda() -> str | None:
    """The newest CUDA that the driver supports."""
    found = re.search(r"CUDA Version: ([\d.]+)", _run("nvidia-smi"))
    return found[1] if found else None


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _hub_cache() -> str:
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return os.environ.get("HF_HUB_CACHE", f"{home}/hub")


def _line(error: Any) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


if __name__ == "__main__":
    sys.exit(main())
