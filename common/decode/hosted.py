"""A model behind an OpenAI-compatible endpoint: requested once per question, retried, replayed. Imports no torch.

Every request, with its response or error, is a line of an append-only transcript. Its replies are not requested again:
a run that was stopped resumes without paying twice, and a finished run is replayed without a network. The key comes
from the environment and is in no file, log or message. Answers are greedy.

Hosts differ in what they send with status 200. An answer counts if its finish reason is one of `ENDS` or `LIMITS`.
Errors are raised in the host's words. Values that a host leaves out are None, never 0.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import ssl
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, cast

from common.config import FIELDS, Config
from common.data.prompt import message
from common.data.tokens import Tokenizer, tokenize
from common.errors import UserError
from common.files import lock

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from tqdm import tqdm

Json = dict[str, Any]  # an object as `json.loads` returns it

RETRY_STATUSES = {408, 409, 425, 429, *range(500, 600)}  # HTTP: timeout, conflict, too early, rate limit, server error
BACKOFF = wait_random_exponential(multiplier=0.5, max=60)  # seconds, where the host names none
LONGEST_WAIT_S = 300.0  # that a host may ask for; longer waits are for the user to decide
CHARS_PER_TOKEN = 2  # where no tokenizer is given; English has about 4, so costs are overestimated
ERROR_CHARS, BODY_CHARS = 300, 2000  # kept of an error's message and of an error response: a line, and a page
STREAMED = {"stop": ["\n"], "stream": True, "stream_options": {"include_usage": True}}
ENDS = {"stop", "eos", "eos_token", "stop_sequence", "end_turn"}  # finish reasons of a complete answer
LIMITS = {"length", "max_tokens", "model_length"}  # finish reasons of the token limit
USAGE = ("prompt_tokens", "completion_tokens")
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
THINKING = re.compile(r"\A(.*</think>|\s*<think>.*)", re.S)  # the same inside the text
WORDS = ("detail", "message", "msg", "error_msg", "error_message", "errors")  # keys of an error's message
TRANSIENT = re.compile(
    r"overload|rate.?limit|too many requests|timed?.?out|temporar|try again|busy|at capacity|unavailable|server.?error",
    re.I,
)
FILTER_STATUSES = {400, 403, 422, 451}
FILTER = re.compile(
    r"content[ _-]?filter|content[ _-]?(management )?polic|usage polic|responsible.?ai|moderation|\bsafety\b"
    r"|\b(input|prompt|content|text|message)\b.{0,40}\bflagged|data_inspection|(prohibited|sensitive).?content"
    r"|\Asensitive\Z",
    re.I,
)
OF_ALL = {401, 402, 403, 404, 405, 410}  # statuses that every question meets; others are reported with the question
COMPARED, SHOWN_IDS = 200, 10  # prompts whose tokens are compared with the host's count; ids in a note


@dataclass(frozen=True)
class Reply:
    """A complete answer. Times in seconds; `first` and `total` are of the try that succeeded."""

    text: str
    hit_limit: bool
    read: int | None  # input tokens; None: the host does not report them
    written: int | None  # output tokens, likewise
    connect: float | None  # TCP and TLS; None: the connection was open
    first: float | None  # until the answer's first text; None: the host does not stream
    total: float
    server: float | None  # the host's own time, where it reports one
    waited: float  # before that try: earlier tries and pauses
    # newer than published transcripts
    elsewhere: str = ""  # fields that held text which is no answer: reasoning_content, tool_calls, …
    refused: str = ""  # the host's words, if its content filter refused the question
    streamed: bool = True


class _Retryable(Exception):
    """A failure after which another try may help; `after`: seconds that the host asks to wait."""

    def __init__(self, why: str, after: float | None = None, filtered: bool = False):
        super().__init__(why)
        self.after, self.filtered = after, filtered


class _OfQuestion(UserError):
    """A failure that another question may not meet: the message gets the question's id."""


class _Body(Json):
    """A JSON body instead of a stream of events."""


