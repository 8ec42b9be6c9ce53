"""A hosted model: retried where that helps, paid for once, replayed, within limits, and the key is nowhere."""

import contextlib
import hashlib
import itertools
import json
import math
import random
import re
import threading
import time
from dataclasses import asdict, replace
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import eval_loop
from common.config import load
from common.data import prompt, squad
from common.data.trees import build_trees
from common.decode import hosted, hosted_logprobs, responses
from common.errors import UserError
from common.model.load import load_tokenizer
from scripts import ask as ask_script
from scripts import certify
from tests.conftest import same

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
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
            given = {"tokens": [piece], "token_logprobs": [-0.25]} if piece and body.get("logprobs") else None
            self.event({"choices": [{kind: {"content": piece} if kind == "delta" else piece, "logprobs": given}]})
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
        with host.lock:  # before the last event: whoever has it may look at once
            host.answered += [asked] if fault != "html" else []
        self.wfile.write(b"data: [DONE]\n\n")

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
        (replied(written=None), (100 * 2000 + 0.5 * 10000) / 1e6),  # one character came
        (replied(written=0), 100 * 2000 / 1e6),
        (replace(replied(written=None), elsewhere="reasoning"), (100 * 2000 + 32 * 10000) / 1e6),  # hidden: the most
    ],
)
def test_a_reply_costs_its_tokens_and_by_our_own_count_what_is_not_known(client, reply, usd):
    asking = client(reply, words=PRICES)
    asking.ask("twenty letters, 2 x 10"[:20])
    assert asking.usd == pytest.approx(usd, abs=1e-12)
    assert (asking.requests, asking.reserved_usd) == (1, 0)


def test_what_was_cut_short_was_paid_for_and_what_was_refused_was_not(client, ask):
    failures = ((200, "cut"), (500, "busy"), (None, "no word"))
    tries = [*((status, responses.Retryable(why)) for status, why in failures), replied()]
    asking = client(*tries, words=PRICES)
    asking.ask("twenty letters, 2 x 10"[:20])
    cut = (10 * 2000 + 0.5 * 10000) / 1e6  # 20 characters were sent and 1 came, two per token
    assert asking.usd == pytest.approx(cut + 0.23)
    assert (asking.requests, asking.reserved_usd) == (4, 0)
    again, _ = ask(lambda: None, *PRICES)
    assert (again.requests, again.usd) == (4, pytest.approx(cut + 0.23)), "by the transcript"


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
    asking = client((503, responses.Retryable("busy – wait")), replied("Zürich"), words=("api.url=http://h/v1",))
    asking.ask("one")
    first, second = lines(tmp_path)  # before it is closed
    body = {"model": "meta-llama/Llama-3.1-8B", "prompt": "one", "temperature": 0, "max_tokens": 32, "stop": ["\n"]}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    key = hashlib.sha256(json.dumps(["http://h/v1", body], sort_keys=True).encode()).hexdigest()[:24]
    times = {"connect": None, "first": 0.1, "total": 0.2, "server": None, "waited": 0.0}
    times |= {"elsewhere": "", "refused": "", "streamed": True, "logprob": None, "least": None}
    reply = {"text": "Zürich", "hit_limit": False, "read": 100, "written": 3, **times}
    when = first.pop("when"), second.pop("when")
    assert list(when) == sorted(when)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", text) for text in when)
    common = {"key": key, "url": "http://h/v1", "request": body, "text": "…", "read": None, "written": None}
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
    tries = [responses.Retryable("x" * 295 + KEY), httpx2.ReadTimeout(""), httpx2.StreamError("z" * 301)]
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
        monkeypatch.setattr(hosted, "events", self.coming)
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
    assert seen == {"status": 200, "text": " amber", "read": 7, "written": 2}
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
    events = [piece("a ", finish_reason="length") | {"usage": usage}, piece("b") | {"usage": None}]
    Wire(monkeypatch, client, events, headers={"openai-processing-ms": "250"})
    reply = client._stream({}, {}, 1000.0, waited=0.0)
    assert (reply.text, reply.hit_limit, reply.read, reply.written, reply.server) == ("a b", True, 7, 2, 0.25)
    Wire(monkeypatch, client, [piece("a"), piece("b")])
    with pytest.raises(responses.Retryable, match="an answer that was cut short"):
        client._stream({}, {}, 1000.0, waited=0.0)
    Wire(monkeypatch, client, [{"choices": [{"text": ["a"]}]}])
    with pytest.raises(responses.Retryable, match=r"an event that is none of an answer's: .*'a'"):
        client._stream({}, {}, 1000.0, waited=0.0)


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 529, 599])
def test_statuses_after_which_another_try_may_help(ask, monkeypatch, status):
    client, _ = ask()
    Wire(monkeypatch, client, [], status=status, headers={"retry-after": "300"}, text=f"no, {KEY} " + "x" * 3000)
    with pytest.raises(responses.Retryable) as again:
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
    model += " A host without /completions needs prompt.chat=true"
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
            raise responses.Retryable("busy", 10.0)
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
        state.set_exception((responses.Retryable, responses.Retryable("busy"), None))
    assert [hosted._pause(state) for state in states] == [(0, 0.5 * 2**i) for i in range(7)] + [(0, 60)] * 2
    states[0].set_exception((responses.Retryable, responses.Retryable("busy", 0.0), None))
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
        ('[{"error": {"message": "of a list"}}]', "of a list"),
        ('{"error": true, "msg": "no quota"}', "no quota"),
        ('{"errors": ["a", "b"]}', "['a', 'b']"),
        ("<h1>Bad\n gateway</h1>", "<h1>Bad gateway</h1>"),
        (" \n", "no word of why"),
        (json.dumps({"error": "x" * 301}), "x" * 300),
        ("y" * 301, "y" * 300),
    ],
)
def test_the_line_for_a_person_in_an_error(text, message):
    assert responses.error_message(text) == message


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", 0.0),
        ("2.5", 2.5),
        ("-1", 0.0),
        ("soon", None),
        ("nan", None),
        ("inf", None),
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

    monkeypatch.setattr(responses, "datetime", Clock)
    assert responses.retry_after(value) == seconds


