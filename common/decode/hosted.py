"""A model behind an OpenAI-compatible endpoint: asked once for each question, tried again where that helps, replayed.

Every request and its answer, or what went wrong, is a line of a transcript that is only ever added to. What it holds is
not asked again, so a run that was stopped goes on and nothing is paid for twice; and a finished one can be replayed
without a network, when the host has long retired the model. The key comes from the environment and is in no file, log
or message. Imports no torch.

Answers are streamed, greedy (temperature 0), and end at a line break or after `window.answer` tokens.
"""

import contextlib
import fcntl
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

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from tqdm import tqdm

AGAIN = {408, 409, 425, 429, *range(500, 600)}  # HTTP statuses after which another try may help
BACKOFF = wait_random_exponential(multiplier=0.5, max=60)  # seconds, where the host names none
LONGEST_WAIT = 300.0  # seconds that a host may ask for; a longer wait is for the user to decide
LETTERS_A_TOKEN = 2  # of a prompt whose tokens are not known: few, so that a budget is rather kept than passed


@dataclass(frozen=True)
class Reply:
    """An answer. Seconds; `first` and `total` are of the try that succeeded, `waited` is all that came before it."""

    text: str
    hit_limit: bool
    read: int | None  # tokens of the prompt, where the host says
    written: int | None  # tokens of the answer
    connect: float | None  # TCP and TLS; None where a connection was there
    first: float  # until the first of the answer's text
    total: float
    server: float | None  # what the host says that it took
    waited: float


class _Again(Exception):
    """Another try may help: why, and how many seconds the host asks to wait."""

    def __init__(self, why: str, after: float | None = None):
        super().__init__(why)
        self.after = after


