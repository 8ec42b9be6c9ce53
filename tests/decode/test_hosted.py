"""A hosted model: retried where that helps, paid for once, replayed, within limits, and the key is nowhere."""

import contextlib
import hashlib
import itertools
import json
import random
import re
import threading
import time
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import eval_loop
from common.config import load
from common.data import prompt, squad
from common.data.trees import build_trees
from common.decode import hosted
from common.errors import UserError
from common.model.load import load_tokenizer
from scripts import ask as ask_script
from scripts import certify
from tests.conftest import same

import httpx2
import pytest
from tenacity import RetryCallState

KEY = "sk-very-secret-1234567890"


class Host(ThreadingHTTPServer):
    """Answers each prompt with its last word, in the manner of `faults`: a name for each request, or none."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, faults=lambda: None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.lock = faults, threading.Lock()
        self.answered: list[str] = []
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.at_once = self.most_at_once = 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # a client that has heard enough
            super().handle()

    def do_POST(self):
        host: Host = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with host.lock:
            host.at_once += 1
            host.most_at_once = max(host.most_at_once, host.at_once)
            host.bodies.append(body)
            host.headers.append(dict(self.headers))
            fault = host.faults()
        time.sleep(0.001)  # others come meanwhile
        with host.lock:
            host.at_once -= 1  # before the first byte: whoever has an answer may ask again at once
        self.answer(host, body, fault)

    def answer(self, host: Host, body: dict, fault: str | None) -> None:
        asked = body.get("prompt") or body["messages"][0]["content"]
        status, _, after = (fault or "").partition("/")
        if status.isdigit():
            text = json.dumps(
                {"error": {"message": f"no, {self.headers.get('Authorization')}", "code": "any"}}
            ).encode()
            self.send_response(int(status))
            if after:
                self.send_header("Retry-After", after)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if fault == "html" else "text/event-stream")
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        word = asked.split()[-1]
        kind = "delta" if "messages" in body else "text"
        pieces = [f" {word[:2]}", word[2:], "\nmore" if fault == "talks on" else ""]
        if fault == "halves":
            pieces = [" \ud83d", "\ude00 \ud83d", ""]
        for piece in pieces:
            self.event({"choices": [{kind: {"content": piece} if kind == "delta" else piece}]})
            if fault == "cut":
                return
            if fault and fault.startswith("raw "):
                self.wfile.write(f"data: {fault[4:]}\n\n".encode())
                return
            if fault == "garbage":
                self.wfile.write(b"data: {not json\n\n")
                return
            if fault == "error inside":
                self.event({"error": {"message": f"overloaded, {self.headers.get('Authorization')}"}})
                return
        usage = {"prompt_tokens": 100, "completion_tokens": "3" if fault == "halves" else 3, "total_time": 0.25}
        self.event({"choices": [{kind: {}, "finish_reason": "length" if fault == "long" else "stop"}], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        with host.lock:
            host.answered += [asked] if fault != "html" else []

    def event(self, found: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(found).encode() + b"\n\n")
        self.wfile.flush()


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Clients of a host with faults, on one transcript."""
    monkeypatch.setenv("API_KEY", KEY)
    monkeypatch.setattr(hosted, "BACKOFF", lambda state: 0.001)
    hosts, clients = [], []

    def make(faults=lambda: None, *overrides: str, host: Host | None = None, beside: bool = False, **how: bool):
        if clients and not beside:
            clients[-1].close()
        host = host or Host(faults)
        hosts.append(host)
        config = load("api8b", [f"api.url={host.url}", *overrides])
        clients.append(hosted.Client(config, tmp_path / "transcript.jsonl", **how))
        return clients[-1], host

    yield make
    for client in clients:
        client.close()
    for host in hosts:
        host.shutdown()


def lines(tmp_path) -> list[dict]:
    return list(hosted.read_transcript(tmp_path / "transcript.jsonl"))


def test_an_answer_has_text_tokens_and_times(ask, tmp_path):
    client, host = ask()
    reply = client.ask("What is it? amber")
    assert (reply.text, reply.hit_limit, reply.read, reply.written, reply.server) == ("amber", False, 100, 3, 0.25)
    assert 0 < reply.connect < reply.first <= reply.total
    assert reply.waited < reply.total
    body = host.bodies[0]
    expected = {"prompt": "What is it? amber", "temperature": 0, "max_tokens": 32, "stop": ["\n"]}
    assert body.items() >= expected.items()
    assert host.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_hundreds_of_questions_through_every_fault_none_lost_none_double_order_kept(ask, tmp_path):
    rng = random.Random(0)
    kinds = ["429/0", "429", "500", "503/0", "cut", "garbage", "html", "error inside", *[None] * 12]
    client, host = ask(lambda: rng.choice(kinds), "api.concurrency=16", "api.tries=30")
    wanted = {f"q{i}": f"Which? word{i}" for i in range(300)}
    replies = hosted.ask_all(client, wanted, progress=None)
    assert list(replies) == list(wanted)
    assert all(replies[f"q{i}"].text == f"word{i}" for i in range(300))
    assert sorted(host.answered) == sorted(wanted.values())
    assert len(host.bodies) == client.requests == len(lines(tmp_path)) > 420
    assert 1 < host.most_at_once <= 16
    assert sum(line["reply"] is not None for line in lines(tmp_path)) == 300


