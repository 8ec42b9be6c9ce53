"""A question asked by itself is answered, placed in its context, and told as it was found."""

import io
import json
import runpy
from types import SimpleNamespace

from common.arguments import parser
from common.config import Config, load
from common.decode import single
from common.decode.answers import Generation, Prediction
from common.decode.hosted import Reply
from common.errors import UserError
from common.model.load import load_tokenizer, load_tokenizers
from common.runs import adapters
from scripts import ask
from tests.decode.test_predict import system

import pytest
import torch

NOTE = "Note 1: the north gate is here, the otter, the chisel; the otter is not at the north gate."
PLACE = "Which place is meant?"


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch):
    for name in ("CONTEXT", "CONTEXT_FILE", "QUESTION", "QUESTIONS"):
        monkeypatch.delenv(name, raising=False)


def texts(*words: str):
    return ask.given_texts(parser("ask").parse_args(["a model", *words]))


def asked(capsys, *words: str) -> tuple[list[str], dict]:
    """What is printed before the last line, and that."""
    ask.main([str(word) for word in words])
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_an_answer_is_told_with_its_place_probability_and_size(answering_config, answering_base, capsys):
    words = ["lora=null", "base.quant=none", "--context", f" {NOTE}\n", "--question", PLACE]
    lines, found = asked(capsys, answering_config, *words)
    model, tokenizer = system(answering_base)
    text = f"Context: {NOTE}\n\nQuestion: {PLACE}\n\nAnswer:"
    prompt, ids = tokenizer(text).input_ids, [*tokenizer(" north gate", add_special_tokens=False).input_ids, 1]
    logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
    probability = logits.softmax(-1).gather(1, torch.tensor(ids)[:, None]).prod().item()
    assert 0.1 < probability < 0.999
    took, on = found.pop("milliseconds"), found.pop("on")
    assert found == {
        "system": "answering",
        "random_weights": False,
        "question": PLACE,
        "answer": "north gate",
        "confidence": pytest.approx(probability, rel=1e-3),
        "tokens": 3,
        "passes": found["passes"],
        "windows": 1,
        "ended_by_itself": True,
        "context_cut": False,
        "span": [12, 22],
    }
    assert NOTE[12:22] == "north gate"
    assert found["passes"] in (2, 3)
    about = f"characters 12 to 22 of the context; confidence {probability:.0%}; {took:.0f} ms, answering on {on}"
    assert lines == ["north gate", NOTE.replace("north gate", "»north gate«", 1), about]


@pytest.mark.parametrize(
    ("context", "answer", "span", "shown", "about"),
    [
        ("the otter", "otter", [4, 9], ["otter", "the »otter«"], "characters 4 to 9 of the context"),
        ("otter and otter", "otter", [0, 5], ["otter", "»otter« and otter"], "characters 0 to 5 of the context"),
        ("the heron", "otter", None, ["otter"], "not a span of the context"),
        ("the heron", "", None, ["(nothing)"], "not a span of the context"),
    ],
)
def test_the_place_of_an_answer_is_its_first_in_the_context(
    answering_config, capsys, monkeypatch, context, answer, span, shown, about
):
    result = {"answer": answer, "confidence": 0.756, "context_cut": False, "milliseconds": 12.6, "on": "a machine"}
    monkeypatch.setattr(ask, "ask_here", lambda *_: [dict(result)])
    lines, found = asked(capsys, answering_config, "lora=null", "--context", context, "--question", "Which?")
    assert found == {**result, "span": span}
    assert lines == [*shown, f"{about}; confidence 76%; 13 ms, answering on a machine"]


def test_a_context_that_was_cut_and_a_confidence_that_nobody_said_are_told(answering_config, capsys, monkeypatch):
    result = {"answer": "otter", "confidence": None, "context_cut": True, "milliseconds": 1.0, "on": "a host"}
    monkeypatch.setattr(ask, "ask_here", lambda *_: [dict(result)])
    words = ["lora=null", "window.context=300", "--context", "an otter", "--question", "Which?"]
    lines, _ = asked(capsys, answering_config, *words)
    assert lines == [
        "otter",
        "an »otter«",
        "only the context's first 300 tokens were read; window.overflow=chunk reads all",
        "characters 3 to 8 of the context; 1 ms, answering on a host",
    ]


