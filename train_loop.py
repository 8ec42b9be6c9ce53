"""Train one system's LoRA adapter on SQuAD, stop early on exact match, keep `best/` and `last/`.

    python train_loop.py qlora7b [key=value ...] [--fresh]

Read it top to bottom: settings, data, model, loop, record. Started again, it goes on where it stopped; `--fresh` begins
anew in a new run folder.
"""

import argparse
import contextlib
import json
import math
import sys
from typing import Any

from common import checkpoint, decode, meter, packing, plan, preflight, record, squad
from common.config import load
from common.errors import UserError, one_line_errors
from common.model import add_lora, compute_dtype, load_base, load_tokenizer, load_weights, parameter_counts
from common.prompt import build_trees
from common.score import score

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file
from tqdm import tqdm

CPU_PACK_TOKENS, GPU_PACK_TOKENS = 1024, 4096


def rate(step: int, total: int, warmup: float, peak: float) -> float:
    """Learning rate of `step` (from 0): linear warm-up, then a cosine to zero. Pure, so there is no state to save."""
    rising = max(1, round(warmup * total))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a name in configs/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--fresh", action="store_true", help="start anew, in a new run folder")
    args = parser.parse_intermixed_args(argv)
    config = load(args.model, args.overrides)
    train, stop = config.train, config.early_stop
    if config.lora is None:
        raise UserError(f"{config.system} has no lora section, so there is nothing to train; try MODEL=qlora7b")
    preflight.check(config.base, config.system)
    set_seed(config.seed)
    device = meter.pick_device()
    dtype = compute_dtype(config.base, device)
    accelerator = Accelerator(
        mixed_precision={torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}[dtype],
        cpu=device.type == "cpu",
    )

    # ---- data ------------------------------------------------------------------------------------------------------
    train_set, dev_set = squad.load(config.data, "train"), squad.load(config.data, "dev")
    identity = {"config": config.hash(), "train": train_set.sha256, "dev": dev_set.sha256}
    run = None if args.fresh else record.newest_run(config, "train")
    if run and (run / "record.json").exists():
        finished = json.loads((run / "record.json").read_text())["result"]
        if finished["identity"] == identity:
            print(f"{run} is finished; FRESH=1 trains anew")
            print(json.dumps(finished))
            return
        run = None  # that was on other data
    train_examples, stop_examples = train_set.examples, dev_set.examples
    if stop.split == "heldout":
        train_examples, stop_examples = squad.hold_out(train_examples, stop.heldout_share)
    stop_examples = squad.stratified(stop_examples, stop.questions or len(stop_examples))
    tokenizer = load_tokenizer(config.base.path, config.base.revision)
    cutter = load_tokenizer(config.window.tokenizer) if config.window.tokenizer else tokenizer
    built = build_trees(train_examples, tokenizer, config.window, train=True, window_tokenizer=cutter)
    stop_trees = build_trees(stop_examples, tokenizer, config.window, train=False, window_tokenizer=cutter).trees
    pack_tokens = train.pack_tokens or (CPU_PACK_TOKENS if device.type == "cpu" else GPU_PACK_TOKENS)
    trees = plan.bounded(built.trees, train.questions_per_step)
    if not trees:
        raise UserError(f"{train_set.source}: no question is left to train on ({built.counts})")
    per_epoch = plan.steps_per_epoch(trees, train.questions_per_step)
    total = max(1, round(train.epochs * per_epoch))
    total = min(total, train.max_steps or total)
    stops = decode.stop_ids(tokenizer)

    # ---- model -----------------------------------------------------------------------------------------------------
    model = add_lora(load_base(config.base, device), config.lora, config.seed)
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.PagedAdamW8bit(weights, lr=train.lr, weight_decay=train.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    adapter = accelerator.unwrap_model(model)
    trained, frozen = parameter_counts(adapter)

    # ---- go on, or start -------------------------------------------------------------------------------------------
    state: dict[str, Any] = {
        "step": 0, "best_em": None, "best_f1": None, "best_step": None, "waited": 0, "seconds": 0.0,
        "identity": identity,
    }  # fmt: skip
    if run:
        checkpoint.recover(run / "last")
    if run and (run / "last").exists():
        state = checkpoint.load_state(run / "last")
        if state["identity"] != identity:
            raise UserError(f"{run}: the data has changed since this run began; FRESH=1 starts a new one")
        load_weights(adapter, load_file(run / "last" / "adapter_model.safetensors"), str(run / "last"))
        checkpoint.load_training(run / "last", optimizer)
        print(f"{run}: going on after step {state['step']}")
    elif run is None:
        run = record.new_run(config, "train")
    kept = [row for row in record.read_metrics(run) if row["step"] <= state["step"]]  # what came after is done again
    record.write_text(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    print(
        f"{config.system} on {meter.describe(device)['name']}, {dtype}: trains {trained:,} weights beside {frozen:,} "
        f"frozen ones ({trained / frozen:.3%})\n"
        f"{train_set.source}: {built.counts}, {train_set.fixed_offsets} offsets fixed, "
        f"{sum(map(len, trees)):,} tokens\n"
        f"{total} steps of ~{train.questions_per_step} questions; every {train.eval_every} steps EM on "
        f"{len(stop_examples)} questions of {stop.split}; run {run}"
    )
    if config.lora.dropout:
        print("lora.dropout > 0: branches share one dropout mask on their prefix; valid training, not equal to rows")

    # ---- loop ------------------------------------------------------------------------------------------------------
    model.train()
    meter.reset_peaks(device)
    epoch_plan: list[plan.Step] = []
    bar = tqdm(total=total, initial=state["step"], desc="train", unit="step")
    began, seconds_before = meter.now(device), state["seconds"]
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        while state["step"] < total and state["waited"] < stop.patience:
            step = state["step"]
            if not epoch_plan or step % per_epoch == 0:
                epoch_plan = list(
                    plan.epoch(trees, config.seed, step // per_epoch, train.questions_per_step, pack_tokens)
                )
            packs = epoch_plan[step % per_epoch]
            branches = [branch for members in packs for tree in members for branch in tree.branches]
            answer_tokens = sum(len(branch.answer_ids) for branch in branches)

            loss = 0.0  # mean over the answer tokens of the whole step, however it is cut into packs
            for i, members in enumerate(packs):
                batch = packing.pack(members).to(device)
                last = i + 1 == len(packs)
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    logits = packing.pack_logits(model, batch, batch.target_index)
                    part = F.cross_entropy(logits.float(), batch.target_ids, reduction="sum") / answer_tokens
                    accelerator.backward(part)
                loss += part.item()
            grad_norm = accelerator.clip_grad_norm_(weights, train.max_grad_norm)
            if accelerator.scaler is None:  # fp16's scaler skips steps of its own accord when a gradient overflows
                finite = math.isfinite(loss) and math.isfinite(grad_norm)
            else:
                finite = math.isfinite(loss)
            if not finite:
                raise UserError(
                    f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; stopped before the update, and what "
                    f"{run} holds is whole. Lower train.lr, or look at these questions: "
                    f"{', '.join(branch.id for branch in branches)}"
                )
            for group in optimizer.param_groups:
                group["lr"] = rate(step, total, train.warmup, train.lr)
            optimizer.step()
            optimizer.zero_grad()

            state["step"] = step + 1
            seconds = seconds_before + meter.now(device) - began
            line = {
                "step": step + 1, "loss": loss, "lr": group["lr"], "grad_norm": float(grad_norm),
                "questions": len(branches), "tokens": sum(len(tree) for members in packs for tree in members),
                "seconds": round(seconds, 3),
            }  # fmt: skip
            metrics.write(json.dumps(line) + "\n")
            bar.set_postfix(loss=f"{loss:.3f}", best_em=state["best_em"], refresh=False)
            bar.update()

            if (step + 1) % train.eval_every == 0 or step + 1 == total:
                answers = decode.predict(
                    adapter, tokenizer, stop_trees, stops, config.window.answer, config.eval.pack_tokens, "evaluate"
                )
                texts = {id_: answer.text for id_, answer in sorted(answers.items())}
                scored = score(stop_examples, texts)
                better = state["best_em"] is None or scored.em >= state["best_em"] + stop.min_delta
                state["waited"] = 0 if better else state["waited"] + 1
                state["seconds"] = seconds_before + meter.now(device) - began
                metrics.write(json.dumps({"step": step + 1, "em": scored.em, "f1": scored.f1, "n": scored.n}) + "\n")
                metrics.flush()
                if better:
                    state |= {"best_em": scored.em, "best_f1": scored.f1, "best_step": step + 1}
                    checkpoint.save(run / "best", adapter, state)
                    record.write_text(run / "predictions.json", json.dumps(texts, ensure_ascii=False, indent=0) + "\n")
                checkpoint.save(run / "last", adapter, state, optimizer)
                tqdm.write(
                    f"step {step + 1}: EM {scored.em:.2f} F1 {scored.f1:.2f} on {scored.n} ({stop.split})"
                    f"{', best so far' if better else ''}",
                    file=sys.stderr,
                )
    bar.close()

    # ---- record ----------------------------------------------------------------------------------------------------
    questions = sum(row.get("questions", 0) for row in record.read_metrics(run))
    result = {
        "run": str(run), "identity": identity, "em": state["best_em"], "f1": state["best_f1"],
        "selected_on": stop.split, "n": len(stop_examples), "best_step": state["best_step"], "steps": state["step"],
        "stopped_early": state["step"] < total, "questions": questions,
        "seconds": round(seconds_before + meter.now(device) - began, 1), "window_counts": built.counts,
        "trained_weights": trained, "frozen_weights": frozen, "peak": meter.peaks(device),
    }  # fmt: skip
    record.write(run, config, "train", dev_set, meter.describe(device), result)
    print(f"best EM {result['em']:.2f} F1 {result['f1']:.2f} at step {result['best_step']}; adapter in {run}/best")
    print(json.dumps(result))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