def test_what_was_answered_is_not_asked_again(ask, tmp_path):
    client, host = ask()
    wanted = {"a": "one", "b": "two"}
    first = hosted.ask_all(client, wanted, progress=None)
    again, _ = ask(host=host)
    assert hosted.ask_all(again, wanted | {"c": "three"}, progress=None)["a"] == first["a"]
    assert sorted(host.answered) == ["one", "three", "two"]
    timed, _ = ask(host=host, fresh=True)
    timed.ask("one")
    assert host.answered.count("one") == 2


def test_a_finished_run_is_replayed_without_a_network(ask):
    client, host = ask()
    first = client.ask("one")
    host.shutdown()
    host.server_close()
    replayed, _ = ask(host=host, replay=True)
    assert replayed.ask("one") == first
    with pytest.raises(UserError, match="has no answer to 'two'"):
        replayed.ask("two")


def test_a_line_that_a_crash_cut_is_asked_again(ask, tmp_path):
    client, host = ask()
    client.ask("one")
    client.ask("two")
    path = tmp_path / "transcript.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    again, _ = ask(host=host)
    assert again.ask("two").text == "two"
    assert [line["reply"]["text"] for line in lines(tmp_path)] == ["one", "two"]
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(UserError, match=r"transcript.jsonl:1: not a line"):
        ask(host=host)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("401", "HTTP 401.*read from API_KEY, which is set"),
        ("404", "HTTP 404.*is base.path=meta-llama/Llama-3.1-8B .still. a model there"),
        ("400", "HTTP 400"),
        ("429/9999", "asks to wait 9999 s"),
    ],
)
def test_what_another_try_does_not_help_ends_at_once(ask, fault, message):
    client, host = ask(lambda: fault)
    with pytest.raises(UserError, match=message):
        client.ask("one")
    assert len(host.bodies) == 1


def test_tries_are_counted_and_the_last_reason_is_named(ask):
    client, host = ask(lambda: "503", "api.tries=3")
    with pytest.raises(UserError, match=r"3 tries, and the last had HTTP 503: no, .*the same command goes on"):
        client.ask("one")
    assert len(host.bodies) == 3


def test_a_host_decides_how_long_to_wait(ask, monkeypatch):
    slept = []
    faults = iter(["429/0.5", "429/Thu, 01 Jan 1970 00:00:00 GMT", "503", None])
    client, _ = ask(lambda: next(faults))
    monkeypatch.setattr(client, "_sleep", slept.append)
    assert client.ask("one").text == "one"
    assert slept == [0.5, 0.0, 0.001]


def test_a_host_that_is_not_there_is_named(ask):
    client, host = ask(lambda: None, "api.tries=2")
    host.shutdown()
    host.server_close()
    with pytest.raises(UserError, match=r"127.0.0.1.*2 tries, and the last had .*refused"):
        client.ask("one")


def test_limits_are_kept_before_a_request_is_sent(ask):
    client, host = ask(lambda: None, "api.max_requests=2")
    with pytest.raises(UserError, match=r"api.max_requests=2 is reached; what was answered is kept"):
        hosted.ask_all(client, {str(i): f"word{i}" for i in range(5)}, progress=None)
    assert len(host.bodies) == 2
    prices = ("api.usd_per_million_read=1000", "api.usd_per_million_written=0")  # 0.1 a reply, by its usage
    more, _ = ask(lambda: None, *prices, "api.max_cost_usd=0.41", "api.concurrency=1", host=host)
    assert more.usd == pytest.approx(0.2)
    with pytest.raises(UserError, match=r"api.max_cost_usd=0.41 is reached \(0.4000 spent\)"):
        hosted.ask_all(more, {str(i): f"word{i} " + "x" * 30 for i in range(10, 20)}, progress=None)
    assert len(host.bodies) == 4


def test_the_key_is_nowhere(ask, tmp_path, capsys):
    faults = itertools.cycle(["500", "error inside", None, "401"])
    client, _ = ask(lambda: next(faults))
    client.ask("one")
    with pytest.raises(UserError) as error:
        client.ask("two")
    printed = capsys.readouterr()
    everything = (tmp_path / "transcript.jsonl").read_text() + str(error.value) + printed.out + printed.err
    assert everything.count("Bearer …") > 2  # the host returned the header
    assert KEY not in everything


