"""Token ids of whole texts (the ids of parts need not be the same), and each token's characters. Imports no torch."""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers import Encoding
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer
else:
    Tokenizer = object  # transformers imports torch

MANY = 5000  # texts that take seconds to tokenize: from here on a bar is shown, and trees are cached
BATCH = 1000  # texts between two updates of the bar
Ids = list[int]
Span = tuple[int, int]  # characters, [start, stop)


@dataclass(frozen=True)
class Tokenizers:
    own: Tokenizer  # the system's: makes the ids that it reads
    window: Tokenizer  # cuts the text to the window, for all systems alike


def offsets(tokenizer: Tokenizer, whole: str) -> list[Span]:
    """The characters of each token of `whole`, without special tokens."""
    return tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


def tokenize(tokenizer: Tokenizer, texts: list[str], special: bool = True) -> list[Ids]:
    return [encoding.ids for encoding in encode(tokenizer, texts, special=special)]


def encode(tokenizer: Tokenizer, texts: list[str], *, special: bool, progress: bool = False) -> Iterator[Encoding]:
    """The encoding of each text: ids and their characters; `special` adds the tokenizer's BOS, if it has one."""
    with tqdm(total=len(texts), desc="tokenise", unit="text", disable=not progress or len(texts) < MANY) as bar:
        for i in range(0, len(texts), BATCH):
            part = texts[i : i + BATCH]
            yield from tokenizer.backend_tokenizer.encode_batch(part, add_special_tokens=special)
            bar.update(len(part))


def holds_special(tokenizer: Tokenizer, text: str) -> bool:
    """True if a special token stands in `text` as words: no answer can hold it, for decoding leaves such tokens out."""
    return any(token in text for token in tokenizer.all_special_tokens)


def tokens_within(encoding: Encoding, stop: int) -> int | None:
    """The number of tokens in the first `stop` characters, or None if a token lies across that place.

    Those tokens are also the ids of the first `stop` characters alone: BPE merges only what a token joins, and no token
    crosses the place, so the text behind it changes no id before it.
    """

    def end(token: int) -> int:
        span = encoding.token_to_chars(token)
        return span[1] if span else token and stop + 1  # no span: BOS is before all text, EOS behind it

    n = bisect.bisect_right(range(len(encoding)), stop, key=end)
    span = encoding.token_to_chars(n) if n < len(encoding) else None
    return None if span and span[0] < stop else n
