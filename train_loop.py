"""Train one system's LoRA adapter on SQuAD, stop early on exact match or loss, keep `best/` and `last/`.

    python train_loop.py qlora7b [key=value ...] [--fresh]

Read it top to bottom: settings, data, model, resume, loop, record. Started again, it resumes from `last/`; `--fresh`
starts a new run. SIGTERM, SIGINT and SIGHUP save at the end of the step and exit with 143, 130 and 129. Under
`accelerate launch --multi_gpu --num_processes 2` the processes share each step, and the training is the same.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common.arguments import parse
from common.config import Config
from common.data import cache, squad
from common.data.plan import Plan
from common.data.squad import Dataset
from common.data.tokens import Tokenizers
from common.decode import predict
from common.device import describe_device, out_of_memory, pick_device
from common.errors import UserError, one_line_errors
from common.files import write_text
from common.metrics.score import score
from common.model.adapter import add_lora, load_weights
from common.model.identity import identify
from common.model.load import compute_dtype, load_base, load_tokenizers, sources, tokenizer_sha256
from common.runs import adapters, checkpoint, gauges, preflight, ranks, record, signals
from common.runs.progress import Bar
from common.runs.results import Section, TrainResult
from common.train.early_stopping import EarlyStopping, Evaluation
from common.train.ema import EMA
from common.train.engine import Engine
from common.train.messages import ending, evaluated, not_finite

import bitsandbytes as bnb
import torch
from accelerate.utils import broadcast_object_list, set_seed
from peft import PeftModel
from safetensors.torch import load_file
from tqdm import tqdm

SAVE_SECONDS = 600  # between two saves at most: what a crash costs


def learning_rate(step: int, total: int, warmup: float, peak: float) -> float:
    """The rate of `step` (from 0): linear warm-up over a share `warmup` of the steps, then a cosine to zero."""
    rising = max(1, round(warmup * total))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def main(argv: list[str]) -> None:
    # ---- settings --------------------------------------------------------------------------------------------------
    started = time.perf_counter()
    config, args = parse("train_loop", argv)
    train, stop, lora = config.train, config.early_stop, preflight.trainable(config)
    preflight.check(config)
    process = ranks.join(at_most=train.questions_per_step)
    first, rank, n_ranks = process.is_main_process, process.process_index, process.num_processes
    set_seed(config.seed)
    device = pick_device()
    gauges.reset_peaks(device)  # before graphs are captured, which allocate
    accelerator = ranks.accelerator(config, device, compute_dtype(config.base, device))

    # ---- data ------------------------------------------------------------------------------------------------------
    train_set, dev_set = squad.load(config.data, "train"), squad.load(config.data, "dev")
    identity = {"config": config.hash("train"), "train": train_set.sha256, "dev": dev_set.sha256}
    found = record.open_run(config, "train", lambda r: r["result"]["identity"] == identity, args.fresh)
    run, finished = broadcast_object_list([*found])  # of one rank: the others might find what it makes later
    if finished:
        print(f"{run} is finished; FRESH=1 trains anew\n{json.dumps(finished)}")
        return
    if first and run:
        checkpoint.claim(run)  # before anything in it is touched
    chosen, stop_on = squad.selection(train_set, dev_set, config.data, stop)
    tokenizers = load_tokenizers(config)
    with ranks.local_first():  # the others read the trees from the cache
        built = cache.build_trees(chosen, tokenizers, config.window, config.prompt, train=True)
        dev_trees = cache.build_trees(stop_on, tokenizers, config.window, config.prompt, train=stop.by == "loss").trees
    if not built.trees:
        raise UserError(f"{train_set.source}: no question is left to train on ({built.counts})")
    plan = Plan(built.trees, train, config.seed)
    total = plan.total_steps

    # ---- model -----------------------------------------------------------------------------------------------------
    model = add_lora(load_base(config.base, device), lora, config.seed)
    engine = Engine(model, plan, config, dev_trees, accelerator.backward, rank, n_ranks)
    optimizer = bnb.optim.PagedAdamW8bit(engine.weights, lr=train.lr, weight_decay=train.weight_decay)
    optimizer = accelerator.prepare(optimizer)
    ema = EMA(engine.weights, train.average) if train.average else None
    sha256 = (chosen if config.data.train_share < 1 else train_set).sha256
    settings = adapters.settings_of(config, sha256, identify(config.base), tokenizer_sha256(tokenizers.own))
    training = {"optimizer": optimizer, "scaler": accelerator.scaler, "average": ema}

    # ---- resume, or start ------------------------------------------------------------------------------------------
    run = run or broadcast_object_list([record.new_run(config, "train") if first else None])[0]
    state, lost_best = resume(run, identity, model, training)
    if first:
        checkpoint.claim(run)
        record.cut_metrics(run, state.step, state.evaluated)
    ranks.start_tracker(accelerator, config, run)
    announce(config, run, train_set, built.counts, plan, engine)

    # ---- loop ------------------------------------------------------------------------------------------------------
    def save_last() -> float:
        state.seconds, state.peak = seconds_before + gauges.now(device) - began, gauges.peaks(device, state.peak)
        if first:
            checkpoint.save(run / "last", model, state, settings, training)
        return time.monotonic()

    # Connects the ranks: who is ready first waits here, not in a step.
    ranks.sum_gradients(engine.weights, 0.0).tolist()
    stopping = EarlyStopping(stop, state.best, state.waited)
    bar = Bar(state, plan, dev_trees or None, disable=not first)
    began, seconds_before, signalled, upcoming = gauges.now(device), state.seconds, False, None
    stepping, busy, saved = 0.0, 0.0, time.monotonic()  # seconds of steps alone; of these, with this GPU at work
    with bar, signals.listen() as request, record.Metrics(run, first, accelerator.log) as metrics:
        while not signalled:
            step = state.step
            if step > state.evaluated and stopping.due(step, total, train.eval_every):
                evaluation_began = gauges.now(device)
                with engine.released():  # until what was found is saved
                    with ema.in_place() if ema else contextlib.nullcontext():
                        scored = evaluate(engine, tokenizers, stop_on, request.check, step)
                        state.evaluation_seconds += gauges.now(device) - evaluation_began
                        if signalled := scored is None:
                            continue
                        better = stopping.update(scored.value, replace=step == lost_best)
                        state.evaluated, state.waited = step, stopping.waited
                        if better:
                            state.keep(step, scored.row)
                        if better and first:
                            checkpoint.save(run / "best", model, state, settings)
                            if scored.predictions:
                                write_text(run / "predictions.json", scored.predictions)
                    if first and scored.value is not None:
                        tqdm.write(evaluated(step, scored, stop.split, better), file=sys.stderr)
                    if scored.row:
                        metrics.log({"step": step, **scored.row})
                    saved = save_last()
            elif first and time.monotonic() - saved > SAVE_SECONDS:
                saved = save_last()
            if step == total or stopping.over:
                break

            step_began = gauges.now(device)
            trees, packs = upcoming or engine.prepare(step)
            branches = [branch for tree in trees for branch in tree.branches]
            engine.seed_modules(step)
            # the mean over the whole step's answer tokens (or questions), however it is packed and shared out
            answer_tokens = sum(len(branch.answer_ids) for branch in branches)
            weight = 1 / (answer_tokens if train.loss == "token" else len(branches))
            rate = learning_rate(step, total, train.warmup, train.lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            total_loss = torch.zeros((), device=device)
            with out_of_memory(f"{engine.memory_advice}. What {run} holds is whole"):
                work_began = gauges.mark(device)
                for pack in packs:
                    total_loss += engine(pack, weight)
                work_ended = gauges.mark(device)
                my_tokens = float(sum(pack.n_tokens for pack in packs))
                sums = ranks.sum_gradients(engine.weights, total_loss, my_tokens, request.code > 0)
                norm = accelerator.clip_grad_norm_(engine.weights, train.max_grad_norm)
                on_host = torch.cat([sums, norm.reshape(1)]).to("cpu", non_blocking=True)  # complete after `now`
                upcoming = engine.prepare(step + 1) if step + 1 < total else None  # while the GPU computes
                optimizer.step()  # queued behind the packs; then bitsandbytes waits
                optimizer.zero_grad(set_to_none=False)
                if ema:
                    ema.update()
                now = gauges.now(device)
            loss, tokens, n_signals, grad_norm = on_host.tolist()
            stepping, busy = stepping + now - step_began, busy + gauges.between(work_began, work_ended)
            # fp16's scaler skips the step itself when a gradient overflows
            if not math.isfinite(loss) or (accelerator.scaler is None and not math.isfinite(grad_norm)):
                raise not_finite(step + 1, loss, grad_norm, run, branches, engine.dtype)
            if optimizer.step_was_skipped and accelerator.scaler.get_scale() < 1:
                raise UserError(f"step {step + 1}: gradients overflow fp16 at any scale; try base.dtype=bf16 or fp32")
            state.step, signalled = step + 1, n_signals > 0
            row = {"step": state.step, "loss": loss, "lr": rate, "grad_norm": grad_norm, "questions": len(branches)}
            metrics.log(row | {"tokens": int(tokens), "seconds": round(seconds_before + now - began, 3)})
            bar.set_postfix(loss=f"{loss:.3f}", **stopping.shown, refresh=False)
            bar.update()
        if signalled:
            save_last()
            accelerator.wait_for_everyone()  # a launcher ends the others as soon as one has ended
            accelerator.end_training()
            print(f"stopped after step {state.step}; the same command goes on from {run}")
            sys.exit(request.code or 143)

    # ---- record ----------------------------------------------------------------------------------------------------
    state.seconds, state.peak = seconds_before + gauges.now(device) - began, gauges.peaks(device, state.peak)
    result: TrainResult = {
        "run": str(run),
        "random_weights": config.base.random_weights,
        "selected_on": None if stop.by == "none" else stop.split,
        "n": engine.n_dev,
        "window_counts": built.counts,
        "stopped_early": state.step < total,
        "processes": n_ranks,
        "idle_share": ranks.idle_share(busy, stepping),
        "start_seconds": round(began - started, 1),
        "gpu_bytes": gauges.process_peak(device),
        **state.result(record.questions_trained(run)),
        **engine.result(),
    }
    accelerator.end_training()
    if first:
        record.write(run, config, "train", dev_set, describe_device(device), result, sources(model, tokenizers))
    print(f"{config.title}: {ending(state, result)}\n{json.dumps(result)}")


def resume(
    run: Path, identity: dict[str, str], model: PeftModel, training: Section
) -> tuple[checkpoint.State, int | None]:
    """(the state of `last/`, loaded into model and training; the step of `best/` where that is newer than `last/`).

    `best/` is saved first, so after a crash between the two saves the evaluation of that step replaces it.
    """
    if not (run / "last").exists():
        return checkpoint.State(identity), None
    state, lost_best = checkpoint.load_state(run / "last"), None
    if (run / "best").exists():
        best_step = checkpoint.load_state(run / "best").best_step
        lost_best = best_step if best_step is not None and best_step > state.step else None
    if state.identity != identity:
        raise UserError(f"{run}: the data has changed since this run began; FRESH=1 starts a new one")
    load_weights(model, load_file(run / "last" / "adapter_model.safetensors"), str(run / "last"))
    checkpoint.load_training(run / "last", training)
    print(f"{run}: going on after step {state.step}")
    return state, lost_best


def evaluate(
    engine: Engine, tokenizers: Tokenizers, data: Dataset, check: Callable[[], None], step: int
) -> Evaluation | None:
    """What `early_stop.by` selects the model's weights by; None where a signal stopped a rank (`signals.Stopped`)."""
    config = engine.config
    if config.early_stop.by == "none":
        return Evaluation(None, {})
    if config.early_stop.by == "loss":
        loss = engine.loss(check)
        return None if loss is None else Evaluation(loss, {"dev_loss": loss, "n": engine.n_dev})
    answers = predict.by_all_ranks(engine.model, tokenizers, engine.dev, config, check, step)
    if answers is None:
        return None
    texts = {id_: answer.text for id_, answer in answers.items()}
    scored = score(data.examples, texts)
    em, f1 = (None, None) if config.base.random_weights else (scored.em, scored.f1)
    cut = sum(answer.hit_limit for answer in answers.values()) / len(answers)
    predictions = json.dumps(texts, ensure_ascii=False, indent=0) + "\n"
    return Evaluation(em, {"em": em, "f1": f1, "n": len(texts)}, predictions, cut)