@pytest.mark.parametrize("key", ["…", "sk-abc\x00def"])
def test_a_key_that_can_be_none_is_refused(ask, monkeypatch, key):
    monkeypatch.setattr(hosted.os, "environ", {"API_KEY": key})
    with pytest.raises(UserError, match="API_KEY holds is no key"):
        ask()


def test_space_around_a_key_is_no_part_of_it(ask, monkeypatch):
    monkeypatch.setenv("API_KEY", f" {KEY}\r\n")
    client, host = ask()
    client.ask("one")
    assert host.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_two_processes_do_not_write_one_transcript(ask):
    client, host = ask()
    client.ask("one")
    with pytest.raises(UserError, match="another process is asking"):
        ask(host=host, beside=True)
    ask(host=host, beside=True, replay=True)[0].ask("one")


def test_an_address_that_is_none_is_named(ask):
    with pytest.raises(UserError, match=r"api.url=http://h:port/v1"):
        ask(lambda: None, "api.url=http://h:port/v1")


@pytest.mark.parametrize("odd", ['{"choices": [null, 5]}', '{"choices": [{"text": 5}]}', '{"choices": 7}', "[]"])
def test_an_odd_answer_is_asked_for_again(ask, odd):
    faults = iter([f"raw {odd}", None])
    client, host = ask(lambda: next(faults))
    assert client.ask("one").text == "one"
    assert len(host.bodies) == 2


def test_only_the_first_line_counts_and_a_limit_is_seen(ask):
    faults = iter(["talks on", "long"])
    client, _ = ask(lambda: next(faults))
    assert client.ask("one").text == "one"
    assert client.ask("two").hit_limit


def test_characters_in_halves_and_counts_in_words_are_borne(ask):
    client, host = ask(lambda: "halves", "api.usd_per_million_read=1")
    reply = client.ask("one")
    assert (reply.text, reply.read, reply.written) == ("😀 �", 100, None)
    assert ask(host=host, replay=True)[0].ask("one") == reply


def test_a_chat_gets_the_prompt_as_one_message(ask):
    client, host = ask(lambda: None, "prompt.chat=true")
    assert client.ask("Which? amber").text == "amber"
    (message,) = host.bodies[0]["messages"]
    assert message == {"role": "user", "content": prompt.message("Which? amber")}
    assert prompt.fingerprint(client.config.prompt) != prompt.fingerprint()


def test_being_told_to_stop_ends_the_work_and_keeps_what_came(ask, tmp_path):
    client, _ = ask()
    calls = itertools.count()

    def check():
        if next(calls) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hosted.ask_all(client, {str(i): f"word{i}" for i in range(500)}, check, progress=None)
    assert 0 < len(lines(tmp_path)) < 500


# ---- what is counted, and what it costs ----------------------------------------------------------------------------

PRICES = ("api.usd_per_million_read=2000", "api.usd_per_million_written=10000")  # 0.23 a reply of 100 and 3 tokens


@pytest.fixture
def client(ask):
    """Clients whose requests go nowhere: `_stream` is what each of them gets, one after the other."""

    def make(*replies, words: tuple[str, ...] = (), **how: bool) -> hosted.Client:
        made, _ = ask(lambda: None, *words, **how)
        coming = iter(replies)

        def stream(body, seen, start, waited):
            found = next(coming)
            found = found() if callable(found) else found
            status, reply = found if isinstance(found, tuple) else (200, found)
            seen.update(status=status, text="…")
            if isinstance(reply, Exception):
                raise reply
            return reply

        made._stream = stream
        return made

    return make


def replied(text: str = "amber", read: int | None = 100, written: int | None = 3) -> hosted.Reply:
    return hosted.Reply(text, False, read, written, None, 0.1, 0.2, None, 0.0)


@pytest.mark.parametrize(
    ("reply", "usd"),
    [
        (replied(), (100 * 2000 + 3 * 10000) / 1e6),
        (replied(read=None), (10 * 2000 + 3 * 10000) / 1e6),  # 20 characters, two per token
        (replied(written=None), (100 * 2000 + 32 * 10000) / 1e6),  # as many as it may have
        (replied(read=0, written=0), 0),
    ],
)
def test_a_reply_costs_its_tokens_and_at_most_what_is_not_known(client, reply, usd):
    asking = client(reply, words=PRICES)
    asking.ask("twenty letters, 2 x 10"[:20])
    assert asking.usd == pytest.approx(usd, abs=1e-12)
    assert (asking.requests, asking.reserved_usd) == (1, 0)


def test_what_was_cut_short_was_paid_for_and_what_was_refused_was_not(client, ask):
    failures = ((200, "cut"), (500, "busy"), (None, "no word"))
    tries = [*((status, hosted._Retryable(why)) for status, why in failures), replied()]
    asking = client(*tries, words=PRICES)
    asking.ask("twenty letters, 2 x 10"[:20])
    most = (10 * 2000 + 32 * 10000) / 1e6
    assert asking.usd == pytest.approx(most + 0.23)
    assert (asking.requests, asking.reserved_usd) == (4, 0)
    again, _ = ask(lambda: None, *PRICES)
    assert (again.requests, again.usd) == (4, pytest.approx(most + 0.23)), "by the transcript"


