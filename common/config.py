"""The configuration of one system: every key, its unit, its default and its limits. `common.config_file` reads it.

Imports no torch.
"""

import dataclasses
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from common.config_file import read, shown
from common.errors import UserError
from common.files import ROOT
from common.words import nearest

CONFIGS = ROOT / "configs"
T = TypeVar("T")
MANY = 10**9  # of anything that is counted; more is a slip of the finger
NAME, PATH = 255, 4095  # bytes of a file's name, and of a path: what Linux takes


def need(holds: bool, key: str, what: str) -> None:
    if not holds:
        raise UserError(f"{key}: {what}")


def between(section: object, **bounds: tuple[float, float]) -> None:
    for key, (low, high) in bounds.items():
        value = getattr(section, key)
        need(value in (None, "auto") or low <= value <= high, key, f"must be between {low:,} and {high:,}")


def later(default: T) -> T:
    """The default of a key that is newer than published records: it must keep the behaviour of before.

    Hashes count such a key only where it differs from its default, so new keys orphan no run.
    """
    return field(default=default, metadata={"later": True})


def plain_words(section: object, *keys: str) -> None:
    """Names, and paths of files: neither empty, nor longer than Linux takes, nor with control characters."""
    for key in keys:
        value = getattr(section, key)
        if value is None:
            continue
        need(value.strip() != "", key, "must not be empty")
        control = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in value)
        need(not control, key, "must have no control characters and no line breaks")
        fits = len(value.encode()) <= PATH and all(len(name.encode()) <= NAME for name in value.split("/"))
        need(fits, key, f"too long: a name has at most {NAME} bytes, a path {PATH}")


@dataclass(frozen=True)
class Base:
    path: str  # hub id or folder of the frozen base model and its tokenizer
    revision: str = "main"  # hub revision; unused for a folder
    tokenizer: str | None = None  # hub id or folder; null: the one beside the base
    random_weights: bool = False  # only the shapes of `path`, with random weights: for speed and memory, no accuracy
    quant: Literal["nf4", "fp4", "none"] = "nf4"  # storage of the frozen linear layers
    double_quant: bool = True  # quantise the quantisation constants too
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # compute; auto: bf16 or fp16 on a GPU, fp32 on a CPU
    min_gpu_gib: float = 0.0  # smallest GPU memory that training and evaluation fit in, ≤ 10,000; 0: a CPU does too

    def __post_init__(self) -> None:
        plain_words(self, "path", "revision", "tokenizer")
        between(self, min_gpu_gib=(0, 10_000))


@dataclass(frozen=True)
class Lora:
    rank: int = 16  # columns of B and rows of A, 1 to 4,096
    alpha: float = 16.0  # the update is scaled by alpha / rank; 0.001 to a million
    dropout: float = 0.0  # on the adapter's input, [0, 1); above 0 branches share their prefix's mask: not as rows
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        between(self, rank=(1, 4096), alpha=(0.001, 10**6))
        need(0 <= self.dropout < 1, "dropout", "must be in [0, 1)")
        need(len(self.targets) > 0, "targets", "name at least one layer")
        named = all(re.fullmatch(r"[A-Za-z0-9_.-]{1,255}", name) for name in self.targets)
        need(named, "targets", "no layer is called like that")
        need(len(set(self.targets)) == len(self.targets), "targets", "name each layer once")


@dataclass(frozen=True)
class Data:
    train: str = "rajpurkar/squad"  # SQuAD v1.1 JSON (plain or .gz), or a hub id; SQUAD_DIR wins over this one
    dev: str = "rajpurkar/squad"  # the same for the dev split
    train_paragraphs: int | None = None  # only the first N paragraphs, 1 to a billion; null: all
    dev_questions: int | None = None  # only a fixed, article-stratified N, 1 to a billion; null: all
    fix_offsets: bool = False  # repair an answer_start that is off, and count it
    # share of the train questions that train_paragraphs and early_stop.split leave, (0, 1]; the same ones for all seeds
    train_share: float = later(1.0)
    train_unit: Literal["article", "question"] = later("article")  # what the share takes: whole articles, or questions
    # what an evaluation scores: dev, or the articles that early_stop.split=heldout takes out of train, for choices
    split: Literal["dev", "heldout"] = later("dev")

    def __post_init__(self) -> None:
        plain_words(self, "train", "dev")
        need(0 < self.train_share <= 1, "train_share", "must be in (0, 1]")
        between(self, train_paragraphs=(1, MANY), dev_questions=(1, MANY))


