"""Train one system's LoRA adapter on SQuAD, stop early on exact match, keep `best/` and `last/`.

    python train_loop.py qlora7b [key=value ...] [--fresh]

Read it top to bottom: settings, data, model, loop, record. Started again, it goes on where it stopped; `--fresh` begins
anew in a new run folder. SIGTERM, SIGINT and SIGHUP save at the end of the step and exit with 143, 130 and 129. Under
`accelerate launch --multi_gpu --num_processes 2` it is the same training, each step shared out.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import random
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from common.config import flat, load
from common.data import cache, plan, squad
from common.data.trees import Tree
from common.decode import chunks, predict
from common.decode.answers import stop_tokens
from common.device import describe_device, has_flash_attention, out_of_memory, pick_device
from common.errors import UserError, one_line_errors
from common.files import recover, write_text
from common.metrics.score import score
from common.model import memory, tree_mask
from common.model.load import (
    add_lora,
    compute_dtype,
    load_base,
    load_tokenizers,
    load_weights,
    parameter_counts,
    sources,
)
from common.model.pack import IGNORED, Pack, PadSizes, build_pack
from common.runs import checkpoint, gauges, preflight, ranks, record, signals
from common.train import cuda_graphs, fused
from common.train.ema import EMA

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from safetensors.torch import load_file
from tqdm import tqdm

CPU_PACK_TOKENS, GPU_PACK_TOKENS = 1024, 4096  # of layers that are not fused
SAVE_SECONDS = 600  # a crash between two evaluations costs no more


def rate(step: int, total: int, warmup: float, peak: float) -> float:
    """Learning rate of `step` (from 0): linear warm-up, then a cosine to zero. Pure, so there is no state to save."""
    rising = max(1, round(warmup * total))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a name in configs/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--fresh", action="store_true", help="start anew, in a new run folder")
    args = parser.parse_intermixed_args(argv)
    config = load(args.model, args.overrides)
    train, stop, untrue = config.train, config.early_stop, config.base.random_weights
    if config.lora is None:
        raise UserError(
            f"{config.system} has no lora section, so there is nothing to train; try MODEL=qlora7b, or a copy of "
            "configs/qlora7b.yaml with another base.path"
        )
    if config.adapter:
        raise UserError(
            f"adapter={config.adapter}: a training makes its own; ADAPTER is of eval, bench, export and ask"
        )
    preflight.check(config)
    process = ranks.join()
    first, rank, n_ranks = process.is_main_process, process.process_index, process.num_processes
    if train.questions_per_step < n_ranks:
        raise UserError(f"train.questions_per_step={train.questions_per_step}: fewer than the {n_ranks} processes")
    set_seed(config.seed)
    device = pick_device()
    gauges.reset_peaks(device)  # graphs allocate while they are recorded, before the loop
    dtype = compute_dtype(config.base, device)
    try:
        accelerator = Accelerator(
            mixed_precision={torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}[dtype],
            cpu=device.type == "cpu",
            log_with=config.tracker,
            project_dir=config.runs,
        )
    except ValueError as error:
        if not config.tracker:
            raise
        raise UserError(f"tracker={config.tracker}: {error}") from error
    if config.tracker and not accelerator.log_with:
        raise UserError(f"tracker={config.tracker}: its package is not installed; pip install {config.tracker}")

    # ---- data ------------------------------------------------------------------------------------------------------
    train_set, dev_set = squad.load(config.data, "train"), squad.load(config.data, "dev")
    identity = {"config": config.hash("train"), "train": train_set.sha256, "dev": dev_set.sha256}
    run = None if args.fresh else record.newest_run(config, "train")
    (run,) = broadcast_object_list([run])  # one rank looks, for the others might see what it makes later
    if run and (run / "record.json").exists():
        finished = json.loads((run / "record.json").read_text())["result"]
        if finished["identity"] == identity:
            print(f"{run} is finished; FRESH=1 trains anew")
            print(json.dumps(finished))
            return
        run = None  # that was on other data
    if first and run:
        record.claim(run)  # before anything in it is touched
        recover(run / "last")
        recover(run / "best")
    train_examples, stop_examples = train_set.examples, dev_set.examples
    if stop.split == "heldout":
        train_examples, stop_examples = squad.hold_out(train_examples, stop.heldout_share)
    stop_examples = squad.stratified(stop_examples, stop.questions or len(stop_examples))
    tokenizer, cutter = load_tokenizers(config)
    with ranks.local_first():  # the others find the trees in the cache
        built = cache.build_trees(
            train_examples, tokenizer, config.window, train=True, options=config.prompt, window_tokenizer=cutter
        )
        stop_trees = cache.build_trees(
            stop_examples, tokenizer, config.window, train=False, options=config.prompt, window_tokenizer=cutter
        ).trees
    trees = plan.bounded(built.trees, train.questions_per_step)
    if not trees:
        raise UserError(f"{train_set.source}: no question is left to train on ({built.counts})")

    def reads(members: list[Tree]) -> list[Tree]:
        """What a pack holds of these: themselves, or a row for each question."""
        return members if train.share_prefixes else [row for tree in members for row in tree.split(max_questions=1)]

    per_epoch = plan.steps_per_epoch(trees, train.questions_per_step)
    total = max(1, round(train.epochs * per_epoch))
    total = min(total, train.max_steps or total)
    stops = stop_tokens(tokenizer)
    # an evaluation keeps to the budget of the training that it interrupts, in what it allocates
    budget = train.memory_budget_gib or config.eval.memory_budget_gib
    evaluating = dataclasses.replace(config.eval, memory_budget_gib=budget)

    # ---- model -----------------------------------------------------------------------------------------------------
    model = add_lora(load_base(config.base, device), config.lora, config.seed)
    trained, frozen = parameter_counts(model)
    plain = "train.fused=false" if not train.fused else fused.untrainable_reason(model)
    if plain and train.memory_budget_gib:
        raise UserError(
            f"train.memory_budget_gib needs the fused layers; not with {plain}: set train.memory_budget_gib=null, and "
            "train.pack_tokens and train.gradient_checkpointing by hand"
        )
    knob, counted = "lower train.pack_tokens", None
    if plain:
        keep_layers, recomputed = (0, 1.0) if train.gradient_checkpointing else (model.config.num_hidden_layers, 0.0)
        pack_tokens = train.pack_tokens or (CPU_PACK_TOKENS if device.type == "cpu" else GPU_PACK_TOKENS)
        ways = f"layers by transformers and PEFT ({plain}), packs of {pack_tokens} tokens"
        knob += f" (now {pack_tokens})"
        knob += "" if train.gradient_checkpointing else ", or set train.gradient_checkpointing=true"
        weights = [p for p in model.parameters() if p.requires_grad]
        if train.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        logits_of: Callable = functools.partial(tree_mask.pack_logits, model)
    else:
        n_tokens = sum(map(len, reads(trees)))
        answer_share = sum(len(branch.answer_ids) for tree in trees for branch in tree.branches) / n_tokens
        free = memory.available_bytes(device) if device.type == "cuda" else None
        shapes = memory.Shapes.of(model, trained)
        # what graphs hold is not free for an evaluation
        evaluation = shapes.evaluation(memory.LEAST_PASS_TOKENS, memory.LEAST_ARENA_TOKENS)
        choice = memory.choose(train, shapes, device, n_tokens / per_epoch / n_ranks, answer_share, free, evaluation)
        pack_tokens, keep_layers = choice.pack_tokens, choice.keep_layers
        counted, ways = choice.counted if device.type == "cuda" else None, choice.sentence
        knob += f" (now {pack_tokens}), or {'lower' if train.memory_budget_gib else 'set'} train.memory_budget_gib"
        fast = fused.Fused(model, keep_layers, choice.hold_layers)
        weights, logits_of, recomputed = [fast.flat], fast.logits, fast.recomputed

    def work(pack: Pack, share: torch.Tensor | float) -> torch.Tensor:
        """Forward and backward of a pack on the device; its loss, each answer token (or question) weighing `share`."""
        logits = logits_of(pack, pack.target_index).float()
        by_token = F.cross_entropy(
            logits,
            pack.target_ids,
            reduction="none",
            ignore_index=IGNORED,
            label_smoothing=train.label_smoothing,
        )
        loss = (by_token if train.loss == "token" else by_token * pack.target_share).sum() * share
        accelerator.backward(loss)
        return loss.detach()

    @functools.lru_cache(maxsize=1)
    def epoch(number: int) -> list[list[Tree]]:
        return plan.epoch(trees, config.seed, number, train.questions_per_step)

    def prepare(step: int, rank: int = rank) -> tuple[list[Tree], list[Pack]]:
        """All trees of a step, and a rank's share of them in packs on the host. Pure, so it may be done ahead."""
        members = epoch(step // per_epoch)[step % per_epoch]
        parts = plan.fill(plan.share(reads(members), n_ranks)[rank], pack_tokens)
        return members, [pack for part in parts for pack in (room.packs(part) if room else [build_pack(part)])]

    room: PadSizes | None = None
    compute: Callable = lambda pack, share: work(pack.to(device), share)  # noqa: E731
    if not plain and free is not None and has_flash_attention(device, dtype):
        if sum(choice.counted.values()) + evaluation <= free:
            ways += ", CUDA graphs"
            sample = range(min(32, per_epoch))
            like = [pack for step in sample for pack in prepare(step)[1]]
            like = like or [pack for step in sample for pack in prepare(step, 0)[1]]  # who always has a share
            smallest = min(like, key=lambda pack: pack.n_tokens)
            room = PadSizes.of(like, pack_tokens)
            with out_of_memory(knob):
                compute = cuda_graphs.Graphed(work, weights, room, smallest)
        else:
            ways += ", no CUDA graphs (an evaluation would not fit beside them)"
    optimizer = accelerator.prepare(bnb.optim.PagedAdamW8bit(weights, lr=train.lr, weight_decay=train.weight_decay))
    if accelerator.scaler:  # it begins with the first loss, which a rank without trees would not have
        accelerator.scaler.scale(torch.zeros((), device=device))
    average = EMA(weights, train.average) if train.average else None
    parts = {"optimizer": optimizer, "scaler": accelerator.scaler, "average": average}
    training = {name: part for name, part in parts.items() if part is not None}

    # ---- go on, or start -------------------------------------------------------------------------------------------
    state: dict[str, Any] = {
        "step": 0, "evaluated": 0, "best_em": None, "best_f1": None, "best_step": None, "waited": 0,
        "seconds": 0.0, "evaluation_seconds": 0.0, "peak": {}, "identity": identity,
    }  # fmt: skip
    lost = None  # the step whose weights `best/` has, where a crash kept `last/` from knowing: they are replaced
    if run and (run / "last").exists():
        state = checkpoint.load_state(run / "last")
        if (run / "best").exists():
            best_step = checkpoint.load_state(run / "best")["best_step"]
            lost = best_step if best_step > state["step"] else None
        if state["identity"] != identity:
            raise UserError(f"{run}: the data has changed since this run began; FRESH=1 starts a new one")
        load_weights(model, load_file(run / "last" / "adapter_model.safetensors"), str(run / "last"))
        checkpoint.load_training(run / "last", training)
        print(f"{run}: going on after step {state['step']}")
    elif run is None:
        (run,) = broadcast_object_list([record.new_run(config, "train") if first else None])
    if first:
        record.claim(run)
        # what came after is redone
        kept = [
            row for row in record.read_metrics(run) if row["step"] <= state["step" if "loss" in row else "evaluated"]
        ]
        write_text(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    accelerator.project_configuration.logging_dir = str(run)
    accelerator.init_trackers("squad-qlora", flat(config.to_dict()))
    print(
        f"{config.title} on {f'{n_ranks} × ' if n_ranks > 1 else ''}{describe_device(device)['name']}, {dtype}: "
        f"trains {trained:,} weights beside {frozen:,} frozen ones ({trained / frozen:.3%})\n"
        f"{train_set.source}: {built.counts}, {train_set.fixed_offsets} offsets fixed, "
        f"{sum(map(len, trees)):,} tokens\n"
        f"{total} steps of ~{train.questions_per_step} questions; every {train.eval_every} steps "
        f"{'no accuracy (random weights), but its time and memory' if untrue else 'EM'} on "
        f"{len(stop_examples)} questions of {stop.split}; run {run}\n{ways}"
    )
    if config.lora.dropout:
        print("lora.dropout > 0: branches share one dropout mask on their prefix; valid training, not equal to rows")

    # ---- loop ------------------------------------------------------------------------------------------------------
    def log(metrics: TextIO, row: dict[str, Any]) -> None:
        if first:
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()
        accelerator.log({key: value for key, value in row.items() if value is not None}, row["step"])

    def save_last() -> None:
        state["seconds"] = seconds_before + gauges.now(device) - began
        state["peak"] = gauges.peaks(device, state["peak"])
        if first:
            checkpoint.save(run / "last", model, state, training)

    def evaluate(request: signals.Request) -> dict[str, Any] | None:
        """Score the weights as they are, and keep them if they are the best; None where someone asked to stop."""
        evaluation_began, step = gauges.now(device), state["step"]
        try:
            answers = predict.answer_trees(
                model, tokenizer, stop_trees, stops, config.window.answer, evaluating, "evaluate" if first else None,
                request.check, round_=f"evaluation at {step}",
            )  # fmt: skip
        except signals.Stopped:
            answers = None
        everyone = gather_object([answers])
        state["evaluation_seconds"] += gauges.now(device) - evaluation_began
        if None in everyone:
            return None
        texts = {id_: a.text for id_, a in chunks.merge(a for r in everyone for a in r.values()).items()}
        scored = score(stop_examples, texts)
        em, f1 = (None, None) if untrue else (scored.em, scored.f1)
        best = state["best_em"]
        better = em is None or best is None or (em > best and em >= best + stop.min_delta) or step == lost
        state["waited"] = 0 if better else state["waited"] + 1
        state["evaluated"] = step
        if better:
            state.update(best_em=em, best_f1=f1, best_step=step)
        if better and first:
            checkpoint.save(run / "best", model, state)
            write_text(run / "predictions.json", json.dumps(texts, ensure_ascii=False, indent=0) + "\n")
        if first and not untrue:
            tqdm.write(
                f"step {step}: EM {em:.2f} F1 {f1:.2f} on {scored.n} ({stop.split}){', best so far' if better else ''}",
                file=sys.stderr,
            )
        return {"step": step, "em": em, "f1": f1, "n": scored.n}

    ranks.sum_gradients(weights, 0.0).tolist()  # connects the ranks; who is ready first waits here and not in a step
    model.train()
    bar = tqdm(total=total, initial=state["step"], desc="train", unit="step", disable=not first)
    began, seconds_before, asked = gauges.now(device), state["seconds"], False
    stepping, busy = 0.0, 0.0  # seconds of steps, without evaluating and saving; of those with this GPU at work
    start_seconds = began - started  # until the first step of this process begins
    upcoming: tuple[list[Tree], list[Pack]] | None = None
    saved = time.monotonic()
    with bar, signals.listen() as request, (run / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        while not asked:
            step = state["step"]
            if step > state["evaluated"] and (step % train.eval_every == 0 or step == total):
                with average.in_place() if average else contextlib.nullcontext():
                    row = evaluate(request)
                if row is None:
                    asked = True
                    continue
                log(metrics, row)
                save_last()
                saved = time.monotonic()
            elif first and time.monotonic() - saved > SAVE_SECONDS:
                save_last()
                saved = time.monotonic()
            if step == total or state["waited"] >= stop.patience:
                break

            step_began = gauges.now(device)
            members, packs = upcoming or prepare(step)
            branches = [branch for tree in members for branch in tree.branches]
            answer_tokens = sum(len(branch.answer_ids) for branch in branches)
            if config.lora.dropout:
                torch.manual_seed(random.Random(f"{config.seed} {step} {rank}").getrandbits(63))

            # mean over the answer tokens (or questions) of the whole step, however it is cut into packs and shared out
            weight = 1 / (answer_tokens if train.loss == "token" else len(branches))
            total_loss = torch.zeros((), device=device)
            tokens = float(sum(pack.n_tokens for pack in packs))
            for group in optimizer.param_groups:
                group["lr"] = rate(step, total, train.warmup, train.lr)
            with out_of_memory(f"{knob}. What {run} holds is whole"):
                work_began = gauges.mark(device)
                for pack in packs:
                    total_loss += compute(pack, weight)
                work_ended = gauges.mark(device)
                sums = ranks.sum_gradients(weights, total_loss, tokens, request.code > 0)
                norm = accelerator.clip_grad_norm_(weights, train.max_grad_norm)
                told = torch.cat([sums, norm.reshape(1)]).to("cpu", non_blocking=True)  # there after `now`
                upcoming = prepare(step + 1) if step + 1 < total else None  # while a GPU computes
                optimizer.step()  # queued like all before it; then bitsandbytes waits
                optimizer.zero_grad(set_to_none=False)
                if average:
                    average.update()
                now = gauges.now(device)
            loss, tokens, signalled, grad_norm = told.tolist()
            stepping += now - step_began
            busy += gauges.between(work_began, work_ended)
            # fp16's scaler skips steps of its own accord when a gradient overflows
            if not math.isfinite(loss) or (accelerator.scaler is None and not math.isfinite(grad_norm)):
                raise UserError(
                    f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; stopped, and what {run} holds is whole, "
                    "from before it. Lower train.lr, or look at these questions: "
                    f"{', '.join(branch.id for branch in branches)}"
                )
            if optimizer.step_was_skipped and accelerator.scaler.get_scale() < 1:
                raise UserError(f"step {step + 1}: gradients overflow fp16 at any scale; try base.dtype=bf16 or fp32")

            state["step"] = step + 1
            asked = signalled > 0
            row = {
                "step": step + 1, "loss": loss, "lr": group["lr"],
                "grad_norm": grad_norm if math.isfinite(grad_norm) else None, "questions": len(branches),
                "tokens": int(tokens), "seconds": round(seconds_before + now - began, 3),
            }  # fmt: skip
            log(metrics, row)
            bar.set_postfix(loss=f"{loss:.3f}", best_em=state["best_em"], refresh=False)
            bar.update()
        if asked:
            save_last()
            accelerator.wait_for_everyone()  # a launcher ends the others as soon as one is gone
    works = 0.0 if asked else sum(gather_object([busy])) / n_ranks  # else a rank waits, sums, updates, saves
    accelerator.end_training()
    if asked:
        print(f"stopped after step {state['step']}; the same command goes on from {run}")
        sys.exit(request.code or 143)

    # ---- record ----------------------------------------------------------------------------------------------------
    seconds = seconds_before + gauges.now(device) - began
    questions = sum(row.get("questions", 0) for row in record.read_metrics(run))
    result = {
        "run": str(run), "identity": identity, "em": state["best_em"], "f1": state["best_f1"],
        "random_weights": untrue, "selected_on": stop.split, "n": len(stop_examples), "best_step": state["best_step"],
        "steps": state["step"], "stopped_early": state["step"] < total, "questions": questions, "processes": n_ranks,
        "seconds": round(seconds, 1), "evaluation_seconds": round(state["evaluation_seconds"], 1),
        "questions_per_s": round(questions / (seconds - state["evaluation_seconds"]), 2), "window_counts": built.counts,
        "start_seconds": round(start_seconds, 1), "pack_tokens": pack_tokens, "kept_layers": keep_layers,
        "recomputed": recomputed, "counted_bytes": counted,
        "idle_share": round(1 - works / stepping, 4) if works else None,
        "trained_weights": trained, "frozen_weights": frozen, "peak": gauges.peaks(device, state["peak"]),
    }  # fmt: skip
    if first:
        record.write(run, config, "train", dev_set, describe_device(device), result, sources(model, tokenizer, cutter))
    accuracy = "no accuracy" if untrue else f"best EM {result['em']:.2f} F1 {result['f1']:.2f}"
    print(
        f"{config.title}: {accuracy} at step {result['best_step']}; {result['questions_per_s']} questions/s; "
        f"evaluations took {state['evaluation_seconds'] / seconds:.0%} of {seconds:.0f} s; adapter in {run}/best"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
