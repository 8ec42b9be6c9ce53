"""A hosted model: tried again where that helps, paid for once, replayed, within limits, and the key is nowhere."""

import contextlib
import itertools
import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import ask as ask_script
import bench_latency
import certify
import eval_loop
from common import api, prompt, squad
from common.config import load
from common.errors import UserError
from common.model import load_tokenizer

import pytest

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
    monkeypatch.setattr(api, "BACKOFF", lambda state: 0.001)
    hosts, clients = [], []

    def make(faults=lambda: None, *overrides: str, host: Host | None = None, beside: bool = False, **how: bool):
        if clients and not beside:
            clients[-1].close()
        host = host or Host(faults)
        hosts.append(host)
        config = load("api8b", [f"api.url={host.url}", *overrides])
        clients.append(api.Client(config, tmp_path / "transcript.jsonl", **how))
        return clients[-1], host

    yield make
    for client in clients:
        client.close()
    for host in hosts:
        host.shutdown()


def lines(tmp_path) -> list[dict]:
    return list(api.read_transcript(tmp_path / "transcript.jsonl"))


def test_an_answer_has_text_tokens_and_times(ask, tmp_path):
    client, host = ask()
    reply = client.ask("What is it? amber")
    assert (reply.text, reply.hit_limit, reply.read, reply.written, reply.server) == ("amber", False, 100, 3, 0.25)
    assert 0 < reply.connect < reply.first <= reply.total
    assert reply.waited < reply.total
    body = host.bodies[0]
    assert (body["prompt"], body["temperature"], body["max_tokens"], body["stop"]) == (
        "What is it? amber",
        0,
        32,
        ["\n"],
    )
    assert host.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_a_thousand_questions_through_every_fault_none_lost_none_double_order_kept(ask, tmp_path):
    rng = random.Random(0)
    kinds = ["429/0", "429", "500", "503/0", "cut", "garbage", "html", "error inside", *[None] * 12]
    client, host = ask(lambda: rng.choice(kinds), "api.concurrency=16", "api.tries=30")
    wanted = {f"q{i}": f"Which? word{i}" for i in range(1000)}
    replies = api.ask_all(client, wanted, progress=None)
    assert list(replies) == list(wanted)
    assert all(replies[f"q{i}"].text == f"word{i}" for i in range(1000))
    assert sorted(host.answered) == sorted(wanted.values())
    assert len(host.bodies) == client.requests == len(lines(tmp_path)) > 1400
    assert 1 < host.most_at_once <= 16
    assert sum(line["reply"] is not None for line in lines(tmp_path)) == 1000


def test_what_was_answered_is_not_asked_again(ask, tmp_path):
    client, host = ask()
    wanted = {"a": "one", "b": "two"}
    first = api.ask_all(client, wanted, progress=None)
    again, _ = ask(host=host)
    assert api.ask_all(again, wanted | {"c": "three"}, progress=None)["a"] == first["a"]
    assert sorted(host.answered) == ["one", "three", "two"]
    timed, _ = ask(host=host, anew=True)
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


def test_tries_are_counted_and_the_last_reason_is_said(ask):
    client, host = ask(lambda: "503", "api.tries=3")
    with pytest.raises(UserError, match=r"3 tries, and the last had HTTP 503: no, .*the same command goes on"):
        client.ask("one")
    assert len(host.bodies) == 3


def test_a_host_says_how_long_to_wait(ask, monkeypatch):
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
        api.ask_all(client, {str(i): f"word{i}" for i in range(5)}, progress=None)
    assert len(host.bodies) == 2
    prices = ("api.usd_per_million_read=1000", "api.usd_per_million_written=0")  # 0.1 a reply, by its usage
    more, _ = ask(lambda: None, *prices, "api.max_cost_usd=0.41", "api.concurrency=1", host=host)
    assert more.usd == pytest.approx(0.2)
    with pytest.raises(UserError, match=r"api.max_cost_usd=0.41 is reached \(0.4000 spent\)"):
        api.ask_all(more, {str(i): f"word{i} " + "x" * 30 for i in range(10, 20)}, progress=None)
    assert len(host.bodies) == 4


