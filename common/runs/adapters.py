"""Which adapter a system answers with, and what its training says of how to ask it. Imports no torch.

Beside an adapter's weights lies `trained_with.json`: prompt, window, base, LoRA and training settings. What reads the
adapter takes prompt, window, LoRA and quantisation from there, so overrides need not be repeated.
"""

import json
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.config import Config, Lora, apart_from_memory, flat, load
from common.config_file import of_dict
from common.errors import UserError, first_line
from common.files import read_json
from common.runs.record import read_all, read_one, weights_of
from common.runs.results import Section

import huggingface_hub
import yaml

SETTINGS = "trained_with.json"
DEFAULT = "qlora7b"  # the Makefile's MODEL
KEPT = ("system", "seed", "base", "lora", "prompt", "window", "train", "early_stop", "data")
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # as PEFT writes them, now and before 2023
# keys that an adapter's training decides; of the window those alone that say how text is read, which may be chosen anew
BOUND = {"prompt": None, "lora": None, "base": ("quant", "double_quant")}
FREE = {"window": ("context", "question", "answer", "overflow", "stride")}


@dataclass(frozen=True)
class Chosen:
    """A system's adapter, and the configuration to ask it with."""

    config: Config
    adapter: Path | None  # None: the base as it is, or random weights without a training
    trained_with: Section | None = None  # settings of its training; None: not known
    taken: str = ""  # of those, as overrides, what the configuration would have had otherwise
    forced: str = ""  # FORCE=1, and of those, as overrides, what it went against

    def note(self) -> None:
        """Print what was taken from the training, if anything."""
        if self.taken:
            print(f"note: {self.taken}, as {self.adapter} was trained", file=sys.stderr)


def choose(config: Config, given: Collection[str] = (), force: bool = False) -> Chosen:
    """The adapter of a system, and its configuration completed by what the adapter was trained with.

    `given`: dotted keys that were typed; the others are taken from the training. Raises `UserError` if a typed prompt,
    base or LoRA setting differs from the training's, unless `force`.
    """
    adapter = folder_of(config.adapter) if config.adapter else _newest(config, given)
    if adapter is None:
        return Chosen(config, None)
    trained = trained_with(adapter)
    if trained is None and config.data.split == "heldout":
        raise UserError(f"data.split=heldout: what {adapter} was trained on is not known")
    if trained is None:
        complete = replace(config, lora=_lora_of(adapter) or config.lora or Lora())
        return Chosen(complete, adapter, forced="FORCE=1" * force)
    mine = config.to_dict()
    taken: list[tuple[str, str, object]] = []
    against: list[tuple[str, str, object]] = []
    for section, keys in {**BOUND, **FREE}.items():
        asked, was = mine[section] or {}, trained[section]
        for key in keys or was:
            typed = f"{section}.{key}" in given
            if asked.get(key) == was[key] or (typed and section in FREE):
                continue
            (against if typed else taken).append((section, key, was[key]))
    if against and not force:
        raise UserError(
            f"{adapter} was trained with {_words(against)}: leave that out of ARGS, or ask otherwise by FORCE=1"
        )
    for section, key, value in taken:
        mine[section] = {**(mine[section] or {}), key: value}
    if config.data.split == "heldout":
        mine |= _held_out(adapter, mine, trained)
    complete = of_dict(Config, mine, f"{adapter} was trained otherwise than it is asked")
    return Chosen(complete, adapter, trained, _words(taken), f"FORCE=1 {_words(against)}".strip() * force)


def _held_out(adapter: Path, mine: Section, trained: Section) -> Section:
    """The sections data and early_stop by which an adapter's training held articles out, for data.split=heldout."""
    stop, data = trained["early_stop"], trained["data"]
    if stop["split"] != "heldout":
        raise UserError(f"data.split=heldout: {adapter} was trained on all articles, without early_stop.split=heldout")
    same = {key: data[key] for key in ("train", "train_paragraphs", "fix_offsets")}
    return {"data": {**mine["data"], **same}, "early_stop": stop}


def newest_system(argv: list[str]) -> list[str]:
    """A command line whose MODEL is "newest", with the system and adapter of the newest finished training in `runs`."""
    if argv[:1] != ["newest"]:
        return argv
    runs = load(DEFAULT, [word for word in argv if word.startswith("runs=")]).runs
    trained = [r for r in read_all(Path(runs)) if r["kind"] == "train"]
    if not trained:
        return [DEFAULT, *argv[1:]]
    folder = trained[-1]["folder"]
    return [f"{folder}/config.yaml", f"adapter={json.dumps(f'{folder}/best')}", *argv[1:]]


def folder_of(name: str) -> Path:
    """The folder of an adapter that is named by a path or a hub id. Raises `UserError` if it holds none."""
    path = Path(name)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        try:
            patterns = ["adapter_config.json", *WEIGHTS, SETTINGS]
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
        except Exception as error:  # the hub's client raises many kinds; each means: not to be had from there
            why = first_line(error, 100)
            raise UserError(f"adapter={name}: no such folder here, and the hub gave none ({why})") from error
    if not path.is_dir():
        raise UserError(f"adapter={name}: {'a file; name its folder' if path.is_file() else 'no such folder'}")
    if not (path / "adapter_config.json").is_file():
        below = sorted(str(p.parent) for p in path.glob("*/adapter_config.json"))
        where = f"; adapters are in {', '.join(below)}: name one, such as ADAPTER={below[0]}" if below else ""
        raise UserError(f"adapter={name}: it holds no adapter_config.json, so no adapter{where}")
    return path


