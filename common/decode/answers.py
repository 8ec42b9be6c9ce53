"""Answers: what is known of one, which tokens end it, and its text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.data.tokens import Ids


@dataclass(frozen=True)
class Prediction:
    id: str
    text: str
    token_ids: list[int]  # as decoded, the stop token included
    logprob: float | None  # of all decoded tokens, natural log; None where a host does not say
    hit_limit: bool  # stopped by the limit, not by itself
    ties: int | None = None  # tokens with whose logit another's was equal; None where it was not looked


def stop_tokens(tokenizer: Any) -> list[int]:
    """EOS, and every token whose text holds a line break."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return sorted({tokenizer.eos_token_id} | {i for i, text in enumerate(texts) if "\n" in text})


def gold_ids(tokenizer: Any, text: str, limit: int) -> Ids:
    """A gold answer as a script: its ids and EOS, `limit` at most."""
    ids = tokenizer(" " + text, add_special_tokens=False).input_ids
    return [*ids[: limit - 1], tokenizer.eos_token_id]


def to_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The answer's first line, without special tokens and surrounding space."""
    return tokenizer.decode(token_ids, skip_special_tokens=True).partition("\n")[0].strip()


@dataclass
class Generation:
    token_ids: Ids = field(default_factory=list)
    logprob: float = 0.0  # of all tokens, natural log
    ties: int = 0  # tokens with whose logit another's was equal
    drafted: int = 0  # tokens
    accepted: int = 0
    passes: int = 0