class Client:
    """One endpoint and its transcript, for several threads.

    `replay`: answers come from the transcript alone. `fresh`: answers in it are requested again, for timing. `count`:
    tokens of a text, where the host reports none. Raises `UserError` where a retry does not help, a limit is reached,
    or an answer to replay is missing.
    """

    def __init__(
        self,
        config: Config,
        transcript: Path,
        replay: bool = False,
        fresh: bool = False,
        count: Callable[[str], float] = lambda text: len(text) / CHARS_PER_TOKEN,
    ):
        assert config.api
        self.api, self.config, self.replay, self.fresh, self.count = config.api, config, replay, fresh, count
        self.key = os.environ.get(self.api.key, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError(f"what {self.api.key} holds is no key: it has other characters than keys have")
        try:
            httpx2.URL(self.api.url)
        except httpx2.InvalidURL as error:
            raise UserError(f"api.url={self.api.url}: {error}") from error
        self.transcript, self.lock, self.stop = transcript, threading.Lock(), threading.Event()
        self.requests, self.usd, self.reserved_usd = 0, 0.0, 0.0
        self.replies: dict[str, Reply] = {}
        self.file = None if replay else transcript.open("a", encoding="utf-8")
        if self.file:
            if not lock(self.file):
                raise UserError(f"{transcript}: another process is asking, and writes there; wait until it is done")
            # a last line that a crash cut short is removed
            os.truncate(transcript, transcript.read_bytes().rfind(b"\n") + 1)
        for number, line in enumerate(read_transcript(transcript), 1):
            try:
                self.requests += 1
                if line["reply"]:
                    self.replies[line["key"]] = reply = _restored(line["reply"])
                    line["reply"] = asdict(reply)
                self.usd += self._paid_usd(line)
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{transcript}:{number}: not a line of a transcript; what was changed here?") from error
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx2.Limits(max_connections=self.api.concurrency, max_keepalive_connections=self.api.concurrency)
        self.http = httpx2.Client(headers=headers, timeout=self.api.timeout_s, limits=limits, verify=_certificates())

    def close(self) -> None:
        self.stop.set()
        self.http.close()
        if self.file:
            self.file.close()

    def ask(self, prompt: str, id_: str = "") -> Reply:
        """The reply to one prompt; `id_` is the question's, for errors."""
        body, of = self.body(prompt), f"question {id_}: " if id_ else ""
        key = hashlib.sha256(json.dumps([self.api.url, body], sort_keys=True).encode()).hexdigest()[:24]
        if key in self.replies and not self.fresh:
            return self.replies[key]
        if self.replay:
            raise UserError(f"{self.transcript}: has no answer to {prompt[-80:]!r}; it is of another run, or not whole")
        stop, retry = stop_after_attempt(self.api.tries), retry_if_exception_type(_Retryable)
        request, began, tries = self.sent(body), time.perf_counter(), itertools.count(1)
        try:
            return Retrying(self._sleep, stop, _pause, retry, reraise=True)(self._try, request, key, began, tries)
        except _OfQuestion as error:
            raise UserError(f"{of}{error}") from error
        except _Retryable as error:
            last = f"{self.api.tries} tries, and the last had {error}"
            raise UserError(
                f"{of}{self.api.url}: {last}; what was answered is kept, the same command goes on"
            ) from error

    def sent(self, body: Json) -> Json:
        """The request as this host takes it: `api.omit` leaves fields out, or gives them another name."""
        names = dict(word.partition("=")[::2] for word in self.api.omit)
        if names.get("stream") == "":
            names["stream_options"] = ""  # hosts refuse it without `stream`
        return {names.get(field, field): value for field, value in body.items() if names.get(field, field)}

    def body(self, prompt: str) -> Json:
        chat, limit = self.config.prompt.chat, self.config.window.answer
        given = {"messages": [{"role": "user", "content": message(prompt)}]} if chat else {"prompt": prompt}
        return {"model": self.config.base.path, **given, "temperature": 0, "max_tokens": limit, **STREAMED}

    def _try(self, request: Json, key: str, began: float, tries: Iterator[int]) -> Reply:
        """Sends one request; its outcome is in the transcript before this returns or raises."""
        last, most, start = next(tries) == self.api.tries, self._reserve(request), time.perf_counter()
        seen: Json = {"status": None, "text": "", "read": None, "written": None}
        reply = why = None
        try:
            reply = self._stream(request, seen, start, waited=start - began)
            return reply
        except (httpx2.HTTPError, httpx2.StreamError, _Retryable) as error:
            # redact first: a cut may split a key
            why = self._redact(_mended(str(error)) or type(error).__name__)[:ERROR_CHARS]
            if last and getattr(error, "filtered", False):
                reply = _refusal(why, seen, start, start - began)
                return reply
            raise _Retryable(why, getattr(error, "after", None)) from None
        except UserError as error:
            why = str(error)
            raise
        finally:
            when = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = {"key": key, "when": when, "url": self.api.url, "request": request, **seen, "error": why}
            line["reply"] = asdict(reply) if reply else None
            paid = self._paid_usd(line)
            with self.lock:
                self.reserved_usd -= most
                if reply:
                    self.replies[key] = reply
                self.usd += paid
                assert self.file
                self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
                self.file.flush()

    def _stream(self, request: Json, seen: Json, start: float, waited: float) -> Reply:
        """The reply of one request; `seen` gets the status, the text and the token counts, also of a failure."""
        marks, pieces, usage, elsewhere = dict[str, float](), list[str](), Json(), dict[str, None]()
        trace = {"trace": lambda name, _: marks.setdefault(name, time.perf_counter())}
        url = f"{self.api.url.rstrip('/')}/{'chat/completions' if self.config.prompt.chat else 'completions'}"
        first = reason = server = read = written = None
        text, streamed, by_delta = "", True, False
        with self.http.stream("POST", url, json=request, extensions=trace) as response:
            seen["status"] = status = response.status_code
            if status != 200:
                response.read()
                text = self._redact(_mended(response.text))
                seen["text"] = text[:BODY_CHARS]
                if status in FILTER_STATUSES and self._is_filter(text):
                    return _refusal(f"HTTP {status}: {_error_message(text)}", seen, start, waited)
                raise self._failure(status, text, _retry_after(response.headers.get("retry-after")))
            for event in _events(response):
                if reported := _reported(event):
                    said = self._redact(_mended(json.dumps(reported, ensure_ascii=False)))
                    # as free as an error by status
                    seen.update(text=said[:BODY_CHARS], read=read or 0, written=written or 0)
                    if self._is_filter(said):
                        return _refusal(_error_message(said), seen, start, waited)
                    raise self._failure_inside(reported, said)
                try:
                    choice = (event.get("choices") or [{}])[0]
                    piece, fields = _text_of(choice)
                    reason = choice.get("finish_reason") or reason
                    counts = found if isinstance(found := event.get("usage"), dict) else {}
                    usage = counts if any(_count(counts.get(key)) for key in USAGE) else usage
                    server = _server_seconds(event, response.headers) or server
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise _Retryable(f"an event that is none of an answer's: {event}") from error
                elsewhere |= dict.fromkeys(fields)
                streamed = streamed and not isinstance(event, _Body)
                if piece and first is None:
                    first = time.perf_counter() - start
                if piece and not choice.get("text") and not choice.get("delta") and by_delta:
                    pieces.clear()  # a message after deltas repeats them
                by_delta = by_delta or bool(piece and (choice.get("text") or choice.get("delta")))
                pieces.append(piece)
                # a host may split a surrogate pair over two events; half of one alone becomes U+FFFD
                seen["text"] = text = self._redact(_mended("".join(pieces)))
                read, written = (_count(usage.get(key)) for key in USAGE)
                # no prompt has 0 tokens, nor has a text; of an answer without text 0 is plausible
                written = None if written == 0 and (text or elsewhere or not read) else written
                seen["read"], seen["written"] = read, written = read or None, written
        total = time.perf_counter() - start
        if reason is None:
            raise _Retryable("an answer that was cut short")
        kind = str(reason).lower()
        if kind not in ENDS | LIMITS:
            filtered = FILTER.search(kind) is not None
            raise _Retryable(f'an answer that ended with finish_reason "{reason}"', filtered=filtered)
        connected = [marks[n] - start for n in marks if n.endswith((".connect_tcp.complete", ".start_tls.complete"))]
        answer, thoughts = THINKING.subn("", text)
        line, more, _ = answer.lstrip().partition("\n")
        return Reply(
            text=line.strip(),
            hit_limit=kind in LIMITS and not more,  # a host that ignores `stop` may reach the limit after the answer
            read=read,
            written=written,
            connect=max(connected, default=None),
            first=(first or total) if streamed else None,
            total=total,
            server=server,
            waited=waited,
            elsewhere=", ".join([*elsewhere, *["<think>"] * thoughts]),
            streamed=streamed,
        )

    def _is_filter(self, text: str) -> bool:
        """True if an error's code, type or message names a content filter; `text` is JSON, or all of the message."""
        return FILTER.search(_named(text).replace(self.config.base.path, "")) is not None

    def _failure(self, status: int, text: str, after: float | None) -> UserError | _Retryable:
        message = f"HTTP {status}: {_error_message(text)}"
        if after and after > LONGEST_WAIT_S:
            return UserError(f"{self.api.url}: {message}; it asks to wait {after:.0f} s: start again then, to go on")
        if status in RETRY_STATUSES:
            return _Retryable(message, after)
        if status in (401, 403):
            message += f"; the key is read from {self.api.key}, which is {'set' if self.key else 'not set'}"
        if status == 404:
            message += f"; is base.path={self.config.base.path} (still) a model there, and does api.url end with /v1?"
        if status in (404, 405) and not self.config.prompt.chat:
            message += " A host without /completions needs prompt.chat=true"
        if status in (400, 422):
            message += self._omittable(text)
        return (UserError if status in OF_ALL else _OfQuestion)(f"{self.api.url}: {message}")

    def _failure_inside(self, error: Json, said: str) -> UserError | _Retryable:
        """The error that a host reports in a reply of status 200; `said` is its JSON, without the key."""
        message = f"an error in a reply of status 200: {_error_message(said)}"
        inner = error["error"] if isinstance(error.get("error"), dict) else error
        codes = [str(inner.get(key)) for key in ("code", "status", "status_code")]
        retried = any(code.isdecimal() and int(code) in RETRY_STATUSES for code in codes)
        if retried or TRANSIENT.search(_named(said)):
            return _Retryable(message)
        message += "; does api.url end with /v1?" if isinstance(error, _Body) else ""
        return _OfQuestion(f"{self.api.url}: {message}{self._omittable(said)}")

    def _omittable(self, text: str) -> str:
        """The end of an error that names a field of our requests: how to leave it out."""
        named = f"{_error_message(text)} {_named(text)}"
        if re.search(r"context.(length|window)", named):  # which names max_tokens, too
            return ""
        names = dict(word.partition("=")[::2] for word in self.api.omit)
        found = [field for field in FIELDS if field not in names and re.search(rf"\b{field}\b", named)]
        other = re.search(r"\bmax_(completion|new|output)_tokens\b", named)
        words = [f"{field}={other[0]}" if field == "max_tokens" and other else field for field in found]
        return (
            f"; a host that refuses {found[0]} needs api.omit=[{','.join([*self.api.omit, *words])}]" if found else ""
        )

    def _reserve(self, request: Json) -> float:
        """Counts a request and reserves the dollars that it may cost, which are returned; raises beyond a limit."""
        most = self._usd(self.count(_prompt_of(request)), self.config.window.answer) if self.priced else 0.0
        kept = "what was answered is kept, and the same command goes on with a higher limit"
        with self.lock:
            if self.stop.is_set():
                raise UserError("stopped")
            if self.api.max_requests is not None and self.requests >= self.api.max_requests:
                raise UserError(f"api.max_requests={self.api.max_requests} is reached; {kept}")
            spent = self.usd + self.reserved_usd
            if self.api.max_cost_usd is not None and spent + most > self.api.max_cost_usd:
                raise UserError(f"api.max_cost_usd={self.api.max_cost_usd:g} is reached ({spent:.4f} spent); {kept}")
            self.requests += 1
            self.reserved_usd += most
        return most

    def _paid_usd(self, line: Json) -> float:
        """Dollars of a line of the transcript: by the host's token counts, else by our own of what was sent and came.

        A host bills an answer that was cut short, too, but no error.
        """
        prompt, said = _prompt_of(line["request"]), line["reply"] or line
        if line["status"] != 200 or not self.priced:
            return 0.0
        read, written = said.get("read"), said.get("written")
        if written is None:  # hidden tokens can't be counted: at most so many
            written = self.config.window.answer if said.get("elsewhere") else self.count(line.get("text") or "")
        return self._usd(self.count(prompt) if read is None else read, written)

    @property
    def priced(self) -> bool:
        return self.api.usd_per_million_read > 0 or self.api.usd_per_million_written > 0

    def _usd(self, read: float, written: float) -> float:
        return (read * self.api.usd_per_million_read + written * self.api.usd_per_million_written) / 1e6

    def _sleep(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise UserError("stopped")

    def _redact(self, text: str) -> str:
        return text.replace(self.key, "…") if self.key else text


@functools.cache
def _certificates() -> ssl.SSLContext:
    return httpx2.create_ssl_context()  # reads the certificates of all authorities, which takes 30 ms


def ask_all(
    client: Client, wanted: Mapping[str, str], check: Callable[[], None] = lambda: None, progress: str | None = "ask"
) -> dict[str, Reply]:
    """Answers to {id: prompt}, in that order, from `api.concurrency` threads; what `check` raises ends the work."""
    failed: list[BaseException] = []

    def ask(id_: str, prompt: str) -> Reply:
        try:
            return client.ask(prompt, id_)
        except BaseException as error:
            failed.append(error)
            client.stop.set()  # before another thread sends a request
            raise

    pool = ThreadPoolExecutor(client.api.concurrency)
    try:
        replies = {id_: pool.submit(ask, id_, prompt) for id_, prompt in wanted.items()}
        pending = set(replies.values())
        with tqdm(total=len(wanted), desc=progress, unit="question", disable=progress is None) as bar:
            while pending:
                ended, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                check()
                if failed:
                    raise failed[0]
                bar.update(len(ended))
    finally:
        client.stop.set()
        pool.shutdown(cancel_futures=True)  # requests that were sent end, and are in the transcript
        client.stop.clear()
    return {id_: future.result() for id_, future in replies.items()}


def read_transcript(path: Path) -> Iterator[Json]:
    """Lines of a transcript, less a last one that a crash cut short. Raises `UserError` for any other damaged line."""
    text = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a line of a transcript; what was changed here?") from error


def counter(tokenizer: Tokenizer) -> Callable[[str], float]:
    """A function that returns the tokens of a text, BOS included."""
    return lambda text: len(tokenize(tokenizer, [text])[0])


def notes(client: Client, wanted: Mapping[str, str], replies: Mapping[str, Reply]) -> list[str]:
    """Lines to print on what is odd in the replies: refused questions, empty answers, other prompts, missing times."""
    out, n, chat = list[str](), len(replies), client.config.prompt.chat
    refused = {id_: reply.refused for id_, reply in replies.items() if reply.refused}
    if refused:
        ids = ", ".join(list(refused)[:SHOWN_IDS]) + (", …" if len(refused) > SHOWN_IDS else "")
        were = "1 question was refused" if len(refused) == 1 else f"{len(refused)} questions were refused"
        scores = "scores" if len(refused) == 1 else "score"
        out.append(f"{were} by the host's content filter and {scores} 0: {ids} ({next(iter(refused.values()))})")
    empty = [r for r in replies.values() if not r.text and not r.refused and (r.written or r.elsewhere)]
    if empty:
        fields = ", ".join(dict.fromkeys(field for r in empty for field in r.elsewhere.split(", ") if field))
        are = f"answer{'s' * (n > 1)} {'is' if len(empty) == 1 else 'are'} empty"
        advice = "raise window.answer, or turn the model's thinking off at the host"
        advice += "" if chat else "; a model that only chats needs prompt.chat=true"
        out.append(f"{len(empty)} of {n} {are} although the host wrote tokens: it sent {fields or 'no text'}; {advice}")
    if not all(reply.streamed for reply in replies.values()):
        out.append("the host does not stream, so the time to the first token is unknown")
    known = [(r.read, client.count(wanted[i])) for i, r in itertools.islice(replies.items(), COMPARED) if r.read]
    if not chat and sum(read > 1.25 * sent + 16 for read, sent in known) > len(known) / 2:
        read, sent = (statistics.mean(side) for side in zip(*known, strict=True))
        out.append(
            f"the host read {read:.0f} tokens of {sent:.0f} that were sent, on average: it wraps completions in a "
            "template of its own, which is another prompt, or its tokenizer is very different"
        )
    if "temperature" in client.api.omit:
        out.append("temperature was not sent: unless the host's default is 0, another run may score otherwise")
    return out


# ---- responses -----------------------------------------------------------------------------------------------------


class _Kept:
    """A response of any content type, for `EventSource`; `text` is what came until `keep` is unset."""

    def __init__(self, response: httpx2.Response):
        self.headers = {"content-type": "text/event-stream"}
        self.response, self.request, self.text, self.keep = response, response.request, "", True

    def iter_text(self) -> Iterator[str]:
        for text in self.response.iter_text():
            self.text += text if self.keep else ""
            yield text


def _events(response: httpx2.Response) -> Iterator[Json]:
    """The JSON of every event with data, up to [DONE], or a `_Body`. Raises `_Retryable` for anything else."""
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
                raise _Retryable(f"an answer that is no JSON: {event.data!r}") from error
            found = data or "an event without words"
        if name == "error" and not (isinstance(found, dict) and found.get("error")):
            found = {"error": found}
        if not isinstance(found, dict):
            raise _Retryable(f"an event that is none of an answer's: {found}")
        yield found
    if kept.keep and kept.text.strip():
        yield _body(kept.text, kind)


def _body(text: str, kind: str) -> _Body:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        said = " ".join(text.split())[:ERROR_CHARS]
        raise _Retryable(f"no stream and no JSON, but {kind or 'a body of no type'}: {said}") from error
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    return _Body(found if isinstance(found, dict) else {"error": f"a JSON body that is no answer: {found}"})


def _reported(event: Json) -> Json | None:
    """The object that holds an error's message, if an event or body reports an error."""
    choices = event.get("choices")
    holders = [event, *(c for c in (choices if isinstance(choices, list) else []) if isinstance(c, dict))]
    if failed := [holder for holder in holders if holder.get("error")]:
        return failed[0]
    said = any(isinstance(event.get(key), str | list) and event[key] for key in WORDS)
    named = "error" in (event.get("object"), event.get("type"), event.get("status"))
    return event if not choices and (said or named or isinstance(event, _Body)) else None


def _text_of(choice: Json) -> tuple[str, list[str]]:
    """A choice's text, and the names of fields that hold what is no answer."""
    said = choice.get("delta") or choice.get("message") or {}
    content = choice.get("text") or said.get("content") or ""
    fields = [name for name in NO_ANSWER if said.get(name) or choice.get(name)]
    if isinstance(content, list):  # a chat message in parts
        fields += [part["type"] for part in content if part["type"] != "text"]
        content = "".join(part["text"] for part in content if part["type"] == "text")
    return "" + content, fields


def _refusal(why: str, seen: Json, start: float, waited: float) -> Reply:
    """The reply to a question that the host's content filter refuses."""
    read, written, total = seen.get("read"), seen.get("written"), time.perf_counter() - start
    return Reply("", False, read, written, None, None, total, server=None, waited=waited, refused=why)


def _restored(fields: Json) -> Reply:
    """A reply of a transcript; token counts that are both 0 are unknown."""
    reply = Reply(**fields)
    return reply if reply.read or reply.written or reply.refused else replace(reply, read=None, written=None)


def _prompt_of(request: Json) -> str:
    return request.get("prompt") or request["messages"][0]["content"]


def _mended(text: str) -> str:
    """Text that UTF-8 takes: halves of a surrogate pair are joined, or become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _count(value: object) -> int | None:
    """A token count; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(value) if value >= 0 and value == int(value) else None


def _parsed(text: str) -> Json:
    """The JSON object of an error response; empty if it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        found = found[0] if isinstance(found, list) and len(found) == 1 else found
        return found if isinstance(found, dict) else {}
    return {}


def _named(text: str) -> str:
    """The code, type, field and message of an error response: not what a host repeats of the request."""
    found = _parsed(text)
    error = found["error"] if isinstance(found.get("error"), dict) else found
    inner = error.get("innererror")
    holders = (error, inner if isinstance(inner, dict) else {}, found)
    values = [holder.get(key) for holder in holders for key in ("code", "type", "param", "error", *WORDS)]
    return " ".join(v for v in values if isinstance(v, str)) if found else text[:ERROR_CHARS]


def _error_message(text: str) -> str:
    """The message in an error response's body, on one line."""
    found = _parsed(text)
    error = found.get("error", found)
    inner = error if isinstance(error, dict) else {}
    said = error if isinstance(error, str) else inner.get("message") or next(filter(None, map(found.get, WORDS)), None)
    return " ".join(str(said or text).split())[:ERROR_CHARS] or "no word of why"


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, which holds seconds or a date."""
    with contextlib.suppress(ValueError):
        seconds = float(value or "")
        return max(0.0, seconds) if math.isfinite(seconds) else None
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(value or "") - datetime.now(UTC)).total_seconds())
    return None


def _pause(state: RetryCallState) -> float:
    after = getattr(state.outcome and state.outcome.exception(), "after", None)
    return BACKOFF(state) if after is None else after


def _server_seconds(event: Json, headers: Mapping[str, str]) -> float | None:
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
