"""One decoding stack, one process: answer the questions of a job file, print one JSON line.

    python -m benchmarks.decode_peers ours|hf|unsloth|vllm JOB.json        (started by decode_throughput)

Each answers greedily with the same base, the same unmerged adapter and the same precision. A script, where the job
names one, is what is drawn in place of the most probable tokens, by all alike: for models with random weights, whose
answers mean nothing and never end. Loading, compiling, recording graphs and one warm-up are left out and shown apart.
"""

import json
import os
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from benchmarks.records import DecodeJob, DecodeResult, DecodeRow, Question, reason

import numpy as np

if TYPE_CHECKING:
    from common.decode.answers import Prediction
    from common.model.llama import Model

    from torch import Tensor

os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

FIXED = {"b": 8, "c": 32}  # tokens of these scripts
P = ParamSpec("P")
T = TypeVar("T")


def main(stack: str, job_file: str) -> None:
    job: DecodeJob = json.loads(Path(job_file).read_text())
    result: DecodeResult
    try:
        result = {"hf": hf, "unsloth": unsloth, "vllm": vllm, "ours": ours}[stack](job)
    except Exception as error:  # whatever stands in a peer's way is its result
        result = {"failed": reason(error)}
    print(json.dumps(result), flush=True)


def script_of(question: Question, kind: str, eos: int) -> list[int] | None:
    """The tokens to generate; None where the model decides."""
    if kind in FIXED:  # no token of it follows another in any prompt: drafts are never right
        return [eos + 100 + i for i in range(FIXED[kind])]
    return question["gold"] if kind == "a" else None


def asked(question: Question, kind: str, eos: int) -> tuple[list[int], list[int] | None]:
    """A question's prompt, and the tokens to generate."""
    return question["prefix"] + question["prompt"], script_of(question, kind, eos)


def limit_of(kind: str, job: DecodeJob) -> int:
    """Tokens of an answer at most."""
    return FIXED.get(kind, job["limit"])


def timed(work: Callable[P, T], *args: P.args, **more: P.kwargs) -> tuple[T, float, float]:
    """(result, seconds, peak allocated GiB) of one call."""
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = work(*args, **more)
    if cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - began, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def row(kind: str, batch: int | None, seconds: Sequence[float], n: int, allocated: float | None) -> DecodeRow:
    """The figures of `n` questions; `seconds`: of each call."""
    found: DecodeRow = {
        "kind": kind,
        "batch": batch,
        "questions": n,
        "seconds": sum(seconds),
        "questions_per_s": n / sum(seconds),
        "allocated_gib": allocated,
    }
    if batch == 1:
        found["p50_ms"], found["p95_ms"] = (1000 * float(np.percentile(seconds, q)) for q in (50, 95))
    return found


# ---- the stacks ----------------------------------------------------------------------------------------------------