@dataclass(frozen=True)
class Window:  # each of the three 16 to a million tokens
    context: int = 416  # most tokens of "Context: …", BOS included
    question: int = 64  # most tokens of "\n\nQuestion: …\n\nAnswer:"
    answer: int = 32  # most tokens of an answer: trained on with EOS, decoded at most
    overflow: Literal["truncate", "chunk"] = "truncate"  # a longer context: keep its head, or read it in windows
    stride: int = 208  # chunk: tokens from one window's start to the next's
    tokenizer: str | None = None  # cuts the text for every system alike; null: the system's own

    @property
    def tokens(self) -> int:
        """The whole window: what one question may take, in tokens."""
        return self.context + self.question + self.answer

    def __post_init__(self) -> None:
        between(self, context=(16, 10**6), question=(16, 10**6), answer=(16, 10**6))
        plain_words(self, "tokenizer")
        need(1 <= self.stride <= self.context, "stride", "must be between 1 and window.context")


@dataclass(frozen=True)
class Prompt:
    order: Literal["context", "question", "both"] = "context"  # what comes first; both: the question before and after
    chat: bool = False  # as one message of a user, in the model's own chat template; for models that were tuned to chat
    shots: int = 0  # questions of train, answered, in front: each with its paragraph, beside the window; ≤ 1,000
    shots_seed: int = 0  # which ones, [0, 2^32)
    earlier: bool = False  # the earlier questions of the paragraph and their gold answers before each: another task
    before: str = ""  # what stands in front of every prompt: the shots, filled in where they are asked for
    template: str = later("")  # another tool's prompt, with {context} and {question} once each; "": this project's

    def __post_init__(self) -> None:
        between(self, shots=(0, 1000))
        need(0 <= self.shots_seed < 2**32, "shots_seed", "must be in [0, 2^32)")
        need(not self.earlier or self.order == "context", "earlier", "needs order=context")
        places = [self.template.count(name) for name in ("{context}", "{question}")]
        need(not self.template or places == [1, 1], "template", "must hold {context} and {question}, once each")
        alone = self.order == "context" and not self.earlier
        need(not self.template or alone, "template", "decides the order, so order=context; not with earlier")

    def spare(self, window: Window) -> int:
        """Tokens of `window.context` that are not the context's: a second question's, and 4 as seams may cost more."""
        return {"context": 0, "question": 4, "both": 4 + window.question}[self.order]


@dataclass(frozen=True)
class Train:
    lr: float = 2e-4  # peak learning rate, 1e-12 to 100
    epochs: float = 1.0  # passes over the train set, 0.0001 to 10,000
    questions_per_step: int = 64  # the batch size: questions of one optimizer step, 1 to a million
    pack_tokens: int | None = None  # tokens of one micro-batch, 64 to a million; null: by device, fused and budget
    # what the process may take of its GPU, as nvidia-smi shows it, 0.001 to 10,000; auto: what is free when it starts;
    # null: what gradient_checkpointing takes. Layers that are not fused go by gradient_checkpointing
    memory_budget_gib: float | Literal["auto"] | None = "auto"
    loss: Literal["token", "question"] = "token"  # mean over a step's answer tokens, or over its questions' own means
    label_smoothing: float = 0.0  # share of each target that goes to all tokens alike, [0, 1)
    share_prefixes: bool = True  # false: every question reads its paragraph anew, in the same steps; to compare with
    fused: bool = True  # compute Llama layers by common/train/fused.py; false: by transformers' and PEFT's modules
    warmup: float = 0.03  # share of the steps in which the rate rises, [0, 1]
    weight_decay: float = 0.0  # times the rate, per step; ≤ 100
    average: float = 0.0  # decay of a running mean of the weights, which is what is kept, [0, 1); 0: keep the last
    max_grad_norm: float = 1.0  # clip the gradient's norm to this, 1e-9 to a billion
    gradient_checkpointing: bool = True  # without a budget: recompute activations (less memory, more time) or not
    eval_every: int = 250  # steps between two evaluations (and saves), 1 to a billion
    max_steps: int | None = None  # stop here at the latest, 1 to a billion; the schedule ends here too

    def __post_init__(self) -> None:
        between(self, lr=(1e-12, 100), epochs=(1e-4, 10_000), questions_per_step=(1, 10**6), pack_tokens=(64, 10**6))
        between(self, memory_budget_gib=(0.001, 10_000), warmup=(0, 1), weight_decay=(0, 100))
        between(self, max_grad_norm=(1e-9, MANY), eval_every=(1, MANY), max_steps=(1, MANY))
        need(0 <= self.average < 1, "average", "must be in [0, 1)")
        need(0 <= self.label_smoothing < 1, "label_smoothing", "must be in [0, 1)")


