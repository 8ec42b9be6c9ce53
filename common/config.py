"""The configuration of one system: every key, its unit, its default and its limits. `common.strict` reads it.

Imports no torch.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError
from common.strict import nearest, read

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def _need(holds: bool, key: str, what: str) -> None:
    if not holds:
        raise ValueError(f"{key}: {what}")


@dataclass(frozen=True)
class Base:
    path: str  # hub id or folder of the frozen base model and its tokenizer
    revision: str = "main"  # hub revision; unused for a folder
    tokenizer: str | None = None  # hub id or folder; null: the one beside the base
    random_weights: bool = False  # only the shapes of `path`, with random weights: for speed and memory, no accuracy
    quant: Literal["nf4", "fp4", "none"] = "nf4"  # storage of the frozen linear layers
    double_quant: bool = True  # quantise the quantisation constants too
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # compute; auto: bf16 or fp16 on a GPU, fp32 on a CPU
    min_gpu_gib: float = 0.0  # smallest GPU memory that training and evaluation fit in; 0: a CPU does too

    def __post_init__(self) -> None:
        _need(self.min_gpu_gib >= 0, "min_gpu_gib", "must be ≥ 0")


@dataclass(frozen=True)
class Lora:
    rank: int = 16  # columns of A and rows of B, ≥ 1
    alpha: float = 16.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # on the adapter's input, [0, 1); above 0 shared prefixes are no longer exact
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        _need(self.rank >= 1, "rank", "must be ≥ 1")
        _need(self.alpha > 0, "alpha", "must be > 0")
        _need(0 <= self.dropout < 1, "dropout", "must be in [0, 1)")
        _need(len(self.targets) > 0, "targets", "name at least one layer")


@dataclass(frozen=True)
class Data:
    train: str = "rajpurkar/squad"  # SQuAD v1.1 JSON (plain or .gz), or a hub id; SQUAD_DIR wins over this one
    dev: str = "rajpurkar/squad"  # the same for the dev split
    train_paragraphs: int | None = None  # only the first N paragraphs; null: all
    dev_questions: int | None = None  # only a fixed, article-stratified N; null: all
    fix_offsets: bool = False  # repair an answer_start that is off, and count it

    def __post_init__(self) -> None:
        _need(self.train_paragraphs is None or self.train_paragraphs >= 1, "train_paragraphs", "must be ≥ 1")
        _need(self.dev_questions is None or self.dev_questions >= 1, "dev_questions", "must be ≥ 1")


@dataclass(frozen=True)
class Window:
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
        for key in ("context", "question", "answer"):
            _need(getattr(self, key) >= 16, key, "must be ≥ 16")
        _need(1 <= self.stride <= self.context, "stride", "must be between 1 and window.context")


@dataclass(frozen=True)
class Prompt:
    order: Literal["context", "question", "both"] = "context"  # what comes first; both: the question before and after
    chat: bool = False  # as one message of a user, in the model's own chat template; for models that were tuned to chat
    shots: int = 0  # questions of train with their answers in front, each with its paragraph, beside the window
    shots_seed: int = 0  # which ones
    earlier: bool = False  # the earlier questions of the paragraph and their gold answers before each: another task
    before: str = ""  # what stands in front of every prompt: the shots, filled in where they are asked for

    def __post_init__(self) -> None:
        _need(self.shots >= 0, "shots", "must be ≥ 0")
        _need(not self.earlier or self.order == "context", "earlier", "needs order=context")

    def spare(self, window: Window) -> int:
        """Tokens of `window.context` that are not the context's: a second question's, and 4 as seams may cost more."""
        return {"context": 0, "question": 4, "both": 4 + window.question}[self.order]


@dataclass(frozen=True)
class Train:
    lr: float = 2e-4  # peak learning rate
    epochs: float = 1.0  # passes over the train set
    questions_per_step: int = 64  # the batch size: questions of one optimizer step
    pack_tokens: int | None = None  # tokens of one micro-batch; null: by device, fused and memory_budget_gib
    memory_budget_gib: float | None = None  # fused: peak GPU memory; null: gradient_checkpointing decides
    loss: Literal["token", "question"] = "token"  # mean over a step's answer tokens, or over its questions' own means
    label_smoothing: float = 0.0  # share of each target that goes to all tokens alike, [0, 1)
    share_prefixes: bool = True  # false: every question reads its paragraph anew, in the same steps; to compare with
    fused: bool = True  # compute Llama layers by common/fused.py; false: by transformers' and PEFT's modules
    warmup: float = 0.03  # share of the steps in which the rate rises, [0, 1]
    weight_decay: float = 0.0
    average: float = 0.0  # decay of a running mean of the weights, which is what is kept, [0, 1); 0: keep the last
    max_grad_norm: float = 1.0  # clip the gradient's norm to this
    gradient_checkpointing: bool = True  # without a budget: recompute activations (less memory, more time) or not
    eval_every: int = 250  # steps between two evaluations (and saves)
    max_steps: int | None = None  # stop here at the latest; the schedule ends here too

    def __post_init__(self) -> None:
        for key in ("lr", "epochs", "max_grad_norm"):
            _need(getattr(self, key) > 0, key, "must be > 0")
        for key in ("questions_per_step", "eval_every"):
            _need(getattr(self, key) >= 1, key, "must be ≥ 1")
        _need(0 <= self.warmup <= 1, "warmup", "must be in [0, 1]")
        _need(self.weight_decay >= 0, "weight_decay", "must be ≥ 0")
        _need(0 <= self.average < 1, "average", "must be in [0, 1)")
        _need(0 <= self.label_smoothing < 1, "label_smoothing", "must be in [0, 1)")
        _need(self.max_steps is None or self.max_steps >= 1, "max_steps", "must be ≥ 1")
        _need(self.memory_budget_gib is None or self.memory_budget_gib > 0, "memory_budget_gib", "must be > 0")
        _need(self.pack_tokens is None or self.pack_tokens >= 64, "pack_tokens", "must be ≥ 64")


@dataclass(frozen=True)
class EarlyStop:
    patience: int = 4  # evaluations without a gain before training stops
    min_delta: float = 0.1  # smallest gain in EM points that counts
    split: Literal["dev", "heldout"] = "dev"  # heldout: whole articles taken out of train
    heldout_share: float = 0.05  # heldout: share of the train questions, (0, 0.5]
    questions: int | None = None  # a fixed, article-stratified N of that split; null: all of it

    def __post_init__(self) -> None:
        _need(self.patience >= 1, "patience", "must be ≥ 1")
        _need(self.min_delta >= 0, "min_delta", "must be ≥ 0")
        _need(0 < self.heldout_share <= 0.5, "heldout_share", "must be in (0, 0.5]")
        _need(self.questions is None or self.questions >= 1, "questions", "must be ≥ 1")


@dataclass(frozen=True)
class Eval:
    engine: Literal["auto", "plain"] = "auto"  # plain: transformers' and PEFT's modules, as for all but Llamas
    memory_budget_gib: float = 12.0  # what may be allocated at the peak, the base included; less where less is free
    pass_tokens: int | None = None  # tokens of one forward pass; null: by device and memory
    parts: int | None = None  # read each apart: answers of several processes are one's, to the bit; null: fastest

    def __post_init__(self) -> None:
        _need(self.memory_budget_gib > 0, "memory_budget_gib", "must be > 0")
        _need(self.pass_tokens is None or self.pass_tokens >= 64, "pass_tokens", "must be ≥ 64")
        _need(self.parts is None or self.parts >= 1, "parts", "must be ≥ 1")


@dataclass(frozen=True)
class Bench:
    queries: int = 1000  # timed single queries, drawn article by article from dev
    warmup_queries: int = 10  # before the clock starts
    processes: int = 3  # fresh ones, one after the other

    def __post_init__(self) -> None:
        _need(self.processes >= 1, "processes", "must be ≥ 1")
        _need(self.queries >= 1, "queries", "must be ≥ 1")
        _need(self.warmup_queries >= 0, "warmup_queries", "must be ≥ 0")


@dataclass(frozen=True)
class Api:
    url: str  # of an OpenAI-compatible endpoint, up to and with /v1; `base.path` is the model's name there
    key: str = "API_KEY"  # the environment variable that holds the key; where it is unset, none is sent
    concurrency: int = 8  # requests at a time in an evaluation; single queries are timed one by one
    tries: int = 8  # of a request that met 429, 5xx, a timeout or an answer cut short
    timeout_s: float = 60.0  # of connecting, and of waiting for the next bytes
    usd_per_million_read: float = 0.0  # price of tokens of prompts
    usd_per_million_written: float = 0.0  # price of tokens of answers
    max_requests: int | None = None  # of a run, every try counted; null: no limit
    max_cost_usd: float | None = None  # of a run, by the two prices; null: no limit

    def __post_init__(self) -> None:
        _need(self.url.startswith(("http://", "https://")), "url", "must begin with http:// or https://")
        for key in ("concurrency", "tries"):
            _need(getattr(self, key) >= 1, key, "must be ≥ 1")
        _need(self.timeout_s > 0, "timeout_s", "must be > 0")
        for key in ("usd_per_million_read", "usd_per_million_written", "max_requests", "max_cost_usd"):
            _need((getattr(self, key) or 0) >= 0, key, "must be ≥ 0")
        priced = self.usd_per_million_read > 0 or self.usd_per_million_written > 0
        _need(self.max_cost_usd is None or priced, "max_cost_usd", "needs the prices: usd_per_million_read, …_written")


@dataclass(frozen=True)
class Config:
    system: str  # the name in tables, run folders and `MODEL=`
    base: Base
    seed: int = 0  # sampler order, LoRA init, dropout
    lora: Lora | None = None  # null: the base as it is
    api: Api | None = None  # null: the base runs here
    adapter: str | None = None  # folder of a trained adapter; null: of the newest finished training like this
    data: Data = field(default_factory=Data)
    window: Window = field(default_factory=Window)
    prompt: Prompt = field(default_factory=Prompt)
    train: Train = field(default_factory=Train)
    early_stop: EarlyStop = field(default_factory=EarlyStop)
    eval: Eval = field(default_factory=Eval)
    bench: Bench = field(default_factory=Bench)
    runs: str = "runs"  # where run folders go
    tracker: str | None = None  # tensorboard, wandb or another that Accelerate knows; null: metrics.jsonl alone

    def __post_init__(self) -> None:
        _need(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.system) is not None, "system", "use letters, digits, - _")
        _need(0 <= self.seed < 2**32, "seed", "must be in [0, 2^32)")
        left = self.window.context - self.prompt.spare(self.window)
        _need(left >= 16, "prompt", f"in this order {left} tokens are left for the context; raise window.context")
        _need(self.adapter is None or self.lora is not None, "adapter", "needs a lora section beside it")
        _need(self.api is None or self.lora is None, "api", "a hosted model has no lora section")
        _need(
            self.api is None or self.window.tokenizer is not None, "window.tokenizer", "an api needs one to cut text by"
        )
        _need(self.api is None or self.window.overflow == "truncate", "window.overflow", "an api reads one window")
        asked = self.prompt
        _need(not asked.earlier or self.window.overflow == "truncate", "prompt.earlier", "reads one window: truncate")
        plain = not (asked.chat or asked.shots or asked.earlier or asked.before)
        _need(self.lora is None or plain, "prompt", "chat, shots and earlier are of models as they are, without lora")

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @property
    def title(self) -> str:
        """The system's name, marked where its weights are random."""
        return f"{self.system} (random weights)" if self.base.random_weights else self.system

    def hash(self, kind: str | None = None) -> str:
        """8 hex digits of what decides a result: not `runs`, not `tracker`, and of `api` only whom it asks.

        A `kind` of run does not depend on what comes after it, and a training goes on with more or less memory.
        """
        decides = self.to_dict()
        del decides["runs"], decides["tracker"]
        decides["api"] = self.api and self.api.url  # a run that met a limit goes on with a higher one
        if kind in ("train", "eval"):
            del decides["bench"]
        if kind == "train":
            decides["train"] = apart_from_memory(decides["train"])
            for key in ("memory_budget_gib", "pass_tokens", "parts"):
                del decides["eval"][key]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A record's configuration with today's keys: those that it is older than are at their defaults."""
    today = Config(system="any", base=Base(path="any")).to_dict()
    return {
        key: {**default, **config.get(key, {})} if isinstance(default, dict) else config.get(key, default)
        for key, default in today.items()
    }


def apart_from_memory(train: dict[str, Any]) -> dict[str, Any]:
    """What of a `train` section decides a result: a training goes on with more or less memory, and other packs."""
    budget = train["memory_budget_gib"] is not None  # null: other layers
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
        if not Path(name).is_file():
            raise UserError(f"{name}: no such file")
        return Path(name)
    known = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    if name not in known:
        names = f"{', '.join(known)}, a .yaml file, a folder or a hub id"
        raise UserError(f'unknown MODEL "{name}"{nearest(name, known)}; known: {names}')
    return known[name]


def load(name: str, overrides: Iterable[str] = ()) -> Config:
    """Read the YAML of system `name`, apply `key=value` overrides, check everything.

    A name that is a hub id, or a folder, is that model as it is, in NF4. Raises `UserError` with file and line (or the
    override) of the first thing that is wrong.
    """
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith((".yaml", ".yml"))
    known = not name or (CONFIGS / f"{name}.yaml").is_file()
    if not known and (Path(name).is_dir() or hub_id):
        system = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).name).strip("-")
        words = [f"system={json.dumps(system)}", f"base.path={json.dumps(name)}"]
        return read(Config, None, [*words, *overrides])
    return read(Config, find(name), overrides)