def test_a_message_of_a_chat_costs_as_a_prompt_does(client):
    asking = client(replied(read=None, written=0), words=(*PRICES, "prompt.chat=true"))
    asking.ask("What is it? amber")
    assert asking.usd == pytest.approx(len(prompt.message("What is it? amber")) / 2 * 2000 / 1e6)


def test_requests_on_their_way_count_against_the_budget(client):
    """One of 20 letters may cost 0.02 + 0.32; others are asked for while the first, or two, are on their way."""
    one, two, three = (letter * 20 for letter in "abc")

    def first() -> hosted.Reply:
        assert (asking.reserved_usd, asking.usd) == (pytest.approx(0.34), 0)
        assert asking.ask(two).text == "two"
        return replied("one")

    def second() -> hosted.Reply:
        assert asking.reserved_usd == pytest.approx(0.68)
        with pytest.raises(UserError, match=r"max_cost_usd=1 is reached \(0.6800 spent\); what was answered is kept"):
            asking.ask(three)
        return replied("two")

    asking = client(first, second, replied("three"), words=(*PRICES, "api.max_cost_usd=1"))
    assert asking.ask(one).text == "one"
    assert (asking.reserved_usd, asking.usd, asking.requests) == (pytest.approx(0), pytest.approx(0.46), 2)
    assert asking.ask(three).text == "three", "0.46 + 0.34 is within it"
    with pytest.raises(UserError, match=r"\(0.6900 spent\)"):
        asking.ask("d" * 20)


def test_a_budget_may_be_used_up_to_the_last_cent(client):
    prices = ("api.usd_per_million_read=0", "api.usd_per_million_written=31250")  # 1 for the 32 tokens there may be
    assert client(replied(), words=(*prices, "api.max_cost_usd=1")).ask("one").text == "amber"
    with pytest.raises(UserError, match=r"max_cost_usd=0.999 is reached"):
        client(words=(*prices, "api.max_cost_usd=0.999")).ask("two")


def test_a_limit_of_nothing_asks_nothing(client):
    with pytest.raises(UserError, match=r"api.max_requests=0 is reached"):
        client(replied(), words=("api.max_requests=0",)).ask("one")
    with pytest.raises(UserError, match=r"api.max_cost_usd=0 is reached \(0.0000 spent\)"):
        client(replied(), words=(*PRICES, "api.max_cost_usd=0")).ask("one")


def test_requests_on_their_way_count_against_their_number(client):
    def nested() -> hosted.Reply:
        with pytest.raises(UserError, match=r"max_requests=1 is reached"):
            asking.ask("two")
        return replied()

    asking = client(nested, words=("api.max_requests=1",))
    assert asking.ask("one").text == "amber"
    assert asking.requests == 1


def test_a_try_that_failed_is_on_its_way_no_more(client):
    def failed():
        raise UserError("no such model")

    asking = client(failed, words=(*PRICES, "api.max_cost_usd=0.5"))
    with pytest.raises(UserError, match="no such model"):
        asking.ask("one")
    assert asking.reserved_usd == 0


# ---- the transcript ------------------------------------------------------------------------------------------------


def test_a_line_of_the_transcript_holds_the_request_and_its_outcome(client, tmp_path, monkeypatch):
    asking = client((503, hosted._Retryable("busy – wait")), replied("Zürich"), words=("api.url=http://h/v1",))
    asking.ask("one")
    first, second = lines(tmp_path)  # before it is closed
    body = {"model": "meta-llama/Llama-3.1-8B", "prompt": "one", "temperature": 0, "max_tokens": 32, "stop": ["\n"]}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    key = hashlib.sha256(json.dumps(["http://h/v1", body], sort_keys=True).encode()).hexdigest()[:24]
    times = {"connect": None, "first": 0.1, "total": 0.2, "server": None, "waited": 0.0}
    reply = {"text": "Zürich", "hit_limit": False, "read": 100, "written": 3, **times}
    when = first.pop("when"), second.pop("when")
    assert list(when) == sorted(when)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", text) for text in when)
    common = {"key": key, "url": "http://h/v1", "request": body, "text": "…"}
    assert first == common | {"status": 503, "error": "busy – wait", "reply": None}
    assert second == common | {"status": 200, "error": None, "reply": reply}
    assert "Zürich" in (tmp_path / "transcript.jsonl").read_text(encoding="utf-8")


def test_an_answer_is_of_one_address_and_one_request(ask):
    client, host = ask()
    client.ask("one")
    for words in (["window.answer=16"], ["prompt.chat=true"], [f"api.url={host.url}/"], ["base.path=other"], []):
        ask(lambda: None, *words, host=host)[0].ask("one")
    assert len(host.bodies) == 5, "all but the last differ from the first"


