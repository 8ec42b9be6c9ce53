"""What OpenAI-compatible hosts send: events, bodies, errors, token counts and times, in the shapes that they have.

Values that a host leaves out, or that are odd, are None. Imports no torch.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, cast

import httpx2

Json = dict[str, Any]  # an object as `json.loads` returns it

ERROR_CHARS = 300  # kept of an error's message: a line
CONTROL = {"", "ping", "[ping]", "heartbeat", "keep-alive", "keepalive"}  # events, and data, that carry nothing
# fields of a chat message that hold text, but no answer
NO_ANSWER = (
    "reasoning_content",
    "reasoning",
    "reasoning_details",
    "thinking",
    "tool_calls",
    "function_call",
    "refusal",
)
WORDS = ("detail", "message", "msg", "error_msg", "error_message", "errors")  # keys of an error's message


class Retryable(Exception):
    """A failure after which another try may help; `after`: seconds that the host asks to wait."""

    def __init__(self, why: str, after: float | None = None, filtered: bool = False):
        super().__init__(why)
        self.after, self.filtered = after, filtered


class Body(Json):
    """A JSON body instead of a stream of events."""


class _Kept:
    """A response of any content type, for `EventSource`; `text` is what came until `keep` is unset."""

    def __init__(self, response: httpx2.Response):
        self.headers = {"content-type": "text/event-stream"}
        self.response, self.request, self.text, self.keep = response, response.request, "", True
        self.began = False

    def iter_text(self) -> Iterator[str]:
        for text in self.response.iter_text():
            text = text.removeprefix("\ufeff") if not self.began else text  # as the standard has it
            self.began = True
            self.text += text if self.keep else ""
            yield text


def events(response: httpx2.Response) -> Iterator[Json]:
    """The JSON of every event with data, up to [DONE], or a `Body`. Raises `Retryable` for anything else."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if "json" in kind or "html" in kind:
        response.read()
        yield _body(response.text, kind)
        return
    kept = _Kept(response)
    for event in httpx2.EventSource(cast(httpx2.Response, kept)):
        data, name = event.data.strip(), event.event.lower()
        kept.keep = False
        if data == "[DONE]":
            return
        if name != "error" and (data.lower() in CONTROL or name in CONTROL):
            continue
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            if name != "error":
                raise Retryable(f"an answer that is no JSON: {event.data!r}") from error
            found = data or "an event without words"
        if name == "error" and not (isinstance(found, dict) and found.get("error")):
            found = {"error": found}
        if not isinstance(found, dict):
            raise Retryable(f"an event that is none of an answer's: {found}")
        yield found
    if kept.keep and kept.text.strip():
        yield _body(kept.text, kind)


def _body(text: str, kind: str) -> Body:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        said = " ".join(text.split())[:ERROR_CHARS]
        raise Retryable(f"no stream and no JSON, but {kind or 'a body of no type'}: {said}") from error
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    return Body(found if isinstance(found, dict) else {"error": f"a JSON body that is no answer: {found}"})


def reported_error(event: Json) -> Json | None:
    """The object that holds an error's message, if an event or body reports an error."""
    choices = event.get("choices")
    holders = [event, *(c for c in (choices if isinstance(choices, list) else []) if isinstance(c, dict))]
    if failed := [holder for holder in holders if holder.get("error")]:
        return failed[0]
    said = any(isinstance(event.get(key), str | list) and event[key] for key in WORDS)
    named = "error" in (event.get("object"), event.get("type"), event.get("status"))
    return event if not choices and (said or named or isinstance(event, Body)) else None


def text_of(choice: Json) -> tuple[str, list[str]]:
    """A choice's text, and the names of fields that hold what is no answer."""
    said = choice.get("delta") or choice.get("message") or {}
    content = choice.get("text") or said.get("content") or ""
    fields = [name for name in NO_ANSWER if said.get(name) or choice.get(name)]
    if isinstance(content, list):  # a chat message in parts
        fields += [part["type"] for part in content if part["type"] != "text"]
        content = "".join(part["text"] for part in content if part["type"] == "text")
    return "" + content, fields


def mended(text: str) -> str:
    """Text that UTF-8 takes: halves of a surrogate pair are joined, or become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def count_of(value: object) -> int | None:
    """A token count; None if it is none."""
    number = number_of(value)
    return int(number) if number is not None and number >= 0 and number == int(number) else None


def number_of(value: object) -> float | None:
    """A JSON number; None for all else, and for what no float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def _parsed(text: str) -> Json:
    """The JSON object of an error response; empty if it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        found = found[0] if isinstance(found, list) and len(found) == 1 else found
        return found if isinstance(found, dict) else {}
    return {}


def named(text: str) -> str:
    """The code, type, field and message of an error response: not what a host repeats of the request."""
    found = _parsed(text)
    error = found["error"] if isinstance(found.get("error"), dict) else found
    inner = error.get("innererror")
    holders = (error, inner if isinstance(inner, dict) else {}, found)
    values = [holder.get(key) for holder in holders for key in ("code", "type", "param", "error", *WORDS)]
    return " ".join(v for v in values if isinstance(v, str)) if found else text[:ERROR_CHARS]


def error_message(text: str) -> str:
    """The message in an error response's body, on one line."""
    found = _parsed(text)
    error = found.get("error", found)
    inner = error if isinstance(error, dict) else {}
    said = error if isinstance(error, str) else inner.get("message") or next(filter(None, map(found.get, WORDS)), None)
    return " ".join(str(said or text).split())[:ERROR_CHARS] or "no word of why"


def retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, which holds seconds or a date."""
    with contextlib.suppress(ValueError):
        seconds = float(value or "")
        return max(0.0, seconds) if math.isfinite(seconds) else None
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(value or "") - datetime.now(UTC)).total_seconds())
    return None


def server_seconds(event: Json, headers: Mapping[str, str]) -> float | None:
    """The host's own time: OpenAI's header, Groq's usage, llama.cpp's timings; None if it is left out or odd."""
    header = headers.get("openai-processing-ms")
    timings, usage = event.get("timings"), event.get("usage")
    parts = [timings.get(key) for key in ("prompt_ms", "predicted_ms")] if isinstance(timings, dict) else [None]
    total = usage.get("total_time") if isinstance(usage, dict) else None
    for values, per_second in (([header], 1000), ([total], 1), (parts, 1000)):
        known = [seconds for value in values if (seconds := _duration(value)) is not None]
        if len(known) == len(values):
            return sum(known) / per_second
    return None


def _duration(value: Any) -> float | None:
    """A time that is finite and not negative; None for all else."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        found = float(value)
        return found if math.isfinite(found) and found >= 0 and not isinstance(value, bool) else None
    return None
