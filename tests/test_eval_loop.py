"""One system's EM and F1: every figure that is printed or recorded, and whose answers they are of."""

import hashlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import eval_loop
from common.config import load
from common.data import cache, squad
from common.data.tokens import Tokenizers
from common.decode import hosted, predict
from common.decode.answers import Prediction
from common.device import describe_device, pick_device
from common.errors import UserError
from common.runs import adapters, checkpoint, gauges, preflight, ranks, record, signals
from tests.decode.test_hosted import KEY, Host

import pytest

LORA = "lora={rank: 4, alpha: 8, targets: [q_proj]}"


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


# ---- score and record ----------------------------------------------------------------------------------------------

GOLD = [  # article, id, gold answers, what is answered, EM, F1
    ("Zürich", "z1", ["the red fox"], "red fox", True, 1.0),
    ("Zürich", "z2", ["old mill"], "mill", False, 2 / 3),
    ("Andes", "a3", ["harbour", "a port"], "Port.", True, 1.0),
    ("Andes", "a1", ["north gate"], "", False, 0.0),
    ("Andes", "a2", ["north gate"], "Süd gate", False, 0.5),
    ("Crete", "c1", ["hammer"], "hammer", True, 1.0),
    ("Crete", "c2", ["old mill"], "an old, old house", False, 0.4),
    ("Crete", "c3", ["otter"], "otter", True, 1.0),
]
# means over 8: EM 4 / 8, F1 (5/3 + 3/2 + 12/5) / 8; Wilson's interval of 4 of 8 is 21.52 to 78.48
# whole articles: with three of them the bootstrap's expanded interval is from its lowest mean to its highest: of Andes
# alone (EM 1/3, F1 1/2) to Crete alone (EM 2/3) and Zürich alone (F1 5/6)
EM, F1 = 50.0, 100 * (5 / 3 + 3 / 2 + 12 / 5) / 8  # 69.583


