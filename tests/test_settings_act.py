"""Each setting changes what it should, in a training and in an evaluation, and nothing else.

What is seen of a run is taken apart below (`trained`, `evaluated`). A row of a table says which of these parts another
value changes; all others must stay as they were.
"""

import contextlib
import functools
import io
import itertools
import json

import eval_loop
import train_loop
from common.config import Config
from common.config_file import known_keys
from common.model.pack import build_pack
from common.train import engine
from tests import answering
from tests.conftest import answering_yaml

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

TRAIN = "train.max_steps=2 train.eval_every=2 early_stop.questions=12 train.lr=2e-2"
MODULES = "train.fused=false"
NARROW = "window.context=24 window.stride=20"
CHUNK = f"{NARROW} window.overflow=chunk"
ALL = "train.questions_per_step=48 train.max_steps=1 train.eval_every=1"
NBEST = "decode.spans=true decode.nbest=9"
HELDOUT = "early_stop.split=heldout"
LONG = "train.max_steps=3 train.eval_every=1 train.lr=1e-12"

TRAINING = [  # key, another value, beside what else, what changes
    ("seed", "1", "", "order tokens loss norm weights"),
    ("base.quant", "none", "", "loss norm weights"),
    ("base.double_quant", "false", "", "loss norm weights"),
    ("base.dtype", "bf16", "", "loss norm weights"),
    ("base.revision", "other", "", ""),  # of a folder there is one alone
    ("lora.rank", "8", "", "norm weights"),
    ("lora.alpha", "16", "", "norm weights"),
    ("lora.dropout", "0.3", "", "norm weights"),
    ("lora.dropout", "0.3", MODULES, "norm weights"),
    ("lora.targets", "[q_proj, v_proj]", MODULES, "norm weights"),
    ("data.train_paragraphs", "9", "", "order tokens loss norm weights window"),
    ("data.dev_questions", "9", "", "asked"),
    ("data.train_share", "0.5", "", "order tokens loss norm weights window"),
    ("data.train_unit", "question", "data.train_share=0.5", "order tokens loss norm weights"),
    ("window.context", "24", "window.stride=20", "order tokens loss norm weights window"),
    ("window.question", "16", ALL, "tokens weights"),
    ("window.answer", "16", ALL, "order tokens loss norm weights window"),
    ("window.overflow", "chunk", NARROW, "order tokens loss norm weights window"),
    ("window.stride", "8", CHUNK, "order tokens loss norm weights"),
    ("prompt.order", "both", "", "order tokens loss norm weights"),
    ("train.lr", "1e-2", "", "rates weights"),
    ("train.epochs", "0.25", "train.max_steps=9", "order tokens rates weights kept evaluations"),
    ("train.questions_per_step", "16", "", "order tokens loss norm weights"),
    ("train.pack_tokens", "64", "", "tokens"),
    ("train.memory_budget_gib", "4", "", ""),
    ("train.loss", "question", "", "loss norm weights"),
    ("train.label_smoothing", "0.2", "", "loss norm weights"),
    ("train.share_prefixes", "false", "", "tokens weights"),  # whose bits the optimizer sees
    ("train.fused", "false", "", "weights"),  # the optimizer's 8-bit blocks lie elsewhere
    ("train.warmup", "1.0", "", "rates weights"),
    ("train.weight_decay", "0.5", "", "weights"),
    ("train.average", "0.9", "", "kept"),
    ("train.max_grad_norm", "1e-6", "", "weights"),
    ("train.gradient_checkpointing", "false", MODULES, ""),
    ("train.eval_every", "1", "", "kept evaluations"),
    ("train.max_steps", "3", "", "order tokens rates weights kept evaluations"),
    ("early_stop.patience", "1", LONG, "order tokens rates weights evaluations"),
    ("early_stop.split", "heldout", "", "order tokens loss norm weights window asked"),
    ("early_stop.heldout_share", "0.5", HELDOUT, "order tokens loss norm weights window asked"),
    ("early_stop.questions", "13", "", "asked"),
    ("early_stop.by", "loss", "", "asked evaluations"),
    ("early_stop.by", "none", "", "asked evaluations"),
    ("eval.engine", "plain", "", ""),
    ("eval.memory_budget_gib", "3", "", ""),
    ("eval.pass_tokens", "64", "", ""),
    ("eval.parts", "3", "", ""),
    ("bench.queries", "3", "", ""),
    ("bench.warmup_queries", "3", "", ""),
    ("bench.processes", "2", "", ""),
]