def trained_with(adapter: Path) -> Section | None:
    """The settings an adapter was trained with; None for one of another tool."""
    file = adapter / SETTINGS
    if file.is_file():
        found = read_json(file)
    else:  # a run from before there was such a file
        file = adapter.parent / "record.json"
        if not file.is_file():
            return None
        found = read_one(file)["config"]
    if not isinstance(found, dict) or not isinstance(found.get("lora"), dict):
        raise UserError(f"{file}: not the settings of an adapter's training; what was changed here?")
    settings = of_dict(Config, {key: value for key, value in found.items() if key in KEPT}, str(file)).to_dict()
    return found | {key: settings[key] for key in KEPT}


def settings_of(config: Config, data_sha256: str, identity: object, tokenizer_sha256: str) -> Section:
    """What `trained_with.json` holds."""
    mine = config.to_dict()
    facts = {"data_sha256": data_sha256, "tokenizer_sha256": tokenizer_sha256, "identity": identity}
    return {key: mine[key] for key in KEPT} | facts


def newest(config: Config) -> Path | None:
    """`best/` of the newest finished training of exactly this system, seed, base, LoRA and prompt order.

    One that was trained as `config` says comes before those that were trained otherwise. None for a system without
    LoRA, and for random weights that were not trained.
    """
    return _newest(config, None)


def _newest(config: Config, given: Collection[str] | None) -> Path | None:
    """`given`: the keys that were typed, which alone have to match where no training matches all; None: all have to."""
    if config.lora is None:
        return None
    mine = config.to_dict()
    trained = [r for r in read_all(Path(config.runs)) if r["kind"] == "train"]
    own = [r for r in trained if r["system"] == config.system]
    runs = [r for r in own if _decides(r["config"]) == _decides(mine)]
    if not runs and config.base.random_weights:
        return None
    if not runs and given is not None:
        typed = [key for key in flat(mine) if key in given and key.partition(".")[0] in BOUND]
        runs = [
            r
            for r in own
            if r["seed"] == config.seed
            and r["config"]["base"]["path"] == config.base.path
            and all(flat(r["config"]).get(key) == flat(mine)[key] for key in typed)
        ]
    if not runs or len({json.dumps(_decides(r["config"])) for r in runs}) > 1:
        parts = ("seed", "base", "lora", "prompt")
        others = [f"{r['folder']} has {_differ(r['config'], mine, parts)}" for r in own]
        nearest = f" ({min(others, key=len)})" if others else ""
        raise UserError(
            f"{config.system} (seed {config.seed}) has no finished training under {config.runs}/ with this base, lora "
            f"and prompt.order{nearest}: make train MODEL={config.system}, or name an adapter with ADAPTER=folder"
        )
    alike = [r for r in runs if _trains_as(r["config"], mine)]
    return Path(max(alike or runs, key=lambda r: r["created"])["folder"]) / "best"


def _lora_of(adapter: Path) -> Lora | None:
    """The LoRA settings of another tool's adapter, for records; None of what is no LoRA."""
    found = read_json(adapter / "adapter_config.json")
    settings = found if isinstance(found, dict) else {}
    if settings.get("peft_type", "LORA") != "LORA":
        return None
    targets = settings.get("target_modules")
    try:
        return Lora(
            rank=settings.get("r", Lora.rank),
            alpha=settings.get("lora_alpha", Lora.alpha),
            targets=tuple(sorted(set(targets))) if isinstance(targets, list) and targets else Lora.targets,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{adapter}/adapter_config.json: {error}") from error


def _words(settings: Sequence[tuple[str, str, object]]) -> str:
    return " ".join(f"{section}.{key}={_as_yaml(value)}" for section, key, value in settings)


def _as_yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).partition("\n")[0]


def _differ(a: Section, b: Section, parts: Sequence[str]) -> str:
    """The overrides by which `a` differs from `b`."""
    mine, other = (flat({part: config[part] for part in parts}) for config in (a, b))
    differ = (key for key in {**mine, **other} if mine.get(key) != other.get(key))
    return " ".join(f"{key}={_as_yaml(mine.get(key))}" for key in differ)


def _decides(config: Section) -> list[object]:
    prompt = [config["prompt"][key] for key in ("order", "template")]
    return [config["system"], config["seed"], weights_of(config["base"]), config["lora"], prompt]


def _trains_as(a: Section, b: Section) -> bool:
    def decides(config: Section) -> list[object]:
        data = [
            config["data"][key] for key in ("train", "train_paragraphs", "train_share", "train_unit", "fix_offsets")
        ]
        return [apart_from_memory(config["train"]), config["early_stop"], config["window"], data]

    return decides(a) == decides(b)
