"""Every wrong answer has one kind, and the classes that accuracy is broken down by hold every question once."""

from common import mistakes
from common.mistakes import KINDS, kind_of, off_by, question_word, table
from common.score import score
from common.squad import Answer, Example, read
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
    ],
)
def test_a_wrong_answers_kind_is_where_it_stands(answer, text, kind):
    assert kind_of(example(answer), text, right=False, hit_limit=False) == kind
    assert kind_of(example(answer), text, right=True, hit_limit=False) == "right"
    assert kind_of(example(answer), "dug out in 1122, by", False, hit_limit=True) == "cut by the limit"


def test_any_gold_answer_counts():
    assert kind_of(example("Vecht", "1122"), "dug out in 1122", False, False) == "boundary off"
    assert off_by(example("Vecht", "1122"), "dug out in 1122") == 3
    assert off_by(example("dug out in 1122", "out in 1122, by 40"), "in 1122, by 40 men") == 2


def test_words_off_are_those_of_both_ends():
    assert off_by(example("branch of the"), "a branch") == 3
    assert off_by(example("the Rhine"), "Rhine") == 1


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("How many canals?", "how many"), ("In which year, and who dug?", "which"), ("HOW long?", "how"),
        ("Somewhat odd?", "other"), ("To whom and when?", "when"), ("The reason is what?", "what"),
    ],
)  # fmt: skip
def test_the_question_word_is_the_first_whole_one(question, word):
    assert question_word(question) == word


@given(st.data())
def test_a_table_counts_every_question_once_and_finds_the_score_again(data):
    examples = read(str(ROOT / "demo" / "dev.json"), "dev").examples[:25]
    texts = {}
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
    assert list(mistakes._places(context, "İzmir")) == [(0, 5)]
