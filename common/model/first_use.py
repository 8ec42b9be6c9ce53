"""A check before a card is used for the first time: fast layers against transformers' and PEFT's modules.

The kernels that compute there are chosen by torch, Triton and bitsandbytes, for cards that nobody here could try. An
agreement or a difference is kept for this card, versions and code; what fails is tried again at the next start.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from common.device import describe_device, has_nf4_kernels
from common.errors import first_line
from common.files import ROOT, atomic
from common.model import llama, varlen
from common.model.llama import Model

import torch

FOLDER = ROOT / ".cache" / "checked"
CODE = ("common/model/*.py", "common/train/*.py", "common/decode/*.py", "common/torch_private.py", "common/device.py")
VERSIONS = ("torch", "triton", "bitsandbytes", "transformers", "peft")
_known: dict[str, str | None] = {}  # of this process, by file name


class Found(NamedTuple):
    what: str  # is compared, for people
    ours: float
    expected: float  # by the modules; NaN where they overflow
    distance: float  # between both
    most: float  # the distance up to which both compute the same


def mismatch(model: Model, way: str, compare: Callable[[], Found]) -> str | None:
    """Why this device must do without the fast layers of `way`; None if they agree, as far as can be told.

    `compare` computes both ways. A CPU is not checked: the tests are.
    """
    if model.device.type == "cpu":
        return None
    decides = _decides(model, way)
    name = f"{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]}.json"
    if name not in _known:
        _known[name] = _kept_or_compared(name, decides, compare)
    return _known[name]


def _kept_or_compared(name: str, decides: dict[str, object], compare: Callable[[], Found]) -> str | None:
    path, wrong = FOLDER / name, None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # absent, or damaged
        return json.loads(path.read_text())["mismatch"]
    where = f"{decides['way']} by fast layers on {decides['device']}"
    try:
        found = compare()
    except torch.OutOfMemoryError:
        _say(f"{where} could not be checked: out of memory")
        return None
    except Exception as error:  # compilers and kernels have many kinds; a compiler may be installed tomorrow
        wrong = f"{where} fails: {first_line(error, 160)}"
        _say(f"{wrong}; transformers' and PEFT's modules compute instead")
        return wrong
    said = f"{found.what} {found.ours:.4g} for {found.expected:.4g} of PEFT's modules, {found.distance:.3g} apart"
    if not math.isfinite(found.expected):
        said = "the modules overflow, so nothing was compared"
    elif not found.distance <= found.most:  # NaN is far
        wrong = f"{where} is wrong ({said}; {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path})"
    _say(f"{where}, checked at first use: {said}")
    with contextlib.suppress(OSError):  # a full disk, or a folder that is not ours: checked again next time
        FOLDER.mkdir(parents=True, exist_ok=True)
        with atomic(path, f".{os.getpid()}") as partial:
            partial.write_text(json.dumps({"mismatch": wrong, "said": said, **decides}, indent=1) + "\n")
    return wrong


def _say(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr)


def _decides(model: Model, way: str) -> dict[str, object]:
    """All that decides how the layers compute: device, versions, the model's kind, the kernels chosen, this code."""
    files = sorted(path for pattern in CODE for path in ROOT.glob(pattern))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    states = [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None)]
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    adapters = [llama.adapter_of(layer)[0] for layer in llama.layers_of(model)[:1]]
    kernels = varlen.kernels(model.device, model.dtype)
    return {
        "way": way,
        "device": describe_device(model.device)["name"],
        "versions": {name: _version(name) for name in VERSIONS},
        "code": code,
        "dtype": str(model.dtype),
        "quantised": sorted({(state.quant_type, state.nested) for state in states}),
        "model": json.loads(json.dumps(config, default=str)),
        "adapter": [[adapter.shapes, adapter.scale] for adapter in adapters],
        "kernels": [kernels and kernels.forward.__name__, has_nf4_kernels(model.device, model.dtype)],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