def test_what_went_wrong_is_kept_up_to_300_letters_and_the_key_is_hidden_first(client, tmp_path):
    tries = [hosted._Retryable("x" * 295 + KEY), httpx2.ReadTimeout(""), httpx2.StreamError("z" * 301)]
    asking = client(*((None, error) for error in tries), replied())
    asking.ask("one")
    first, second, third, _ = lines(tmp_path)
    assert third["error"] == "z" * 300
    assert first["error"] == "x" * 295 + "…"
    assert second["error"] == "ReadTimeout"


def test_a_mistake_of_the_users_is_in_the_transcript_and_not_tried_again(client, tmp_path):
    with pytest.raises(UserError, match="no such model"):
        client((404, UserError("no such model"))).ask("one")
    (line,) = lines(tmp_path)
    assert (line["status"], line["error"], line["reply"]) == (404, "no such model", None)


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[]",
        "7",
        '{"key": "k", "reply": {"odd": 1}, "request": {}, "status": 200}',
        '{"key": "k", "reply": null, "request": null, "status": 200}',
    ],
)
def test_a_line_that_is_none_of_a_transcript_is_named(ask, tmp_path, line):
    client, host = ask()
    client.ask("one")
    client.close()
    with (tmp_path / "transcript.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"transcript.jsonl:2: not a line of a transcript"):
        ask(host=host)


def test_a_transcript_that_is_not_there_is_empty(tmp_path):
    assert list(hosted.read_transcript(tmp_path / "absent.jsonl")) == []


def test_a_client_that_is_closed_lets_go_of_everything_and_asks_no_more(ask):
    client, host = ask()
    client.ask("one")
    client.close()
    assert client.http.is_closed
    assert client.file.closed
    with pytest.raises(UserError, match=r"^stopped$"):
        client.ask("two")
    ask(host=host, beside=True)[0].ask("two")


def test_a_long_prompt_that_has_no_answer_is_named_by_its_end(ask):
    client, host = ask()
    client.ask("one")
    with pytest.raises(UserError) as error:
        ask(host=host, replay=True)[0].ask("x" * 100 + "y" * 80)
    assert f"has no answer to '{'y' * 80}'; it is of another run" in str(error.value)


# ---- one request ---------------------------------------------------------------------------------------------------


class Wire:
    """In place of a connection: every event, and every mark of a trace, comes a second after the one before."""

    def __init__(self, monkeypatch, client, events, trace=(), status=200, headers=None, text=""):
        self.now, self.events, self.marks, self.asked = 1000.0, events, trace, None
        self.status_code, self.headers, self.text = status, headers or {}, text
        monkeypatch.setattr(hosted.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(hosted, "_events", self.coming)
        client.http.stream = self.stream

    @contextlib.contextmanager
    def stream(self, method, url, json, extensions):
        self.asked = (method, url, json)
        for name in self.marks:
            self.now += 1
            extensions["trace"](name, {})
        yield self

    def read(self):
        pass

    def coming(self, response):
        assert response is self
        for event in self.events:
            self.now += 1
            yield event
        self.now += 1  # [DONE]


def piece(text: str | None = None, **more) -> dict:
    return {"choices": [{"text": text, **more}]}


def test_times_are_from_the_request_to_the_first_text_and_to_the_end(ask, monkeypatch):
    client, _ = ask(lambda: None, "api.url=http://h/v1/")
    trace = [f"connection.{name}" for name in ("connect_tcp.started", "connect_tcp.complete", "start_tls.complete")]
    trace.append("http11.send_request_headers.complete")
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_time": 1.5}
    events = [piece(""), piece(" am"), piece("ber"), piece(finish_reason="stop"), {"choices": [], "usage": usage}, {}]
    wire = Wire(monkeypatch, client, events, trace)
    reply = client._stream({"prompt": "one"}, seen := {}, 990.0, waited=2.5)
    assert reply == hosted.Reply(
        "amber", False, 7, 2, connect=13.0, first=16.0, total=21.0, server=1.5, waited=2.5
    )  # from 990: connected at 1003, first text at 1006, the end at 1011
    assert seen == {"status": 200, "text": " amber"}
    assert wire.asked == ("POST", "http://h/v1/completions", {"prompt": "one"})


def test_an_answer_without_text_has_its_first_at_the_end_and_no_connecting_where_none_was_made(ask, monkeypatch):
    client, _ = ask(lambda: None, "prompt.chat=true", "api.url=http://h/v1")
    events = [{"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [{"delta": {}, "finish_reason": "length"}]}]
    wire = Wire(monkeypatch, client, events, ["http11.send_request_headers.complete"])
    reply = client._stream({}, {}, 1000.0, waited=0.0)
    assert reply == hosted.Reply("", True, None, None, None, first=4.0, total=4.0, server=None, waited=0.0)
    assert wire.asked[1] == "http://h/v1/chat/completions"


def test_a_field_of_any_event_is_kept_and_an_event_that_is_no_answer_is_retried(ask, monkeypatch):
    client, _ = ask()
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    events = [piece("a ", finish_reason="length") | {"usage": usage}, piece("b\nc") | {"usage": None}]
    Wire(monkeypatch, client, events, headers={"openai-processing-ms": "250"})
    reply = client._stream({}, {}, 1000.0, waited=0.0)
    assert (reply.text, reply.hit_limit, reply.read, reply.written, reply.server) == ("a b", True, 7, 2, 0.25)
    Wire(monkeypatch, client, [piece("a"), piece("b")])
    with pytest.raises(hosted._Retryable, match="an answer that was cut short"):
        client._stream({}, {}, 1000.0, waited=0.0)
    Wire(monkeypatch, client, [{"choices": [{"text": ["a"]}]}])
    with pytest.raises(hosted._Retryable, match=r"an event that is none of an answer's: .*'a'"):
        client._stream({}, {}, 1000.0, waited=0.0)


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 529, 599])
def test_statuses_after_which_another_try_may_help(ask, monkeypatch, status):
    client, _ = ask()
    Wire(monkeypatch, client, [], status=status, headers={"retry-after": "300"}, text=f"no, {KEY} " + "x" * 3000)
    with pytest.raises(hosted._Retryable) as again:
        client._stream({}, seen := {}, 0.0, waited=0.0)
    assert again.value.after == 300
    assert str(again.value) == f"HTTP {status}: " + ("no, … " + "x" * 3000)[:300]
    assert seen == {"status": status, "text": ("no, … " + "x" * 3000)[:2000]}


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 410, 422, 499, 600])
def test_statuses_after_which_none_does(ask, monkeypatch, status):
    client, _ = ask(lambda: None, "api.url=http://h/v1")
    Wire(monkeypatch, client, [], status=status, text=f'{{"error": "no, {KEY}"}}')
    with pytest.raises(UserError) as error:
        client._stream({}, {}, 0.0, waited=0.0)
    key = "; the key is read from API_KEY, which is set"
    model = "; is base.path=meta-llama/Llama-3.1-8B (still) a model there, and does api.url end with /v1?"
    advice = {401: key, 403: key, 404: model}.get(status, "")
    assert str(error.value) == f"http://h/v1: HTTP {status}: no, …{advice}"