@pytest.mark.parametrize(
    ("event", "headers", "seconds"),
    [
        ({}, {}, None),
        ({"usage": None, "timings": None}, {}, None),
        ({"usage": {"total_time": 0.5}}, {}, 0.5),
        ({"usage": {"total_time": 0}}, {}, 0.0),
        ({"usage": {"total_time": 0.5}}, {"openai-processing-ms": "1500"}, 1.5),
        ({"usage": {"total_time": 0.5}}, {"openai-processing-ms": "fast"}, 0.5),
        ({"usage": {"total_time": 0.5}}, {"openai-processing-ms": "nan"}, 0.5),
        ({"usage": {"total_time": "0.5"}}, {}, 0.5),
        ({"timings": {"prompt_ms": 100, "predicted_ms": 250}}, {}, 0.35),
        # left out or odd: unknown, not 0
        ({"timings": {"prompt_ms": 100}}, {}, None),
        ({"timings": {"prompt_ms": None, "predicted_ms": 250}}, {}, None),
        ({"timings": {"prompt_ms": "soon", "predicted_ms": 250}}, {}, None),
        ({"timings": {"prompt_ms": -1, "predicted_ms": 250}}, {}, None),
        ({"timings": [1, 2]}, {}, None),
        ({"timings": "fast"}, {}, None),
        ({"usage": {"total_time": float("nan")}}, {}, None),
        ({"usage": {"total_time": float("inf")}}, {}, None),
        ({"usage": {"total_time": True}}, {}, None),
        ({"usage": {"total_time": {}}}, {}, None),
        ({"usage": {"total_time": 10**400}}, {}, None),
        ({"usage": [1]}, {}, None),
    ],
)
def test_a_hosts_own_time(event, headers, seconds):
    assert responses.server_seconds(event, headers) == seconds


# ---- what hosts send -----------------------------------------------------------------------------------------------

SSE, AS_JSON = "text/event-stream", "application/json"
USAGE = {"prompt_tokens": 90, "completion_tokens": 3}


def event(reason: str | None = None, text: str | None = None, **more) -> str:
    """An event of `/completions`."""
    return f"data: {json.dumps({'choices': [{'text': text, 'finish_reason': reason}], **more})}\n\n"


def told(reason: str | None = None, key: str = "delta", **message) -> str:
    """An event of `/chat/completions`."""
    return f"data: {json.dumps({'choices': [{key: message, 'finish_reason': reason}]})}\n\n"


WHOLE = event(text=" amb") + event(text="er") + event("stop", usage=USAGE)
DONE = "data: [DONE]\n\n"


@pytest.fixture
def says(tmp_path, monkeypatch):
    """Clients of a host that sends these responses, one per request: the text of a stream, or (status, type, text)."""
    monkeypatch.setenv("API_KEY", KEY)
    monkeypatch.setattr(hosted, "BACKOFF", lambda state: 0.001)
    clients = []

    def make(*responses, words: tuple[str, ...] = (), **how):
        for client in clients:
            client.close()
        coming, requests = iter(responses), []

        def answer(request):
            requests.append(json.loads(request.content))
            found = next(coming)
            status, kind, text = found if isinstance(found, tuple) else (200, SSE, found)
            return httpx2.Response(status, headers={"content-type": kind}, content=text.encode())

        config = load("api8b", ["api.url=http://h/v1", "api.tries=2", "api.concurrency=1", *words])
        client = hosted.Client(config, tmp_path / "transcript.jsonl", **how)
        client.http = httpx2.Client(transport=httpx2.MockTransport(answer))
        clients.append(client)
        return client, requests

    yield make
    for client in clients:
        client.close()


@pytest.mark.parametrize(
    ("reason", "hit_limit"),
    [
        *((reason, False) for reason in ("stop", "STOP", "eos", "eos_token", "stop_sequence", "end_turn")),
        *((reason, True) for reason in ("length", "max_tokens", "MAX_TOKENS", "model_length")),
    ],
)
def test_reasons_that_end_an_answer(says, reason, hit_limit):
    client, requests = says(event("", " amb") + event(text="er") + event(reason) + DONE)
    reply = client.ask("one")
    assert (reply.text, reply.hit_limit, len(requests)) == ("amber", hit_limit, 1)


@pytest.mark.parametrize("reason", ["abort", "error", "tool_calls", "function_call", "cancelled", "unknown", "null"])
def test_an_answer_that_ends_for_another_reason_is_asked_again_then_reported_by_question(says, reason):
    half = event(text=" am") + event(reason) + DONE
    client, requests = says(half, WHOLE)
    assert client.ask("one").text == "amber"
    assert len(requests) == 2
    client, requests = says(WHOLE, half, half)
    said = f'question q2: http://h/v1: 2 tries, and the last had an answer that ended with finish_reason "{reason}"; '
    with pytest.raises(UserError, match=re.escape(said)):
        hosted.ask_all(client, {"q1": "first", "q2": "second", "q3": "third"}, progress=None)
    assert len(requests) == 3
    client, requests = says(WHOLE, WHOLE)
    hosted.ask_all(client, {"q1": "first", "q2": "second", "q3": "third"}, progress=None)
    assert len(requests) == 2, "the first was kept"