@dataclass(frozen=True)
class EarlyStop:
    patience: int = 4  # evaluations without a gain before training stops, 1 to a billion
    min_delta: float = 0.1  # smallest gain in EM points that counts, [0, 100]; by loss any decrease does
    split: Literal["dev", "heldout"] = "dev"  # heldout: whole articles taken out of train
    heldout_share: float = 0.05  # heldout: share of the train questions, [0.0001, 0.5]
    questions: int | None = None  # a fixed, article-stratified N of that split, 1 to a billion; null: all of it
    # the weights that are kept: of the highest EM; of the least loss per answer token (teacher-forced, unsmoothed, of
    # first golds that the window holds); none: the last, without evaluations and early stopping
    by: Literal["em", "loss", "none"] = later("em")

    def __post_init__(self) -> None:
        between(self, patience=(1, MANY), min_delta=(0, 100), heldout_share=(1e-4, 0.5), questions=(1, MANY))


@dataclass(frozen=True)
class Decode:  # what an answer may be, in evaluations, timings and questions; a training evaluates freely
    spans: bool = later(False)  # only what stands in the context that was read, by construction
    whole_words: bool = later(False)  # with spans: of whole words, as they are read: a window may cut its last one
    max_tokens: int | None = later(None)  # of an answer, 1 to fewer than window.answer
    stop: Literal["line", "eos"] = later("line")  # an answer ends at a line break too, or at EOS alone
    snap: bool = later(False)  # afterwards: an answer becomes the span of the context that is most like it
    nbest: int | None = later(None)  # with spans: search for the N most probable answers, 1 to 100; null: greedily
    # of those: the greatest probability, summed over equal strings; the greatest expected F1; the most probable tokens
    choose: Literal["mass", "risk", "path"] = later("mass")
    length_exponent: float = later(0.0)  # to choose, log-probabilities are divided by tokens ** this, [0, 2]

    def __post_init__(self) -> None:
        between(self, max_tokens=(1, 10**6), nbest=(1, 100), length_exponent=(0, 2))
        need(self.spans or self.nbest is None, "nbest", "needs decode.spans=true")
        need(self.nbest is not None or self.choose == "mass", "choose", "needs decode.nbest")
        need(self.nbest is not None or self.length_exponent == 0, "length_exponent", "needs decode.nbest")
        need(self.spans or not self.whole_words, "whole_words", "needs decode.spans=true")
        need(not self.spans or self.stop == "line", "stop", "with decode.spans a line break is text like any other")
        need(not self.spans or not self.snap, "snap", "with decode.spans every answer is a span already")


@dataclass(frozen=True)
class Ask:
    least: float = later(0.0)  # the confidence below which no answer is given, by the adapter's calibration, [0, 1]

    def __post_init__(self) -> None:
        between(self, least=(0, 1))


@dataclass(frozen=True)
class Eval:
    engine: Literal["auto", "plain"] = "auto"  # plain: transformers' and PEFT's modules, as for all but Llamas
    memory_budget_gib: float | Literal["auto"] = 12.0  # as of train, 0.001 to 10,000; less where less is free
    pass_tokens: int | None = None  # tokens of one forward pass, 64 to a million; null: by device and memory
    parts: int | None = None  # 1 to 1,024, read each apart: N processes answer as one, to the bit; null: fastest

    def __post_init__(self) -> None:
        between(self, memory_budget_gib=(0.001, 10_000), pass_tokens=(64, 10**6), parts=(1, 1024))


