"""Merge an adapter into its base as a folder that any tool loads, and check that it answers as well.

    python -m scripts.export qlora7b FOLDER [key=value ...] [--dtype bf16] [--questions 500]

The base is dequantised, for that is what the adapter was trained on; the adapter's product is added in fp32, and the
sum stored as safetensors with the tokenizer and a model card. Then a part of dev is answered by both. The last line but
one says how many of the answers are the same, and whether EM is; where it got worse for sure, the exit code is 1.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.arguments import parse
from common.config import Config
from common.data import prompt, squad
from common.data.tokens import Tokenizers
from common.decode import predict
from common.device import pick_device
from common.errors import UserError, first_line, one_line_errors
from common.files import replacing, write_text
from common.metrics import score
from common.metrics.stats import mcnemar
from common.model import memory
from common.model.linears import dense
from common.model.llama import Model
from common.model.load import DTYPES, load_base, load_system, load_tokenizers
from common.runs import checkpoint, preflight, record

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

SURE = 0.01  # p below which a difference is none of chance
CARD = """\
---
base_model: {base}
language: en
library_name: transformers
pipeline_tag: text-generation
---
# {system}: {base} with a LoRA adapter for SQuAD v1.1, merged

Made by `make export MODEL={system}` (code {commit}) from the adapter {adapter} (sha256 {sha256}); stored in {dtype}.
The adapter was trained on the base in {quant}; the base's numbers here are those, dequantised.

Exact match and F1 by the official rules, on {source}:

{table}

Prompt, to the byte; answered greedily up to a line break or {limit} tokens, context and question cut to {window}:
```
{prompt}
```

**Licences.** The weights are the base's with a change, so the base's licence holds for them: see {base}. Trained on
{trained_on}; SQuAD v1.1 is CC BY-SA 4.0.
"""


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    config, args = parse("export", argv)
    if config.lora is None:
        raise UserError(f"{config.system} has no adapter to merge; try MODEL=qlora7b")
    preflight.new_folder(args.folder)
    if args.questions < 1:
        raise UserError("--questions must be 1 or more")
    config = preflight.check(config)
    adapter = checkpoint.verified(record.trained_adapter(config))
    if adapter is None:
        raise UserError(f"{config.system} has random weights and no trained adapter, so there is nothing to export")
    device = pick_device()
    dev = squad.load(config.data, "dev")
    some = squad.stratified(dev.examples, min(args.questions, len(dev.examples)))

    # ---- merge -----------------------------------------------------------------------------------------------------
    tokenizers = load_tokenizers(config)
    model = load_system(config, adapter, device)
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
            raise UserError(f"{args.folder}: could not be written ({reason}); make room, and try again") from error
        del model, plain, weights

        # ---- check -------------------------------------------------------------------------------------------------
        if device.type == "cuda" and needs > memory.available_bytes(device):
            print(
                "the merged model does not fit this GPU, so it is checked on the CPU; fewer --questions take less time"
            )
            device = torch.device("cpu")
        base = replace(config.base, path=str(folder), quant="none", tokenizer=None, random_weights=False)
        after = texts(load_base(base, device), tokenizers, config, some)
        a, b = score.score(some, before), score.score(some, after)
        write_card(folder, args, config, adapter, dev, a.em, b.em, len(some))
    lost, gained, p = mcnemar(a.correct, b.correct)
    same = sum(before[e.id] == after[e.id] for e in some)
    worse = lost > gained and p < SURE
    result = {"folder": str(args.folder), "em_before": a.em, "em_after": b.em, "n": len(some), "same_answers": same}
    result |= {"lost": lost, "gained": gained, "p": p, "worse": worse}
    print(
        f"{args.folder}: {same} of {len(some)} answers are the same; EM {a.em:.2f} by the adapter, {b.em:.2f} merged "
        f"(exact McNemar p = {p:.2g}){': WORSE' if worse else ''}\n{json.dumps(result)}"
    )
    sys.exit(bool(worse))


def merged(model: Model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The base's state dict on the host, dequantised, the adapter's products added."""
    out: dict[str, torch.Tensor] = {}
    settings = model.peft_config[model.active_adapter]
    if settings.use_dora or settings.bias != "none" or settings.modules_to_save:
        raise UserError(
            "this adapter is more than two matrices a layer (DoRA, biases, whole modules): PEFT merges those"
        )
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
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


def texts(model: Model, tokenizers: Tokenizers, config: Config, some: list[squad.Example]) -> dict[str, str]:
    return {id_: answer.text for id_, answer in predict.answers(model, tokenizers, some, config).items()}


def write_card(
    folder: Path,
    args: argparse.Namespace,
    config: Config,
    adapter: Path,
    dev: squad.Dataset,
    before: float,
    after: float,
    n: int,
) -> None:
    """README.md, with the newest evaluation of this adapter on all of this data, where there is one."""
    sha256 = checkpoint.weights_sha256(adapter)

    def decides(must: dict[str, Any], config: dict[str, Any]) -> list[Any]:
        return [must["data"], must["prompt"], config["window"], record.weights_of(config["base"])]

    mine = decides({"data": dev.sha256, "prompt": prompt.fingerprint(config.prompt)}, config.to_dict())
    evaluations = (r for r in record.read_all(Path(config.runs)) if r["kind"] == "eval")
    of_it = (r for r in evaluations if r["result"].get("adapter_sha256") == sha256)
    whole = [r for r in of_it if decides(r["must_match"], r["config"]) == mine]
    lines = ["| | EM | F1 | n |", "|---|---|---|---|"]
    if whole:
        r = whole[-1]["result"]
        what = f"the adapter on its {config.base.quant} base, all questions"
        lines.append(f"| {what} | {r['em']:.2f} | {r['f1']:.2f} | {r['n']} |")
    lines.append(f"| the adapter, {n} questions, spread over the articles | {before:.2f} | | {n} |")
    lines.append(f"| merged, the same questions | {after:.2f} | | {n} |")
    commit, dirty = record.code()
    code = f"{commit[:10]}{', changed since' if dirty else ''}" if commit else "of no known commit"
    text = CARD.format(
        base=config.base.path,
        system=config.system,
        commit=code,
        adapter=adapter,
        sha256=sha256,
        dtype=args.dtype,
        source=dev.source,
        trained_on=trained_on(adapter),
        quant=config.base.quant,
        table="\n".join(lines),
        limit=config.window.answer,
        window=config.window.context + config.window.question,
        prompt=prompt.text("{context}", "{question}", config.prompt.order),
    )
    write_text(folder / "README.md", text)


def trained_on(adapter: Path) -> str:
    """The data of the training that made it, by its record."""
    path = adapter.parent / "record.json"
    return record.read_one(path)["config"]["data"]["train"] if path.is_file() else "data that is not known here"


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