@pytest.fixture
def config_file(tmp_path) -> Path:
    """A system on eight questions, whose base is never loaded: tests put something in its place."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    articles: dict[str, list] = {}
    for article, id_, gold, *_ in GOLD:
        context = f"About {' or '.join(gold)}."
        answers = [{"text": text, "answer_start": context.index(text)} for text in gold]
        qas = [{"id": id_, "question": "Which?", "answers": answers}]
        articles.setdefault(article, []).append({"context": context, "qas": qas})
    data = [{"title": title, "paragraphs": paragraphs} for title, paragraphs in articles.items()]
    (tmp_path / "dev.json").write_text(json.dumps({"version": "1.1", "data": data}))
    path = tmp_path / "one.yaml"
    path.write_text(
        f"system: one\nbase: {{path: {tmp_path / 'base'}, dtype: fp32}}\ndata: {{dev: {tmp_path / 'dev.json'}}}\n"
        f"runs: {tmp_path / 'runs'}\n"
    )
    return path


def answered(**more) -> eval_loop.Answered:
    """The answers of `GOLD`, in order of ids as engines give them; three ran into the limit."""
    found = {
        id_: Prediction(id_, text, [7, 8], -0.25, id_ in ("a1", "a2", "z2"), ties=i)
        for i, (_, id_, _, text, *_) in enumerate(GOLD)
    }
    made_by = {"engine": "stream", "tokenizer": "t", "cutter": "c", "base_commit": "b"}
    result = {"adapter": None, "adapter_sha256": None, "processes": 1, "peak": {"rss_bytes": 5}}
    told = {"truncated": 2, "seconds": 3.14159, "device": {"name": "a machine"}, "made_by": made_by, "result": result}
    return eval_loop.Answered(dict(sorted(found.items())), **told | more)


@pytest.fixture
def scored(config_file, monkeypatch, capsys):
    """Runs the script on made-up answers: (what it printed, the object on its last line)."""

    def run(*words: str, **more):
        monkeypatch.setattr(eval_loop, "answer_here", lambda config, dev, chosen: answered(**more))
        eval_loop.main([str(config_file), *words])
        out = capsys.readouterr().out
        return out, json.loads(out.splitlines()[-1])

    return run


def test_every_figure_of_the_result(scored):
    _, result = scored()
    assert result == {
        "run": result["run"],
        "em": EM,
        "em_interval": pytest.approx([21.5216, 78.4784], abs=1e-4),
        "em_article_interval": pytest.approx([100 / 3, 200 / 3]),
        "f1": pytest.approx(F1),
        "f1_article_interval": pytest.approx([50, 500 / 6]),
        "n": 8,
        "random_weights": False,
        "truncated_share": 0.25,
        "hit_limit_share": 0.375,
        "empty_share": 0.125,
        "mean_words": 1.5,
        "seconds": 3.14,
        "questions_per_s": 2.55,
        "adapter": None,
        "adapter_sha256": None,
        "processes": 1,
        "peak": {"rss_bytes": 5},
    }
    assert list(result)[1:6] == ["em", "em_interval", "em_article_interval", "f1", "f1_article_interval"]


def test_what_is_printed(scored, tmp_path):
    out, result = scored()
    assert out.splitlines()[:-1] == [
        f"one on {tmp_path / 'dev.json'}",
        "EM 50.00 [21.52, 78.48], by article [33.33, 66.67]  F1 69.58, by article [50.00, 83.33]  n 8",
        f"context cut 25.00%, answer ran into the limit 37.50%, answer empty 12.50%, 2.55 questions/s; "
        f"{result['run']}/predictions.json",
    ]


def test_notes_are_printed_below_the_scores(scored):
    out, result = scored(notes=["one thing", "another"])
    assert out.splitlines()[-3:] == ["one thing", "another", json.dumps(result)]


def test_an_adapter_is_named_and_a_time_that_is_not_known_is_none(scored, tmp_path):
    out, result = scored(seconds=None, result={"adapter": "runs/x/best"})
    assert out.startswith(f"one with runs/x/best on {tmp_path / 'dev.json'}\n")
    assert ", unknown questions/s; " in out
    assert result["seconds"] is result["questions_per_s"] is None


def test_random_weights_have_no_accuracy(scored):
    out, result = scored("base.random_weights=true")
    accuracy = ("em", "em_interval", "em_article_interval", "f1", "f1_article_interval")
    assert [result[key] for key in accuracy] == [None] * 5
    assert result["random_weights"] is True
    assert out.startswith("one (random weights) on ")
    assert out.splitlines()[1] == "random weights: no accuracy  n 8"
    row = json.loads((Path(result["run"]) / "questions.jsonl").read_text().splitlines()[0])
    assert "em" not in row
    assert row["article"] == "Zürich"


def test_one_article_has_no_interval_by_article(scored, tmp_path, config_file):
    text = (tmp_path / "dev.json").read_text()
    (tmp_path / "dev.json").write_text(text.replace('"Andes"', '"Crete"').replace(json.dumps("Zürich"), '"Crete"'))
    out, result = scored()
    assert result["em_interval"] == pytest.approx([21.5216, 78.4784], abs=1e-4)
    assert result["em_article_interval"] is result["f1_article_interval"] is None
    assert "EM 50.00 [21.52, 78.48], by article –  F1 69.58, by article –  n 8\n" in out


def test_predictions_and_questions_are_written_in_the_order_of_the_data_and_as_they_were_said(scored):
    _, result = scored()
    run = Path(result["run"])
    lines = ",\n".join(f'"{id_}": {json.dumps(text, ensure_ascii=False)}' for _, id_, _, text, *_ in GOLD)
    assert (run / "predictions.json").read_text() == "{\n" + lines + "\n}\n"
    text = (run / "questions.jsonl").read_text()
    assert text.endswith("\n")
    assert "Süd gate" in text
    assert [json.loads(line) for line in text.splitlines()] == [
        {
            "id": id_,
            "text": said,
            "token_ids": [7, 8],
            "logprob": -0.25,
            "hit_limit": id_ in ("a1", "a2", "z2"),
            "ties": i,
            "article": article,
            "em": em,
            "f1": round(f1, 6),
        }
        for i, (article, id_, _, said, em, f1) in enumerate(GOLD)
    ]


def test_the_record_holds_what_is_printed_last_the_data_and_what_made_it(scored, tmp_path):
    _, result = scored("seed=3")
    run = Path(result["run"])
    assert run.name.startswith("one-s3-")
    assert run.name.endswith("-eval-001")
    written = record.read_one(run / "record.json")
    assert written["result"] == result
    assert (written["kind"], written["system"], written["must_match"]["questions"]) == ("eval", "one", 8)
    assert written["must_match"]["window"]["tokenizer"] == "c"
    assert written["may_differ"]["device"] == {"name": "a machine"}
    assert (written["may_differ"]["engine"], written["may_differ"]["base_commit"]) == ("stream", "b")
    assert written["may_differ"]["data_source"] == str(tmp_path / "dev.json")


def test_a_run_that_was_begun_is_written_to_and_no_other_made(scored, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    _, result = scored(run=begun)
    assert result["run"] == str(begun)
    assert {path.name for path in begun.iterdir()} == {"predictions.json", "questions.jsonl", "record.json"}
    assert not (tmp_path / "runs").exists()


def test_a_rank_that_is_not_the_first_writes_and_prints_nothing(config_file, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(eval_loop, "answer_here", lambda config, dev, chosen: None)
    eval_loop.main([str(config_file)])
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "runs").exists()


def test_help_says_what_each_word_is(capsys):
    with pytest.raises(SystemExit) as ended:
        eval_loop.main(["--help"])
    assert not ended.value.code
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "Official EM and F1 of one system, by greedy decoding with the one prompt and window.",
        "[--fresh] [--force] [--replay RUN]",
        "model a name in configs/, a YAML file, a folder or a hub id",
        "[key=value ...]",
        "--replay RUN take the answers from this run's transcript",
        "--fresh start a new run instead of resuming one",
    ):
        assert words in said


@pytest.mark.parametrize("flag", [["--replay", "x"], ["--fresh"]])
def test_what_is_of_hosted_models_is_refused_elsewhere(config_file, flag):
    with pytest.raises(UserError, match="--replay and --fresh are of systems behind an API; one runs here"):
        eval_loop.main([str(config_file), *flag])


def test_what_stands_in_the_way_is_said_before_anything_is_read(config_file, monkeypatch):
    def refused(config):
        raise UserError(f"{config.system} does not run here")

    monkeypatch.setattr(preflight, "check", refused)
    monkeypatch.setattr(squad, "load", lambda *args: pytest.fail("too late"))
    with pytest.raises(UserError, match="one does not run here"):
        eval_loop.main([str(config_file)])


def test_shots_are_filled_in(config_file, monkeypatch, train_file):
    found = []
    monkeypatch.setattr(eval_loop, "answer_here", lambda config, dev, chosen: found.append(config.prompt.before))
    eval_loop.main([str(config_file), f"data.train={train_file}", "prompt.shots=1"])
    assert found[0].startswith("Context: Number ")


def test_questions_are_of_dev(config_file, monkeypatch, tmp_path):
    folder = tmp_path / "squad"
    folder.mkdir()
    (folder / "dev-v1.1.json").write_bytes((tmp_path / "dev.json").read_bytes())
    monkeypatch.setenv("SQUAD_DIR", str(folder))
    found = []
    monkeypatch.setattr(eval_loop, "answer_here", lambda config, dev, chosen: found.append(dev.source))
    eval_loop.main([str(config_file), "data.dev=rajpurkar/squad"])
    assert found == [str(folder / "dev-v1.1.json")]


def test_a_mistake_is_one_line_and_exit_code_2(config_file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval_loop.py", "--fresh", str(config_file)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(eval_loop.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: --replay and --fresh are of systems behind an API")


# ---- a model on this machine ---------------------------------------------------------------------------------------


@pytest.fixture
def here(config_file, monkeypatch, tmp_path):
    """Runs `local` on parts that only note what they get: its answer, and what happened in which order."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "adapter_config.json").write_text("{}")
    events, clock = [], {"now": 50.0}

    def passes(name, seconds, result):
        def call(*args, **kwargs):
            events.append((name, *args, kwargs) if kwargs else (name, *args))
            clock["now"] += seconds
            return result(*args, **kwargs) if callable(result) else result

        return call

    def run(*words: str, first: bool = True, processes: int = 1, force: bool = False, special: tuple = ()):
        config = load(str(config_file), [LORA, f"adapter={adapter}", *words])
        dev = squad.load(config.data, "dev")
        built = SimpleNamespace(trees=["tree"], counts={"truncated": 3, "questions": 8})
        process = SimpleNamespace(is_main_process=first, num_processes=processes)
        mine, others = (Prediction(i, "x", [1], p, False) for i, p in (("a", -2.0), ("b", -3.0)))
        for module, name, seconds, result in (
            (ranks, "join", 1, process),
            (eval_loop, "broadcast_object_list", 1, lambda found: found),
            (eval_loop, "load_tokenizers", 1, TOKENIZERS),
            (adapters.Chosen, "note", 1, None),
            (eval_loop, "holds_special", 0, lambda tokenizer, text: text in special),
            (eval_loop, "load_system", 1, "model"),
            (cache, "build_trees", 1, built),
            (eval_loop, "stop_tokens", 1, [1, 2]),
            (gauges, "reset_peaks", 1, None),
            (predict, "by_all_ranks", 30, {"a": mine, "b": others}),
            (gauges, "peaks", 1, {"rss_bytes": 9}),
            (eval_loop, "describe_device", 1, {"name": "a machine"}),
            (eval_loop, "pick_device", 1, "device"),
            (predict, "engine_of", 1, "stream"),
        ):
            monkeypatch.setattr(module, name, passes(name, seconds, result))
        monkeypatch.setattr(eval_loop, "sources", lambda *args: {"of": args})
        monkeypatch.setattr(gauges, "now", lambda device: clock["now"])
        chosen = adapters.Chosen(config, adapter, {"seed": 3}, forced="FORCE=1" * force)
        return eval_loop.answer_here(config, dev, chosen), {event[0]: event[1:] for event in events}, config, dev

    return run