@dataclass(frozen=True)
class Bench:
    queries: int = 1000  # timed single queries, drawn article by article from dev; 1 to a million
    warmup_queries: int = 10  # before the clock starts, ≤ a million
    processes: int = 3  # fresh ones, one after the other; 1 to 100

    def __post_init__(self) -> None:
        between(self, queries=(1, 10**6), warmup_queries=(0, 10**6), processes=(1, 100))


# of a request to a hosted model, beside model and prompt
FIELDS = ("temperature", "max_tokens", "stop", "stream", "stream_options", "logprobs")


@dataclass(frozen=True)
class Api:
    url: str  # of an OpenAI-compatible endpoint, up to and with /v1; `base.path` is the model's name there
    key: str = "API_KEY"  # the environment variable that holds the key; where it is unset, none is sent
    concurrency: int = 8  # requests at a time in an evaluation, 1 to 1,000; single queries are timed one by one
    tries: int = 8  # of a request that met 429, 5xx, a timeout or an answer that did not end; 1 to 1,000
    timeout_s: float = 60.0  # of connecting, and of waiting for the next bytes; 0.001 to 86,400 (a day)
    usd_per_million_read: float = 0.0  # price of tokens of prompts, ≤ a million
    usd_per_million_written: float = 0.0  # price of tokens of answers, ≤ a million
    max_requests: int | None = None  # of a run, every try counted, ≤ a billion; null: no limit
    max_cost_usd: float | None = None  # of a run, by the two prices, ≤ a billion; null: no limit
    # fields of a request that the host refuses: "stop" leaves it out, "max_tokens=max_completion_tokens" renames it
    omit: tuple[str, ...] = later(())
    logprobs: bool = later(False)  # ask for the answer tokens' log-probabilities, which confidence needs; another run

    def __post_init__(self) -> None:
        for word in self.omit:
            known = word.partition("=")[0] in FIELDS and re.fullmatch(r"[a-z_]+(=[A-Za-z_][A-Za-z0-9_]{0,99})?", word)
            need(bool(known), "omit", f'"{word[:100]}" is none of {", ".join(FIELDS)}; FIELD=NAME renames one')
        fields = [word.partition("=")[0] for word in self.omit]
        need(len(set(fields)) == len(fields), "omit", "name each field once")
        need(_is_url(self.url), "url", "must begin with http:// or https://, and name a host")
        variable = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", self.key) is not None
        need(variable, "key", "is the name of an environment variable, not what it holds")
        between(self, concurrency=(1, 1000), tries=(1, 1000), timeout_s=(0.001, 86_400), max_requests=(0, MANY))
        between(self, usd_per_million_read=(0, 10**6), usd_per_million_written=(0, 10**6), max_cost_usd=(0, MANY))
        priced = self.usd_per_million_read > 0 or self.usd_per_million_written > 0
        need(self.max_cost_usd is None or priced, "max_cost_usd", "needs the prices: usd_per_million_read, …_written")