@pytest.mark.parametrize("reason", ["", None])
def test_an_empty_reason_is_none(says, reason):
    client, _ = says(*[event(reason, " am") + DONE] * 2)
    with pytest.raises(UserError, match=r"question q1: .* the last had an answer that was cut short"):
        client.ask("one", "q1")


@pytest.mark.parametrize(
    ("text", "kept", "hit_limit"),
    [
        (" amber", "amber", True),
        ("", "", True),
        (" \n\n", "", True),
        ("\namber", "amber", True),
        (" \r\n amber ", "amber", True),
        (" amber\n", "amber", False),
        (" amber\n\nQuestion: Who else?", "amber", False),
        ("\n\namber\nmore", "amber", False),
        (" amber\r\nmore", "amber", False),
        ("<think>\nIt is\n</think>\n\namber", "amber", True),
        ("It is\n</think>\n\namber\n", "amber", False),
        ("<think>It", "", True),
        ("amber <think>", "amber <think>", True),
    ],
)
def test_the_first_line_with_text_is_kept_and_the_limit_counts_for_it_alone(says, text, kept, hit_limit):
    client, _ = says(event(text=text) + event("length"))
    reply = client.ask("one")
    assert (reply.text, reply.hit_limit) == (kept, hit_limit)


@pytest.mark.parametrize(
    ("stream", "text", "elsewhere"),
    [
        (told(content=" am") + told(content="ber") + told("stop"), "amber", ""),
        (told("stop", "message", role="assistant", content="amber"), "amber", ""),
        (told(None, "message", content="am") + told("stop", "message", content="ber"), "amber", ""),
        (told(content=" am") + told(content="ber") + told("stop", "message", content="amber"), "amber", ""),
        (told("stop", content=[{"type": "text", "text": "amber"}]), "amber", ""),
        (told("stop", content=[{"type": "thinking", "thinking": []}]), "", "thinking"),
        (told(content=None, reasoning_content="We") + told("length", content=None), "", "reasoning_content"),
        (told(reasoning="We", thinking="We") + told("stop", content="amber"), "amber", "reasoning, thinking"),
        (told("stop", content=None, refusal="I can't"), "", "refusal"),
        (told(tool_calls=[{"id": 1}]) + told("stop"), "", "tool_calls"),
        (told(content="<think>") + told("stop"), "", "<think>"),
        (event("stop", " amber"), "amber", ""),
    ],
)  # fmt: skip
def test_shapes_of_a_chat(says, stream, text, elsewhere):
    client, _ = says(stream + DONE, words=("prompt.chat=true",))
    reply = client.ask("one")
    assert (reply.text, reply.elsewhere) == (text, elsewhere)