TOKENIZERS = Tokenizers("tokenizer", "cutter")
WEIGHTS = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"  # printf weights | sha256sum


def test_a_local_models_answers_are_gathered_and_timed_from_the_first_token_to_the_last(here, tmp_path):
    found, _, _, _ = here(processes=2)
    assert list(found.answers) == ["a", "b"]
    assert (found.truncated, found.device, found.run) == (3, {"name": "a machine"}, None)
    assert found.seconds == 30, "of decoding and of gathering, not of loading"
    assert found.made_by == {"engine": "stream", "of": ("model", TOKENIZERS)}
    assert found.result == {
        "adapter": str(tmp_path / "adapter"),
        "adapter_sha256": WEIGHTS,
        "processes": 2,
        "peak": {"rss_bytes": 9},
        "trained_with": {"seed": 3},
        "forced": None,
    }


def test_every_part_of_a_local_evaluation_gets_what_it_needs(here, tmp_path):
    _, got, config, dev = here("eval.parts=2", "window.answer=20", "prompt.order=both")
    adapter = tmp_path / "adapter"
    assert got["broadcast_object_list"] == ([adapter, WEIGHTS],)
    assert "note" in got
    assert got["load_system"] == (config, adapter, "device", False)
    assert got["build_trees"] == (dev, TOKENIZERS, config.window, config.prompt, {"train": False})
    assert got["by_all_ranks"] == ("model", TOKENIZERS, ["tree"], config)
    assert got["reset_peaks"] == got["peaks"] == got["describe_device"] == ("device",)
    assert got["stop_tokens"] == ("tokenizer", "model", config.decode)
    assert got["engine_of"] == ("model", config.eval)


