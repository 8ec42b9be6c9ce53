"""A model behind an OpenAI-compatible endpoint: requested once per question, retried, replayed. Imports no torch.

Every request, with its response or error, is a line of an append-only transcript. Its replies are not requested again:
a run that was stopped resumes without paying twice, and a finished run is replayed without a network, even when the
host has retired the model. The key comes from the environment and is in no file, log or message. Answers are streamed,
greedy (temperature 0), and end at a line break or after `window.answer` tokens.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TextIO

from common.config import Config
from common.data.prompt import message
from common.errors import UserError
from common.files import lock

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from tqdm import tqdm

Json = dict[str, Any]  # an object as `json.loads` returns it

RETRY_STATUSES = {408, 409, 425, 429, *range(500, 600)}  # HTTP: timeout, conflict, too early, rate limit, server error
BACKOFF = wait_random_exponential(multiplier=0.5, max=60)  # seconds, where the host names none
LONGEST_WAIT_S = 300.0  # that a host may ask for; longer waits are for the user to decide
CHARS_PER_TOKEN = 2  # of a prompt of unknown length in tokens; English has about 4, so costs are overestimated
ERROR_CHARS, BODY_CHARS = 300, 2000  # kept of an error's message and of an error response: a line, and a page
STREAMED = {"stop": ["\n"], "stream": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Reply:
    """A complete answer. Times in seconds; `first` and `total` are of the try that succeeded."""

    text: str
    hit_limit: bool
    read: int | None  # input tokens; None: the host does not report them
    written: int | None  # output tokens, likewise
    connect: float | None  # TCP and TLS; None: the connection was open
    first: float  # until the answer's first text
    total: float
    server: float | None  # the host's own time, where it reports one
    waited: float  # before that try: earlier tries and pauses


class _Retryable(Exception):
    """A failure after which another try may help; `after`: seconds that the host asks to wait."""

    def __init__(self, why: str, after: float | None = None):
        super().__init__(why)
        self.after = after


class Client:
    """One endpoint and its transcript, for several threads.

    `replay`: answers come from the transcript alone. `fresh`: answers in it are requested again, for timing. Raises
    `UserError` where a retry does not help, a limit is reached, or an answer to replay is missing.
    """

    def __init__(self, config: Config, transcript: Path, replay: bool = False, fresh: bool = False):
        assert config.api
        self.api, self.config, self.replay, self.fresh = config.api, config, replay, fresh
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
        self.file = None if replay else _open_locked(transcript)
        for number, line in enumerate(read_transcript(transcript), 1):
            try:
                self.requests += 1
                reply = Reply(**line["reply"]) if line["reply"] else None
                if reply:
                    self.replies[line["key"]] = reply
                self.usd += self._cost_usd(line["request"], reply) if line["status"] == 200 else 0
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{transcript}:{number}: not a line of a transcript; what was changed here?") from error
        headers, n = {"Authorization": f"Bearer {self.key}"} if self.key else {}, self.api.concurrency
        limits = httpx2.Limits(max_connections=n, max_keepalive_connections=n)
        self.http = httpx2.Client(headers=headers, timeout=self.api.timeout_s, limits=limits)

    def close(self) -> None:
        self.stop.set()
        self.http.close()
        if self.file:
            self.file.close()

    def ask(self, prompt: str) -> Reply:
        """The answer to one prompt, from the transcript or the endpoint."""
        body = self.body(prompt)
        key = hashlib.sha256(json.dumps([self.api.url, body], sort_keys=True).encode()).hexdigest()[:24]
        if key in self.replies and not self.fresh:
            return self.replies[key]
        if self.replay:
            raise UserError(f"{self.transcript}: has no answer to {prompt[-80:]!r}; it is of another run, or not whole")
        began, stop = time.perf_counter(), stop_after_attempt(self.api.tries)
        retry = retry_if_exception_type(_Retryable)
        try:
            return Retrying(self._sleep, stop, _pause, retry, reraise=True)(self._try, body, key, began)
        except _Retryable as error:
            tries = f"{self.api.tries} tries, and the last had {error}"
            raise UserError(f"{self.api.url}: {tries}; what was answered is kept, the same command goes on") from error

    def body(self, prompt: str) -> Json:
        chat, limit = self.config.prompt.chat, self.config.window.answer
        given = {"messages": [{"role": "user", "content": message(prompt)}]} if chat else {"prompt": prompt}
        return {"model": self.config.base.path, **given, "temperature": 0, "max_tokens": limit, **STREAMED}

    def _try(self, body: Json, key: str, began: float) -> Reply:
        """Sends one request; its outcome is in the transcript before this returns or raises."""
        most = self._reserve(body)
        seen: Json = {"status": None, "text": ""}
        reply = why = None
        start = time.perf_counter()
        try:
            reply = self._stream(body, seen, start, waited=start - began)
            return reply
        except (httpx2.HTTPError, httpx2.StreamError, _Retryable) as error:
            why = self._redact(str(error) or type(error).__name__)[:ERROR_CHARS]  # redact first: a cut may split a key
            raise _Retryable(why, getattr(error, "after", None)) from None
        except UserError as error:
            why = str(error)
            raise
        finally:
            with self.lock:
                self.reserved_usd -= most
                if reply:
                    self.replies[key] = reply
                # a host bills an answer that was cut short, too
                self.usd += self._cost_usd(body, reply) if seen["status"] == 200 else 0
                when = datetime.now(UTC).isoformat(timespec="milliseconds")
                line = {"key": key, "when": when, "url": self.api.url, "request": body, **seen, "error": why}
                line["reply"] = asdict(reply) if reply else None
                assert self.file
                self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
                self.file.flush()

    def _stream(self, body: Json, seen: Json, start: float, waited: float) -> Reply:
        """The reply of one request; `seen` gets the status and the text, also of a failure."""
        marks: dict[str, float] = {}
        trace = {"trace": lambda name, _: marks.setdefault(name, time.perf_counter())}
        url = f"{self.api.url.rstrip('/')}/{'chat/completions' if self.config.prompt.chat else 'completions'}"
        pieces, usage = list[str](), Json()
        first, reason, server = None, None, None
        with self.http.stream("POST", url, json=body, extensions=trace) as response:
            seen["status"] = response.status_code
            if response.status_code != 200:
                response.read()
                text = self._redact(response.text)
                seen["text"] = text[:BODY_CHARS]
                raise self._failure(response.status_code, text, _retry_after(response.headers.get("retry-after")))
            for event in _events(response):
                try:
                    choice = (event.get("choices") or [{}])[0]
                    piece = "" + (choice.get("text") or (choice.get("delta") or {}).get("content") or "")
                    reason = choice.get("finish_reason") or reason
                    usage = event.get("usage") or usage
                    server = _server_seconds(event, response.headers) or server
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise _Retryable(f"an event that is none of an answer's: {event}") from error
                if piece and first is None:
                    first = time.perf_counter() - start
                pieces.append(piece)
        total = time.perf_counter() - start
        # a host may split a surrogate pair over two events; half of one alone becomes U+FFFD
        text = self._redact("".join(pieces).encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        seen["text"] = text
        if reason is None:
            raise _Retryable("an answer that was cut short")
        keys = ("prompt_tokens", "completion_tokens")
        read, written = (n if isinstance(n := usage.get(key), int) else None for key in keys)
        connected = [marks[n] for n in marks if n.endswith((".connect_tcp.complete", ".start_tls.complete"))]
        connect = max(connected) - start if connected else None
        line = text.partition("\n")[0].strip()
        return Reply(line, reason == "length", read, written, connect, first or total, total, server, waited)

    def _failure(self, status: int, text: str, after: float | None) -> UserError | _Retryable:
        """The error of a response whose status is not 200."""
        message = f"HTTP {status}: {_error_message(text)}"
        if after and after > LONGEST_WAIT_S:
            return UserError(f"{self.api.url}: {message}; it asks to wait {after:.0f} s: start again then, to go on")
        if status in RETRY_STATUSES:
            return _Retryable(message, after)
        if status in (401, 403):
            message += f"; the key is read from {self.api.key}, which is {'set' if self.key else 'not set'}"
        if status == 404:
            message += f"; is base.path={self.config.base.path} (still) a model there, and does api.url end with /v1?"
        return UserError(f"{self.api.url}: {message}")

    def _reserve(self, body: Json) -> float:
        """Counts a request and reserves the dollars that it may cost, which are returned; raises beyond a limit."""
        most = self._cost_usd(body)
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

    def _cost_usd(self, body: Json, reply: Reply | None = None) -> float:
        """Dollars for a request: its cost by the reply's token counts, or the most that it may cost without them."""
        prompt = body.get("prompt") or body["messages"][0]["content"]
        input_tokens = len(prompt) / CHARS_PER_TOKEN if reply is None or reply.read is None else reply.read
        output_tokens = body["max_tokens"] if reply is None or reply.written is None else reply.written
        return (input_tokens * self.api.usd_per_million_read + output_tokens * self.api.usd_per_million_written) / 1e6

    def _sleep(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise UserError("stopped")

    def _redact(self, text: str) -> str:
        return text.replace(self.key, "…") if self.key else text


def ask_all(
    client: Client, wanted: Mapping[str, str], check: Callable[[], None] = lambda: None, progress: str | None = "ask"
) -> dict[str, Reply]:
    """Answers to {id: prompt}, in that order, from `api.concurrency` threads; what `check` raises ends the work."""
    replies, failed = dict[str, Reply](), list[BaseException]()

    def ask(prompt: str) -> Reply:
        try:
            return client.ask(prompt)
        except BaseException as error:
            failed.append(error)
            client.stop.set()  # before another thread sends a request
            raise

    pool = ThreadPoolExecutor(client.api.concurrency)
    try:
        pending = {pool.submit(ask, prompt): id_ for id_, prompt in wanted.items()}
        with tqdm(total=len(wanted), desc=progress, unit="question", disable=progress is None) as bar:
            while pending:
                ended, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                check()
                if failed:
                    raise failed[0]
                for future in ended:
                    replies[pending.pop(future)] = future.result()
                    bar.update()
    finally:
        client.stop.set()
        pool.shutdown(cancel_futures=True)  # requests that were sent end, and are in the transcript
        client.stop.clear()
    return {id_: replies[id_] for id_ in wanted}


def read_transcript(path: Path) -> Iterator[Json]:
    """Lines of a transcript, less a last one that a crash cut short. Raises `UserError` for any other damaged line."""
    text = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a line of a transcript; what was changed here?") from error


def _open_locked(path: Path) -> TextIO:
    """A transcript to append to, locked against other processes; a last line that a crash cut short is removed."""
    file = path.open("a", encoding="utf-8")
    if not lock(file):
        raise UserError(f"{path}: another process is asking, and writes there; wait until it is done")
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return file


# ---- responses -----------------------------------------------------------------------------------------------------


def _events(response: httpx2.Response) -> Iterator[Json]:
    """The JSON of every event, up to [DONE]. Raises `_Retryable` for anything else, and for a reported error."""
    for event in httpx2.EventSource(response):
        if event.data.strip() == "[DONE]":
            return
        try:
            found = json.loads(event.data)
        except ValueError as error:
            raise _Retryable(f"an answer that is no JSON: {event.data!r}") from error
        if not isinstance(found, dict) or found.get("error"):
            raise _Retryable(f"an error in the answer: {event.data}")
        yield found


def _error_message(text: str) -> str:
    """The message in an error response's body, on one line."""
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        found = json.loads(text)
        error = found.get("error", found)
        said = error if isinstance(error, str) else error.get("message") or found.get("detail") or found.get("message")
        text = str(said or text)
    return " ".join(text.split())[:ERROR_CHARS] or "no word of why"


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, which holds seconds or a date."""
    if not value:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return None


def _pause(state: RetryCallState) -> float:
    """Seconds before the next try."""
    error = state.outcome and state.outcome.exception()
    after = error.after if isinstance(error, _Retryable) else None
    return BACKOFF(state) if after is None else after


def _server_seconds(event: Json, headers: Mapping[str, str]) -> float | None:
    """The host's own time: OpenAI's header, Groq's usage, llama.cpp's timings."""
    with contextlib.suppress(KeyError, ValueError):
        return float(headers["openai-processing-ms"]) / 1000
    if (total := (event.get("usage") or {}).get("total_time")) is not None:
        return float(total)
    if timings := event.get("timings"):
        return (timings.get("prompt_ms", 0) + timings.get("predicted_ms", 0)) / 1000
    return None
