"""Log-probabilities of a hosted model's answers: what hosts send, and which of it is the answer's. Imports no torch."""

import itertools
import re

from common.decode.responses import Json, number_of

ROUNDING = 1e-3  # that a log-probability may lie above 0
NOT_KNOWN = -9999.0  # hosts send this or less for a token whose log-probability they do not have
STOP_TOKEN = re.compile(r"\s*(<.+>|\[.+\])?\s*", re.S)  # as hosts write it: </s>, <|im_end|>, [EOS], a line break
PIECES = re.compile("[\u2581\u0120\u010a\ufffd]")  # ▁, Ġ: a space; Ċ: a line break; U+FFFD: half a character


def token_logprobs(choice: Json) -> list[tuple[str, float]] | None:
    """A choice's tokens and their natural log-probabilities, as completions or chats give them; empty if not given.

    None if one is malformed, not finite, not known to the host, or above 0 by more than rounding.
    """
    found = choice.get("logprobs")
    if found is None:
        return []
    if not isinstance(found, dict):
        return None
    pairs: list[tuple[object, object]] = []
    if isinstance(content := found.get("content"), list):
        pairs = [(e.get("token"), e.get("logprob")) if isinstance(e, dict) else (None, None) for e in content]
    elif isinstance(tokens := found.get("tokens"), list) and isinstance(values := found.get("token_logprobs"), list):
        pairs = [*zip(tokens, values, strict=False)] if len(tokens) == len(values) else [(None, None)]
    out = []
    for token, given in pairs:
        value = number_of(given)
        if not isinstance(token, str) or value is None or not NOT_KNOWN < value <= ROUNDING:
            return None
        out.append((token, min(0.0, value)))
    return out


def line_logprobs(tokens: list[tuple[str, float]] | None, text: str, answer: str, written: int | None) -> list[float]:
    """The log-probabilities of the tokens of an answer's first line with text; empty if they are not surely all known.

    `tokens`: as the host gave them. `text`: all that it sent. `answer`: its end, after thoughts. `written`: the host's
    count of these tokens and a stop token, if it is known.

    The tokens must spell the text, or some are missing, repeated or of thoughts; a stop token may follow. Spaces are
    not compared. Where tokens hold `PIECES`, only ASCII is compared. Then all tokens count, the stop token too. If the
    text has several lines or thoughts, tokens must spell it exactly. Then tokens of the line count, and the one that
    ends it.
    """
    tokens, start = tokens or [], len(text) - len(answer.lstrip())
    line, spelt = text[start:].partition("\n")[0], "".join(token for token, _ in tokens)
    if not line or (written or 0) > len(tokens) + 1:
        return []
    ended = bool(tokens) and STOP_TOKEN.fullmatch(tokens[-1][0]) is not None
    less = spelt.removesuffix(tokens[-1][0]) if ended else spelt
    if answer == text and "\n" not in text:
        return [value for _, value in tokens] if _spells(spelt, text) or _spells(less, text) else []
    if text not in (spelt, less):
        return []
    first, last = max(text.rfind("\n", 0, start) + 1, len(text) - len(answer)), start + len(line)
    ends = itertools.accumulate(len(token) for token, _ in tokens)
    places = [(end - len(token), end, value) for (token, value), end in zip(tokens, ends, strict=True)]
    return [value for begin, end, value in places if begin <= last and (begin >= first or end > first)]


def _spells(tokens: str, text: str) -> bool:
    ignored = r"[^!-~]+" if PIECES.search(tokens) else r"\s+"
    return re.sub(ignored, "", tokens) == re.sub(ignored, "", text) != ""
