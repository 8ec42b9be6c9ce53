"""Token ids of whole texts, and where each token lies in its text. Imports no torch (a tokenizer is handed in)."""

import bisect
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

MANY = 5000  # texts: so many take a while
Ids = list[int]
Span = tuple[int, int]  # characters, from and to


def offsets(tokenizer: Any, whole: str) -> list[Span]:
    return tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


def tokenize(tokenizer: Any, texts: list[str], special: bool = True) -> list[Ids]:
    return [encoding.ids for encoding in encode(tokenizer, texts, special=special)]


def encode(tokenizer: Any, texts: list[str], progress: bool = False, special: bool = True) -> Iterator[Any]:
    """`tokenizers.Encoding` of each text: what the tokenizer itself makes of it, and where each token lies in it."""
    with tqdm(total=len(texts), desc="tokenise", unit="text", disable=not progress or len(texts) < MANY) as bar:
        for i in range(0, len(texts), 1000):
            yield from tokenizer.backend_tokenizer.encode_batch(texts[i : i + 1000], add_special_tokens=special)
            bar.update(len(texts[i : i + 1000]))


def tokens_within(encoding: Any, stop: int) -> int | None:
    """How many tokens lie in the first `stop` characters; None where one lies across that place.

    These are the ids of the first `stop` characters alone: a merge of BPE is made for what it joins, and none of them
    crossed the place, so what is behind it changed nothing before it.
    """

    def end(token: int) -> int:
        span = encoding.token_to_chars(token)
        return span[1] if span else token and stop + 1  # none: BOS is before all text, EOS behind

    n = bisect.bisect_right(range(len(encoding)), stop, key=end)
    span = encoding.token_to_chars(n) if n < len(encoding) else None
    return None if span and span[0] < stop else n