def ours(job: DecodeJob) -> DecodeResult:
    began = time.perf_counter()
    from common.config import Base, Decode, Eval, Lora
    from common.data.trees import Branch, Tree
    from common.decode import predict, single
    from common.decode.answers import Generation, stop_tokens
    from common.device import pick_device
    from common.model.adapter import add_lora, load_adapter
    from common.model.load import load_base, load_tokenizer

    import torch

    device = pick_device()
    base = Base(**job["base"])
    tokenizer = load_tokenizer(base.tokenizer or base.path)
    model = load_base(base, device)
    if job["adapter"]:
        model = load_adapter(model, Path(job["adapter"]), base)
    elif job["lora"]:
        model = add_lora(model, Lora(**job["lora"]), 0).eval()
    options, questions, eos = Eval(**job["eval"]), job["questions"], tokenizer.eos_token_id
    trees: dict[tuple[str, tuple[int, ...]], list[Branch]] = {}
    for q in questions:
        trees.setdefault((q["context"], tuple(q["prefix"])), []).append(Branch(q["id"], q["prompt"], []))
    paragraphs = [Tree(list(prefix), tuple(branches), context) for (context, prefix), branches in trees.items()]
    of_paragraph: defaultdict[tuple[int, ...], list[Question]] = defaultdict(list)
    for q in questions:
        of_paragraph[tuple(q["prefix"])].append(q)
    ways = {"": Decode(), "as spans": Decode(spans=True)}

    def dev(kind: str, some: list[Tree], way: str = "") -> "dict[str, Prediction]":
        scripts = {q["id"]: s for q in questions if (s := script_of(q, kind, eos))}
        stops = stop_tokens(tokenizer, model, ways[way]) if way else job["stops"]
        limit = limit_of(kind, job)
        return predict.answer_trees(
            model, tokenizer, some, stops, limit, options, None, forced=scripts, decode=ways[way]
        )

    start = {"load_s": time.perf_counter() - began}
    sizes = predict.sizes_of(model, options)._asdict()
    _, start["warm_up_s"], _ = timed(dev, job["kinds"][0], paragraphs[:20])
    rows: list[DecodeRow] = []
    answers: dict[str, list[int]] = {}
    answers_alone: dict[str, list[int]] = {}
    ties = 0
    for kind in job["kinds"]:
        tries: dict[str, list[tuple[dict[str, Prediction], float, float]]] = {way: [] for way in ways}
        for _ in range(job["rounds"]):
            for way, done in tries.items():
                done.append(timed(dev, kind, paragraphs, way))
        for way, done in tries.items():
            found, rounds = done[0][0], [took for _, took, _ in done]
            rows.append(row(kind, None, [statistics.median(rounds)], len(found), max(peak for *_, peak in done)))
            rows[-1] |= {"rounds_s": rounds, "tokens": statistics.mean(len(a.token_ids) for a in found.values())}
            if way:
                rows[-1]["way"] = way
            elif kind == "natural":
                answers = {id_: a.token_ids for id_, a in found.items()}
                ties = sum(a.ties or 0 for a in found.values())
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for kind in job["kinds"]:
        engine, seconds, _ = timed(single.Single, model, job["stops"], limit_of(kind, job), job["window"])
        start[f"record_s {kind}"] = seconds
        for way in ("", "paragraph kept"):  # from the question before, where the prompt begins with it
            alone: list[Generation] = []
            allocated, took = 0.0, []
            engine.keeps_prompt = bool(way)
            for q in job["alone"]:
                others = of_paragraph[tuple(q["prefix"])] if q["prefix"] else []
                before = next((x for x in others if x["id"] != q["id"]), None)
                if not alone or (way and before):  # the first one is a warm-up
                    engine.answer(*asked(before or q, kind, eos))
                if way and not before:
                    continue
                answer, seconds, peak = timed(engine.answer, *asked(q, kind, eos))
                alone.append(answer)
                took.append(seconds)
                allocated = max(allocated, peak)
            if not alone:
                continue
            drafted = sum(a.drafted for a in alone)
            share = sum(a.accepted for a in alone) / drafted if drafted else None
            passes = sum(a.passes for a in alone) / len(alone)
            rows.append({**row(kind, 1, took, len(took), allocated), "drafts_accepted": share, "passes": passes})
            if way:
                rows[-1]["way"] = way
            elif kind == "natural":
                answers_alone = {q["id"]: a.token_ids for q, a in zip(job["alone"], alone, strict=True)}
        del engine
    return {
        "rows": rows,
        "answers": answers,
        "answers_alone": answers_alone,
        "ties": ties,
        "start": start,
        "sizes": sizes,
        "versions": versions(),
    }


def hf(job: DecodeJob) -> DecodeResult:
    began = time.perf_counter()
    from benchmarks.peers import load

    from peft import LoraConfig, PeftModel, get_peft_model

    model = load(job["model"])
    model.config.use_cache = True
    if job["adapter"]:
        model = PeftModel.from_pretrained(model, job["adapter"])
    elif job["lora"]:
        model = get_peft_model(
            model,
            LoraConfig(
                r=job["lora"]["rank"],
                lora_alpha=job["lora"]["alpha"],
                target_modules=job["lora"]["targets"],
                task_type="CAUSAL_LM",
            ),
        )
    return generate(model.eval(), job, began)


def unsloth(job: DecodeJob) -> DecodeResult:
    began = time.perf_counter()
    import torch
    import unsloth as stack  # before transformers, which it patches

    model, _ = stack.FastLanguageModel.from_pretrained(
        job["adapter"] or job["model"], max_seq_length=job["window"], dtype=torch.bfloat16, load_in_4bit=True
    )
    if job["lora"] and not job["adapter"]:
        model = stack.FastLanguageModel.get_peft_model(
            model, r=job["lora"]["rank"], lora_alpha=job["lora"]["alpha"], target_modules=job["lora"]["targets"]
        )
    stack.FastLanguageModel.for_inference(model)
    return generate(model, job, began)