@dataclass(frozen=True)
class Config:
    system: str  # the name in tables, run folders and `MODEL=`: letters, digits, - and _, at most 100
    base: Base
    seed: int = 0  # sampler order, LoRA init, dropout; [0, 2^32)
    lora: Lora | None = None  # null: the base as it is
    api: Api | None = None  # null: the base runs here
    adapter: str | None = None  # folder of a trained adapter; null: of the newest finished training like this
    data: Data = field(default_factory=Data)
    window: Window = field(default_factory=Window)
    prompt: Prompt = field(default_factory=Prompt)
    train: Train = field(default_factory=Train)
    early_stop: EarlyStop = field(default_factory=EarlyStop)
    decode: Decode = field(default=Decode(), metadata={"later": True})
    ask: Ask = field(default=Ask(), metadata={"later": True})
    eval: Eval = field(default_factory=Eval)
    bench: Bench = field(default_factory=Bench)
    runs: str = "runs"  # where run folders go
    tracker: str | None = None  # tensorboard, wandb or another that Accelerate knows; null: metrics.jsonl alone

    def __post_init__(self) -> None:
        named = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", self.system) is not None
        need(named, "system", "use letters, digits, - and _, at most 100")
        plain_words(self, "adapter", "runs", "tracker")
        need(0 <= self.seed < 2**32, "seed", "must be in [0, 2^32)")
        left = self.window.context - self.prompt.spare(self.window)
        need(left >= 16, "prompt", f"in this order {left} tokens are left for the context; raise window.context")
        need(self.adapter is None or self.api is None, "adapter", "a hosted model has none of ours")
        need(self.api is None or self.lora is None, "api", "a hosted model has no lora section")
        need(
            self.api is None or self.window.tokenizer is not None, "window.tokenizer", "an api needs one to cut text by"
        )
        need(self.api is None or self.window.overflow == "truncate", "window.overflow", "an api reads one window")
        hosted, decode = self.api is not None, self.decode
        fewer = (decode.max_tokens or 0) < self.window.answer
        need(fewer, "decode.max_tokens", f"must be less than window.answer, which is {self.window.answer}")
        need(
            not hosted or not decode.spans, "decode.spans", "a hosted model chooses its tokens itself; decode.snap can"
        )
        need(not hosted or self.ask.least == 0, "ask.least", "needs a calibration, which adapters have")
        need(not hosted or decode.stop == "line", "decode.stop", "a hosted model is asked to stop at a line break")
        asked = self.prompt
        need(not asked.earlier or self.window.overflow == "truncate", "prompt.earlier", "reads one window: truncate")
        plain = not (asked.chat or asked.shots or asked.earlier or asked.before)
        foreign = self.adapter is not None  # perhaps trained elsewhere; a training refuses an adapter
        known = self.lora is None or plain or foreign
        need(known, "prompt", "chat, shots and earlier are of models as they are, without lora")

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @property
    def title(self) -> str:
        """The system's name, marked where its weights are random."""
        return f"{self.system} (random weights)" if self.base.random_weights else self.system

    @property
    def eval_in_training(self) -> Eval:
        """How a training decodes: in the memory that it trains in."""
        budget = self.train.memory_budget_gib or self.eval.memory_budget_gib
        return dataclasses.replace(self.eval, memory_budget_gib=budget)

    def hash(self, kind: str | None = None) -> str:
        """8 hex digits of what decides a result: not `runs`, not `tracker`, and of `api` only whom it asks.

        A hosted run that asks for log-probabilities is another one, since a finished run without them has none.
        A `kind` of run does not depend on what comes after it, and a training goes on with more or less memory.
        """
        decides = without_unset(self)
        del decides["runs"], decides["tracker"]
        decides.pop("ask", None)
        decides["api"] = self.api and self.api.url  # a run that met a limit goes on with a higher one
        if self.api and self.api.logprobs:
            decides["api"] = [self.api.url, "logprobs"]  # a finished run without them does not have them
        if kind in ("train", "eval"):
            del decides["bench"]
        if self.train.memory_budget_gib == "auto" and (kind != "train" or self.lora is None):
            decides["train"]["memory_budget_gib"] = None  # the default of before, and nothing depends on it
        if kind == "train":
            decides.pop("decode", None)
            decides["train"] = apart_from_memory(decides["train"])
            for key in ("memory_budget_gib", "pass_tokens", "parts"):
                del decides["eval"][key]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]


def without_unset(section: Any) -> dict[str, Any]:
    """A dataclass as a JSON object, without the `later` keys that are at their defaults."""
    out = {}
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if not f.metadata.get("later") or value != f.default:
            out[f.name] = without_unset(value) if dataclasses.is_dataclass(value) else value
    return out