@pytest.mark.parametrize(
    ("text", "usage", "counts"),
    [
        ("amber", {"prompt_tokens": 90, "completion_tokens": 3}, (90, 3)),
        ("amber", {"prompt_tokens": 90.0, "completion_tokens": 3.0}, (90, 3)),
        ("amber", {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, (None, None)),
        ("amber", {"prompt_tokens": 90, "completion_tokens": 0}, (90, None)),
        ("amber", {"prompt_tokens": 0, "completion_tokens": 3}, (None, 3)),
        ("", {"prompt_tokens": 90, "completion_tokens": 0}, (90, 0)),  # plausible where nothing came
        ("", {"prompt_tokens": 0, "completion_tokens": 0}, (None, None)),
        ("amber", {"prompt_tokens": None}, (None, None)),
        ("amber", {"prompt_tokens": -1, "completion_tokens": True}, (None, None)),
        ("amber", {"prompt_tokens": "90", "completion_tokens": 2.5}, (None, None)),
        ("amber", {"prompt_tokens": float("nan"), "completion_tokens": float("inf")}, (None, None)),
        ("amber", [90, 3], (None, None)),
        ("amber", {}, (None, None)),
        ("amber", None, (None, None)),
    ],
)
def test_token_counts_that_are_left_out_or_odd_are_unknown(says, tmp_path, text, usage, counts):
    client, _ = says(event("stop", text, usage=usage, timings={"prompt_ms": float("nan")}) + DONE)
    reply = client.ask("one")
    assert (reply.text, reply.read, reply.written, reply.server) == (text, *counts, None)
    json.loads((tmp_path / "transcript.jsonl").read_text(), parse_constant=pytest.fail)


def test_zeros_do_not_overwrite_counts_that_came_before(says):
    client, _ = says(event(text="a", usage=USAGE) + event("stop", usage=dict.fromkeys(USAGE, 0)))
    reply = client.ask("one")
    assert (reply.read, reply.written) == (90, 3)


def test_unknown_tokens_cost_what_our_own_tokenizer_counts(says):
    """A word is a token: the prompt has 3, the answer 1, and 32 are reserved for it."""
    words = (*PRICES, "api.max_cost_usd=0.4")

    def count(text: str) -> int:
        return len(text.split())

    client, requests = says(*[WHOLE.replace("90", "0").replace("3}", "0}")] * 2, words=words, count=count)
    assert client.ask("which is it").read is None
    assert client.usd == pytest.approx((3 * 2000 + 1 * 10000) / 1e6)  # 0.016
    client.ask("who is it")
    client.ask("which is it")
    assert (len(requests), client.usd) == (2, pytest.approx(0.032))
    client, requests = says(words=(*PRICES, "api.max_cost_usd=0.357"), count=count)
    with pytest.raises(UserError, match=r"max_cost_usd=0.357 is reached \(0.0320 spent\)"):
        client.ask("when is it")  # it may cost 0.006 + 0.32
    assert requests == []


def test_our_own_count_is_of_the_whole_prompt(tiny_base):
    tokenizer = load_tokenizer(str(tiny_base))
    assert hosted.counter(tokenizer)("Which? amber") == len(tokenizer("Which? amber").input_ids) > 2


@pytest.mark.parametrize(
    ("omit", "gone", "new"),
    [
        ("[]", (), {}),
        ("[stream_options]", ("stream_options",), {}),
        ("[temperature, stop]", ("temperature", "stop"), {}),
        ("[stream]", ("stream", "stream_options"), {}),
        ("[max_tokens=max_completion_tokens]", ("max_tokens",), {"max_completion_tokens": 32}),
        ("[max_tokens, stop=stop_sequences]", ("max_tokens", "stop"), {"stop_sequences": ["\n"]}),
    ],
)
def test_fields_that_a_host_refuses_are_left_out_or_renamed(says, omit, gone, new):
    full = says()[0].body("one")
    client, requests = says(WHOLE, words=(f"api.omit={omit}", *PRICES))
    client.ask("one")
    assert requests == [{key: value for key, value in full.items() if key not in gone} | new]
    client, requests = says(words=("api.omit=[]",))
    assert client.ask("one").text == "amber", "the same question, whatever its fields are called"


@pytest.mark.parametrize("omit", ["[model]", "[prompt]", "[max_tokens=]", "[stop=a b]", "[Stop]", "['']"])
def test_fields_that_cannot_be_left_out_are_named(omit):
    with pytest.raises(
        UserError, match=r"omit: .* is none of temperature, max_tokens, stop, stream, stream_options, logprobs; "
    ):
        load("api8b", [f"api.omit={omit}"])
    with pytest.raises(UserError, match="omit: name each field once"):
        load("api8b", ["api.omit=[stop, stop=ends]"])


def test_a_field_that_is_left_out_makes_no_other_run():
    one, other = load("api8b"), load("api8b", ["api.omit=[stop]"])
    assert one.hash("eval") == other.hash("eval")


@pytest.mark.parametrize(
    ("status", "error", "offer"),
    [
        (400, {"error": {"message": "Unknown field: stream_options"}}, "api.omit=[stream_options]"),
        (400, {"error": {"message": "Unsupported value", "param": "temperature"}}, "api.omit=[temperature]"),
        (422, {"detail": [{"loc": ["body", "stop"], "msg": "extra fields not permitted"}]}, "api.omit=[stop]"),
        (400, {"error": "'max_tokens' is not supported, use 'max_completion_tokens'"},
         "api.omit=[max_tokens=max_completion_tokens]"),
        (400, {"error": "no temperature, no stop"}, "api.omit=[temperature,stop]"),
        (200, {"error": "stream_options is not known"}, "api.omit=[stream_options]"),
        (400, {"error": "maximum context length is 512 tokens; lower max_tokens"}, None),
        (400, {"error": "cannot stop_early"}, None),
        (404, {"error": "no temperature"}, None),
    ],
)  # fmt: skip
def test_a_host_that_refuses_a_field_gets_no_more_of_it(says, status, error, offer):
    client, requests = says((status, AS_JSON, json.dumps(error)))
    with pytest.raises(UserError) as refused:
        client.ask("one")
    assert len(requests) == 1
    assert offer in str(refused.value) if offer else "api.omit" not in str(refused.value)
    if offer:
        load("api8b", [offer])


def test_what_is_left_out_already_stays_so_in_the_offer(says):
    refusal = (400, AS_JSON, '{"error": "stream_options and temperature are unknown"}')
    client, _ = says(refusal, words=("api.omit=[stream_options]",))
    with pytest.raises(UserError, match=r"refuses temperature needs api.omit=\[stream_options,temperature\]$"):
        client.ask("one")


@pytest.mark.parametrize(
    "stream",
    [
        "retry: 3000\n\n" + WHOLE + DONE,
        "id: 7\n\n" + WHOLE + DONE,
        ": keep-alive\n\n" + WHOLE + DONE,
        "event: ping\n\n" + WHOLE + DONE,
        'event: ping\ndata: {"type": "ping"}\n\n' + WHOLE + DONE,
        'data: {"type": "ping"}\n\n' + WHOLE + DONE,
        "event: heartbeat\ndata: now\n\n" + WHOLE + DONE,
        "data:\n\n" + WHOLE + DONE,
        "data: ping\n\ndata: [PING]\n\n" + WHOLE + DONE,
        "event: completion\nid: 1\n" + WHOLE + DONE,
        WHOLE.replace("\n", "\r\n"),
        WHOLE + 'data: {"choices": [], "usage": null}\n\n' + "data:  [DONE] \n\n" + "data: {not\n\n",
        WHOLE.replace("er", "er\u2028", 1) + DONE,  # a line of JSON, though Unicode's separator is in it
        (200, "text/plain", WHOLE),
        (200, "application/octet-stream", WHOLE),
        (200, "Text/Event-Stream; charset=utf-8", WHOLE),
        (200, "", WHOLE),
    ],
)  # fmt: skip
def test_events_that_carry_nothing_are_no_data(says, stream):
    client, requests = says(stream)
    reply = client.ask("one")
    assert (reply.text, reply.read, len(requests)) == ("amber", 90, 1)


@pytest.mark.parametrize(
    ("response", "words"),
    [
        ((200, AS_JSON, '{"error": "Unexpected endpoint or method."}'), "Unexpected endpoint or method.; does api.url"),
        ((200, AS_JSON, '{"error": {"message": "no model", "code": 404}}'), "no model; does api.url end with /v1?"),
        ((200, AS_JSON, '{"object": "error", "message": "no model"}'), "no model"),
        ((200, AS_JSON, '{"type": "error", "message": "no model"}'), "no model"),
        ((200, AS_JSON, '{"detail": "Not Found"}'), "Not Found"),
        ((200, AS_JSON, '{"code": 1211, "msg": "no model"}'), "no model"),
        ((200, AS_JSON, '[{"error": {"message": "no model"}}]'), "no model"),
        ((200, AS_JSON, '{"models": []}'), '{"models": []}'),
        ((200, AS_JSON, "[1, 2]"), "a JSON body that is no answer: [1, 2]"),
        ((200, "text/plain", '{"error": "no model"}'), "no model"),
        ((200, SSE, '{"error": "no model"}'), "no model"),
        (event(text=" ") + 'event: error\ndata: {"message": "no quota"}\n\n' + DONE, "no quota"),
        ("event: error\ndata: no quota\n\n", "no quota"),
        ("event: error\n\n", "an event without words"),
        (event(text=" ") + 'data: {"error": {"message": "no quota", "code": 402}}\n\n' + DONE, "no quota"),
        ('data: {"error": {"message": "no quota"}, "choices": [{"finish_reason": "error"}]}\n\n', "no quota"),
        ('data: {"choices": [{"text": "", "error": {"message": "no quota"}}]}\n\n', "no quota"),
        ('data: {"object": "error", "message": "no quota"}\n\n', "no quota"),
        ('data: {"detail": "no quota"}\n\n', "no quota"),
        (f'data: {{"error": {{"message": "half: \\ud83d, {KEY}"}}}}\n\n', "half: \ufffd, …"),
    ],
)  # fmt: skip
def test_an_error_inside_a_200_is_reported_at_once_in_the_hosts_words_and_costs_nothing(
    says, tmp_path, response, words
):
    client, requests = says(response, words=PRICES)
    with pytest.raises(UserError) as error:
        client.ask("one", "q1")
    said = f"question q1: http://h/v1: an error in a reply of status 200: {words}"
    assert str(error.value).startswith(said)
    assert (len(requests), client.usd, client.reserved_usd) == (1, 0, 0)
    assert KEY not in (tmp_path / "transcript.jsonl").read_text()
    assert says(words=PRICES)[0].usd == 0, "by the transcript"


@pytest.mark.parametrize(
    "error",
    [
        'data: {"error": {"message": "no", "code": 503}}\n\n',
        'data: {"error": {"message": "no", "code": "429"}}\n\n',
        'data: {"error": {"message": "no", "type": "overloaded_error"}}\n\n',
        'data: {"error": "The request timed out"}\n\n',
        'event: error\ndata: {"message": "upstream overloaded"}\n\n',
        (200, AS_JSON, '{"error": {"message": "Rate limit reached"}}'),
        (200, "text/html", "<h1>Bad gateway</h1>"),
        "data: {not json\n\n",
        "data: [1]\n\n",
        "",
    ],
)
def test_a_failure_inside_a_200_that_may_pass_is_asked_again(says, error):
    client, requests = says(error, WHOLE)
    assert client.ask("one").text == "amber"
    assert len(requests) == 2
    client, _ = says(error, error)
    with pytest.raises(UserError, match=r"question q2: .*2 tries, and the last had "):
        client.ask("two", "q2")


@pytest.mark.parametrize("kind", [AS_JSON, "application/json; charset=utf-8", "text/plain", SSE])
def test_a_whole_answer_as_json_counts_and_its_first_text_has_no_time(says, kind):
    choice = {"text": " amber", "finish_reason": "stop"}
    client, _ = says((200, kind, json.dumps({"choices": [choice], "usage": USAGE}, indent=1)))
    reply = client.ask("one")
    assert (reply.text, reply.read, reply.written, reply.first, reply.streamed) == ("amber", 90, 3, None, False)
    assert reply.total > 0
    assert hosted.notes(client, {"q1": "one " * 90}, {"q1": reply}) == [
        "the host does not stream, so the time to the first token is unknown"
    ]
    message = {"message": {"role": "assistant", "content": "amber"}, "finish_reason": "length"}
    client, _ = says((200, kind, json.dumps({"choices": [message]})), words=("prompt.chat=true",))
    reply = client.ask("one")
    assert (reply.text, reply.hit_limit, reply.read, reply.first) == ("amber", True, None, None)


FILTERED = [
    (400, {"error": {"message": "The prompt triggers the content policy.", "code": "content_filter"}}),
    (400, {"error": {"message": "The response was filtered due to Azure OpenAI's content management policy."}}),
    (400, {"error": {"message": "no", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),
    (400, {"error": {"message": "no", "type": "moderation_error"}}),
    (403, {"error": {"message": "Your input was flagged", "code": 403}}),
    (422, {"detail": "blocked by safety settings"}),
    (400, {"code": "data_inspection_failed", "message": "no"}),
    (400, [{"error": {"message": "contentFilter"}}]),
    (200, {"error": {"message": "no", "code": "content_filter"}}),
]


@pytest.mark.parametrize(("status", "error"), FILTERED)
def test_a_question_that_a_content_filter_refuses_has_an_empty_answer_and_is_not_asked_again(says, status, error):
    refusal, wanted = (status, AS_JSON, json.dumps(error)), {"q1": "one", "q2": "two"}
    client, requests = says(WHOLE, refusal, words=PRICES)
    replies = hosted.ask_all(client, wanted, progress=None)
    assert (replies["q1"].text, replies["q2"].text, replies["q2"].hit_limit) == ("amber", "", False)
    assert replies["q2"].refused
    assert client.usd == pytest.approx((90 * 2000 + 3 * 10000) / 1e6)
    (note,) = hosted.notes(client, {"q1": "x" * 180, "q2": "two"}, replies)
    assert note.startswith("1 question was refused by the host's content filter and scores 0: q2 (")
    again, requests = says()
    assert hosted.ask_all(again, wanted, progress=None) == replies
    assert requests == []
    replayed, _ = says(replay=True)
    assert hosted.ask_all(replayed, wanted, progress=None) == replies


def test_an_answer_that_a_content_filter_ends_is_asked_again_then_refused(says):
    half = event(text=" am") + event("content_filter", usage=USAGE) + DONE
    client, _ = says(half, WHOLE)
    assert client.ask("one").text == "amber"
    client, requests = says(half, half, words=PRICES)
    before, reply = client.usd, client.ask("two", "q2")
    assert (reply.text, len(requests)) == ("", 2)
    assert reply.refused == 'an answer that ended with finish_reason "content_filter"'
    assert client.usd - before == pytest.approx(2 * (90 * 2000 + 3 * 10000) / 1e6), "the host bills both"


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, {"error": {"message": "no such field", "input": "What is the safety of moderation?"}}),
        (400, {"detail": [{"msg": "too long", "input": "content policy"}]}),
        (400, {"error": {"message": "org/safety-8b is not known"}}),
        (403, {"error": {"message": "your account was flagged"}}),
        (401, {"error": {"message": "content_filter"}}),
        (404, {"error": {"message": "content_filter"}}),
    ],
)
def test_what_is_refused_for_another_reason_is_an_error(says, status, error):
    client, _ = says((status, AS_JSON, json.dumps(error)), words=("base.path=org/safety-8b",))
    with pytest.raises(UserError) as refused:
        client.ask("one", "q2")
    assert str(refused.value).startswith("question q2: ") == (status == 400), "the others are of no one question"


