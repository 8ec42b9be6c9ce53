"""Merge an adapter into its base as a folder that any tool loads, and check that it still answers as well.

    python -m scripts.export qlora7b FOLDER [key=value ...] [--dtype bf16] [--questions 500]

The base is dequantised, for that is what the adapter was trained on; the adapter's product is added in fp32, and the
sum stored as safetensors with the tokenizer and a model card. Then a part of dev is answered by both. The last line but
one says how many of the answers are the same, and whether EM is; where it got worse for sure, the exit code is 1.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import Config, load
from common.data import prompt, squad
from common.data.trees import build_trees
from common.decode import predict
from common.decode.answers import stop_tokens
from common.device import pick_device
from common.errors import UserError, one_line_errors
from common.files import beside, replacing, write_text
from common.metrics import score
from common.metrics.stats import mcnemar
from common.model import memory
from common.model.linears import dense
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a name in configs/, or a YAML file")
    parser.add_argument("folder", type=Path, help="where the merged model goes; must not exist")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="what the sum is stored in")
    parser.add_argument("--questions", type=int, default=500, help="of dev, answered before and after")
    args = parser.parse_intermixed_args(argv)
    config = load(args.model, args.overrides)
    if config.lora is None:
        raise UserError(f"{config.system} has no adapter to merge; try MODEL=qlora7b")
    if not args.folder.name:
        raise UserError("no folder to write is named: make export OUT=folder")
    for folder in (args.folder, *beside(args.folder)):  # it is written beside itself, then renamed
        if folder.exists():
            raise UserError(f"{folder} is there already; move it away, or name another folder than {args.folder}")
    above = next(path for path in args.folder.absolute().parents if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"{above} is no folder to write to, so there can be no {args.folder}")
    if args.questions < 1:
        raise UserError("--questions must be 1 or more")
    preflight.check(config)
    adapter = checkpoint.verified(record.trained_adapter(config))
    if adapter is None:
        raise UserError(f"{config.system} has random weights and no trained adapter, so there is nothing to export")
    device = pick_device()
    dev = squad.load(config.data, "dev")
    some = squad.stratified(dev.examples, min(args.questions, len(dev.examples)))

    # ---- merge -----------------------------------------------------------------------------------------------------
    tokenizer, cutter = load_tokenizers(config)
    model = load_system(config, adapter, device)
    weights = merged(model, DTYPES[args.dtype])
    before = answers(model, tokenizer, cutter, config, some)
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
            tokenizer.save_pretrained(folder)
        except (SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{args.folder}: could not be written ({reason}); make room, and try again") from error
        del model, plain, weights

        # ---- check -------------------------------------------------------------------------------------------------
        if device.type == "cuda" and needs > memory.available_bytes(device):
            print(
                "the merged model does not fit this GPU, so it is checked on the CPU; fewer --questions take less time"
            )
            device = torch.device("cpu")
        base = replace(config.base, path=str(folder), quant="none", tokenizer=None, random_weights=False)
        after = answers(load_base(base, device), tokenizer, cutter, config, some)
        a, b = score.score(some, before), score.score(some, after)
        write_card(folder, args, config, adapter, dev, a.em, b.em, len(some))
    lost, gained, p = mcnemar(a.correct, b.correct)
    same = sum(before[e.id] == after[e.id] for e in some)
    worse = lost > gained and p < SURE
    result = {
        "folder": str(args.folder), "em_before": a.em, "em_after": b.em, "n": len(some), "same_answers": same,
        "lost": lost, "gained": gained, "p": p, "worse": worse,
    }  # fmt: skip
    print(f"{args.folder}: {same} of {len(some)} answers are the same; EM {a.em:.2f} by the adapter, {b.em:.2f} merged "
          f"(exact McNemar p = {p:.2g}){': WORSE' if worse else ''}")  # fmt: skip
    print(json.dumps(result))
    sys.exit(bool(worse))


def merged(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
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


def answers(model: Any, tokenizer: Any, cutter: Any, config: Config, some: list[squad.Example]) -> dict[str, str]:
    trees = build_trees(
        some, tokenizer, config.window, train=False, options=config.prompt, window_tokenizer=cutter
    ).trees
    found = predict.answer_trees(model, tokenizer, trees, stop_tokens(tokenizer), config.window.answer, config.eval)
    return {id_: answer.text for id_, answer in found.items()}


def write_card(
    folder: Path, args: argparse.Namespace, config: Config, adapter: Path, dev: squad.Dataset, before: float,
    after: float, n: int,
) -> None:  # fmt: skip
    """README.md, with the newest evaluation of this adapter on all of this data, where there is one."""
    sha256 = checkpoint.weights_sha256(adapter)
    whole = [
        r for r in record.read_all(Path(config.runs))
        if r["kind"] == "eval" and r["result"].get("adapter_sha256") == sha256 and r["must_match"]["data"] == dev.sha256
        and r["must_match"]["prompt"] == prompt.fingerprint(config.prompt)
        and r["config"]["window"] == config.to_dict()["window"]
        and record.weights_of(r["config"]["base"]) == record.weights_of(config.to_dict()["base"])
    ]  # fmt: skip
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
