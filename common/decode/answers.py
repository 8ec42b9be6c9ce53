"""Answers: the record of one, the tokens that end it, and its text."""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from common.config import Decode, Eval
from common.data.tokens import Ids, Span
from common.data.trees import Branch, Tree
from common.decode.spans import Automaton
from common.errors import UserError
from common.model.llama import Model, causal_of
from common.model.load import eos_ids

import torch
from transformers import PreTrainedTokenizerBase

Tick = Callable[[int], None]  # called with the number of new tokens after each pass


@dataclass(frozen=True)
class Prediction:
    id: str
    text: str
    token_ids: Ids  # as decoded, the stop token included
    logprob: float | None  # of all decoded tokens, natural log; None: the host does not report it
    hit_limit: bool  # ended by the limit, not by a stop token
    ties: int | None = None  # tokens whose logit equals another's; None: not counted
    span: Span | None = None  # characters of the question's context; None where an answer need not be a quote
    least: float | None = None  # of the decoded tokens' log-probabilities; None: the host does not report them
    # of decode.nbest: answers and their probabilities, the most probable first; what others may have, at most; and the
    # answer that greedy decoding gives
    nbest: list[tuple[str, float]] | None = None
    rest: float | None = None
    greedy: str | None = None


@dataclass
class Generation:
    """One prompt's greedy tokens, and the passes that they took."""

    token_ids: Ids = field(default_factory=list)
    logprob: float = 0.0  # of all tokens, natural log
    least: float = 0.0  # of the tokens' log-probabilities
    ties: int = 0  # tokens whose logit equals another's
    drafted: int = 0  # tokens
    accepted: int = 0  # drafted tokens that were kept
    passes: int = 0

    def append(self, token: int, logprob: float, tie: int, stop_tokens: Collection[int], limit: int) -> bool:
        """Adds a token; True if the answer ends with it, at a stop token or at the limit."""
        self.token_ids.append(token)
        self.logprob += logprob
        self.least = min(self.least, logprob)
        self.ties += tie
        return token in stop_tokens or len(self.token_ids) == limit


class Task(NamedTuple):
    """What both batched engines get beside the model and the trees."""

    tokenizer: PreTrainedTokenizerBase
    stop_tokens: Sequence[int]
    max_new_tokens: int
    options: Eval
    check: Callable[[], None]  # called between passes; an exception that it raises ends the work
    # by question: tokens to generate instead of the most probable ones, to time models whose answers mean nothing
    forced: Mapping[str, Ids]
    round: str  # the name of this evaluation (`ranks.take`), the same on all ranks
    quotes: Callable[[Tree], Automaton | None] = lambda tree: None  # what answers may be, where they are quotes
    decode: Decode = Decode()


def stop_tokens(
    tokenizer: PreTrainedTokenizerBase, model: Model | None = None, options: Decode = Decode()
) -> list[int]:
    """EOS of the tokenizer and of the model's generation settings, and tokens with a line break; ascending.

    In quotes a line break is text like any other, and so it is with `decode.stop=eos`.
    """
    settings = causal_of(model).generation_config if model else None
    ends = eos_ids(tokenizer.eos_token_id, settings)
    return sorted(ends if options.spans or options.stop == "eos" else {*ends, *_line_breaks(tokenizer)})


@functools.lru_cache(maxsize=4)
def _line_breaks(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return frozenset(i for i, text in enumerate(texts) if "\n" in text)


def need_finite(where: str, logprob: float | None, dtype: torch.dtype) -> None:
    """Raises `UserError` if an answer's log-probability is none: some logit was NaN or infinite."""
    if logprob is None or math.isfinite(logprob):
        return
    overflow = "fp16 overflows here: set base.dtype=bf16 or fp32"
    hint = overflow if dtype == torch.float16 else "look for such numbers in the base or the adapter"
    raise UserError(f"{where}: logits that are not finite (nan or inf) in {str(dtype).removeprefix('torch.')}; {hint}")


def gold_ids(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> Ids:
    """The ids of a gold answer and EOS, `limit` at most: forced tokens for models whose answers mean nothing."""
    return [*tokenizer(" " + text, add_special_tokens=False).input_ids[: limit - 1], tokenizer.eos_token_id]


def to_prediction(
    tokenizer: PreTrainedTokenizerBase,
    branch: Branch,
    answer: Generation,
    stop_tokens: Collection[int],
    decode: Decode = Decode(),
    quotes: Automaton | None = None,
    ties: bool = False,
) -> Prediction:
    """The record of a decoded answer, a quote of `quotes`. `ties`: whether they were counted."""
    ids, span = answer.token_ids, None
    hit_limit = ids[-1] not in stop_tokens
    if quotes:
        text, (start, stop) = quotes.quote(ids if hit_limit else ids[:-1])
        span = start + branch.offset, stop + branch.offset
    else:
        text = to_text(tokenizer, ids, whole=decode.stop == "eos")
    counted = answer.ties if ties else None
    return Prediction(branch.id, text, ids, answer.logprob, hit_limit, counted, span, answer.least)


def to_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], whole: bool = False) -> str:
    """The answer's first line, or the `whole` of it, without special tokens and surrounding space."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    return (text if whole else text.partition("\n")[0]).strip()