@pytest.mark.parametrize(
    ("status", "chat", "hint"), [(404, False, 1), (405, False, 1), (404, True, 0), (400, False, 0)]
)
def test_a_host_that_only_chats_is_offered_a_chat(says, status, chat, hint):
    client, _ = says((status, AS_JSON, '{"detail": "Not Found"}'), words=(f"prompt.chat={str(chat).lower()}",))
    with pytest.raises(UserError) as error:
        client.ask("one")
    assert str(error.value).count("needs prompt.chat=true") == hint


@pytest.mark.parametrize(
    ("replies", "chat", "said"),
    [
        ([replied(), replied()], False, []),
        ([replied(""), replied()], False, ["1 of 2 answers is empty although the host wrote tokens: it sent no text;"]),
        ([replied("", written=0), replied("", written=None)], False, []),
        (
            [replace(replied("", written=None), elsewhere="a"), replace(replied(""), elsewhere="a, b")],
            True,
            ["2 of 2 answers are empty although the host wrote tokens: it sent a, b; raise window.answer"],
        ),
        ([replace(replied(""), refused="no")] * 2, False, ["2 questions were refused by the host's "]),
        ([replied(read=141)] * 2, False, []),  # 100 were sent; 1.25 times as many, and 16, are borne
        ([replied(read=142)] * 2, False, ["the host read 142 tokens of 100 that were sent, on average: it wraps "]),
        ([replied(read=142), replied(read=141)], False, []),
        ([replied(read=142), replied(read=None)], False, ["the host read 142 tokens of 100 that were sent"]),
        ([replied(read=142)] * 2, True, []),  # a chat has a template
        ([replace(replied(), streamed=False), replied()], False, ["the host does not stream"]),
    ],
)  # fmt: skip
def test_what_is_odd_in_replies_is_said(says, replies, chat, said):
    client, _ = says(words=(f"prompt.chat={str(chat).lower()}",))
    ids = [f"q{i}" for i in range(len(replies))]
    found = hosted.notes(client, dict.fromkeys(ids, "x" * 200), dict(zip(ids, replies, strict=True)))
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True))
    assert ("prompt.chat=true" in " ".join(found)) == (not chat and "wrote tokens" in " ".join(found))


