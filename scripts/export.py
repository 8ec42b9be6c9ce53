"""Merge an adapter into its base as a folder that any tool loads, and check that it answers as well.

    python -m scripts.export qlora7b FOLDER [key=value ...] [--dtype bf16] [--questions 500]

The adapter's product is added in fp32 to the dequantised base, on which it was trained; the sum is stored as
safetensors with the tokenizer and a model card. Then both answer a part of dev. The last line but one has the number of
equal answers and EM before and after; the exit code is 1 if EM is significantly lower.
"""

import contextlib
import hashlib
import json
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import cast

from common.arguments import parse
from common.config import Base, Config, Data
from common.data import prompt, squad
from common.data.squad import Dataset, Example
from common.data.tokens import Tokenizers
from common.decode import predict
from common.device import pick_device
from common.errors import UserError, first_line, one_line_errors, way_on
from common.files import read_json, replacing, write_text
from common.metrics import score
from common.metrics.stats import mcnemar
from common.model import memory, smollm2
from common.model.linears import dense
from common.model.llama import Model, beyond_lora
from common.model.load import DTYPES, load_base, load_system, load_tokenizers
from common.runs import adapters, checkpoint, preflight, record
from common.runs.results import Section

import torch
import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

SURE = 0.01  # p below which a difference is none of chance
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what common.model.smollm2 converts
LICENCES = {  # of the bases in configs/: the hub's tag, and its name
    SMOLLM2: ("apache-2.0", "Apache-2.0"),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": ("apache-2.0", "Apache-2.0"),
    "meta-llama/Llama-2-7b-hf": ("llama2", "Llama 2 Community License"),
    "meta-llama/Llama-3.1-8B": ("llama3.1", "Llama 3.1 Community License"),
}
HUB_DATA = Data().train
SQUAD = f"SQuAD v1.1 ({HUB_DATA})"
# `texts_sha256` of SQuAD v1.1's 87,599 and 10,570 questions (rajpurkar.github.io/SQuAD-explorer). Ids and offsets are
# left out: copies of train differ in them.
SQUAD_TEXTS = {
    "train": "10006be7a2bec5095497c274b7252d77d6da17ee635a41986b45de84be337f97",
    "dev": "52e3333b016cc4789e3d58beb06303007815540128cf7514513f3b31d29f31c3",
}


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    config, args = parse("export", argv)
    if config.lora is None and config.adapter is None:
        raise UserError(f"{config.system} has no adapter to merge; try MODEL=qlora7b")
    preflight.new_folder(args.folder)
    if args.questions < 1:
        raise UserError("--questions must be 1 or more")
    chosen = adapters.choose(config, args.given, args.force)
    config, adapter = preflight.check(chosen.config), checkpoint.verified(chosen.adapter)
    if adapter is None:
        raise UserError(f"{config.system} has random weights and no trained adapter, so there is nothing to export")
    chosen.note()
    device = pick_device()
    dev = squad.load(config.data, "dev")
    some = squad.stratified(dev.examples, min(args.questions, len(dev.examples)))

    # ---- merge -----------------------------------------------------------------------------------------------------
    tokenizers = load_tokenizers(config)
    model = load_system(config, adapter, device, args.force)
    weights = merged(model, DTYPES[args.dtype])
    before = texts(model, tokenizers, config, some)
    settings = model.get_base_model().config
    settings.__dict__.pop("quantization_config", None)
    settings.dtype = DTYPES[args.dtype]
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(settings)
    missing, odd = plain.load_state_dict(weights, strict=False, assign=True)
    plain.tie_weights()
    assert not odd, odd
    assert set(missing) <= {"lm_head.weight"}, missing  # tied to the embeddings
    needs = 1.3 * sum(w.numel() * w.element_size() for w in weights.values())
    with replacing(args.folder) as folder:
        try:
            plain.save_pretrained(folder)
            tokenizers.own.save_pretrained(folder)
        except (SafetensorError, RuntimeError) as error:
            reason = first_line(error)
            raise UserError(
                f"{args.folder}: could not be written ({reason}); {way_on(error)}, then try again"
            ) from error
        del model, plain, weights

        # ---- check -------------------------------------------------------------------------------------------------
        if device.type == "cuda" and needs > memory.limit_bytes("auto", device):
            device, why = torch.device("cpu"), "the merged model does not fit this GPU, so it is checked on the CPU"
            print(f"{why}; fewer --questions take less time")
        base = replace(config.base, path=str(folder), quant="none", tokenizer=None, random_weights=False)
        after = texts(load_base(base, device), tokenizers, config, some)
        a, b = score.score(some, before), score.score(some, after)
        write_card(folder, args, config, adapter, dev, a.em, b.em, len(some))
    lost, gained, p = mcnemar(a.correct, b.correct)
    same = sum(before[e.id] == after[e.id] for e in some)
    worse = lost > gained and p < SURE
    result = {"folder": str(args.folder), "em_before": a.em, "em_after": b.em, "n": len(some), "same_answers": same}
    result |= {"lost": lost, "gained": gained, "p": p, "worse": worse}
    ems = f"EM {a.em:.2f} by the adapter, {b.em:.2f} merged (exact McNemar p = {p:.2g}){': WORSE' if worse else ''}"
    print(f"{args.folder}: {same} of {len(some)} answers are the same; {ems}\n{json.dumps(result)}")
    sys.exit(bool(worse))