def generate(model: "Model", job: DecodeJob, began: float) -> DecodeResult:
    """Figures of transformers' `generate`, rows padded on the left; in each batch rows of similar lengths."""
    import torch
    from transformers import LogitsProcessorList

    device, eos = next(model.parameters()).device, job["eos"]

    def answer(batch: list[Question], kind: str) -> list[list[int]]:
        prompts = [q["prefix"] + q["prompt"] for q in batch]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        scripts = [script for q in batch if (script := script_of(q, kind, eos))]  # of all or none

        def forced(seen: "Tensor", scores: "Tensor") -> "Tensor":
            at = seen.shape[1] - width
            wanted = torch.tensor([s[at] if at < len(s) else eos for s in scripts], device=device)
            return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)

        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=limit_of(kind, job),
            do_sample=False,
            pad_token_id=eos,
            eos_token_id=job["stops"],
            logits_processor=LogitsProcessorList([forced] if scripts else []),
        )
        stops, answers = set(job["stops"]), []
        for tokens in out[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
            answers.append(tokens[:end])
        return answers

    start = {"load_s": time.perf_counter() - began}
    rows: list[DecodeRow] = []
    answers: dict[str, list[int]] = {}
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        _, start["warm_up_s"], _ = timed(answer, job["alone"][:1], job["kinds"][0])
        for kind in job["kinds"]:
            for batch in job["batches"]:
                of = job["alone"] if batch == 1 else job["batched"]
                some = sorted(of[: job["counts"][str(batch)]], key=lambda q: len(q["prefix"] + q["prompt"]))
                seconds, allocated, n = [], 0.0, 0
                try:
                    for i in range(0, len(some) - batch + 1, batch):
                        part = some[i : i + batch]
                        found, took, peak = timed(answer, part, kind)
                        seconds.append(took)
                        n, allocated = n + len(part), max(allocated, peak)
                        if kind == "natural" and batch == 1:
                            answers[part[0]["id"]] = found[0]
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    continue
                if seconds:
                    rows.append(row(kind, batch, seconds, n, allocated))
    return {"rows": rows, "answers": answers, "start": start, "versions": versions()}


def vllm(job: DecodeJob) -> DecodeResult:
    """vLLM's offline engine, with a trained adapter beside the base; an untrained one is not handed to it.

    It follows no script, so (a) is left out. Its memory is another process's, and reserved ahead: not reported.
    """
    began = time.perf_counter()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        job["model"],
        quantization="bitsandbytes",
        enable_lora=bool(job["adapter"]),
        max_model_len=job["window"],
        enable_prefix_caching=True,
    )
    lora = LoRARequest("adapter", 1, job["adapter"]) if job["adapter"] else None
    start = {"load_s": time.perf_counter() - began}
    rows: list[DecodeRow] = []

    def ask(questions: list[Question], sampling: SamplingParams) -> None:
        prompts = [{"prompt_token_ids": q["prefix"] + q["prompt"]} for q in questions]
        engine.generate(prompts, sampling, lora_request=lora, use_tqdm=False)

    for kind in job["kinds"]:
        if kind == "a":
            continue
        sampling = SamplingParams(
            temperature=0, max_tokens=limit_of(kind, job), stop_token_ids=job["stops"], ignore_eos=kind in FIXED
        )
        ask(job["alone"][:1], sampling)
        took = []
        for q in job["alone"]:
            engine.reset_prefix_cache()
            took.append(timed(ask, [q], sampling)[1])
        rows.append(row(kind, 1, took, len(took), None))
        engine.reset_prefix_cache()
        _, seconds, _ = timed(ask, job["questions"], sampling)
        rows.append(row(kind, None, [seconds], len(job["questions"]), None))
    return {"rows": rows, "answers": {}, "start": start, "versions": versions()}


def versions() -> dict[str, str]:
    from benchmarks.peers import PACKAGES, installed

    return installed((*PACKAGES, "vllm"))


if __name__ == "__main__":
    main(*sys.argv[1:])