def test_many_refused_questions_are_named_by_the_first(says):
    client, _ = says(words=("api.omit=[temperature]",))
    replies = {f"q{i}": replace(replied(""), refused=f"no {i}") for i in range(11)}
    refused, cold = hosted.notes(client, dict.fromkeys(replies, "x" * 200), replies)
    assert refused.endswith(" and score 0: q0, q1, q2, q3, q4, q5, q6, q7, q8, q9, … (no 0)")
    assert cold.startswith("temperature was not sent")


def test_transcripts_of_before_are_replayed(says, tmp_path):
    client, _ = says(WHOLE, WHOLE, words=PRICES)
    first = client.ask("one")
    client.ask("x" * 20)
    client.close()
    path = tmp_path / "transcript.jsonl"
    old = []
    for line, counts in zip(map(json.loads, path.read_text().splitlines()), [(90, 3), (0, 0)], strict=True):
        for key in ("read", "written"):
            del line[key]
        for key in ("elsewhere", "refused", "streamed"):
            del line["reply"][key]
        line["reply"] |= dict(zip(("read", "written"), counts, strict=True))
        old.append(json.dumps(line) + "\n")
    path.write_text("".join(old))
    replayed, _ = says(words=PRICES, replay=True)
    assert asdict(replayed.ask("one")) == asdict(first)
    unknown = replayed.ask("x" * 20)
    assert (unknown.text, unknown.read, unknown.written) == ("amber", None, None)
    # " amber" has 6 characters, two per token
    assert replayed.usd == pytest.approx((90 * 2000 + 3 * 10000 + 10 * 2000 + 3 * 10000) / 1e6)


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


# ---- log-probabilities -----------------------------------------------------------------------------------------------

ASKED = ("api.logprobs=true",)


def with_tokens(*pairs, chat: bool = False, text: str | None = None, **message) -> str:
    """An event with tokens and their log-probabilities, and the text that they spell or another one."""
    text = "".join(token for token, _ in pairs) if text is None else text
    content = {"content": [{"token": token, "logprob": value, "top_logprobs": []} for token, value in pairs]}
    legacy = {"tokens": [token for token, _ in pairs], "token_logprobs": [value for _, value in pairs]}
    said = {"delta": {"content": text, **message}} if chat else {"text": text}
    choice = {**said, "logprobs": content if chat else legacy, "finish_reason": None}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


