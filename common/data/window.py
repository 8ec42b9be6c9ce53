"""Which part of a context or question fits the window, in characters; cut between two tokens. Imports no torch."""

from typing import Any

from common.config import Window
from common.data.prompt import CONTEXT
from common.data.tokens import Span, offsets, tokenize
from common.errors import UserError


def context_windows(contexts: list[str], tokenizer: Any, window: Window) -> list[list[Span]]:
    """For each context the spans to read: itself, its head (truncate), or overlapping windows (chunk)."""
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


def fit(texts: list[str], template: str, limit: int, tokenizer: Any) -> list[int]:
    """For each text, how many of its characters fit `limit` tokens inside `template`; cut between two tokens."""
    special = template is CONTEXT  # it opens the prompt, so BOS counts with it
    filled = tokenize(tokenizer, [template.format(t) for t in texts], special=special)
    return [
        len(t) if len(ids) <= limit else _cut(t, template, limit, tokenizer, special)
        for t, ids in zip(texts, filled, strict=True)
    ]


def _cut(whole: str, template: str, limit: int, tokenizer: Any, special: bool) -> int:
    stops = [stop for _, stop in offsets(tokenizer, whole)]
    keep = min(len(stops), limit)
    while keep > 0:
        filled = template.format(whole[: stops[keep - 1]].strip())
        over = len(tokenize(tokenizer, [filled], special=special)[0]) - limit
        if over <= 0:
            return stops[keep - 1]
        keep -= over
    raise UserError(f"a window of {limit} tokens leaves no room for text; raise window.context or window.question")