def test_a_host_that_asks_for_more_than_five_minutes_is_left_to_the_user(ask, monkeypatch):
    client, _ = ask(lambda: None, "api.url=http://h/v1")
    Wire(monkeypatch, client, [], status=429, headers={"retry-after": "300.6"}, text="slow down")
    with pytest.raises(UserError) as error:
        client._stream({}, {}, 0.0, waited=0.0)
    assert str(error.value) == ("http://h/v1: HTTP 429: slow down; it asks to wait 301 s: start again then, to go on")


def test_what_was_waited_is_all_before_the_try_that_succeeded(ask, monkeypatch):
    client, _ = ask()
    clock, waits = {"now": 50.0}, []

    def stream(body, seen, start, waited):
        waits.append(waited)
        clock["now"] += 2
        if len(waits) < 3:
            raise hosted._Retryable("busy", 10.0)
        return replied()

    monkeypatch.setattr(hosted.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(client, "_sleep", lambda seconds: clock.update(now=clock["now"] + seconds))
    client._stream = stream
    client.ask("one")
    assert waits == [0, 12, 24]


def test_without_a_key_none_is_sent_and_nothing_is_hidden(ask, monkeypatch):
    monkeypatch.delenv("API_KEY")
    faults = iter([None, "401"])
    client, host = ask(lambda: next(faults))
    assert client.ask("What is it? amber").text == "amber"
    assert "Authorization" not in host.headers[0]
    with pytest.raises(UserError, match=r"HTTP 401: no, None; the key is read from API_KEY, which is not set$"):
        client.ask("two")


def test_connections_and_their_patience_are_as_configured(ask, monkeypatch):
    made = []
    real = hosted.httpx2.Client
    monkeypatch.setattr(hosted.httpx2, "Client", lambda **how: (made.append(how), real(**how))[1])
    ask(lambda: None, "api.timeout_s=7.5", "api.concurrency=3")
    (how,) = made
    assert how["headers"] == {"Authorization": f"Bearer {KEY}"}
    assert how["timeout"] == 7.5
    assert how["limits"] == httpx2.Limits(max_connections=3, max_keepalive_connections=3)


def test_pauses_double_up_to_a_minute_unless_the_host_says(monkeypatch):
    monkeypatch.setattr("tenacity.wait.random.uniform", lambda low, high: (low, high))
    states = [RetryCallState(None, None, (), {}) for _ in range(9)]
    for i, state in enumerate(states, 1):
        state.attempt_number = i
        state.set_exception((hosted._Retryable, hosted._Retryable("busy"), None))
    assert [hosted._pause(state) for state in states] == [(0, 0.5 * 2**i) for i in range(7)] + [(0, 60)] * 2
    states[0].set_exception((hosted._Retryable, hosted._Retryable("busy", 0.0), None))
    assert hosted._pause(states[0]) == 0.0
    states[0].set_exception((ValueError, ValueError("no"), None))
    assert hosted._pause(states[0]) == (0, 0.5)


# ---- all questions -------------------------------------------------------------------------------------------------


def test_whoever_was_stopped_while_waiting_ends(ask):
    client, _ = ask()
    client._sleep(0.001)
    client.stop.set()
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^stopped$"):
        client._sleep(60)
    assert time.monotonic() - began < 30


def test_a_failure_stops_the_others_and_the_client_can_be_used_again(client):
    def stopped() -> hosted.Reply:
        assert asking.stop.wait(30), "the other has failed"
        return replied("first")

    def failed():
        raise UserError("no such model")

    asking = client(stopped, failed, replied("third"), words=("api.concurrency=2",))
    with pytest.raises(UserError, match="no such model"):
        hosted.ask_all(asking, {"a": "one", "b": "two", "c": "three"}, progress=None)
    assert len(asking.replies) == 1, "what was on its way is kept, and nothing more was sent"
    assert asking.requests == 2
    assert not asking.stop.is_set()
    assert asking.ask("four").text == "third"


def test_progress_is_shown_by_question(client, capsys):
    asking = client(replied(), replied(), words=("api.concurrency=1",))
    hosted.ask_all(asking, {"a": "one", "b": "two"}, progress="ask")
    shown = capsys.readouterr().err
    assert shown.lstrip().startswith("ask:   0%")
    assert "| 2/2 [" in shown
    assert "question" in shown
    hosted.ask_all(asking, {"a": "one"}, progress=None)
    assert capsys.readouterr().err == ""


def test_asking_is_checked_while_an_answer_is_awaited(client):
    checked = threading.Event()

    def waits() -> hosted.Reply:
        assert checked.wait(30)
        return replied()

    asking = client(waits)
    found = hosted.ask_all(asking, {"a": "one"}, checked.set, progress=None)
    assert found["a"].text == "amber"


# ---- responses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"error": {"message": "too  many\\nrequests"}}', "too many requests"),
        ('{"error": "bad key"}', "bad key"),
        ('{"detail": "not found"}', "not found"),
        ('{"message": "no model"}', "no model"),
        ('{"error": {}, "detail": "a", "message": "b"}', "a"),
        ('{"error": {"code": 5}, "message": "b"}', "b"),
        ('{"detail": [{"loc": 1}]}', "[{'loc': 1}]"),
        ('{"error": {"code": 5}}', '{"error": {"code": 5}}'),
        ("[1,  2]", "[1, 2]"),
        ("<h1>Bad\n gateway</h1>", "<h1>Bad gateway</h1>"),
        (" \n", "no word of why"),
        (json.dumps({"error": "x" * 301}), "x" * 300),
        ("y" * 301, "y" * 300),
    ],
)
def test_the_line_for_a_person_in_an_error(text, message):
    assert hosted._error_message(text) == message


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", 0.0),
        ("2.5", 2.5),
        ("-1", 0.0),
        ("soon", None),
        ("Wed, 01 Jan 2025 00:01:30 GMT", 90.0),
        ("Tue, 31 Dec 2024 23:59:59 GMT", 0.0),
        ("Wed, 01 Jan 2025 00:01:30 -0000", None),  # of no zone
    ],
)
def test_how_long_a_host_asks_to_wait(monkeypatch, value, seconds):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2025, 1, 1, tzinfo=tz)

    monkeypatch.setattr(hosted, "datetime", Clock)
    assert hosted._retry_after(value) == seconds