@pytest.mark.parametrize("chat", [False, True])
def test_log_probabilities_are_asked_for_summed_and_kept(says, tmp_path, chat):
    stream = with_tokens((" amb", -0.5), chat=chat) + with_tokens(("er", -0.25), chat=chat)
    words = (*ASKED, f"prompt.chat={str(chat).lower()}")
    client, requests = says(stream + event("stop") + DONE, words=words)
    reply = client.ask("one")
    assert (reply.text, reply.logprob, reply.least) == ("amber", -0.75, -0.5)
    assert requests[0]["logprobs"] == (True if chat else 1)
    again, requests = says(words=words)
    assert again.ask("one") == reply, "of the transcript"
    other, requests = says(WHOLE)
    assert other.ask("one").logprob is None, "another request"
    assert "logprobs" not in requests[0]
    renamed, requests = says(WHOLE, words=(*ASKED, "api.omit=[logprobs=n_probs]"), fresh=True)
    renamed.ask("one")
    assert requests[0]["n_probs"] == 1


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (with_tokens((" amber", -0.5), ("</s>", -0.1), text=" amber") + event("stop"), (-0.6, -0.5)),
        (with_tokens(("\n", -9), (" amber", -0.5), ("\n", -0.1), ("more", -7)) + event("stop"), (-0.6, -0.5)),
        (with_tokens((" amber", 1e-6)) + event("stop"), (0.0, 0.0)),  # rounding
        (with_tokens((" am", -0.5)) + event("stop", "ber"), (None, None)),  # a part came without
        (event(text=" amber\nmore") + event("stop"), (None, None)),
        (with_tokens((" amber", None)) + event("stop"), (None, None)),
        (with_tokens((" amber", 0.7)) + event("stop"), (None, None)),
        (with_tokens((" amber", True)) + event("stop"), (None, None)),
        (with_tokens((" amber", -9999.0)) + event("stop"), (None, None)),  # hosts' sign for "not known"
        (with_tokens((" amber", -3.4e38)) + event("stop"), (None, None)),  # the same, of llama.cpp
        (with_tokens((" amber", -(10**400))) + event("stop"), (None, None)),
        (with_tokens((" am", -0.5)) + with_tokens(("ber", None)) + with_tokens(("</s>", -0.1), text=""), (None, None)),
        (with_tokens((" am", -0.5)) + event(text="ber") + with_tokens(("</s>", -0.1), text=""), (None, None)),
        (with_tokens((" am", -0.5), ("ber", -0.5)) + with_tokens(("", None)), (None, None)),  # a part of a character
        (with_tokens((" amber", -0.5)) + with_tokens((" amber", -0.5), text=""), (None, None)),  # repeated at the end
        (with_tokens((" amber", -0.5)) + with_tokens(("", -0.1)), (-0.6, -0.5)),  # EOS without a text
        (with_tokens(("Ġam", -0.5), ("ber", -0.25), text=" amber"), (-0.75, -0.5)),
        (with_tokens(("▁am", -0.5), ("ber", -0.25), ("Ċ", -0.1), text="amber"), (-0.85, -0.5)),
        (with_tokens(("\n", -9), (" amber", -0.5), text="\n amber"), (-0.5, -0.5)),  # as if it went on
        (with_tokens(("\n", -9), ("", -0.25), (" amber", -0.5)), (-0.75, -0.5)),  # "": part of a character
        (with_tokens((" ", -1), ("amber", -0.5), ("\n", -0.1), ("more", -7)), (-1.6, -1.0)),
        (with_tokens((" amber", -0.5), ("\nmore", -0.1), ("</s>", -7), text=" amber\nmore"), (-0.6, -0.5)),
        (with_tokens(("<think>", -1), ("amber", -5), ("</think>", -1), ("amber", -0.5)), (-0.5, -0.5)),
    ],
)
def test_only_the_answers_own_tokens_count_and_nothing_is_guessed(says, stream, expected):
    client, _ = says(stream + event("stop") + DONE, words=ASKED)
    reply = client.ask("one")
    assert reply.text == "amber"
    assert (reply.logprob, reply.least) == (expected if None in expected else pytest.approx(expected))
    gave = "the host gave no usable log-probabilities with 1 of 1 answers"
    assert (gave in hosted.notes(client, {"q": "one"}, {"q": reply})) == (reply.logprob is None)


@pytest.mark.parametrize("logprobs", [{"tokens": [" amber"]}, {"token_logprobs": [-0.5]}, [-0.5], -0.5, "x", {}, None])
def test_shapes_without_tokens_or_without_values_are_not_given(says, logprobs):
    choice = {"text": " amber", "logprobs": logprobs, "finish_reason": "stop"}
    client, _ = says(f"data: {json.dumps({'choices': [choice]})}\n\n" + DONE, words=ASKED)
    assert (client.ask("one").text, client.ask("one").logprob) == ("amber", None)


def test_tokens_of_thoughts_and_tokens_that_a_host_drops_leave_it_unknown(says):
    thought = with_tokens(("Hm", -5), chat=True, text="", reasoning_content="Hm")
    said = with_tokens((" amber", -0.5), chat=True) + told("stop")
    chats = (*ASKED, "prompt.chat=true")
    client, _ = says(thought + said + DONE, words=chats)
    reply = client.ask("one")
    assert (reply.text, reply.elsewhere, reply.logprob) == ("amber", "reasoning_content", None)
    # a host that gives the answer's tokens alone counts those of the thoughts too
    counts = event(usage={"prompt_tokens": 9, "completion_tokens": 70})
    client, _ = says(told(reasoning_content="Hm") + said + counts + DONE, words=chats, fresh=True)
    assert client.ask("one").logprob == -0.5
    # llama.cpp counts the first half of a character, and sends the second one's value alone
    for written, expected in ((2, -0.5), (3, None)):
        usage = {"prompt_tokens": 9, "completion_tokens": written}
        client, _ = says(with_tokens((" é", -0.5)) + event("stop", usage=usage) + DONE, words=ASKED, fresh=True)
        assert client.ask("one").logprob == expected