def announce(
    config: Config, run: Path, data: Dataset, window_counts: dict[str, int], plan: Plan, engine: Engine
) -> None:
    trained, frozen = engine.trained_weights, engine.frozen_weights
    processes = f"{engine.ranks} × " if engine.ranks > 1 else ""
    options, what = config.early_stop, "EM"
    if options.by == "loss":
        what = "the loss"
    elif config.base.random_weights:
        what = "no accuracy (random weights), but its time and memory"
    evaluations = f"every {config.train.eval_every} steps {what} on {engine.n_dev} questions of {options.split}"
    if options.by == "none":
        evaluations = "no evaluation, the last weights are kept"
    print(
        f"{config.title} on {processes}{describe_device(engine.device)['name']}, {engine.dtype}: trains {trained:,} "
        f"weights beside {frozen:,} frozen ones ({trained / frozen:.3%})\n"
        f"{data.source}: {window_counts}, {data.fixed_offsets} offsets fixed, {sum(map(len, plan.trees)):,} tokens\n"
        f"{plan.total_steps} steps of ~{config.train.questions_per_step} questions; {evaluations}; run {run}\n"
        f"{engine.description}"
    )
    if config.lora and config.lora.dropout:
        print("lora.dropout > 0: branches share one dropout mask on their prefix; valid training, not equal to rows")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