def test_an_answer_that_the_limit_cut_has_not_ended_by_itself(answering_config, capsys):
    """As a base the model never ends after "badger"."""
    words = ["lora=null", "window.answer=16", "--context", "Note 1: here are the badger and nothing more."]
    _, found = asked(capsys, answering_config, *words, "--question", "Which animal is meant?")
    assert (found["ended_by_itself"], found["tokens"]) == (False, 16)
    assert found["answer"] == " ".join(["badger"] * 16)
    assert found["span"] is None


@pytest.fixture
def clock(monkeypatch) -> list[str]:
    """What `ask_here` does in order, by a clock on which each query takes 0.25 s."""
    done: list[str] = []
    monkeypatch.setattr(ask.gauges, "now", lambda device: done.append("clock") or 0.25 * done.count("query"))
    return done


@pytest.mark.parametrize(
    ("found", "overflow", "expected"),
    [
        (
            [Generation([5] * 31 + [1], -0.5, passes=3)],
            "truncate",
            {"windows": 1, "passes": 3, "ended_by_itself": True},
        ),
        ([Generation([5] * 32, -0.5, passes=3)], "truncate", {"ended_by_itself": False, "tokens": 32}),
        (
            [Generation([5], -0.5, passes=3), Generation([1], -9.0, passes=4)],
            "chunk",
            {"windows": 2, "passes": 7, "ended_by_itself": False, "tokens": 1, "confidence": pytest.approx(0.60653066)},
        ),
    ],
)
def test_the_second_query_is_timed_and_its_best_window_told(
    answering_config, monkeypatch, clock, found, overflow, expected
):
    queries = []

    def answered(*args, **options):
        clock.append("query")
        queries.append((args, options))
        return Prediction("asked", "otter", [5], -0.5, False), found, True

    monkeypatch.setattr(ask.single, "ask", answered)
    config = load(str(answering_config), ["lora=null", f"window.overflow={overflow}", "prompt.order=both"])
    chosen, tokenizers = adapters.Chosen(config, None), load_tokenizers(config)
    (result,) = ask.ask_here(config, chosen, tokenizers, "a context", ["a question"])
    assert clock == ["query", "clock", "query", "clock"]
    assert result["milliseconds"] == 250
    assert {key: result[key] for key in expected} == expected
    assert result["context_cut"] == (overflow == "truncate")
    first, second = queries
    assert first == second
    (_, _, example, given), options = first
    assert (example.context, example.question, given, options) == ("a context", "a question", config, {})


def test_a_context_of_several_windows_is_read_whole_where_that_is_asked_for(answering_config, capsys):
    context = "Note 1: here are " + "nothing and " * 60 + "the otter and nothing more."
    words = ["lora=null", "window.context=64", "window.stride=32", "window.answer=16", "--context", context]
    words += ["--question", "Which animal is meant?"]
    _, cut = asked(capsys, answering_config, *words)
    assert (cut["windows"], cut["context_cut"], "otter" in cut["answer"]) == (1, True, False)
    _, whole = asked(capsys, answering_config, *words, "window.overflow=chunk")
    assert (whole["answer"], whole["context_cut"]) == ("otter", False)
    assert whole["span"] == [context.index("otter"), context.index("otter") + 5]
    assert whole["passes"] >= whole["windows"] >= 3


