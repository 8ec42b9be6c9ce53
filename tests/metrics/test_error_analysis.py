"""Every wrong answer has one kind, and the classes that accuracy is broken down by hold every question once."""

from common.data.squad import Answer, Example, read
from common.metrics import error_analysis
from common.metrics.error_analysis import KINDS, kind_of, off_by, question_word, table
from common.metrics.score import score
from tests.conftest import ROOT

import pytest
from hypothesis import given
from hypothesis import strategies as st

CONTEXT = "The Vecht is a branch of the Rhine. It was dug out in 1122, by 40 men. Dr. No never saw it."


def example(*answers: str, question: str = "What is it?", context: str = CONTEXT) -> Example:
    return Example("q", "T", context, question, tuple(Answer(a, context.index(a)) for a in answers))


@pytest.mark.parametrize(
    ("answer", "text", "kind"),
    [
        ("branch", "", "empty"),
        ("branch", " ", "empty"),
        ("branch", "tributary", "not a span of the context"),
        ("a branch of the Rhine", "branch of", "boundary off"),
        ("branch", "A BRANCH of the", "boundary off"),
        ("1122", "40 men", "right sentence, other words"),
        ("1122", "Vecht", "another sentence"),
        ("No", "never", "right sentence, other words"),
        ("1122", "It", "right sentence, other words"),  # the very first word of the sentence
        ("It", "men", "right sentence, other words"),
        ("Rhine", "It", "another sentence"),
        ("1122", ",", "right sentence, other words"),  # spans that touch do not overlap
        (",", "1122", "right sentence, other words"),
        ("branch of", "h o", "boundary off"),
    ],
)
def test_a_wrong_answers_kind_is_where_it_stands(answer, text, kind):
    assert kind_of(example(answer), text, right=False, hit_limit=False) == kind
    assert kind_of(example(answer), text, right=True, hit_limit=False) == "right"
    assert kind_of(example(answer), "dug out in 1122, by", False, hit_limit=True) == "cut by the limit"


def test_the_first_kind_that_holds_counts():
    gold = example("branch")
    assert kind_of(gold, "", right=True, hit_limit=True) == "right"
    assert kind_of(gold, " ", right=False, hit_limit=True) == "empty"
    assert kind_of(gold, "nowhere", right=False, hit_limit=True) == "cut by the limit"


@pytest.mark.parametrize(
    ("end", "ends"),
    [
        (". The", True),
        ("! The", True),
        ("? 7", True),
        (".\n(The", True),
        ('." The', True),
        (".') The", True),
        ('. "The', True),
        (". [The", True),
        (".] '7", True),
        (".  It", True),
        (". the", False),
        (", The", False),
        (".The", False),
        ("; 7", False),
        (". ((The", False),
    ],
)
def test_a_sentence_ends_where_a_stop_a_space_and_a_capital_or_digit_follow(end, ends):
    asked = example("amber", context=f"The amber canal{end} bridge.")
    assert kind_of(asked, "bridge", False, False) == ("another sentence" if ends else "right sentence, other words")


def test_any_place_of_an_answer_counts():
    context = "A canal. The bridge of amber, the canal of stone. Amber."
    assert kind_of(example("bridge", context=context), "canal", False, False) == "right sentence, other words"
    assert off_by(example("canal of stone", context=context), "canal") == 2
    assert list(error_analysis._places("aXaxaXA", "axa")) == [(0, 3), (2, 5), (4, 7)]


def test_any_gold_answer_counts():
    assert kind_of(example("Vecht", "1122"), "dug out in 1122", False, False) == "boundary off"
    assert off_by(example("Vecht", "1122"), "dug out in 1122") == 3
    assert off_by(example("dug out in 1122", "out in 1122, by 40"), "in 1122, by 40 men") == 2


def test_words_off_are_those_of_both_ends():
    assert off_by(example("branch of the"), "a branch") == 3
    assert off_by(example("the Rhine"), "Rhine") == 1
    assert off_by(example("is a branch"), " a branch of the ") == 3


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("How many canals?", "how many"),
        ("In which year, and who dug?", "which"),
        ("HOW long?", "how"),
        ("How much?", "how much"),
        ("Why? Where?", "why"),
        ("how Many were where?", "how many"),
        ("Who?", "who"),
        ("Somewhat odd?", "other"),
        ("To whom and when?", "when"),
        ("The reason is what?", "what"),
    ],
)
def test_the_question_word_is_the_first_whole_one(question, word):
    assert question_word(question) == word


@pytest.mark.parametrize(
    ("context", "text", "over", "beside", "words"),
    [
        ("one two three four five six seven", "four five", "one two three four", "six", 4),
        ("one two three four five six seven", "three four", "four five six seven", "two", 4),
        ("field moor jetty bridge kiln (amber)", "kiln (", "field moor jetty bridge kiln", "amber", 5),
        ("(amber) kiln bridge jetty moor field", ") kiln", "kiln bridge jetty moor field", "amber", 5),
    ],
)
def test_words_off_are_counted_from_an_answer_that_overlaps(context, text, over, beside, words):
    assert off_by(example(over, beside, context=context), text) == words
    assert off_by(example(beside, over, context=context), text) == words


NUMBERED = " ".join(f"w{i:03}" for i in range(161))


def span(first: int, n: int) -> str:
    return " ".join(NUMBERED.split()[first : first + n])