EVALUATION = [
    ("seed", "1", "", ""),
    ("base.quant", "none", "", "logprob"),
    ("base.double_quant", "false", "", "logprob"),
    ("base.dtype", "bf16", "", "logprob"),
    ("data.dev_questions", "9", "", "asked data answers logprob"),
    ("data.split", "heldout", "", "asked data answers logprob"),
    ("window.context", "24", "window.stride=20", "window answers logprob cut"),
    ("window.question", "16", "", "window logprob"),
    ("window.answer", "16", "", "window answers logprob"),
    ("window.overflow", "chunk", NARROW, "window answers logprob"),
    ("window.stride", "8", CHUNK, "window logprob"),
    ("prompt.order", "both", "", "prompt logprob"),
    ("prompt.chat", "true", "", "prompt logprob"),
    ("prompt.shots", "2", "", "prompt answers logprob"),
    ("prompt.shots_seed", "1", "prompt.shots=2", "prompt answers logprob"),
    ("prompt.earlier", "true", "", "prompt logprob"),
    ("prompt.before", "Note", "", "prompt logprob"),
    ("prompt.template", '"{context} Note {question}"', "", "prompt answers logprob"),
    ("decode.spans", "true", "", "decoding answers logprob"),
    ("decode.whole_words", "true", "decode.spans=true", "decoding answers logprob"),
    ("decode.max_tokens", "1", "", "decoding answers logprob"),
    ("decode.stop", "eos", "", "decoding"),  # this model says nothing behind a line break: test_predict
    ("decode.snap", "true", "", "decoding answers"),
    ("decode.nbest", "4", "decode.spans=true", "decoding answers logprob"),
    ("decode.choose", "risk", f"{NBEST} decode.length_exponent=1", "decoding answers logprob"),
    ("decode.length_exponent", "2", NBEST, "decoding answers logprob"),
    ("eval.engine", "plain", "", "engine"),
    ("eval.memory_budget_gib", "3", "", ""),
    ("eval.pass_tokens", "64", "", ""),
    ("eval.parts", "3", "", ""),
    ("train.lr", "1", "", ""),
    ("bench.queries", "3", "", ""),
]
ELSEWHERE = {  # key → the test that shows what it does
    "system": "test_record",
    "adapter": "test_record",
    "runs": "test_record",
    "tracker": "test_train_loop",
    "base.path": "test_model",
    "base.tokenizer": "test_model",
    "base.random_weights": "test_init",
    "base.min_gpu_gib": "test_preflight",
    "early_stop.min_delta": "test_train_loop",
    "data.train": "test_squad",
    "data.dev": "test_squad",
    "data.fix_offsets": "test_squad",
    "window.tokenizer": "test_prompt",
    "api.": "test_api",
    "ask.least": "test_ask",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, answering_base):
    """Trains or evaluates with overrides, each once; returns what is seen of it, by part."""
    folder = tmp_path_factory.mktemp("settings")
    config, numbers = answering_yaml(folder, answering_base), itertools.count()
    for name, seed in (("train", 0), ("dev", 1)):
        _spoil(answering.squad_file(folder / f"answering-{name}.json", paragraphs=16, seed=seed))

    @functools.cache
    def of(seen, *words: str) -> dict:
        packed = []
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.setattr(engine, "build_pack", lambda trees: packed.append(build_pack(trees)) or packed[-1])
            where = folder / "runs" / str(next(numbers))
            AcceleratorState._reset_state()  # one precision a process, and this may be the second run of a test
            {trained: train_loop, evaluated: eval_loop}[seen].main([str(config), *words, f"runs={where}"])
        return seen(*where.iterdir(), iter([id_ for p in packed for id_ in p.ids]))

    of.config = config
    return of


