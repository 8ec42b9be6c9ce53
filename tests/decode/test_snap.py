"""An answer becomes the span that is most like it; what shares no word stays."""

from common.decode import snap
from common.decode.answers import Prediction
from common.metrics.score import f1

import pytest
from hypothesis import given
from hypothesis import strategies as st

CONTEXT = "In 1856 the Otter (a barge) sank; the old otter of the canal swam to the north gate, twice."


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("the canal", "the canal"),  # it stands there
        ("tter", "tter"),  # even within a word
        ("In 18", "In 18"),
        ("The old Otter", "old otter"),  # articles count nothing, so the shorter one
        ("a north-gate", None),  # "northgate" is no word of the context
        ("It was the north gate!", "north gate"),
        ("otter, canal", "otter of the canal"),
        ("twice twice", "twice"),
        ("barge.", "barge"),
        ("in the year 1856", "In 1856"),
        ("the zebra", None),
        ("the", "the"),
        ("?", None),
        ("", None),
    ],
)
def test_the_span_that_is_most_like_an_answer_is_taken(answer, text):
    found = snap.nearest([(CONTEXT, 100)], answer)
    if text is None:
        assert found is None
    else:
        assert found
        assert found[0] == text
        start, stop = found[1]
        assert CONTEXT[start - 100 : stop - 100] == text


def test_of_several_windows_the_one_with_the_likest_span_is_taken():
    assert snap.nearest([("the (cat) sat", 3)], "Cat") == ("cat", (8, 11))
    windows = [("the otter sleeps here", 0), ("a north otter, a gate", 7), ("the north gate", 40)]
    assert snap.nearest(windows, "North gate otter") == ("north otter, a gate", (9, 28))
    assert snap.nearest(windows, "North gate") == ("north gate", (44, 54))
    assert snap.nearest(windows[:1], "North gate") is None


words = st.lists(st.sampled_from(["the", "a", "Ant,", "bee", "(cat)", "dog", "dog.", "1"]), min_size=1, max_size=9)


@given(context=words, answer=words)
def test_no_span_of_whole_words_is_more_like_the_answer(context, answer):
    text = " ".join(answer)
    found = snap.nearest([(" ".join(context), 0)], text)
    spans = [" ".join(context[i:j]) for i in range(len(context)) for j in range(i + 1, len(context) + 1)]
    best = max(f1(span, text) for span in spans if len(span.split()) <= 2 * len(answer))
    if found is None:
        assert best == 0
    elif text not in " ".join(context):
        assert f1(found[0], text) == pytest.approx(best)
        assert len(found[0].split()) == min(len(s.split()) for s in spans if f1(s, text) == pytest.approx(best))


def test_a_prediction_keeps_all_but_its_text_and_place():
    answer = Prediction("q", "The old Otter", [5, 6], -0.5, True, 2)
    assert snap.of(answer, [(CONTEXT, 0)]) == Prediction("q", "old otter", [5, 6], -0.5, True, 2, (38, 47))
    assert snap.of(other := Prediction("q", "a zebra", [5], -0.5, False), [(CONTEXT, 0)]) is other