class Client:
    """One endpoint, asked by several threads.

    `transcript` is read first, and added to. `replay` answers from it alone; `anew` asks though it holds the answer,
    as timing has to. Raises `UserError` where trying again does not help, a limit is reached, or nothing is to replay.
    """

    def __init__(self, config: Config, transcript: Path, replay: bool = False, anew: bool = False):
        assert config.api
        self.api, self.config, self.replay, self.anew = config.api, config, replay, anew
        self.key = os.environ.get(self.api.key, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError(f"what {self.api.key} holds is no key: it has other characters than keys have")
        try:
            httpx2.URL(self.api.url)
        except httpx2.InvalidURL as error:
            raise UserError(f"api.url={self.api.url}: {error}") from error
        self.transcript, self.lock, self.stop = transcript, threading.Lock(), threading.Event()
        self.requests, self.usd, self.promised = 0, 0.0, 0.0
        self.known: dict[str, Reply] = {}
        self.file = None if replay else _opened(transcript)
        for number, line in enumerate(read_transcript(transcript), 1):
            try:
                self.requests += 1
                reply = Reply(**line["reply"]) if line["reply"] else None
                if reply:
                    self.known[line["key"]] = reply
                self.usd += self._price(line["request"], reply) if line["status"] == 200 else 0
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{transcript}:{number}: not a line of a transcript; what was changed here?") from error
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.http = httpx2.Client(
            headers=headers, timeout=self.api.timeout_s,
            limits=httpx2.Limits(max_connections=self.api.concurrency, max_keepalive_connections=self.api.concurrency),
        )  # fmt: skip

    def close(self) -> None:
        self.stop.set()
        self.http.close()
        if self.file:
            self.file.close()

    def ask(self, prompt: str) -> Reply:
        """The answer to one prompt, from the transcript or the endpoint."""
        body = self.body(prompt)
        key = hashlib.sha256(json.dumps([self.api.url, body], sort_keys=True).encode()).hexdigest()[:24]
        if key in self.known and not self.anew:
            return self.known[key]
        if self.replay:
            raise UserError(f"{self.transcript}: has no answer to {prompt[-80:]!r}; it is of another run, or not whole")
        began = time.perf_counter()
        retrying = Retrying(
            stop=stop_after_attempt(self.api.tries), wait=_pause, sleep=self._sleep,
            retry=retry_if_exception_type(_Again), reraise=True,
        )  # fmt: skip
        try:
            return retrying(self._try, body, key, began)
        except _Again as error:
            tries = f"{self.api.tries} tries, and the last had {error}"
            raise UserError(f"{self.api.url}: {tries}; what was answered is kept, the same command goes on") from error

    def body(self, prompt: str) -> dict[str, Any]:
        chat = self.config.prompt.chat
        asked = {"messages": [{"role": "user", "content": message(prompt)}]} if chat else {"prompt": prompt}
        return {
            "model": self.config.base.path, **asked, "temperature": 0, "max_tokens": self.config.window.answer,
            "stop": ["\n"], "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip

    def _try(self, body: dict[str, Any], key: str, began: float) -> Reply:
        """One request. What came of it is in the transcript before this returns or raises."""
        most = self._admit(body)
        seen: dict[str, Any] = {"status": None, "text": ""}
        reply, why = None, ""
        start = time.perf_counter()
        try:
            reply = self._stream(body, seen, start, waited=start - began)
            return reply
        except (httpx2.HTTPError, httpx2.StreamError, _Again) as error:
            why = self._hide(str(error) or type(error).__name__)[:300]  # hidden first: a cut may fall into a key
            raise _Again(why, getattr(error, "after", None)) from None
        except UserError as error:
            why = str(error)
            raise
        finally:
            with self.lock:
                self.promised -= most
                if reply:
                    self.known[key] = reply
                self.usd += self._price(body, reply) if seen["status"] == 200 else 0  # what was cut short was paid for
                self._note({
                    "key": key, "when": datetime.now(UTC).isoformat(timespec="milliseconds"), "url": self.api.url,
                    "request": body, **seen, "error": why or None, "reply": asdict(reply) if reply else None,
                })  # fmt: skip

    def _stream(self, body: dict[str, Any], seen: dict[str, Any], start: float, waited: float) -> Reply:
        marks: dict[str, float] = {}
        trace = {"trace": lambda name, _: marks.setdefault(name, time.perf_counter())}
        url = f"{self.api.url.rstrip('/')}/{'chat/completions' if self.config.prompt.chat else 'completions'}"
        parts: list[str] = []
        usage: dict[str, Any] = {}
        first, reason, server = None, None, None
        with self.http.stream("POST", url, json=body, extensions=trace) as response:
            seen["status"] = response.status_code
            if response.status_code != 200:
                response.read()
                seen["text"] = self._hide(response.text)[:2000]
                said = f"HTTP {response.status_code}: {_message(self._hide(response.text))}"
                after = _retry_after(response.headers.get("retry-after"))
                if after and after > LONGEST_WAIT:
                    raise UserError(
                        f"{self.api.url}: {said}; it asks to wait {after:.0f} s: start again then, to go on"
                    )
                if response.status_code in AGAIN:
                    raise _Again(said, after)
                raise UserError(f"{self.api.url}: {said}{self._advice(response.status_code)}")
            for event in _events(response):
                try:
                    choice = (event.get("choices") or [{}])[0]
                    piece = "" + (choice.get("text") or (choice.get("delta") or {}).get("content") or "")
                    reason = choice.get("finish_reason") or reason
                    usage = event.get("usage") or usage
                    server = _server_seconds(event, response.headers) or server
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise _Again(f"an event that is none of an answer's: {event}") from error
                if piece and first is None:
                    first = time.perf_counter() - start
                parts.append(piece)
        total = time.perf_counter() - start
        # a host may cut a character in two: halves that meet are one again
        said = "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        seen["text"] = said = self._hide(said)
        counts = (usage.get(key) for key in ("prompt_tokens", "completion_tokens"))
        read, written = (n if isinstance(n, int) else None for n in counts)
        if reason is None:
            raise _Again("an answer that was cut short")
        connect = max(
            (marks[n] for n in marks if n.endswith((".connect_tcp.complete", ".start_tls.complete"))), default=0
        )
        return Reply(
            said.partition("\n")[0].strip(), reason == "length", read, written,
            connect - start if connect else None, first or total, total, server, waited,
        )  # fmt: skip

    def _admit(self, body: dict[str, Any]) -> float:
        """Count a request before it is sent, or refuse it; what it may cost at most."""
        most = self._price(body)
        kept = "what was answered is kept, and the same command goes on with a higher limit"
        with self.lock:
            if self.stop.is_set():
                raise UserError("stopped")
            if self.api.max_requests is not None and self.requests >= self.api.max_requests:
                raise UserError(f"api.max_requests={self.api.max_requests} is reached; {kept}")
            spent = self.usd + self.promised
            if self.api.max_cost_usd is not None and spent + most > self.api.max_cost_usd:
                raise UserError(f"api.max_cost_usd={self.api.max_cost_usd:g} is reached ({spent:.4f} spent); {kept}")
            self.requests += 1
            self.promised += most
        return most

    def _price(self, body: dict[str, Any], reply: Reply | None = None) -> float:
        """What a request cost, or may cost at most where its tokens are not known."""
        asked = body.get("prompt") or body["messages"][0]["content"]
        read = len(asked) / LETTERS_A_TOKEN if reply is None or reply.read is None else reply.read
        written = body["max_tokens"] if reply is None or reply.written is None else reply.written
        return (read * self.api.usd_per_million_read + written * self.api.usd_per_million_written) / 1e6

    def _note(self, line: dict[str, Any]) -> None:
        assert self.file
        self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.file.flush()

    def _sleep(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise UserError("stopped")

    def _hide(self, text: str) -> str:
        return text.replace(self.key, "…") if self.key else text

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return f"; the key is read from {self.api.key}, which is {'set' if self.key else 'not set'}"
        if status == 404:
            return f"; is base.path={self.config.base.path} (still) a model there, and does api.url end with /v1?"
        return ""


def ask_all(
    client: Client, wanted: Mapping[str, str], check: Callable[[], None] = lambda: None, progress: str | None = "ask"
) -> dict[str, Reply]:
    """Answers to {id: prompt}, in that order, `api.concurrency` requests at a time. `check` may raise, to end it."""
    replies: dict[str, Reply] = {}
    failed: list[BaseException] = []

    def ask(prompt: str) -> Reply:
        try:
            return client.ask(prompt)
        except BaseException as error:
            failed.append(error)
            client.stop.set()  # before another request is sent
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
        pool.shutdown(cancel_futures=True)  # what is on its way comes back, and is noted
        client.stop.clear()
    return {id_: replies[id_] for id_ in wanted}


def read_transcript(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a transcript, without a last one that a crash cut short. Raises `UserError` where another is damaged."""
    text = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a line of a transcript; what was changed here?") from error


def _opened(path: Path) -> TextIO:
    """To add to, by one process at a time; a line that a crash cut short is cut off."""
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{path}: another process is asking, and writes there; wait until it is done") from error
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return file


# ---- what hosts say ------------------------------------------------------------------------------------------------


def _events(response: httpx2.Response) -> Iterator[dict[str, Any]]:
    """The JSON of every event, up to [DONE]. Raises `_Again` for what is none, or reports an error."""
    for event in httpx2.EventSource(response):
        if event.data.strip() == "[DONE]":
            return
        try:
            found = json.loads(event.data)
        except ValueError as error:
            raise _Again(f"an answer that is no JSON: {event.data!r}") from error
        if not isinstance(found, dict) or found.get("error"):
            raise _Again(f"an error in the answer: {event.data}")
        yield found


def _message(text: str) -> str:
    """The line for a person in an error's body."""
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        found = json.loads(text)
        error = found.get("error", found)
        said = error if isinstance(error, str) else error.get("message") or found.get("detail") or found.get("message")
        if said:
            return " ".join(str(said).split())[:300]
    return " ".join(text.split())[:300] or "no word of why"


def _retry_after(value: str | None) -> float | None:
    """Seconds, of a header that has seconds or a date."""
    if not value:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return None


def _pause(state: RetryCallState) -> float:
    error = state.outcome and state.outcome.exception()
    asked = error.after if isinstance(error, _Again) else None
    return BACKOFF(state) if asked is None else asked


def _server_seconds(event: dict[str, Any], headers: Mapping[str, str]) -> float | None:
    """The host's own time: OpenAI's header, Groq's usage, llama.cpp's timings."""
    if ms := headers.get("openai-processing-ms"):
        with contextlib.suppress(ValueError):
            return float(ms) / 1000
    if (total := (event.get("usage") or {}).get("total_time")) is not None:
        return float(total)
    if timings := event.get("timings"):
        return (timings.get("prompt_ms", 0) + timings.get("predicted_ms", 0)) / 1000
    return None