def _spoil(file) -> None:
    """What the window meets: a long context, a long question, a long answer."""
    found = json.loads(file.read_text())
    first, second, third = (found["data"][a]["paragraphs"][0] for a in range(3))
    first["context"] = "Here are more words than some windows hold. " + first["context"]
    second["qas"][0]["question"] = "Which animal is meant" + ", of all that are here" * 4 + "?"
    third["qas"][0]["answers"] = [{"text": third["context"], "answer_start": 0}]
    for qa in first["qas"]:
        qa["answers"][0]["answer_start"] += 44
    file.write_text(json.dumps(found))


def trained(run, ids) -> dict:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, result = [row for row in rows if "loss" in row], json.loads((run / "record.json").read_text())["result"]
    answers = run / "predictions.json"  # there is none where EM does not select
    last, best = (load_file(run / name / "adapter_model.safetensors") for name in ("last", "best"))
    return {
        "order": [sorted(itertools.islice(ids, row["questions"])) for row in steps],
        "tokens": [row["tokens"] for row in steps],
        "loss": steps[0]["loss"],
        "norm": steps[0]["grad_norm"],
        "rates": [row["lr"] for row in steps],
        "evaluations": [row["step"] for row in rows if "em" in row],
        "asked": sorted(json.loads(answers.read_text())) if answers.exists() else None,
        "window": result["window_counts"],
        "weights": last,
        "kept": all(torch.equal(last[key], best[key]) for key in last),
    }


def evaluated(run, ids) -> dict:
    record = json.loads((run / "record.json").read_text())
    rows = [json.loads(line) for line in (run / "questions.jsonl").read_text().splitlines()]
    must, result = record["must_match"], record["result"]
    return {
        **{key: must.get(key) for key in ("data", "prompt", "window", "decoding")},
        "asked": [row["id"] for row in rows],
        "answers": [row["text"] for row in rows],
        "logprob": [row["logprob"] for row in rows],
        "cut": result["truncated_share"],
        "engine": record["may_differ"]["engine"],
    }


def same(a, b) -> bool:
    if isinstance(a, dict) and any(isinstance(value, torch.Tensor) for value in a.values()):
        if {key: value.shape for key, value in a.items()} != {key: value.shape for key, value in b.items()}:
            return False
        return all((a[key] - b[key]).norm() <= 1e-4 * a[key].norm() for key in a)
    if isinstance(a[0] if isinstance(a, list) else a, float):
        return a == pytest.approx(b, rel=1e-4)
    return a == b


def changed(runs, seen, common: str, key: str, value: str, beside: str) -> set[str]:
    words = (*common.split(), *beside.split())
    before, after = runs(seen, *words), runs(seen, *words, f"{key}={value}")
    return {part for part in before if not same(before[part], after[part])}


@pytest.mark.parametrize(("key", "value", "beside", "parts"), TRAINING, ids=lambda v: v)
def test_a_setting_changes_of_a_training_what_it_should(runs, key, value, beside, parts):
    assert changed(runs, trained, TRAIN, key, value, beside) == set(parts.split())


@pytest.mark.parametrize(("key", "value", "beside", "parts"), EVALUATION, ids=lambda v: v)
def test_a_setting_changes_of_an_evaluation_what_it_should(runs, key, value, beside, parts):
    assert changed(runs, evaluated, "lora=null", key, value, beside) == set(parts.split())


def test_a_training_evaluates_freely_and_says_so(runs, capsys):
    """It is the same training, and its answers are the same."""
    folders = []
    for words in ([], ["decode.max_tokens=1"]):
        config = runs.config
        train_loop.main([str(config), *TRAIN.split(), *words, f"runs={config.parent / f'free{len(words)}'}"])
        folders += (config.parent / f"free{len(words)}").iterdir()
    free, limited = folders
    assert free.name == limited.name
    assert (free / "predictions.json").read_text() == (limited / "predictions.json").read_text()
    records = [json.loads((folder / "record.json").read_text()) for folder in folders]
    assert records[0]["must_match"] == records[1]["must_match"]
    assert records[1]["config"]["decode"]["max_tokens"] == 1, "what is asked of it later may be otherwise"
    assert "note: decode is of evaluations" in capsys.readouterr().err


def test_every_setting_is_in_a_table():
    here = {key for key, *_ in (*TRAINING, *EVALUATION)}
    missing = [key for key in known_keys(Config) if key not in here and not key.startswith(tuple(ELSEWHERE))]
    assert missing == []