def one(asked: Example, text: str = "", right: bool = False):
    return table([asked], {asked.id: {"text": text, "em": right, "hit_limit": False}})


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        (1, 0, "1 word"),
        (0, 1, "1 word"),
        (1, 1, "2 words"),
        (0, 3, "3 or 4"),
        (3, 1, "3 or 4"),
        (4, 1, "5 or more"),
        (40, 0, "5 or more"),
    ],
)
def test_boundaries_are_counted_by_the_words_they_are_off(before, after, name):
    asked = example(span(60, 9), context=NUMBERED)
    for text in (span(60 - before, before + 9 + after), span(60 + before, 9 - before - after)):
        if text:
            found = one(asked, text)["off"]
            assert found == dict.fromkeys(("1 word", "2 words", "3 or 4", "5 or more"), 0) | {name: 1}


@pytest.mark.parametrize(
    ("what", "edges"),
    [
        (
            "answer",
            {
                "1 word": (1, 1),
                "2 words": (2, 2),
                "3 words": (3, 3),
                "4 or 5": (4, 5),
                "6 to 9": (6, 9),
                "10 or more": (10, 40),
            },
        ),
        (
            "context",
            {
                "up to 80 words": (1, 80),
                "81 to 120 words": (81, 120),
                "121 to 160 words": (121, 160),
                "more than 160 words": (161, 161),
            },
        ),
    ],
)
def test_answers_and_contexts_are_classed_by_their_words(what, edges):
    for name, edge in edges.items():
        for n in edge:
            answers = (span(0, n), span(0, n + 1)) if what == "answer" else (span(0, 1),)  # the shortest gold counts
            found = one(example(*answers, context=NUMBERED if what == "answer" else span(0, n)), right=True)["by"][what]
            assert found == dict.fromkeys(edges, (0, 0)) | {name: (1, 1)}


def test_every_count_of_a_table_is_its_own():
    asked = [
        ("What is it?", ("branch",), "branch", True, False),
        ("What of?", ("the Rhine", "Rhine"), "", False, False),
        ("What year?", ("1122",), "1122", True, False),
        ("Who saw it?", ("Dr. No",), "Dr", False, True),
        ("How many?", ("40 men",), "by 40", False, False),
        ("How many dug it?", ("40 men",), "40", False, False),
        ("How many men dug?", ("by 40 men",), "It was dug", False, False),
        ("Name it", ("The Vecht",), "The Nile", False, False),
        ("It is?", ("a branch of the Rhine",), "It was dug out in 1122", False, False),
        ("Seen?", ("No never saw it",), "It", False, False),
    ]
    examples = [
        Example(str(i), "T", CONTEXT, question, tuple(Answer(a, CONTEXT.index(a)) for a in golds))
        for i, (question, golds, *_) in enumerate(asked)
    ]
    rows = {str(i): {"text": text, "em": em, "hit_limit": hit} for i, (_, _, text, em, hit) in enumerate(asked)}
    assert table(examples, rows) == {
        "kinds": {
            "right": 2,
            "empty": 1,
            "cut by the limit": 1,
            "not a span of the context": 1,
            "boundary off": 3,
            "right sentence, other words": 1,
            "another sentence": 1,
        },
        "off": {"1 word": 1, "2 words": 1, "3 or 4": 1, "5 or more": 0},
        "by": {
            "question": {
                "what": (2, 3),
                "who": (0, 1),
                "when": (0, 0),
                "where": (0, 0),
                "which": (0, 0),
                "why": (0, 0),
                "how many": (0, 3),
                "how much": (0, 0),
                "how": (0, 0),
                "other": (0, 3),
            },
            "answer": {
                "1 word": (2, 3),
                "2 words": (0, 4),
                "3 words": (0, 1),
                "4 or 5": (0, 2),
                "6 to 9": (0, 0),
                "10 or more": (0, 0),
            },
            "context": {
                "up to 80 words": (2, 10),
                "81 to 120 words": (0, 0),
                "121 to 160 words": (0, 0),
                "more than 160 words": (0, 0),
            },
        },
    }


EXAMPLES = read(str(ROOT / "demo" / "dev.json"), "dev").examples[:12]


@given(st.data())
def test_a_table_counts_every_question_once_and_finds_the_score_again(data):
    examples, texts = EXAMPLES, {}
    for e in examples:
        start = data.draw(st.integers(0, len(e.context)))
        texts[e.id] = data.draw(st.sampled_from([e.answers[0].text, e.context[start : start + 9], "", "no such words"]))
    scored = score(examples, texts)
    rows = {e.id: {"text": texts[e.id], "em": scored.correct[e.id], "hit_limit": False} for e in examples}
    found = table(examples, rows)
    right = sum(scored.correct.values())
    assert list(found["kinds"]) == list(KINDS)
    assert sum(found["kinds"].values()) == len(examples)
    assert found["kinds"]["right"] == right
    assert sum(found["off"].values()) == found["kinds"]["boundary off"]
    for classes in found["by"].values():
        assert sum(n for _, n in classes.values()) == len(examples)
        assert sum(r for r, _ in classes.values()) == right


def test_letters_that_change_their_length_in_lower_case_move_nothing():
    context = "İzmir was dug in 1122."
    assert len(context.lower()) != len(context)
    assert kind_of(example("1122", context=context), "in 1122", False, False) == "boundary off"
    assert list(error_analysis._places(context, "İzmir")) == [(0, 5)]