@pytest.mark.parametrize("force", [False, True])
def test_an_adapter_is_checked_noted_and_answers(answering_config, monkeypatch, capsys, force):
    done: list[tuple] = []

    def chosen(config, given, force):
        return adapters.Chosen(config, "an adapter", None, "seed=1", "FORCE=1" * force)

    monkeypatch.setattr(adapters, "choose", chosen)
    monkeypatch.setattr(ask.checkpoint, "verified", lambda adapter: f"{adapter}, verified")
    monkeypatch.setattr(ask.checkpoint, "weights_sha256", lambda adapter: "its weights")
    monkeypatch.setattr(ask.calibrations, "find", lambda *known: done.append(known[:2]))

    def loaded(config: Config, adapter: str, device: torch.device, force: bool):
        done.append((adapter, config.system, force))
        raise UserError("far enough")

    monkeypatch.setattr(ask, "load_system", loaded)
    with pytest.raises(UserError, match="far enough"):
        ask.main([str(answering_config), "--context", "c", "--question", "q", *["--force"] * force])
    assert done == [("an adapter, verified", "its weights"), ("an adapter, verified", "answering", force)]
    assert capsys.readouterr().err == "note: seed=1, as an adapter was trained\n"


def test_shots_stand_before_the_question_and_have_room(answering_config, capsys, monkeypatch):
    rooms, engine = [], single.engine
    monkeypatch.setattr(ask.single, "engine", lambda *args: rooms.append(args[4]) or engine(*args))
    words = ["lora=null", "--context", NOTE, "--question", PLACE]
    asked(capsys, answering_config, *words)
    asked(capsys, answering_config, *words, "prompt.shots=1")
    assert rooms[0] == 0 < rooms[1]


@pytest.fixture
def hosted(tmp_path, answering_base, monkeypatch):
    """A hosted model that answers "otter"; returns its YAML, and what it was asked."""
    file = tmp_path / "hosted.yaml"
    file.write_text(
        "system: hosted\nbase: {path: theirs, quant: none}\napi: {url: http://host/v1}\n"
        f"window: {{tokenizer: {answering_base}}}\n"
    )
    prompts: list[str] = []

    class Client:
        def __init__(self, config: Config, transcript, count):
            assert transcript.parent.is_dir()
            self.config, self.api, self.count = config, config.api, count

        def ask(self, text: str) -> Reply:
            prompts.append(text)
            return Reply("otter", False, 50, 7, None, 0.125, 0.5, None, 9.0)

        def close(self) -> None:
            prompts.append("closed")

    monkeypatch.setattr(ask.hosted, "Client", Client)
    return file, prompts


def test_a_hosted_model_is_asked_the_same_and_told_the_same(hosted, capsys):
    file, prompts = hosted
    lines, found = asked(capsys, file, "--context", NOTE, "--question", "Which animal is meant?")
    assert prompts == [f"Context: {NOTE}\n\nQuestion: Which animal is meant?\n\nAnswer:", "closed"]
    assert found == {
        "system": "hosted",
        "random_weights": False,
        "question": "Which animal is meant?",
        "answer": "otter",
        "confidence": None,
        "tokens": 7,
        "windows": 1,
        "ended_by_itself": True,
        "context_cut": False,
        "milliseconds": 500.0,
        "on": "http://host/v1",
        "span": [36, 41],
    }
    assert lines[2].startswith("characters 36 to 41 of the context; 500 ms, hosted")


def test_a_hosted_models_context_is_cut_as_others_are(hosted, capsys, answering_base):
    file, prompts = hosted
    window = ["window.context=40", "window.stride=40"]
    lines, found = asked(capsys, file, *window, "--context", NOTE * 3, "--question", "Which?")
    assert found["context_cut"]
    assert "first 40 tokens" in lines[2]
    tokens = load_tokenizer(str(answering_base))(prompts[0].partition("\n\n")[0]).input_ids
    assert 36 < len(tokens) <= 40


def test_what_is_not_said_comes_from_the_environment(answering_config, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        ask,
        "ask_here",
        lambda config, chosen, tokenizers, *texts: (
            seen.append(texts)
            or [{"answer": "", "confidence": None, "context_cut": False, "milliseconds": 0.0, "on": ""}]
        ),
    )
    monkeypatch.setenv("CONTEXT", " a context ")
    monkeypatch.setenv("QUESTION", "a question\n")
    monkeypatch.setattr(ask.sys, "stdin", io.StringIO("neither"))
    asked(capsys, answering_config, "lora=null")
    asked(capsys, answering_config, "lora=null", "--question", "another")
    assert seen == [("a context", ["a question"]), ("a context", ["another"])]
    with pytest.raises(UserError, match=r"prompt\.earlier: a single question has no earlier ones"):
        ask.main([str(answering_config), "lora=null", "prompt.earlier=true"])