def test_the_key_is_nowhere(ask, tmp_path, capsys):
    faults = itertools.cycle(["500", "error inside", None, "401"])
    client, _ = ask(lambda: next(faults))
    client.ask("one")
    with pytest.raises(UserError) as error:
        client.ask("two")
    said = capsys.readouterr()
    everything = (tmp_path / "transcript.jsonl").read_text() + str(error.value) + said.out + said.err
    assert everything.count("Bearer …") > 2  # the host said the header back
    assert KEY not in everything


@pytest.mark.parametrize("key", ["…", "sk-abc\x00def"])
def test_a_key_that_can_be_none_is_refused(ask, monkeypatch, key):
    monkeypatch.setattr(api.os, "environ", {"API_KEY": key})
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
        api.ask_all(client, {str(i): f"word{i}" for i in range(500)}, check, progress=None)
    assert 0 < len(lines(tmp_path)) < 500


# ---- through the scripts -------------------------------------------------------------------------------------------


@pytest.fixture
def hosted(tmp_path, tiny_base, dev_file, monkeypatch):
    """A host, and the arguments of a system behind it."""
    monkeypatch.setenv("API_KEY", KEY)
    monkeypatch.setattr(api, "BACKOFF", lambda state: 0.001)
    faults = []
    host = Host(lambda: faults.pop() if faults else None)
    words = [f"api.url={host.url}", f"data.dev={dev_file}", f"window.tokenizer={tiny_base}"]
    prices = ["api.usd_per_million_read=1", "api.usd_per_million_written=1"]
    yield host, faults, ["api8b", *words, *prices, f"runs={tmp_path / 'runs'}"]
    host.shutdown()


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_a_hosted_model_is_scored_goes_on_is_not_paid_twice_and_is_replayed(hosted, capsys, tmp_path):
    host, faults, arguments = hosted
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


def test_a_run_that_met_a_limit_goes_on_with_a_higher_one(hosted, capsys):
    host, _, arguments = hosted
    with pytest.raises(UserError, match="max_requests=5 is reached"):
        eval_loop.main([*arguments, "api.max_requests=5"])
    eval_loop.main([*arguments, "api.max_requests=50"])
    assert last_json(capsys)["requests_before"] == 5
    assert len(host.answered) == 12


def test_a_hosted_models_prompts_are_the_bytes_that_others_read(hosted, capsys, dev_file, tiny_base):
    host, _, arguments = hosted
    eval_loop.main(arguments)
    config, tokenizer = load("api8b", arguments[1:]), load_tokenizer(str(tiny_base))
    trees = prompt.build_trees(squad.load(config.data, "dev").examples, tokenizer, config.window, train=False).trees
    local = {
        tokenizer.decode([*t.prefix_ids, *b.prompt_ids], skip_special_tokens=True) for t in trees for b in t.branches
    }
    assert {body["prompt"] for body in host.bodies} == local


def test_a_hosted_models_single_queries_are_timed(hosted, capsys):
    host, faults, arguments = hosted
    faults += ["429/1", None, None]
    bench_latency.main([*arguments, "bench.queries=4", "bench.warmup_queries=1", "bench.processes=1"])
    out = capsys.readouterr().out
    result = json.loads(out.strip().splitlines()[-1])
    assert result["n"] == 4
    assert result["latency"]["p95_ms"] >= result["ttft"]["p50_ms"] > 0
    assert result["natural"]["server"]["p50_ms"] == 250
    assert "fixed" not in result
    assert host.most_at_once == 1
    assert result["natural"]["waited"]["p99_ms"] > 900 > result["latency"]["p99_ms"]  # the pause is apart
    assert "by the host's own clock" in out
    assert "waiting to try again" in out


def test_one_question_to_a_hosted_model(hosted, capsys):
    _, _, arguments = hosted
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
