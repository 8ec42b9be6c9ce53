"""The characters of a context or question that fit its window, cut between two tokens. Imports no torch."""

from common.config import Decode, Window
from common.data.prompt import CONTEXT
from common.data.tokens import Span, Tokenizer, offsets, tokenize
from common.errors import UserError


def context_windows(contexts: list[str], tokenizer: Tokenizer, window: Window) -> list[list[Span]]:
    """The spans of each context that are read: all of it, its head (truncate), or overlapping windows (chunk)."""
    out: list[list[Span]] = []
    for context, stop in zip(contexts, fit(contexts, CONTEXT, window.context, tokenizer), strict=True):
        spans = [(0, stop)]
        if stop < len(context) and window.overflow == "chunk":
            starts = [a for a, _ in offsets(tokenizer, context)[:: window.stride]]
            while spans[-1][1] < len(context):
                begun, reached = spans[-1]
                start = min([reached, *(a for a in starts if a > begun)])  # never a gap
                (length,) = fit([context[start:]], CONTEXT, window.context, tokenizer)
                spans.append((start, start + length))
        out.append(spans)
    return out


def answer_limit(window: Window, decode: Decode) -> int:
    """Tokens of an answer, at most."""
    return min(window.answer, decode.max_tokens or window.answer)


def fit(texts: list[str], template: str, limit: int, tokenizer: Tokenizer) -> list[int]:
    """The number of characters of each text that fit `limit` tokens inside `template`; `UserError` if none does."""
    special = template is CONTEXT  # it opens the prompt, so BOS counts with it
    filled = tokenize(tokenizer, [template.format(t) for t in texts], special=special)
    return [
        len(t) if len(ids) <= limit else _cut(t, template, limit, tokenizer, special)
        for t, ids in zip(texts, filled, strict=True)
    ]


def _cut(whole: str, template: str, limit: int, tokenizer: Tokenizer, special: bool) -> int:
    stops = [stop for _, stop in offsets(tokenizer, whole)]
    keep = min(len(stops), limit)
    while keep > 0:
        filled = template.format(whole[: stops[keep - 1]].strip())
        over = len(tokenize(tokenizer, [filled], special=special)[0]) - limit
        if over <= 0:
            return stops[keep - 1]
        keep -= over
    raise UserError(f"a window of {limit} tokens leaves no room for text; raise window.context or window.question")
