"""What the benchmarks' processes hand each other as JSON. Imports no library, because Unsloth patches some."""

from collections.abc import Iterable, Sequence
from typing import Any, NotRequired, TypedDict


class Figures(TypedDict):
    """A peer's optimizer steps at one batch size."""

    batch: int
    steps: int
    questions: int
    seconds: float
    questions_per_s: float
    tokens_per_s: float
    allocated_gib: float
    reserved_gib: float


class TrainJob(TypedDict):
    model: str
    rows: list[tuple[list[int], int]]  # ids of prompt and answer, and how many of them are the prompt's
    questions: int
    seed: int
    lr: float
    weight_decay: float
    max_grad_norm: float
    window: int
    checkpointing: bool
    work: str
    lora: dict[str, object]  # arguments of PEFT's LoraConfig
    budgets: NotRequired[list[float]]  # GiB
    search: NotRequired[list[int]]  # batch sizes to try for each budget
    timed: NotRequired[dict[str, int]]  # without a search: the batch size by budget


class PeerResult(TypedDict, total=False):
    """What benchmarks/peers.py prints; which fields depends on the stack."""

    stack: str
    failed: str
    tflops: float
    folder: str
    searched: list[Figures]
    timed: dict[str, Figures]  # by budget
    device: str
    versions: dict[str, str]


class Question(TypedDict):
    id: str
    context: str  # as it is read
    prefix: list[int]
    prompt: list[int]  # ids after the prefix
    gold: list[int]  # ids of the first gold answer, with EOS


class DecodeJob(TypedDict):
    base: dict[str, Any]  # sections of a config, as JSON
    model: str
    adapter: str | None
    lora: dict[str, Any] | None
    eval: dict[str, Any]
    window: int
    limit: int
    stops: list[int]
    eos: int
    kinds: list[str]
    batches: list[int]
    counts: dict[str, int]  # questions by batch size
    rounds: int  # of the stream, freely and as spans by turns
    questions: list[Question]
    alone: list[Question]
    batched: list[Question]


class DecodeRow(TypedDict):
    kind: str
    way: NotRequired[str]  # other than freely, each question with its paragraph
    batch: int | None  # None: a stream of all questions
    questions: int
    seconds: float  # of several rounds: their median
    questions_per_s: float
    allocated_gib: float | None
    tokens: NotRequired[float]  # of an answer
    rounds_s: NotRequired[list[float]]
    p50_ms: NotRequired[float]  # latencies only where one question is asked at a time
    p95_ms: NotRequired[float]
    drafts_accepted: NotRequired[float | None]  # share
    passes: NotRequired[float]  # per question


class DecodeResult(TypedDict, total=False):
    """What benchmarks/decode_peers.py prints: `failed` alone, or the rest; some of it by our stack only."""

    failed: str
    rows: list[DecodeRow]
    answers: dict[str, list[int]]  # ids by question
    answers_alone: dict[str, list[int]]
    ties: int
    start: dict[str, float]  # seconds
    sizes: dict[str, object]
    versions: dict[str, str]


def reason(error: Exception) -> str:
    """An error's type and first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *rows))