def test_other_ranks_say_nothing_and_hand_their_answers_over(here):
    found, got, _, _ = here(first=False)
    assert found is None
    assert got["by_all_ranks"][2] == ["tree"]
    assert "note" not in got


def test_the_first_rank_says_which_adapter(here, monkeypatch, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    real = checkpoint.weights_sha256
    monkeypatch.setattr(checkpoint, "weights_sha256", lambda path: "theirs" if path == other else real(path))

    def told(found):
        return [other, "theirs"]

    here(first=False)  # puts its parts in place
    monkeypatch.setattr(eval_loop, "broadcast_object_list", told)
    loaded = []
    monkeypatch.setattr(eval_loop, "load_system", lambda config, adapter, device, force: loaded.append(adapter))
    config = load(str(tmp_path / "one.yaml"), [LORA, f"adapter={tmp_path / 'adapter'}"])
    eval_loop.answer_here(config, squad.load(config.data, "dev"), adapters.choose(config))
    assert loaded == [other]


def test_an_adapter_that_is_replaced_while_it_is_loaded_is_noticed(here, monkeypatch, tmp_path):
    hashes = iter(["before", "after"])
    monkeypatch.setattr(checkpoint, "weights_sha256", lambda adapter: next(hashes))
    with pytest.raises(UserError, match="replaced while it was read"):
        here()


def test_a_damaged_adapter_is_not_evaluated(here, tmp_path):
    (tmp_path / "adapter" / "SHA256SUMS").write_text("0000  adapter_model.safetensors\n")
    with pytest.raises(UserError, match=r"adapter_model.safetensors"):
        here()


# ---- a hosted model: which run -------------------------------------------------------------------------------------


@pytest.fixture
def asked(config_file, monkeypatch, capsys, tmp_path):
    """Runs the script on a hosted model: the (run, replay) that it was asked with, and what was printed."""
    words = ["api.url=http://h/v1", f"window.tokenizer={tmp_path / 'base'}"]

    def run(*more: str, fails: bool = False):
        calls = []

        def hosted(config, dev, newest, replay):
            calls.append((newest, replay))
            folder = newest or record.new_run(config, "eval")
            if fails:
                raise UserError("met a limit")
            return answered(run=folder, result={"cost_usd": 0.5})

        monkeypatch.setattr(eval_loop, "answer_hosted", hosted)
        try:
            eval_loop.main([str(config_file), *words, *more])
        except UserError:
            assert fails
        return calls, capsys.readouterr().out

    return run


def test_a_run_that_was_not_finished_is_gone_on_with_and_a_finished_one_is_shown(asked, tmp_path):
    ((newest, replay),), _ = asked(fails=True)
    assert newest is replay is None
    (run,) = (tmp_path / "runs").iterdir()
    ((newest, _),), out = asked()
    assert newest == run
    result = json.loads(out.splitlines()[-1])
    assert result["cost_usd"] == 0.5
    calls, out = asked()
    assert calls == []
    assert out.splitlines() == [f"{run} is finished; FRESH=1 asks anew", json.dumps(result)]


def test_a_fresh_start_a_replay_and_other_data_begin_another_run(asked, tmp_path):
    asked()
    assert asked("--fresh")[0] == [(None, None)]
    (tmp_path / "dev.json").write_text((tmp_path / "dev.json").read_text().replace("Which?", "What?"))
    assert asked()[0] == [(None, None)]
    assert asked()[0] == [], "that one is finished now"
    assert asked("--replay", "runs/x")[0] == [(None, Path("runs/x"))]
    assert len(list((tmp_path / "runs").iterdir())) == 4


# ---- a hosted model: its answers -----------------------------------------------------------------------------------


def reply(
    read: int | None = 10, written: int | None = 2, waited: float = 0.126, hit_limit: bool = False, refused: str = ""
) -> hosted.Reply:
    text = "" if refused else "amber"
    return hosted.Reply(text, hit_limit, read, written, None, 0.1, 0.2, None, waited, refused=refused)


@pytest.fixture
def at_host(config_file, monkeypatch, tmp_path):
    """Runs `answer_hosted` on made-up replies; asking takes 4.5 s and 8 requests of the 3 that were sent before."""
    config = load(
        str(config_file), ["api.url=http://h/v1", f"window.tokenizer={tmp_path / 'base'}", "prompt.chat=true"]
    )
    dev, clock, events = squad.load(config.data, "dev"), {"now": 10.0}, []

    class Client:
        def __init__(self, config, transcript, replay, count):
            assert count == ("counts by", "cutter")
            events.append((config.system, transcript, replay))
            clock["now"] += 1
            self.requests, self.usd, self.transcript = 3 if before["made"] else 0, 0.12345678, transcript
            transcript.touch()

        def close(self):
            events.append("closed")

    def ask_all(client, wanted, check):
        assert client.requests == (3 if before["made"] else 0)
        events.append(wanted)
        check()
        clock["now"] += 4.5
        client.requests += 8
        client.transcript.write_text("weights")
        return before["replies"]

    def texts(examples, cutter, window, options):
        assert (cutter, window, options) == ("cutter", config.window, config.prompt)
        return [(e.id, f"asks {e.id}") for e in examples], {"truncated": 3, "questions": 8}

    def notes(client, wanted, replies):
        assert events[-1] == "closed"
        return [f"{len(wanted)} were asked, {', '.join(replies)} answered"]

    before = {"made": False, "replies": {}}
    monkeypatch.setattr(hosted, "counter", lambda tokenizer: ("counts by", tokenizer))
    monkeypatch.setattr(hosted, "notes", notes)
    monkeypatch.setattr(eval_loop, "load_tokenizers", lambda config: Tokenizers("own", "cutter"))
    monkeypatch.setattr(eval_loop, "sources", lambda *args: {"of": args})
    monkeypatch.setattr(eval_loop, "prompt_texts", texts)
    monkeypatch.setattr(hosted, "Client", Client)
    monkeypatch.setattr(hosted, "ask_all", ask_all)
    monkeypatch.setattr(eval_loop.time, "perf_counter", lambda: clock["now"])

    def run(run=None, replay=None, replies=None, made=False):
        before.update(made=made, replies=replies or {"b": reply(), "a": reply(read=7, waited=0.1, hit_limit=True)})
        return eval_loop.answer_hosted(config, dev, run, replay), events

    return run


def test_a_hosted_models_answers_costs_tokens_and_times(at_host, tmp_path):
    found, events = at_host()
    (run,) = (tmp_path / "runs").iterdir()
    ids = [row[1] for row in GOLD]
    assert events == [("one", run / "transcript.jsonl", False), {id_: f"asks {id_}" for id_ in ids}, "closed"]
    assert (found.truncated, found.seconds, found.device, found.run) == (3, 4.5, {"name": "http://h/v1"}, run)
    assert found.made_by == {"engine": "api", "of": (None, Tokenizers("own", "cutter"))}
    assert found.answers == {
        "b": Prediction("b", "amber", [], None, False),
        "a": Prediction("a", "amber", [], None, True),
    }
    assert found.result == {
        "transcript_sha256": WEIGHTS,
        "replayed": None,
        "requests": 8,
        "requests_before": 0,
        "refused": 0,
        "cost_usd": 0.123457,
        "tokens_read": 17,
        "tokens_written": 4,
        "waited_s": 0.23,
        "adapter": None,
        "adapter_sha256": None,
        "peak": {"allocated_bytes": None, "reserved_bytes": None, "rss_bytes": None},
    }
    assert found.notes == ["8 were asked, b, a answered"]


def test_refused_questions_are_counted_have_empty_answers_and_no_tokens(at_host):
    found, _ = at_host(replies={"a": reply(read=None, written=None, refused="no"), "b": reply()})
    assert found.answers["a"] == Prediction("a", "", [], None, False)
    assert (found.result["refused"], found.result["tokens_read"], found.result["tokens_written"]) == (1, 10, 2)


def test_tokens_that_a_host_does_not_say_are_not_known(at_host):
    found, _ = at_host(replies={"a": reply(read=None), "b": reply(written=0), "c": reply()})
    assert (found.result["tokens_read"], found.result["tokens_written"]) == (None, 4)
    found, _ = at_host(replies={"a": reply(written=None), "b": reply()})
    assert (found.result["tokens_read"], found.result["tokens_written"]) == (20, None)


def test_of_a_run_that_is_gone_on_with_the_time_is_not_known(at_host, tmp_path):
    (tmp_path / "begun").mkdir()
    found, events = at_host(run=tmp_path / "begun", made=True)
    assert events[0] == ("one", tmp_path / "begun" / "transcript.jsonl", False)
    assert found.seconds is None
    assert (found.run, found.result["requests"], found.result["requests_before"]) == (tmp_path / "begun", 11, 3)
    assert not (tmp_path / "runs").exists()


def test_a_replay_takes_its_answers_from_that_run_and_writes_a_run_of_its_own(at_host, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "transcript.jsonl").touch()
    found, events = at_host(replay=tmp_path / "old")
    assert events[0] == ("one", tmp_path / "old" / "transcript.jsonl", True)
    assert found.seconds is found.run is None
    assert found.result["replayed"] == str(tmp_path / "old")
    with pytest.raises(UserError, match=r"absent/transcript.jsonl: no such file; --replay names the run"):
        at_host(replay=tmp_path / "absent")


def test_nothing_paid_is_no_cost(at_host, monkeypatch):
    made = hosted.Client

    class Free(made):
        usd = property(lambda self: 0.0, lambda self, value: None)

    monkeypatch.setattr(hosted, "Client", Free)
    assert at_host()[0].result["cost_usd"] is None


def test_being_told_to_stop_keeps_what_came_and_says_how_to_go_on(at_host, monkeypatch, capsys, tmp_path):
    class Request:
        code = 143

        def check(self):
            raise signals.Stopped

    class Listen:
        __enter__, __exit__ = lambda self: Request(), lambda self, *what: None

    monkeypatch.setattr(signals, "listen", Listen)
    with pytest.raises(SystemExit) as ended:
        at_host()
    assert ended.value.code == 143
    (run,) = (tmp_path / "runs").iterdir()
    assert capsys.readouterr().out == f"stopped; the same command goes on from {run}\n"


def test_the_transcript_is_closed_whatever_happens(at_host, monkeypatch):
    def fails(client, wanted, check):
        events.append("asked")
        raise UserError("met a limit")

    _, events = at_host()
    events.clear()
    monkeypatch.setattr(hosted, "ask_all", fails)
    with pytest.raises(UserError, match="met a limit"):
        at_host()
    assert events[1:] == ["asked", "closed"]


def test_a_hosted_model_is_asked_by_one_process(at_host, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    at_host()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="asked by one process: leave PROCESSES out"):
        at_host()


# ---- the real thing ------------------------------------------------------------------------------------------------


def test_a_model_that_answers_is_scored_as_its_words_say(answering_config, capsys):
    eval_loop.main([str(answering_config), "lora=null"])
    result = last_json(capsys)
    said = json.loads((Path(result["run"]) / "predictions.json").read_text())
    dev = squad.load(load(str(answering_config)).data, "dev")
    right = [said[e.id] == e.answers[0].text for e in dev.examples]
    assert result["n"] == len(said) == len(right) == 48
    assert result["em"] == 100 * sum(right) / 48
    assert 0 < result["em"] < result["f1"] < 100
    rows = [json.loads(line) for line in (Path(result["run"]) / "questions.jsonl").read_text().splitlines()]
    assert [row["em"] for row in rows] == right
    assert {row["article"] for row in rows} == {f"Article {a}" for a in range(4)}
    assert 0 < result["hit_limit_share"] == sum(len(row["token_ids"]) == 32 for row in rows) / 48
    assert 48 / result["questions_per_s"] == pytest.approx(result["seconds"], abs=0.006)  # seconds have two decimals
    assert (result["truncated_share"], result["processes"], result["adapter"]) == (0, 1, None)
    assert result["peak"]["rss_bytes"] > 2**20
    made = record.read_one(Path(result["run"]) / "record.json")["may_differ"]
    assert made["engine"] == "stream"
    assert made["device"] == describe_device(pick_device())


def test_the_most_probable_answers_are_kept_with_what_chose_them(answering_config, capsys):
    eval_loop.main([str(answering_config), "lora=null", "decode.spans=true", "decode.nbest=3"])
    result = last_json(capsys)
    rows = [json.loads(line) for line in (Path(result["run"]) / "questions.jsonl").read_text().splitlines()]
    for row in rows:
        texts, masses = zip(*row["nbest"], strict=True)
        assert len(set(texts)) == len(texts) <= 3
        assert row["text"] == texts[0], "by mass"
        assert 0 < masses[-1] <= masses[0]
        assert sum(masses) + row["rest"] <= 1 + 1e-6
        assert row["least"] <= 0 >= row["logprob"]
        assert isinstance(row["greedy"], str)
    decoding = record.read_one(Path(result["run"]) / "record.json")["must_match"]["decoding"]
    assert decoding == {"spans": True, "nbest": 3}


def test_a_context_longer_than_the_window_is_cut_and_counted(answering_config, tmp_path, capsys):
    path = tmp_path / "answering-dev.json"
    data = json.loads(path.read_text())
    paragraph = data["data"][0]["paragraphs"][0]
    paragraph["context"] += " nothing more" * 60
    data["data"] = [{**data["data"][0], "paragraphs": data["data"][0]["paragraphs"][:2]}]
    path.write_text(json.dumps(data))
    for overflow in ("truncate", "chunk"):
        words = [
            "lora=null",
            f"window.overflow={overflow}",
            "window.context=64",
            "window.stride=32",
            "window.answer=16",
        ]
        eval_loop.main([str(answering_config), *words])
        assert last_json(capsys)["truncated_share"] == 3 / 6


def test_dev_can_be_a_fixed_part_of_itself(answering_config, capsys):
    eval_loop.main([str(answering_config), "lora=null", "data.dev_questions=5", "window.answer=16"])
    assert last_json(capsys)["n"] == 5


def test_an_untrained_system_says_how_to_train_it(config_file):
    with pytest.raises(UserError, match="make train MODEL=one"):
        eval_loop.main([str(config_file), LORA])


def test_a_hosted_models_answers_are_snapped_to_what_was_read(tmp_path, tiny_base, dev_file, monkeypatch, capsys):
    """The host says a prompt's last word, which by this template is the context's."""
    monkeypatch.setenv("API_KEY", KEY)
    host = Host()
    words = [f"api.url={host.url}", f"data.dev={dev_file}", f"window.tokenizer={tiny_base}", f"runs={tmp_path / 'r'}"]
    words += ["decode.snap=true", 'prompt.template="{question} {context}"']
    eval_loop.main(["api8b", *words])
    host.shutdown()
    run = Path(last_json(capsys)["run"])
    rows = [json.loads(line) for line in (run / "questions.jsonl").read_text().splitlines()]
    contexts = {e.id: e.context for e in squad.load(load("api8b", words).data, "dev").examples}
    assert len(rows) == 12
    for row in rows:
        assert row["text"] == contexts[row["id"]].split()[-1] == contexts[row["id"]][slice(*row["span"])]
    assert json.loads((run / "record.json").read_text())["must_match"]["decoding"] == {"snap": True}


def test_a_hosted_model_is_asked_once_for_each_question_and_paid_by_its_tokens(
    tmp_path, tiny_base, dev_file, monkeypatch, capsys
):
    monkeypatch.setenv("API_KEY", KEY)
    host = Host()
    words = [
        f"api.url={host.url}",
        f"data.dev={dev_file}",
        f"window.tokenizer={tiny_base}",
        f"runs={tmp_path / 'r'}",
        "api.usd_per_million_read=2",
        "api.usd_per_million_written=10",
    ]
    eval_loop.main(["api8b", *words])
    result = last_json(capsys)
    eval_loop.main(["api8b", *words, "--replay", result["run"]])
    again = last_json(capsys)
    host.shutdown()
    assert len(host.answered) == len(set(host.answered)) == 12
    assert (result["n"], result["requests"], result["tokens_read"], result["tokens_written"]) == (12, 12, 1200, 36)
    assert result["cost_usd"] == round(12 * (100 * 2 + 3 * 10) / 1e6, 6)
    transcript = (Path(result["run"]) / "transcript.jsonl").read_bytes()
    assert result["transcript_sha256"] == hashlib.sha256(transcript).hexdigest()
    assert again["replayed"] == result["run"]
    assert {
        key: again[key] for key in ("em", "f1", "hit_limit_share", "empty_share", "refused", "tokens_read", "cost_usd")
    } == {
        key: result[key] for key in ("em", "f1", "hit_limit_share", "empty_share", "refused", "tokens_read", "cost_usd")
    }
