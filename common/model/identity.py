"""What a base is, told by its shapes and sampled numbers instead of its name.

A sample is a hash of a few numbers of a tensor, rounded to bf16, so a copy in fp32 of weights in 16 bits agrees. Eight
tensors are sampled: the embeddings, the last norm, and of the first, middle and last layer q and down. They are read
from the files, not from the loaded model, whose linears may be quantised.
"""

import hashlib
import json
from pathlib import Path
from typing import TypedDict

from common.config import Base
from common.errors import UserError

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

SHAPES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size",
)  # fmt: skip
ROWS, COLUMNS = 4, 64  # sampled of a matrix, spread over its height; of a vector COLUMNS


class Identity(TypedDict):
    name: str  # base.path, for people
    shapes: dict[str, object]
    samples: dict[str, str]  # by tensor; empty if there are no safetensors to read, or random weights


def identify(base: Base) -> Identity:
    """The identity of a base that is on this disk."""
    config = AutoConfig.from_pretrained(base.path, revision=base.revision)
    config = config.get_text_config()  # of a model that reads pictures too
    shapes = {key: getattr(config, key, None) for key in SHAPES}
    return {"name": base.path, "shapes": shapes, "samples": {} if base.random_weights else _samples(base, config)}


def differs(trained: Identity, here: Identity) -> str | None:
    """How two bases differ; None if they are the same as far as both say. Tensors that one lacks are not compared."""
    kinds = {"name": str, "shapes": dict, "samples": dict}
    if not (isinstance(trained, dict) and all(isinstance(trained.get(key), kind) for key, kind in kinds.items())):
        return "what it says of its base is damaged"
    for key, value in trained["shapes"].items():
        if here["shapes"].get(key) != value:
            return f"{key} is {here['shapes'].get(key)}, was {value}"
    both = trained["samples"].keys() & here["samples"].keys()
    other = sorted(name for name in both if trained["samples"][name] != here["samples"][name])
    return f"{len(other)} of {len(both)} sampled tensors have other numbers, such as {other[0]}" if other else None


def model_name(path: str) -> str:
    """The last part of a base's name: of a snapshot in the hub's cache its repository's, of a 4-bit copy the base's."""
    parts = Path(path).parts
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    name = cached[-1] if cached else parts[-1] if parts else ""
    return name.removesuffix("-bnb-4bit").removesuffix("-unsloth")  # as Unsloth names its copies


def _samples(base: Base, config: PreTrainedConfig) -> dict[str, str]:
    last = config.num_hidden_layers - 1
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    for layer in dict.fromkeys((0, last // 2, last)):
        names += [f"model.layers.{layer}.{part}.weight" for part in ("self_attn.q_proj", "mlp.down_proj")]
    found = {}
    for name, file in _files(base, names).items():
        try:
            with safe_open(file, framework="pt") as tensors:
                part = tensors.get_slice(name)
                height, *width = part.get_shape()
                at = range(0, height, max(1, height // ROWS))
                rows = [part[i : i + 1, :COLUMNS] for i in at] if width else [part[:COLUMNS]]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: {name} cannot be read ({error})") from error
        if all(row.is_floating_point() for row in rows):  # quantised ones are bytes, by another rule each
            numbers = torch.cat([row.flatten() for row in rows]).bfloat16().view(torch.int16).tolist()
            found[name] = hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:12]
    return found


def _files(base: Base, names: list[str]) -> dict[str, Path]:
    """The safetensors files on this disk, by tensor; of what is not there, none."""
    single, index = (stored_file(base, f"model.safetensors{end}") for end in ("", ".index.json"))
    if single:
        with safe_open(single, framework="pt") as tensors:
            return {name: single for name in names if name in set(tensors.keys())}
    files = {name: stored_file(base, shard) for name, shard in _shards(index).items() if name in names}
    return {name: file for name, file in files.items() if file}


def stored_files(base: Base) -> list[Path]:
    """The files on this disk that hold a base's weights; transformers reads the first of both kinds that is there."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        single, index = stored_file(base, name), stored_file(base, f"{name}.index.json")
        found = [single] if single else [stored_file(base, shard) for shard in sorted(set(_shards(index).values()))]
        if files := [file for file in found if file]:
            return files
    return []


def _shards(index: Path | None) -> dict[str, str]:
    return json.loads(index.read_text())["weight_map"] if index else {}


def stored_file(base: Base, name: str) -> Path | None:
    """A base's file on this disk, in its folder or the hub's cache; None if it is not there."""
    if (Path(base.path) / name).is_file():
        return Path(base.path) / name
    if Path(base.path).is_dir():
        return None
    cached = huggingface_hub.try_to_load_from_cache(base.path, name, revision=base.revision)
    return Path(cached) if isinstance(cached, str) else None
