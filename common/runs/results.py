"""The fields of a record, and of the result of each kind of run. Imports no torch.

`em`, `f1` and their intervals are percent, shares are in [0, 1], times with `_ms` are milliseconds, others seconds,
memory is bytes. None: not known, or not defined for this run.
"""

from typing import Any, NotRequired, TypedDict

Section = dict[str, Any]  # a JSON object, such as a section of a configuration
Spread = dict[str, Any]  # of times: `pN_ms`, and `pN_interval_ms` (95 %, None where n is too small)
Peak = dict[str, int | None]  # `allocated_bytes` and `reserved_bytes` by torch, `rss_bytes` of the process


class Progress(TypedDict, total=False):
    """What a training's state adds to its result."""

    identity: dict[str, str]  # hashes of configuration and data
    em: float | None  # of the kept weights; None where another thing than EM selected them
    f1: float | None
    dev_loss: float | None  # per answer token; None where another thing selected them
    best_step: int | None
    steps: int
    questions: int  # trained on, in all steps
    seconds: float | None
    evaluation_seconds: float
    questions_per_s: float | None
    peak: Peak


class Sizes(TypedDict, total=False):
    """What the engine of a training adds to its result."""

    pack_tokens: int
    kept_layers: float  # whose activations are kept
    recomputed: float  # share of the activations, by bytes
    counted_bytes: dict[str, int] | None  # expected peak of a step, by what it is for
    planned_bytes: int | None  # expected peak of the process, evaluations included
    trained_weights: int
    frozen_weights: int


class Common(TypedDict, total=False):
    run: str
    random_weights: bool
    n: int  # questions answered


class TrainResult(Progress, Sizes, Common, total=False):
    selected_on: str | None  # dev or heldout; None: the last weights were kept (early_stop.by=none)
    window_counts: dict[str, int]
    stopped_early: bool
    processes: int
    idle_share: float | None
    start_seconds: float
    gpu_bytes: int | None  # most that the process had of its GPU, by NVML, since it began or went on


class Accuracy(TypedDict, total=False):
    em: float | None
    em_interval: list[float] | None  # 95 %, Wilson
    em_article_interval: list[float] | None  # 95 %, articles resampled
    f1: float | None
    f1_article_interval: list[float] | None


class EvalResult(Accuracy, Common, total=False):
    truncated_share: float
    hit_limit_share: float
    empty_share: float  # answers without text
    mean_words: float  # of an answer
    seconds: float | None
    questions_per_s: float | None
    adapter: str | None
    adapter_sha256: str | None
    trained_with: Section | None  # the adapter's training: its settings; None: not known
    forced: str | None  # those of them that FORCE=1 went against
    processes: int  # here
    peak: Peak
    transcript_sha256: str  # this and what follows: of a hosted model
    replayed: str | None
    requests: int
    requests_before: int
    refused: int  # questions that the host's content filter refused; their answers are empty
    cost_usd: float | None
    tokens_read: int | None
    tokens_written: int | None
    waited_s: float


class Query(TypedDict, total=False):
    """One timed query; times in seconds."""

    total: float
    first: float | None  # time to the first token; None: not known
    last: float | None  # time to the last token; None if a query has several prompts
    tokens: int | None  # None: not known
    passes: int
    drafted: int
    accepted: int
    connect: float | None  # this and the next two: of a hosted model, not part of the total
    server: float | None
    waited: float


class Process(TypedDict):
    """What one process of a timing measured: `process-N.json`."""

    ids: list[str]
    modes: dict[str, list[Query]]
    gauges: dict[str, Peak]  # by phase
    made_by: Section
    nvml: dict[str, Section]  # by phase
    notes: NotRequired[list[str]]  # on a hosted model's replies, to be printed


class Mode(TypedDict, total=False):
    """Figures of one process and mode."""

    n: int
    latency: Spread
    ttft: Spread | None
    tpot: Spread | None
    mean_tokens: float | None  # None: the host reports none
    mean_passes: float
    drafts_accepted: float | None
    queries_per_s: float
    connect: Spread  # this and the next two: of a hosted model
    server: Spread
    waited: Spread
    processes_p95_ms: list[float]


class BenchResult(Common, total=False):
    natural: Mode
    fixed: Mode  # not of a hosted model
    latency: Spread  # this and the next three: the natural mode's
    ttft: Spread | None
    tpot: Spread | None
    mean_tokens: float | None  # None: the host reports none
    phases: dict[str, Section]  # peaks, and what NVML saw
    peak: Peak
    nvml_peak: dict[str, int | None] | None
    host: Section
    engine: str
    adapter: str | None
    adapter_sha256: str | None
    forced: str | None


class Result(TrainResult, EvalResult, BenchResult, total=False):
    """The result of a run of any kind."""


class Record(TypedDict):
    """`record.json`."""

    schema: int
    kind: str
    system: str
    random_weights: bool
    seed: int
    folder: str
    created: str  # ISO 8601, UTC
    must_match: Section  # what two records must share to be compared: data, questions, prompt, scorer, window
    may_differ: Section  # code, versions, device, engine, …
    config: Section
    result: Result