def _is_url(text: str) -> bool:
    """True if an HTTP client takes it: a host, a port if any, and only characters that a URL may have."""
    host, port, path = r"([A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])", r"(:[0-9]+)?", r"([/?][!-~]{0,2000})?"
    try:
        urlsplit(text).port  # noqa: B018, raises where it is none
    except ValueError:
        return False
    return re.fullmatch(rf"https?://([!-~]+@)?{host}{port}{path}", text) is not None


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A record's configuration with today's keys: those that it is older than are at their defaults."""
    today = Config(system="any", base=Base(path="any")).to_dict()
    return {
        key: {**default, **config.get(key, {})} if isinstance(default, dict) else config.get(key, default)
        for key, default in today.items()
    }


def apart_from_memory(train: dict[str, Any]) -> dict[str, Any]:
    """The keys of `train` that decide a result: a training goes on with more or less memory, and other packs."""
    budget = train["memory_budget_gib"] is not None  # null: sizes by another rule, so rounding differs
    return {key: value for key, value in train.items() if key != "pack_tokens"} | {"memory_budget_gib": budget}


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as a dict, to dotted key → value, lists as text: what trackers keep."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        inner = value if isinstance(value, dict) else {"": value}
        out |= {f"{key}.{k}".rstrip("."): str(v) if isinstance(v, list) else v for k, v in inner.items()}
    return out


def find(name: str) -> Path:
    """`MODEL=` names a file of `configs/`, or is a path to a YAML file itself."""
    if name.endswith((".yaml", ".yml")):
        if not os.path.isfile(name):  # Path.is_file raises where a name is too long
            raise UserError(f"{shown(name)}: no such file")
        return Path(name)
    known = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    if name not in known:
        names = f"{', '.join(known)}, a .yaml file, a folder or a hub id"
        raise UserError(f'unknown MODEL "{shown(name)}"{nearest(name, known)}; known: {names}')
    return known[name]


def load(name: str, overrides: Iterable[str] = ()) -> Config:
    """Read the YAML of system `name`, apply `key=value` overrides, check everything.

    A name that is a hub id, or a folder, is that model as it is, in NF4. Raises `UserError` with file and line (or the
    override) of the first thing that is wrong.
    """
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith((".yaml", ".yml"))
    known = not name or os.path.isfile(CONFIGS / f"{name}.yaml")
    if not known and (os.path.isdir(name) or hub_id):
        system = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).name).strip("-")[:100]
        words = [f"system={json.dumps(system)}", f"base.path={json.dumps(name)}"]
        return read(Config, None, [*words, *overrides])
    return read(Config, find(name), overrides)


Kind = Literal["train", "eval", "bench"]


@dataclass(frozen=True)
class Rules:
    em_margin: float = 0.5  # points that EM may lie lower, over all seeds together, [0, 100]
    f1_margin: float = 0.5
    p95_ratio: float = 1.1  # how many times as long p95 may take, 1 to 1,000
    memory_mib: float = 256.0  # how much more a GPU may have allocated at the peak, ≤ a billion
    false_alarms: float = 0.001  # of runs in which nothing has changed, at most

    def __post_init__(self) -> None:
        between(self, em_margin=(0, 100), f1_margin=(0, 100), p95_ratio=(1, 1000), memory_mib=(0, 10**9))
        need(0 < self.false_alarms < 1, "false_alarms", "must be in (0, 1)")


@dataclass(frozen=True)
class Sweep:
    systems: tuple[str, ...]  # names in configs/, YAML files, folders or hub ids
    seeds: tuple[int, ...] = (0,)
    # SYSTEM:key=value is of one system only, in both
    variants: tuple[str, ...] = ("",)  # each the overrides of one, spaces between; system=… gives it rows of its own
    overrides: tuple[str, ...] = ()  # of all runs
    kinds: tuple[Kind, ...] = ("train", "eval")
    adapters: str | None = None  # a folder of runs whose trainings answer; null: those of where the sweep's own runs go
    gate: Rules = field(default_factory=Rules)  # of `make revalidate`, which has this measured anew each time

    def __post_init__(self) -> None:
        for name in ("systems", "seeds", "variants", "kinds"):
            need(len(getattr(self, name)) > 0, name, "name at least one")
        plain_words(self, "adapters")


@dataclass(frozen=True)
class Family:
    """Variants of one baseline that are compared with it: a file of `configs/ablations/`."""

    why: str  # the question that it answers
    baseline: str  # overrides, spaces between; "": the system as it is
    variants: tuple[str, ...]  # each the overrides of one
    system: str = "smollm2-ablation"  # a name in configs/, a YAML file, a folder or a hub id; MODEL= replaces it
    seeds: tuple[int, ...] = (0,)
    overrides: tuple[str, ...] = ()  # of all, the baseline too
    equal_within: float = 1.0  # points of EM, within which a variant counts as equal to the baseline, [0.01, 100]
    # what variants may change of what runs must share to be compared; all else refuses a variant
    changes: tuple[Literal["prompt", "window", "decoding"], ...] = ()

    def __post_init__(self) -> None:
        for name in ("why", "system"):
            need(getattr(self, name).strip() != "", name, "must not be empty")
        for name in ("variants", "seeds"):
            need(len(getattr(self, name)) > 0, name, "name at least one")
        need(len(set(self.seeds)) == len(self.seeds), "seeds", "name each seed once")
        between(self, equal_within=(0.01, 100))