@pytest.mark.parametrize(
    ("event", "headers", "seconds"),
    [
        ({}, {}, None),
        ({"usage": None, "timings": None}, {}, None),
        ({"usage": {"total_time": 0.5}}, {}, 0.5),
        ({"usage": {"total_time": 0}}, {}, 0.0),
        ({"usage": {"total_time": 0.5}}, {"openai-processing-ms": "1500"}, 1.5),
        ({"usage": {"total_time": 0.5}}, {"openai-processing-ms": "fast"}, 0.5),
        ({"timings": {"prompt_ms": 100, "predicted_ms": 250}}, {}, 0.35),
        ({"timings": {"prompt_ms": 100}}, {}, 0.1),
        ({"timings": {"predicted_ms": 250}}, {}, 0.25),
    ],
)
def test_a_hosts_own_time(event, headers, seconds):
    assert hosted._server_seconds(event, headers) == seconds


def test_events_end_at_done_and_what_is_no_answer_is_asked_for_again(monkeypatch):
    def events(*data: str) -> list[dict]:
        monkeypatch.setattr(hosted.httpx2, "EventSource", lambda _: [SimpleNamespace(data=text) for text in data])
        return list(hosted._events(None))

    assert events('{"a": 1}', '{"error": null}', " [DONE] ", '{"b": 2}') == [{"a": 1}, {"error": None}]
    for data, why in (
        ("{not", "an answer that is no JSON: '{not'"),
        ("[1]", r"an error in the answer: \[1\]"),
        ('{"error": "busy"}', 'an error in the answer: {"error": "busy"}'),
    ):
        with pytest.raises(hosted._Retryable, match=why):
            events(data)


