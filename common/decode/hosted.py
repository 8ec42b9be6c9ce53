"""A model behind an OpenAI-compatible endpoint: requested once per question, retried, replayed. Imports no torch.

Every request, with its response or error, is a line of an append-only transcript. Its replies are not requested again:
a run that was stopped resumes without paying twice, and a finished run is replayed without a network. The key comes
from the environment and is in no file, log or message. Answers are greedy.

Hosts differ in what they send with status 200. An answer counts if its finish reason is one of `ENDS` or `LIMITS`.
Errors are raised in the host's words. Values that a host leaves out are None, never 0.
"""

import functools
import hashlib
import itertools
import json
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
from pathlib import Path

from common.config import Config
from common.data.prompt import message
from common.data.tokens import Tokenizer, tokenize
from common.data.window import answer_limit
from common.decode.failures import FILTER, FILTER_STATUSES, Failures, OfQuestion
from common.decode.hosted_logprobs import line_logprobs, token_logprobs
from common.decode.responses import (
    ERROR_CHARS,
    Body,
    Json,
    Retryable,
    count_of,
    error_message,
    events,
    mended,
    reported_error,
    retry_after,
    server_seconds,
    text_of,
)
from common.errors import UserError
from common.files import lock

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from tqdm import tqdm

BACKOFF = wait_random_exponential(multiplier=0.5, max=60)  # seconds, where the host names none
CHARS_PER_TOKEN = 2  # where no tokenizer is given; English has about 4, so costs are overestimated
BODY_CHARS = 2000  # kept of an error response: a page
STREAMED = {"stop": ["\n"], "stream": True, "stream_options": {"include_usage": True}}
ENDS = {"stop", "eos", "eos_token", "stop_sequence", "end_turn"}  # finish reasons of a complete answer
LIMITS = {"length", "max_tokens", "model_length"}  # finish reasons of the token limit
USAGE = ("prompt_tokens", "completion_tokens")
THINKING = re.compile(r"\A(.*</think>|\s*<think>.*)", re.S)  # the same inside the text
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
    # of the answer's tokens, natural log; None: not given, or not surely all; most hosts leave the stop token's out
    logprob: float | None = None
    least: float | None = None  # of these tokens' log-probabilities


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
        self.failures = Failures(config, has_key=bool(self.key))
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
        stop, retry = stop_after_attempt(self.api.tries), retry_if_exception_type(Retryable)
        request, began, tries = self.sent(body), time.perf_counter(), itertools.count(1)
        try:
            return Retrying(self._sleep, stop, _pause, retry, reraise=True)(self._try, request, key, began, tries)
        except OfQuestion as error:
            raise UserError(f"{of}{error}") from error
        except Retryable as error:
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
        chat, limit = self.config.prompt.chat, answer_limit(self.config.window, self.config.decode)
        given = {"messages": [{"role": "user", "content": message(prompt)}]} if chat else {"prompt": prompt}
        fields = {"temperature": 0, "max_tokens": limit, **STREAMED}
        fields |= {"logprobs": True if chat else 1} if self.api.logprobs else {}
        return {"model": self.config.base.path, **given, **fields}

    def _try(self, request: Json, key: str, began: float, tries: Iterator[int]) -> Reply:
        """Sends one request; its outcome is in the transcript before this returns or raises."""
        last, most, start = next(tries) == self.api.tries, self._reserve(request), time.perf_counter()
        seen: Json = {"status": None, "text": "", "read": None, "written": None}
        reply = why = None
        try:
            reply = self._stream(request, seen, start, waited=start - began)
            return reply
        except (httpx2.HTTPError, httpx2.StreamError, Retryable) as error:
            # redact first: a cut may split a key
            why = self._redact(mended(str(error)) or type(error).__name__)[:ERROR_CHARS]
            if last and getattr(error, "filtered", False):
                reply = _refusal(why, seen, start, start - began)
                return reply
            raise Retryable(why, getattr(error, "after", None)) from None
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
        tokens: list[tuple[str, float]] | None = []  # None: one is malformed
        with self.http.stream("POST", url, json=request, extensions=trace) as response:
            seen["status"] = status = response.status_code
            if status != 200:
                response.read()
                text = self._redact(mended(response.text))
                seen["text"] = text[:BODY_CHARS]
                if status in FILTER_STATUSES and self.failures.are_filters(text):
                    return _refusal(f"HTTP {status}: {error_message(text)}", seen, start, waited)
                raise self.failures.by_status(status, text, retry_after(response.headers.get("retry-after")))
            for event in events(response):
                if reported := reported_error(event):
                    said = self._redact(mended(json.dumps(reported, ensure_ascii=False)))
                    # as free as an error by status
                    seen.update(text=said[:BODY_CHARS], read=read or 0, written=written or 0)
                    if self.failures.are_filters(said):
                        return _refusal(error_message(said), seen, start, waited)
                    raise self.failures.in_reply(reported, said)
                try:
                    # of several choices the first, which is the only one that was asked for
                    choice: Json = next((c for c in event.get("choices") or [] if not c.get("index")), {})
                    piece, fields = text_of(choice)
                    reason = choice.get("finish_reason") or reason
                    counts = found if isinstance(found := event.get("usage"), dict) else {}
                    usage = counts if any(count_of(counts.get(key)) for key in USAGE) else usage
                    server = server_seconds(event, response.headers) or server
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise Retryable(f"an event that is none of an answer's: {event}") from error
                elsewhere |= dict.fromkeys(fields)
                streamed = streamed and not isinstance(event, Body)
                if piece and first is None:
                    first = time.perf_counter() - start
                if piece and not choice.get("text") and not choice.get("delta") and by_delta:
                    pieces.clear()  # a message after deltas repeats them
                    tokens = []
                by_delta = by_delta or bool(piece and (choice.get("text") or choice.get("delta")))
                pieces.append(piece)
                given = token_logprobs(choice)
                tokens = None if tokens is None or given is None else tokens + given
                # a host may split a surrogate pair over two events; half of one alone becomes U+FFFD
                seen["text"] = text = self._redact(mended("".join(pieces)))
                read, written = (count_of(usage.get(key)) for key in USAGE)
                # no prompt has 0 tokens, nor has a text; of an answer without text 0 is plausible
                written = None if written == 0 and (text or elsewhere or not read) else written
                seen["read"], seen["written"] = read, written = read or None, written
        total = time.perf_counter() - start
        if reason is None:
            raise Retryable("an answer that was cut short")
        kind = str(reason).lower()
        if kind not in ENDS | LIMITS:
            filtered = FILTER.search(kind) is not None
            raise Retryable(f'an answer that ended with finish_reason "{reason}"', filtered=filtered)
        connected = [marks[n] - start for n in marks if n.endswith((".connect_tcp.complete", ".start_tls.complete"))]
        answer, thoughts = THINKING.subn("", text)
        line, more, _ = answer.lstrip().partition("\n")
        logprobs = line_logprobs(tokens, text, answer, None if elsewhere else written)
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
            logprob=sum(logprobs) if logprobs else None,
            least=min(logprobs, default=None),
        )

    def _reserve(self, request: Json) -> float:
        """Counts a request and reserves the dollars that it may cost, which are returned; raises beyond a limit."""
        most = (
            self._usd(self.count(_prompt_of(request)), answer_limit(self.config.window, self.config.decode))
            if self.priced
            else 0.0
        )
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
            written = (
                answer_limit(self.config.window, self.config.decode)
                if said.get("elsewhere")
                else self.count(line.get("text") or "")
            )
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
        advice = "raise window.answer (or decode.max_tokens), or turn the model's thinking off at the host"
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
    if client.api.logprobs and (without := sum(r.logprob is None and bool(r.text) for r in replies.values())):
        out.append(f"the host gave no usable log-probabilities with {without} of {n} answers")
    if "temperature" in client.api.omit:
        out.append("temperature was not sent: unless the host's default is 0, another run may score otherwise")
    return out


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


def _pause(state: RetryCallState) -> float:
    after = getattr(state.outcome and state.outcome.exception(), "after", None)
    return BACKOFF(state) if after is None else after