def test_the_question_is_the_last_line_of_stdin_and_nothing_need_be_in_the_environment(
    answering_config, capsys, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        ask,
        "ask_here",
        lambda config, chosen, tokenizers, *texts: (
            seen.append(texts)
            or [{"answer": "Zürich", "confidence": None, "context_cut": False, "milliseconds": 0.0, "on": ""}]
        ),
    )
    monkeypatch.delenv("CONTEXT", raising=False)
    monkeypatch.delenv("QUESTION", raising=False)
    monkeypatch.setattr(ask.sys, "stdin", io.StringIO("One line of Zürich.\nAnother.\n\n Which? \n\n"))
    ask.main([str(answering_config), "lora=null"])
    assert seen == [("One line of Zürich.\nAnother.", ["Which?"])]
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "Zürich"
    assert '"answer": "Zürich"' in out[-1]
    assert json.loads(out[-1])["span"] == [12, 18]


def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(ask.sys, "argv", ["ask.py", "absent"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(ask.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("error: unknown MODEL")]) == 1


def test_a_terminal_is_told_how_to_end(monkeypatch, capsys):
    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(ask.sys, "stdin", Typed("a context\nq?"))
    assert texts() == ("a context", ["q?"])
    assert capsys.readouterr().err == "context, then the question on the last line; end with Ctrl-D:\n"
    assert texts("--context", "c", "--question", "q") == ("c", ["q"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(ask.sys, "stdin", Typed("a context"))
    assert texts("--question", "q") == ("a context", ["q"])
    assert capsys.readouterr().err == "the context; end with Ctrl-D:\n"
    monkeypatch.setattr(ask.sys, "stdin", Typed("one?\n\n two?\n"))
    context, questions = texts("--context", "c")
    assert (context, next(questions)) == ("c", "one?"), "asked for one by one"
    assert list(questions) == ["two?"]
    assert capsys.readouterr().err == "question (Ctrl-D ends): " * 4 + "\n"


def test_stdin_that_is_no_text_is_refused(monkeypatch):
    monkeypatch.setattr(ask.sys, "stdin", SimpleNamespace(isatty=lambda: False, read=lambda: b"\xff".decode()))
    with pytest.raises(UserError, match="stdin must be UTF-8 text"):
        texts()


# ---- many questions about one text -----------------------------------------------------------------------------------


def test_questions_come_from_a_file_and_the_context_too(tmp_path, monkeypatch):
    notes, questions = tmp_path / "notes.txt", tmp_path / "asked.txt"
    notes.write_text("\ufeffFirst line.\nSecond.\n")
    questions.write_text("One?\n\n  Two? \n")
    expected = ("First line.\nSecond.", ["One?", "Two?"])
    assert texts("--context-file", str(notes), "--questions", str(questions)) == expected
    monkeypatch.setenv("CONTEXT_FILE", str(notes))
    monkeypatch.setenv("QUESTIONS", str(questions))
    assert texts() == expected
    with pytest.raises(UserError, match="CONTEXT and CONTEXT_FILE: give one of the two"):
        texts("--context", "c", "--context-file", str(notes))
    monkeypatch.setenv("QUESTION", "q")
    with pytest.raises(UserError, match="QUESTION and QUESTIONS: give one of the two"):
        texts()
    assert texts("--questions", str(questions)) == expected
    monkeypatch.delenv("QUESTION")
    monkeypatch.delenv("QUESTIONS")
    assert texts("--context", "c", "--question", "q") == ("c", ["q"]), "what is typed wins"
    notes.write_text(" \n")
    with pytest.raises(UserError, match=r"notes\.txt: it holds no text"):
        texts("--question", "q")
    with pytest.raises(UserError, match=r"absent\.txt: no such file"):
        texts("--context-file", str(tmp_path / "absent.txt"))
    notes.write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(UserError, match=r"notes\.txt: byte 1 \(0xfc\) is not UTF-8"):
        texts("--questions", str(questions))


def test_lines_of_stdin_are_questions_where_the_context_is_given(monkeypatch):
    monkeypatch.setattr(ask.sys, "stdin", io.StringIO("One?\n\nTwo?\n"))
    assert texts("--context", "c") == ("c", ["One?", "Two?"])
    monkeypatch.setattr(ask.sys, "stdin", io.StringIO(" \n"))
    with pytest.raises(UserError, match="no question: make ask"):
        texts("--context", "c")


@pytest.mark.parametrize(("context", "question"), [("?! …", "Which?"), ("a context", "??")])
def test_a_text_without_a_word_is_refused(context, question):
    with pytest.raises(UserError, match="no word is in"):
        texts("--context", context, "--question", question)


def test_a_question_longer_than_its_window_is_refused_before_anything_is_loaded(answering_config, monkeypatch, capsys):
    monkeypatch.setattr(ask, "load_system", lambda *_: pytest.fail("too early"))
    long = "Which otter is it, " * 20 + "then?"
    with pytest.raises(UserError, match=r'^"Which otter is it.*…" takes more than the 64 tokens of window\.question'):
        ask.main([str(answering_config), "lora=null", "--context", NOTE, "--question", long])
    config = load(str(answering_config), ["lora=null"])
    typed = iter([PLACE, long, "??", "Which animal is meant?"])
    assert list(ask.checked(typed, config, load_tokenizers(config))) == [PLACE, "Which animal is meant?"]
    told = capsys.readouterr().err
    assert told.startswith('error: "Which otter')
    assert 'error: no word is in "??"' in told


@pytest.mark.parametrize("spans", ["false", "true"])
def test_the_context_is_read_once_and_answers_are_as_if_it_were_not(answering_config, capsys, monkeypatch, spans):
    """The first answer is timed from nothing; from the second question on a pass has the question's tokens alone."""
    read, forward = [], single.Single._forward
    monkeypatch.setattr(
        single.Single, "_forward", lambda self, new, *rest: read.append(len(new)) or forward(self, new, *rest)
    )
    words = [str(answering_config), "lora=null", f"decode.spans={spans}", "--context", NOTE]
    questions = [PLACE, "Which animal is meant?", "Which tool is meant?"]
    alone, sizes = [], []
    for question in questions:
        ask.main([*words, "--question", question])
        alone.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        sizes.append(read[0])
        assert read.count(read[0]) == 2, "the first answer is not timed, the second reads the whole prompt too"
        read.clear()
    monkeypatch.setattr(ask.sys, "stdin", io.StringIO("\n".join(questions)))
    ask.main(words)
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [found["answer"] for found in together] == [found["answer"] for found in alone]
    for found, other in zip(together, alone, strict=True):
        assert found["confidence"] == pytest.approx(other["confidence"], rel=1e-4)
    assert [n for n in read if n > 20] == [sizes[0]] * 2, "of the other questions their own tokens alone are read"


@pytest.mark.parametrize(
    ("context", "span", "shown"),
    [
        ("One. The otter swims. Two.", (9, 14), "The »otter« swims."),
        ("The otter", (0, 3), "»The« otter"),
        ("A line\nan otter\nanother", (10, 15), "an »otter«"),
        ("It is 3.5 m, or 2! So", (6, 9), "It is »3.5« m, or 2!"),
        ("Yes! No. Both.", (5, 13), "»No. Both«."),
        ("Yes. No.", (0, 4), "»Yes.«"),
    ],
)
def test_an_answer_is_marked_in_its_sentence(context, span, shown, monkeypatch):
    assert ask.in_sentence(context, span) == shown
    monkeypatch.setattr(ask.sys.stdout, "isatty", lambda: True, raising=False)
    assert ask.in_sentence(context, span) == shown.replace("»", "\033[1m").replace("«", "\033[0m")