def merged(model: Model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The base's state dict on the host, dequantised, the adapter's products added."""
    out: dict[str, torch.Tensor] = {}
    if reason := beyond_lora(model):
        raise UserError(f"only LoRA's two matrices on linears are merged here, and {reason}; PEFT merges some others")
    tied = model.get_base_model().config.tie_word_embeddings
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            if tied and name.endswith(("lm_head", "embed_tokens")):
                raise UserError(
                    f"{name} is adapted, and its base ties head and embeddings: merged they would be one again"
                )
            base = module.get_base_layer()
            weight = dense(base.weight, torch.float32)
            (active,) = module.active_adapters
            out[f"{name}.weight"] = (weight + module.get_delta_weight(active).float()).to("cpu", dtype)
            if base.bias is not None:
                out[f"{name}.bias"] = base.bias.data.to("cpu", dtype)
        elif ".lora_" not in name and not name.endswith(".base_layer"):
            for key, parameter in module.named_parameters(recurse=False):
                out[f"{name}.{key}"] = dense(parameter, torch.float32).to("cpu", dtype)
    return out


def texts(model: Model, tokenizers: Tokenizers, config: Config, some: list[Example]) -> dict[str, str]:
    return {id_: answer.text for id_, answer in predict.answers(model, tokenizers, some, config).items()}


def write_card(
    folder: Path, args: Namespace, config: Config, adapter: Path, dev: Dataset, before: float, after: float, n: int
) -> None:
    """README.md, with the newest evaluation of this adapter on all of this data, where there is one.

    It names hub ids, or the last part of a name: never a path of this machine.
    """
    sha256, system = checkpoint.weights_sha256(adapter), config.system
    quant, window, trained = config.base.quant, config.window, adapters.trained_with(adapter)

    def decides(must: Section, config: Section) -> list[object]:
        return [must["data"], must["prompt"], must.get("decoding"), config["window"], record.weights_of(config["base"])]

    mine = decides({"data": dev.sha256, "prompt": prompt.fingerprint(config.prompt)}, config.to_dict())
    alike = (r for r in record.read_all(Path(config.runs)) if decides(r["must_match"], r["config"]) == mine)
    whole = [r["result"] for r in alike if (r["kind"], r["result"].get("adapter_sha256")) == ("eval", sha256)]
    what = f"the adapter on its {quant} base, all questions"
    rows = [f"| {what} | {r['em']:.2f} | {r['f1']:.2f} | {r['n']} |\n" for r in whole[-1:]]
    commit, dirty = record.code()
    code = f"{commit[:10]}{', changed since' if dirty else ''}" if commit else "of no known commit"
    cut = window.context + window.question  # tokens
    base_id, data = hub_id(config.base), "data that is not known here"
    if trained:
        asked = trained["data"]
        data, first = data_name(asked["train"], "train"), asked["train_paragraphs"]
        data = f"the first {first} paragraphs of {data}" if first else data
        if asked["train_share"] < 1:
            data = f"{asked['train_share']:g} of the questions ({asked['train_unit']}s at random) of {data}"
    base = base_id or shapes_of(config.base)
    tag, licence = LICENCES.get(base_id or "", (None, f"see {base}" if base_id else "not known here"))
    on_squad = data.endswith(SQUAD)
    header = {"base_model": base_id, "license": tag, "datasets": [HUB_DATA] if on_squad else None}
    header |= {"language": "en", "library_name": "transformers", "pipeline_tag": "text-generation"}
    card = f"""\
---
{yaml.safe_dump({key: value for key, value in header.items() if value}, sort_keys=False)}---
# {system}: {base} with a LoRA adapter, merged

Made by `make export MODEL={system}` (code {code}); stored in {args.dtype}. The adapter's weights have the sha256
{sha256}.
The adapter was trained on {data}, on the base in {quant}.
The base's numbers here are those, dequantised.

Exact match and F1 by the official rules, on {data_name(config.data.dev, "dev")}:

| | EM | F1 | n |
|---|---|---|---|
{"".join(rows)}| the adapter, {n} questions, spread over the articles | {before:.2f} | | {n} |
| merged, the same questions | {after:.2f} | | {n} |

Prompt, to the byte; answered greedily up to a line break or {window.answer} tokens, context and question cut to {cut}:
```
{prompt.text("{context}", "{question}", config.prompt)}
```

**Licences.** The weights are the base's with a change, so the base's licence holds for them: {licence}.
The training data's licence: {"CC BY-SA 4.0" if on_squad else "not known here"}.
"""
    write_text(folder / "README.md", card)


def hub_id(base: Base) -> str | None:
    """The hub id of a base, or of what its folder is a copy of; None if that is not known, and for random weights."""
    path = Path(base.path)
    if base.random_weights or not path.is_dir():
        return None if base.random_weights else base.path
    if path.resolve() == smollm2.FOLDER.resolve():
        return SMOLLM2
    if cached := re.search("/models--([^/]+)/snapshots/", f"{path.absolute()}/"):
        return cached[1].replace("--", "/", 1)
    name = str(cast(Section, read_json(path / "config.json")).get("_name_or_path"))
    with contextlib.suppress(HFValidationError):
        validate_repo_id(name)
        return name if "/" in name and not Path(name).exists() else None
    return None


def shapes_of(base: Base) -> str:
    """A base without a hub id, in words."""
    path, what = Path(base.path), "random weights" if base.random_weights else "a base"
    if not path.is_dir():
        return f"{what} of the shapes of {path}"
    of = AutoConfig.from_pretrained(path)
    sizes = f"{of.model_type}, {of.num_hidden_layers} layers of {of.hidden_size}, {of.vocab_size} tokens"
    return f"{what} of the shapes {sizes} (a local copy named {path.resolve().name})"


def data_name(source: str, split: str) -> str:
    """SQuAD's name for its hub id and for a file of its questions; else another hub id, or the file's name alone."""
    name = SQUAD if split == "train" else f"dev of {SQUAD}"
    if source == HUB_DATA:
        return name
    with contextlib.suppress(UserError):  # there is no such file now, or another one
        if squad.locate(source, split) is None:
            return source
        if texts_sha256(squad.golds(source)) == SQUAD_TEXTS[split]:
            return name
    return Path(source).name


def texts_sha256(examples: list[Example]) -> str:
    """The sha256 of the distinct pairs of paragraph and question, sorted, white space reduced to single spaces."""
    pairs = sorted({" ".join(f"{e.context} {e.question}".split()) for e in examples})
    return hashlib.sha256("\n".join(pairs).encode()).hexdigest()


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
