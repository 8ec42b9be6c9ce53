"""Answers: the record of one, the tokens that end it, and its text."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from common.config import Eval
from common.data.tokens import Ids

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prediction:
    id: str
    text: str
    token_ids: Ids  # as decoded, the stop token included
    logprob: float | None  # of all decoded tokens, natural log; None: the host does not report it
    hit_limit: bool  # ended by the limit, not by a stop token
    ties: int | None = None  # tokens whose logit equals another's; None: not counted


@dataclass
class Generation:
    """One prompt's greedy tokens, and the passes that they took."""

    token_ids: Ids = field(default_factory=list)
    logprob: float = 0.0  # of all tokens, natural log
    ties: int = 0  # tokens whose logit equals another's
    drafted: int = 0  # tokens
    accepted: int = 0  # drafted tokens that were kept
    passes: int = 0


@dataclass(frozen=True)
class Task:
    """What both batched engines get beside the model and the trees."""

    tokenizer: PreTrainedTokenizerBase
    stop_tokens: Sequence[int]
    max_new_tokens: int
    options: Eval
    check: Callable[[], None]  # called between passes; an exception that it raises ends the work
    forced: Mapping[str, Ids]  # by question: tokens to generate instead of the most probable ones
    round: str  # the name of this evaluation, the same on all ranks


@functools.lru_cache(maxsize=4)
def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """EOS, and every token whose text holds a line break; ascending."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return sorted({tokenizer.eos_token_id} | {i for i, text in enumerate(texts) if "\n" in text})


def gold_ids(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> Ids:
    """The ids of a gold answer and EOS, `limit` at most: forced tokens for models whose answers mean nothing."""
    ids = tokenizer(" " + text, add_special_tokens=False).input_ids
    return [*ids[: limit - 1], tokenizer.eos_token_id]


def to_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The answer's first line, without special tokens and surrounding space."""
    return tokenizer.decode(token_ids, skip_special_tokens=True).partition("\n")[0].strip()