def test_characters_that_a_host_cannot_write_are_compared_by_the_rest(says):
    for said, expected in ((" Zürich", -0.75), (" Zürcher", None), (" ü", None)):
        halves = with_tokens((" Z", -0.25), ("\ufffd", -0.25), ("\ufffd", -0.125), ("rich", -0.125), text=said)
        halves = with_tokens(("\ufffd\ufffd", -0.5), text=said) if said == " ü" else halves
        client, _ = says(halves + event("stop") + DONE, words=ASKED, fresh=True)
        assert client.ask("one").logprob == expected


def test_a_body_and_a_message_after_deltas_count_once(says):
    tokens = {"content": [{"token": " amber", "logprob": -0.5}]}
    choice = {"message": {"content": " amber"}, "logprobs": tokens, "finish_reason": "stop"}
    whole, chats = json.dumps({"choices": [choice]}), (*ASKED, "prompt.chat=true")
    client, _ = says((200, "application/json", whole), words=chats)
    assert client.ask("one").logprob == -0.5
    stream = with_tokens((" amber", -0.75), chat=True) + f"data: {whole}\n\n" + DONE
    client, _ = says(stream, words=chats, fresh=True)
    assert client.ask("one").logprob == -0.5


def test_replies_of_before_have_no_log_probability(says, tmp_path):
    client, _ = says(WHOLE + DONE)
    reply = client.ask("one")
    line = json.loads((tmp_path / "transcript.jsonl").read_text())
    del line["reply"]["logprob"], line["reply"]["least"]
    (tmp_path / "transcript.jsonl").write_text(json.dumps(line) + "\n")
    client, requests = says()
    assert (client.ask("one"), requests) == (reply, [])
    assert reply.logprob is reply.least is None


def test_an_evaluation_keeps_log_probabilities_and_its_replay_has_the_same(host_and_words, capsys):
    host, _, arguments = host_and_words
    eval_loop.main(arguments)
    without = last_json(capsys)
    runs = []
    for more in ([], ["--replay"]):
        eval_loop.main([*arguments, *ASKED, *more, *[run["run"] for run in runs if more]])
        runs.append(last_json(capsys))
    assert len({without["run"], *(run["run"] for run in runs)}) == 3, "a finished run without them does not have them"
    rows = [[json.loads(r) for r in (Path(run["run"]) / "questions.jsonl").open()] for run in (without, *runs)]
    assert len(host.answered) == 24, "asked again, and not for the replay"
    assert rows[1] == rows[2]
    assert {(r["logprob"], r["least"]) for r in rows[1]} == {(-0.5, -0.25)}
    assert [r.get("logprob") for r in rows[0]] == [None] * 12
    assert [r["text"] for r in rows[0]] == [r["text"] for r in rows[1]]


def test_the_confidence_of_one_answer_is_its_tokens_probability(host_and_words, capsys):
    _, _, arguments = host_and_words
    for words, expected in (([], None), (ASKED, math.exp(-0.5))):
        ask_script.main([*arguments, *words, "--context", "A bridge. Answer:", "--question", "What?"])
        assert last_json(capsys)["confidence"] == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.just(10**400) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["content", "tokens", "token_logprobs", "token", "logprob"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(JSON)
def test_whatever_stands_there_gives_log_probabilities_or_none(found):
    pairs = hosted_logprobs.token_logprobs({"logprobs": found})
    assert pairs is None or all(isinstance(token, str) and -9999 < value <= 0 for token, value in pairs)


PAIRS = st.lists(st.tuples(st.text("ab é\n", min_size=1, max_size=3), st.integers(-9, -1)), max_size=6)


@given(PAIRS)
def test_tokens_of_the_line_count_and_the_one_that_ends_it(pairs):
    """By the token of each character: those of the line with what stands before it there, and the next one's."""
    text = "".join(token for token, _ in pairs)
    of = [number for number, (token, _) in enumerate(pairs) for _ in token]
    first = next((i for i, character in enumerate(text) if not character.isspace()), None)
    expected = []
    if first is not None:
        begin, end = text[:first].rfind("\n") + 1, [*(i for i, c in enumerate(text) if c == "\n" and i > first)]
        own = sorted({*of[begin : end[0] + 1 if end else None]})
        expected = [pairs[number][1] for number in own]
    assert hosted_logprobs.line_logprobs(pairs, text, text, None) == expected


@given(PAIRS, st.data())
def test_a_token_that_is_missing_or_repeated_leaves_it_unknown(pairs, data):
    text = "".join(token for token, _ in pairs)
    seen = [i for i, (token, _) in enumerate(pairs) if token.strip()]
    if not seen:
        return
    at, times = data.draw(st.sampled_from(seen)), data.draw(st.sampled_from([0, 2]))
    damaged = [*pairs[:at], *[pairs[at]] * times, *pairs[at + 1 :]]
    found = hosted_logprobs.line_logprobs(damaged, text, text, None)
    if "".join(token for token, _ in damaged).split() != text.split():
        assert found == []


@given(st.integers() | st.floats() | st.just(10**400) | st.just(-(10**400)) | st.booleans() | st.text())
def test_any_number_is_a_token_count_or_none(value):
    found = responses.count_of(value)
    assert found is None or (found == value and found >= 0)