# ---- through the scripts -------------------------------------------------------------------------------------------


@pytest.fixture
def host_and_words(tmp_path, tiny_base, dev_file, monkeypatch):
    """A host, and the arguments of a system behind it."""
    monkeypatch.setenv("API_KEY", KEY)
    monkeypatch.setattr(hosted, "BACKOFF", lambda state: 0.001)
    faults = []
    host = Host(lambda: faults.pop() if faults else None)
    words = [f"api.url={host.url}", f"data.dev={dev_file}", f"window.tokenizer={tiny_base}"]
    prices = ["api.usd_per_million_read=1", "api.usd_per_million_written=1"]
    yield host, faults, ["api8b", *words, *prices, f"runs={tmp_path / 'runs'}"]
    host.shutdown()


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_a_hosted_model_is_scored_resumes_is_not_paid_twice_and_is_replayed(host_and_words, capsys, tmp_path):
    host, faults, arguments = host_and_words
    faults += ["401", None, None]  # taken from the end
    with pytest.raises(UserError, match="HTTP 401"):
        eval_loop.main([*arguments, "api.concurrency=1"])
    eval_loop.main([*arguments, "api.concurrency=1"])
    first = last_json(capsys)
    assert (first["n"], first["requests_before"], first["requests"]) == (12, 3, 13)
    assert len(host.answered) == len(set(host.answered)) == 12
    assert first["cost_usd"] == pytest.approx(12 * 103e-6)
    assert first["run"].endswith("-eval-001")
    eval_loop.main([*arguments, "api.concurrency=1"])
    assert last_json(capsys) == first
    host.shutdown()
    host.server_close()
    eval_loop.main([*arguments, "api.concurrency=1", "--replay", first["run"]])
    replayed = last_json(capsys)
    assert {k: replayed[k] for k in ("em", "f1", "n")} == {k: first[k] for k in ("em", "f1", "n")}
    assert replayed["run"].endswith("-eval-002")
    for run in (first["run"], replayed["run"]):
        with pytest.raises(SystemExit) as ended:
            certify.main([run])
        assert not ended.value.code, capsys.readouterr().out
    transcript = Path(first["run"]) / "transcript.jsonl"
    transcript.write_text(transcript.read_text().replace('"hit_limit": false', '"hit_limit": true', 1))
    with pytest.raises(SystemExit) as ended:
        certify.main([first["run"]])
    assert ended.value.code == 1
    written = "".join(p.read_text() for p in (tmp_path / "runs").rglob("*") if p.is_file())
    assert KEY not in written


def test_a_run_that_met_a_limit_resumes_with_a_higher_one(host_and_words, capsys):
    host, _, arguments = host_and_words
    with pytest.raises(UserError, match="max_requests=5 is reached"):
        eval_loop.main([*arguments, "api.max_requests=5"])
    eval_loop.main([*arguments, "api.max_requests=50"])
    assert last_json(capsys)["requests_before"] == 5
    assert len(host.answered) == 12


def test_a_hosted_models_prompts_are_the_bytes_that_others_read(host_and_words, capsys, dev_file, tiny_base):
    host, _, arguments = host_and_words
    eval_loop.main(arguments)
    config, tokenizer = load("api8b", arguments[1:]), load_tokenizer(str(tiny_base))
    trees = build_trees(squad.load(config.data, "dev").examples, same(tokenizer), config.window, train=False).trees
    local = {
        tokenizer.decode([*t.prefix_ids, *b.prompt_ids], skip_special_tokens=True) for t in trees for b in t.branches
    }
    assert {body["prompt"] for body in host.bodies} == local


def test_one_question_to_a_hosted_model(host_and_words, capsys):
    _, _, arguments = host_and_words
    ask_script.main([*arguments, "--context", "A bridge. Answer:", "--question", "What?"])
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["answer"] == "Answer:"
    assert "characters 10 to 17 of the context; " in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["api.url=ftp://x"], "must begin with http"),
        (["api.max_cost_usd=1"], "needs the prices"),
        (["window.tokenizer=null"], "an api needs one to cut text by"),
        (["window.overflow=chunk"], "an api reads one window"),
    ],
)
def test_settings_that_make_no_sense_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        load("api8b", words)
