"""One prompt, one window, one tokenisation: for training, evaluation and a single query."""

import copy
import hashlib
import random
import re
from dataclasses import replace
from types import SimpleNamespace

from common.config import Prompt, Window, load
from common.data import prompt, tokens
from common.data import trees as trees_module
from common.data.squad import Answer, Example, read
from common.data.tokens import Tokenizers, encode, tokens_within
from common.data.trees import Branch, Tree, Trees, build_trees, prompt_texts, tree_of
from common.errors import UserError
from common.metrics.score import exact_match
from common.model.load import load_tokenizer
from tests.conftest import ROOT, same, squad_file

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOMY = Window(context=1500)  # for a tokenizer of few words
SMALL = Window(context=40, question=24, answer=16, stride=12)


@pytest.fixture(scope="module", params=["tiny_base", "smollm2_base"])
def tokenizer(request):
    """One that adds BOS, and a real one that does not."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def demo() -> list[Example]:
    return read(str(ROOT / "demo" / "train.json"), "train").examples[:20]  # four paragraphs


def example(context: str, answer: str, question: str = "Which one?", id_: str = "q") -> Example:
    return Example(id_, "T", context, question, (Answer(answer, context.index(answer)),))


def prompts(trees) -> dict[str, list[int]]:
    return {branch.id: tree.prefix_ids + branch.prompt_ids for tree in trees for branch in tree.branches}


def test_the_prompt_is_these_bytes():
    assert prompt.text("A canal.", "What is it?") == "Context: A canal.\n\nQuestion: What is it?\n\nAnswer:"


@pytest.mark.parametrize(
    ("order", "text"),
    [
        ("context", "Context: A canal.\n\nQuestion: What is it?\n\nAnswer:"),
        ("question", "Question: What is it?\n\nContext: A canal.\n\nAnswer:"),
        ("both", "Question: What is it?\n\nContext: A canal.\n\nQuestion: What is it?\n\nAnswer:"),
    ],
)
def test_orders_of_the_prompt_are_these_bytes(tokenizer, order, text):
    questions = [example("A canal.", "canal", question, question) for question in ("What is it?", "Is it what?")]
    trees = build_trees(questions, same(tokenizer), Window(), train=True, options=Prompt(order)).trees
    assert prompts(trees)["What is it?"] == tokenizer(text)["input_ids"]
    assert len(trees) == (1 if order == "context" else 2), "what comes behind a question is not shared"


@pytest.mark.parametrize("order", ["question", "both"])
def test_other_orders_stay_in_the_window_too(tokenizer, order):
    window, words = Window(context=120, question=40, stride=60), "Which canals of Utrecht were dug, and when? " * 20
    e = Example("q", "T", words, words, (Answer("Which", 0),))
    ids = prompts(build_trees([e], same(tokenizer), window, train=False, options=Prompt(order)).trees)["q"]
    assert window.context + window.question - 16 < len(ids) <= window.context + window.question


CONTEXT, QUESTION = "Context: {}", "\n\nQuestion: {}\n\nAnswer:"
CHAT = (
    "Answer the question with the shortest span of the context that answers it, copied word for word. Reply with "
    "nothing else.\n\n{}"
)
QUESTION_FIRST = "Question: {1}\n\nContext: {0}\n\nAnswer:"
BOTH = "Question: {1}\n\nContext: {0}\n\nQuestion: {1}\n\nAnswer:"


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, []),
        ({"order": "question"}, [QUESTION_FIRST]),
        ({"order": "both"}, [BOTH]),
        ({"chat": True}, [CHAT]),
        ({"earlier": True}, ["earlier"]),
        ({"before": "shown"}, ["shown"]),
        ({"order": "both", "chat": True, "before": "shown"}, [BOTH, CHAT, "shown"]),
        ({"earlier": True, "chat": True, "before": "shown"}, [CHAT, "earlier", "shown"]),
        ({"shots": 2, "shots_seed": 3}, []),  # what they show is in `before`
    ],
)
def test_the_fingerprint_is_of_the_version_and_every_byte_of_the_prompt(options, more):
    parts = "\0".join(["1", CONTEXT, QUESTION, " {}", *more])
    assert prompt.fingerprint(Prompt(**options)) == hashlib.sha256(parts.encode()).hexdigest()[:12]


def test_the_fingerprint_changes_with_the_prompt(monkeypatch):
    assert prompt.fingerprint() == "debd7cbbbb31"  # a new prompt is a new version: say so in docs/log.md
    seen = {"debd7cbbbb31"}
    for name, value in (("VERSION", "2"), ("CONTEXT", "context: {}"), ("QUESTION", QUESTION + " "), ("TARGET", "{}")):
        with monkeypatch.context() as patch:
            patch.setattr(prompt, name, value)
            seen.add(prompt.fingerprint())
    assert len(seen) == 5


def test_a_chats_message_is_these_bytes():
    assert prompt.message("Context: {}") == CHAT.replace("{}", "Context: {}")


def test_ids_are_the_tokenizers_ids_of_the_whole_text_with_eos_behind(tokenizer, demo):
    for tree in build_trees(demo, same(tokenizer), ROOMY, train=True).trees:
        for branch in tree.branches:
            (e,) = [e for e in demo if e.id == branch.id]
            whole = prompt.text(e.context, e.question) + f" {e.answers[0].text}"
            expected = [*tokenizer(whole)["input_ids"], tokenizer.eos_token_id]
            assert tree.prefix_ids + branch.prompt_ids + branch.answer_ids == expected
            assert tokenizer.pad_token_id not in expected


def test_a_single_query_reads_the_ids_that_training_and_evaluation_read(tokenizer, demo):
    trained = prompts(build_trees(demo, same(tokenizer), ROOMY, train=True).trees)
    evaluated = prompts(build_trees(demo, same(tokenizer), ROOMY, train=False).trees)
    alone = {}
    for e in demo:
        alone |= prompts(build_trees([e], same(tokenizer), ROOMY, train=False).trees)
    assert trained == evaluated == alone


def test_questions_of_a_paragraph_share_one_tree_with_the_paragraph_in_its_prefix(tokenizer, demo):
    built = build_trees(demo, same(tokenizer), ROOMY, train=True)
    assert len(built.trees) == len({e.context for e in demo}) == 4
    for tree in built.trees:
        assert len(tree.branches) == 5
        (context,) = {e.context for e in demo if e.id in {branch.id for branch in tree.branches}}
        assert context in tokenizer.decode(tree.prefix_ids)
        assert all(branch.prompt_ids for branch in tree.branches)
    assert built.counts == {"questions": 20, "truncated": 0, "dropped_outside": 0, "dropped_long": 0}


def test_white_space_around_the_fields_changes_nothing(tokenizer):
    plain = [example("The old canal is long.", "canal")]
    spaced = [Example("q", "T", " \n The old canal is long. ", " Which one?\n", (Answer(" canal ", 10),))]
    assert build_trees(plain, same(tokenizer), Window(), train=True) == build_trees(
        spaced, same(tokenizer), Window(), train=True
    )


WORDS = st.lists(
    st.sampled_from(["canal", "bridge", "Zürich", "運河", "1820", "an", "x.", "…"]), min_size=1, max_size=60
)


@given(WORDS.map(" ".join), WORDS.map(" ".join))
def test_nothing_is_longer_than_its_window(tokenizer, context, question):
    e = Example("q", "T", context, question, (Answer(context.split()[0], 0),))
    for train in (True, False):
        for tree in build_trees([e], same(tokenizer), SMALL, train=train).trees:
            for branch in tree.branches:
                assert len(tree.prefix_ids) + len(branch.prompt_ids) <= SMALL.context + SMALL.question
                assert len(branch.answer_ids) <= SMALL.answer


@given(WORDS.map(" ".join), WORDS.map(" ".join), st.text(max_size=20).map(str.strip).filter(bool))
def test_the_prompts_ids_are_what_the_tokenizer_makes_of_the_prompt_alone(tokenizer, context, question, more):
    e = Example("q", "T", f"{context} {more}", question, (Answer(more, len(context) + 1),))
    (tree,) = build_trees([e], same(tokenizer), Window(context=3000, question=3000, answer=300), train=True).trees
    (branch,) = tree.branches
    text = prompt.text(e.context.strip(), question)
    assert tree.prefix_ids + branch.prompt_ids == tokenizer(text)["input_ids"]
    assert branch.answer_ids[:-1] == tokenizer(f"{text} {more}")["input_ids"][-len(branch.answer_ids) + 1 :]


def test_a_tokenizer_that_ends_texts_or_joins_prompt_and_answer_is_refused(tiny_base, demo):
    from tokenizers import Tokenizer, processors
    from tokenizers.models import BPE
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    ends = AutoTokenizer.from_pretrained(tiny_base)
    template = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    ends.backend_tokenizer.post_processor = template
    with pytest.raises(UserError, match=f"question {demo[0].id}: this tokenizer adds an end to every text"):
        build_trees(demo, same(ends), ROOMY, train=False)

    letters = sorted({c for e in demo for c in prompt.text(e.context, e.question) + e.answers[0].text})
    vocabulary = {token: i for i, token in enumerate(["</s>", *letters, ": "])}
    joins = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, [(":", " ")])), eos_token="</s>")
    with pytest.raises(UserError, match=f"question {demo[0].id}: this tokenizer merges the prompt and the answer"):
        build_trees(demo, same(joins), Window(context=3000, question=3000, answer=300), train=True)


def test_a_long_context_is_cut_alike_whatever_the_question(tokenizer):
    context = " ".join(f"word{i}" for i in range(200))
    long, short = (example(context, "word0", question) for question in ("Which? " * 30, "Which?"))
    texts = [
        tokenizer.decode(prompts(build_trees([e], same(tokenizer), SMALL, train=False).trees)["q"])
        for e in (long, short)
    ]
    cut = [text.partition("\n\nQuestion:")[0] for text in texts]
    assert cut[0] == cut[1]
    assert context.startswith(cut[0].partition("Context: ")[2])
    used = len(tokenizer(cut[0].partition("Context: ")[1] + cut[0].partition("Context: ")[2])["input_ids"])
    assert SMALL.context - 4 <= used <= SMALL.context  # no more is cut than must be


def test_another_tokenizer_can_do_the_cutting_so_that_systems_read_the_same_text(tokenizer, tiny_base):
    from transformers import AutoTokenizer

    cutter = AutoTokenizer.from_pretrained(tiny_base)
    context = " ".join(f"word{i}" for i in range(200))
    by_other = build_trees([example(context, "word0")], Tokenizers(tokenizer, cutter), SMALL, train=False)
    by_itself = build_trees([example(context, "word0")], same(cutter), SMALL, train=False)
    texts = [
        tok.decode(prompts(b.trees)["q"], skip_special_tokens=True)
        for tok, b in ((tokenizer, by_other), (cutter, by_itself))
    ]
    assert texts[0] == texts[1]


def test_a_training_answer_outside_the_window_is_dropped_and_counted(tokenizer):
    context = " ".join(f"word{i}" for i in range(100))
    rows = [example(context, "word1", id_="in"), example(context, "word99", id_="out")]
    built = build_trees(rows, same(tokenizer), SMALL, train=True)
    assert prompts(built.trees).keys() == {"in"}
    assert built.counts == {"questions": 2, "truncated": 2, "dropped_outside": 1, "dropped_long": 0}
    assert prompts(build_trees(rows, same(tokenizer), SMALL, train=False).trees).keys() == {"in", "out"}


def test_a_training_answer_too_long_to_be_decoded_is_dropped_and_counted(tokenizer):
    context = " ".join(f"w{i}" for i in range(12))
    built = build_trees([example(context, context)], same(tokenizer), SMALL, train=True)
    assert (built.trees, built.counts["dropped_long"]) == ([], 1)


def test_a_gold_over_a_line_break_is_trained_as_it_can_be_decoded(tokenizer):
    """A line break ends every decoded answer; a space scores alike."""
    context = "Crew list:\n Mira Dahl\nTomas Brek \nThe ship sails."
    built = build_trees([example(context, "Mira Dahl\nTomas Brek")], same(tokenizer), ROOMY, train=True)
    ((branch,),) = [tree.branches for tree in built.trees]
    assert tokenizer.decode(branch.answer_ids, skip_special_tokens=True).strip() == "Mira Dahl Tomas Brek"
    assert exact_match("Mira Dahl Tomas Brek", "Mira Dahl\nTomas Brek")
    assert "Mira Dahl\nTomas Brek" in tokenizer.decode(built.trees[0].prefix_ids + branch.prompt_ids)  # the text stays


def test_a_gold_that_holds_a_special_token_is_dropped_and_counted(tokenizer):
    """Decoding leaves special tokens out, so no answer can hold one."""
    end = tokenizer.eos_token
    rows = [example(f"The mark {end} ends it.", end, id_="mark"), example("An amber canal.", "amber", id_="plain")]
    built = build_trees(rows, same(tokenizer), ROOMY, train=True)
    assert prompts(built.trees).keys() == {"plain"}
    assert built.counts == {
        "questions": 2,
        "truncated": 0,
        "dropped_outside": 0,
        "dropped_long": 0,
        "dropped_special": 1,
    }
    assert tokens.holds_special(tokenizer, f"a {end} b")
    assert not tokens.holds_special(tokenizer, "a plain text")


# ---- another tool's prompt -----------------------------------------------------------------------------------------

ALPACA = "### Instruction:\nAnswer from the text.\n\n### Input:\n{context}\n\n{question}\n\n### Response:\n"
BEFORE = "Question: {question}\nText: {context}\nAnswer:"


@pytest.mark.parametrize(("template", "trees"), [(ALPACA, 1), (BEFORE, 3)])
def test_a_template_is_filled_once_each_and_a_paragraph_that_comes_first_is_shared(tokenizer, template, trees):
    context = "An amber canal with {question} and {context} in it."
    rows = [example(context, "amber", q, id_=q) for q in ("Which {context}?", "What is amber?", "Where?")]
    options = Prompt(template=template)
    built = build_trees(rows, same(tokenizer), ROOMY, options, train=False)
    assert len(built.trees) == trees
    found = prompts(built.trees)
    for row in rows:
        head, tail = template.split("{context}")
        whole = head.replace("{question}", row.question) + context + tail.replace("{question}", row.question)
        assert found[row.id] == tokenizer(whole).input_ids
        assert prompt_texts([row], tokenizer, ROOMY, options)[0] == [(row.id, whole)]
    if trees == 1:
        assert context in tokenizer.decode(built.trees[0].prefix_ids)


def test_a_template_changes_the_fingerprint_and_counts_beside_the_window(tokenizer):
    plain, filled = Prompt(), Prompt(template=ALPACA)
    assert prompt.fingerprint(filled) != prompt.fingerprint(plain)
    assert prompt.fingerprint(Prompt(template=ALPACA + " ")) != prompt.fingerprint(filled)
    assert prompt.overhead(tokenizer, filled) == len(tokenizer(ALPACA).input_ids)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"template": "{context}"}, "template: must hold {context} and {question}, once each"),
        ({"template": "{context} {question} {question}"}, "template: must hold {context} and {question}, once each"),
        ({"template": "{context} {question}", "order": "both"}, "template: decides the order"),
        ({"template": "{context} {question}", "earlier": True}, "template: decides the order"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(words, says):
    with pytest.raises(UserError, match=re.escape(says)):
        Prompt(**words)


def test_chunks_cover_the_whole_context_and_training_takes_the_one_that_holds_the_answer(tokenizer):
    chunk = replace(SMALL, overflow="chunk")
    words = [f"word{i}" for i in range(100)]
    context = " ".join(words)
    windows = build_trees([example(context, "word7")], same(tokenizer), chunk, train=False).trees
    texts = [tokenizer.decode(tree.prefix_ids).partition("Context: ")[2] for tree in windows]
    assert len(windows) > 3
    assert all(any(word in text.split() for text in texts) for word in words)
    for word in ("word2", "word50", "word99"):
        (tree,) = build_trees([example(context, word)], same(tokenizer), chunk, train=True).trees
        assert word in tokenizer.decode(tree.prefix_ids)


# ---- by hand: a token is a word or a mark of punctuation ------------------------------------------------------------


TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}{% if add_generation_prompt %} w9{% endif %}"


@pytest.fixture(scope="module")
def by_words():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [
        "<s>",
        "</s>",
        "<unk>",
        "Context",
        "Question",
        "Answer",
        ":",
        *(f"{c}{i}" for c in "wq" for i in range(60)),
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


BARE = Window(context=16, question=16, answer=16, stride=5)  # 13 words of the context, 12 of the question, 15 answered


def some(letter: str, start: int, stop: int) -> str:
    return " ".join(f"{letter}{i}" for i in range(start, stop))


def asks(context: str, question: str = "q0", answer: str = "w0", start: int | None = None, id_: str = "q") -> Example:
    return Example(id_, "T", context, question, (Answer(answer, context.index(answer) if start is None else start),))


def as_words(tokenizer, built) -> list[tuple[str, list[tuple[str, str]]]]:
    """Of each tree the words of its prefix, and of each branch those of its prompt and its answer."""

    def text(ids) -> str:
        return " ".join(tokenizer.convert_ids_to_tokens(ids))

    return [(text(t.prefix_ids), [(text(b.prompt_ids), text(b.answer_ids)) for b in t.branches]) for t in built.trees]


def windows(tokenizer, rows, window=BARE, train=False, **more) -> list[str]:
    """The words of the context that each tree's first question reads."""
    out = []
    for prefix, branches in as_words(tokenizer, build_trees(rows, same(tokenizer), window, train=train, **more)):
        kept = [word for word in f"{prefix} {branches[0][0]}".split() if word[0] == "w"]
        assert kept == some("w", int(kept[0][1:]), int(kept[-1][1:]) + 1).split()
        out.append(f"{kept[0]}-{kept[-1]}")
    return out


def test_a_tree_has_the_paragraph_once_and_a_branch_each_question_with_its_answer(by_words):
    rows = [asks("w0 w1 w2", "q0 q1", "w1", id_="a"), asks("w0 w1 w2", "q0 q2", "w2", id_="b"), asks("w3", "q0", "w3")]
    built = build_trees(rows, same(by_words), BARE, train=True)
    assert as_words(by_words, built) == [
        ("<s> Context : w0 w1 w2 Question : q0", [("q1 Answer :", "w1 </s>"), ("q2 Answer :", "w2 </s>")]),
        ("<s> Context : w3 Question : q0 Answer", [(":", "w3 </s>")]),  # the last token is never the prefix's
    ]
    assert [[b.id for b in tree.branches] for tree in built.trees] == [["a", "b"], ["q"]]
    asked = build_trees(rows, same(by_words), BARE, train=False)
    assert [answer for _, branches in as_words(by_words, asked) for _, answer in branches] == ["", "", ""]
    assert built.counts == {"questions": 3, "truncated": 0, "dropped_outside": 0, "dropped_long": 0}
    assert asked.counts == {"questions": 3, "truncated": 0}


@pytest.mark.parametrize("before", ["", "w9 ", "Context: w0\n\nQuestion: q9\n\nAnswer: w0\n\n"])
@pytest.mark.parametrize(("odd", "alone"), [(0, True), (5, True), (6, False)])  # <s> Context : w0 Question :
def test_a_question_whose_ids_break_the_shared_prefix_gets_a_tree_of_its_own(by_words, monkeypatch, before, odd, alone):
    at = odd + len(by_words(before, add_special_tokens=False).input_ids)

    class Odd:
        def __init__(self, encoding):
            self.encoding, self.ids = encoding, [*encoding.ids[:at], 2, *encoding.ids[at + 1 :]]

        def __len__(self):
            return len(self.ids)

        def token_to_chars(self, token):
            return self.encoding.token_to_chars(token)

    def one_odd(tokenizer, texts, *args, **kwargs):
        rows = encode(tokenizer, texts, *args, **kwargs)
        return [Odd(row) if "Answer:" in text and "q1" in text else row for text, row in zip(texts, rows, strict=True)]

    monkeypatch.setattr(trees_module, "encode", one_odd)
    rows = [asks("w0", f"q{i}", id_=f"{i}") for i in range(3)]
    trees = build_trees(rows, same(by_words), Window(), train=False, options=Prompt(before=before)).trees
    assert [[b.id for b in tree.branches] for tree in trees] == ([["0", "2"], ["1"]] if alone else [["0", "1", "2"]])


@pytest.mark.parametrize("order", ["question", "both"])
def test_a_question_that_comes_first_shares_its_tree_with_its_twin_alone(by_words, order):
    long = some("q", 1, 10)  # the same for longer than what questions behind a paragraph share
    rows = [
        asks("w0 w1", f"{long} q10", "w0", id_="a"),
        asks("w0 w1", f"{long} q11", id_="b"),
        asks("w0 w1", f"{long} q10", "w1", id_="c"),
        asks("w1", f"{long} q10", "w1", id_="d"),
    ]
    for train in (True, False):
        trees = build_trees(rows, same(by_words), Window(), train=train, options=Prompt(order)).trees
        assert [[b.id for b in tree.branches] for tree in trees] == [["a", "c"], ["b"], ["d"]]


@pytest.mark.parametrize(
    ("words", "train", "read", "counts"),
    [
        (13, False, ["w0-w12"], {"questions": 1, "truncated": 0}),
        (14, False, ["w0-w12"], {"questions": 1, "truncated": 1}),
        (50, False, ["w0-w12"], {"questions": 1, "truncated": 1}),
        (14, True, ["w0-w12"], {"questions": 1, "truncated": 1, "dropped_outside": 0, "dropped_long": 0}),
    ],
)
def test_a_window_holds_as_many_words_of_the_context_as_fit_with_bos(by_words, words, train, read, counts):
    rows = [asks(some("w", 0, words))]
    assert windows(by_words, rows, train=train) == read
    assert build_trees(rows, same(by_words), BARE, train=train).counts == counts


@pytest.mark.parametrize(("words", "kept"), [(12, 12), (13, 12), (40, 12)])
def test_a_window_holds_as_many_words_of_the_question_as_fit_without_bos(by_words, words, kept):
    ((_, [(branch, _), *_]),) = as_words(
        by_words,
        build_trees(
            [asks("w0", some("q", 0, words)), asks("w0", "q50", id_="other")], same(by_words), BARE, train=False
        ),
    )
    assert branch == f"{some('q', 0, kept)} Answer :"


@pytest.mark.parametrize(
    ("order", "context", "read"),
    [("context", 16, 13), ("question", 20, 13), ("question", 24, 17), ("both", 36, 13), ("both", 40, 17)],
)
def test_what_an_order_takes_comes_off_the_context(by_words, order, context, read):
    window = replace(BARE, context=context)
    rows = [asks(some("w", 0, 50))]
    found = prompt_texts(rows, by_words, window, Prompt(order))
    expected = prompt.text(some("w", 0, read), "q0", Prompt(order=order))
    assert found == ([("q", expected)], {"questions": 1, "truncated": 1})
    assert windows(by_words, rows, window, options=Prompt(order)) == [f"w0-w{read - 1}"]


def test_a_window_without_room_for_a_token_of_the_text_is_an_error():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    by_letters = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    by_letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=by_letters, unk_token="<unk>")
    row = asks("w0", "q0 q1")
    found, _ = prompt_texts([row], tokenizer, replace(BARE, question=len(QUESTION) - 1))
    assert found == [("q", "Context: w0\n\nQuestion: q\n\nAnswer:")]
    with pytest.raises(UserError, match="a window of 21 tokens leaves no room for text; raise window"):
        prompt_texts([row], tokenizer, replace(BARE, question=len(QUESTION) - 2))


@pytest.mark.parametrize(
    ("answer", "start", "held"),  # of w0-w13, of which w0-w12 are read, up to character 41
    [
        ("w0", 0, True),
        ("w12", 38, True),
        ("w13", 42, False),
        ("w11 w12", 34, True),
        ("w12 w13", 38, False),
        ("w12 ", 38, True),
        (" w12", 37, True),
        ("  w12  ", 36, True),
        (" w13", 41, False),
        ("w1", 42, False),  # the start of w13
        ("w0", -1, False),
    ],
)
@pytest.mark.parametrize("indent", ["", " ", " \n "])
def test_an_answer_is_in_the_window_if_its_words_are_whatever_spaces_it_has(by_words, indent, answer, start, held):
    row = asks(f"{indent}{some('w', 0, 14)} ", answer=answer, start=len(indent) + start)
    built = build_trees([row], same(by_words), BARE, train=True)
    assert built.counts["dropped_outside"] == (not held)
    assert len(built.trees) == held
    assert not held or as_words(by_words, built)[0][1][0][1] == f"{answer.strip()} </s>"
    assert len(build_trees([row], same(by_words), BARE, train=False).trees) == 1


@pytest.mark.parametrize(("before", "held"), [(0, True), (4, False)])
def test_spaces_in_front_of_an_answer_are_not_the_answers(by_words, before, held):
    context = f"{some('w', 0, 12)}    w12 w13 w14"  # read up to w12, which is at 41, and character 44
    row = asks(context, answer=" " * before + ("w12 w13" if before else "w12"), start=41 - before)
    assert context.startswith(row.answers[0].text, row.answers[0].start)
    assert build_trees([row], same(by_words), BARE, train=True).counts["dropped_outside"] == (not held)


def test_no_questions_have_all_counts_too(by_words):
    assert build_trees([], same(by_words), BARE, train=True) == (
        Trees([], {"questions": 0, "truncated": 0, "dropped_outside": 0, "dropped_long": 0})
    )
    assert build_trees([], same(by_words), BARE, train=False).counts == {"questions": 0, "truncated": 0}


def test_an_answer_of_as_many_tokens_as_are_decoded_is_kept_with_its_eos(by_words):
    window = replace(BARE, context=40)
    for words, kept in ((15, 1), (16, 0)):
        row = asks(some("w", 0, 20), answer=some("w", 0, words))
        built = build_trees([row], same(by_words), window, train=True)
        assert (len(built.trees), built.counts["dropped_long"]) == (kept, 1 - kept)


def test_every_question_is_counted_for_what_became_of_it(by_words):
    long, short = some("w", 0, 45), some("w", 0, 20)  # 37 words are read
    answers = {
        "a": (long, "w1"),
        "b": (long, "w40"),
        "c": (long, some("w", 0, 16)),
        "d": (long, "w41 w42"),
        "e": (short, some("w", 2, 18)),
        "f": (short, "w2"),
        "g": (short, some("w", 0, 15)),
    }
    rows = [asks(context, answer=answer, id_=id_) for id_, (context, answer) in answers.items()]
    built = build_trees(rows, same(by_words), replace(BARE, context=40), train=True)
    assert [[b.id for b in tree.branches] for tree in built.trees] == [["a"], ["f", "g"]]
    assert built.counts == {"questions": 7, "truncated": 4, "dropped_outside": 2, "dropped_long": 2}


def test_only_the_first_answer_is_trained_on(by_words):
    row = replace(asks("w0 w1 w2"), answers=(Answer("w2", 6), Answer("w0", 0)))
    assert as_words(by_words, build_trees([row], same(by_words), BARE, train=True))[0][1] == [(":", "w2 </s>")]


@pytest.mark.parametrize(
    ("words", "stride", "read"),
    [
        (13, 5, "w0-w12"),
        (14, 5, "w0-w12 w5-w13"),
        (30, 5, "w0-w12 w5-w17 w10-w22 w15-w27 w20-w29"),
        (30, 8, "w0-w12 w8-w20 w16-w28 w24-w29"),
        (30, 13, "w0-w12 w13-w25 w26-w29"),
        (30, 14, "w0-w12 w13-w25 w14-w26 w27-w29"),  # no gap, though 14 words are further than a window is long
        (30, 16, "w0-w12 w13-w25 w16-w28 w29-w29"),
        (16, 1, "w0-w12 w1-w13 w2-w14 w3-w15"),
    ],
)
def test_chunks_start_a_stride_apart_and_leave_no_gap(by_words, words, stride, read):
    window = replace(BARE, stride=stride, overflow="chunk")
    rows = [asks(some("w", 0, words))]
    assert windows(by_words, rows, window) == read.split()
    assert build_trees(rows, same(by_words), window, train=False).counts == {"questions": 1, "truncated": words > 13}


def test_a_stride_is_at_most_the_window_that_an_order_leaves(by_words):
    window = Window(context=40, question=16, answer=16, stride=40, overflow="chunk")  # 20 for the context: 17 words
    rows = [asks(some("w", 0, 45))]
    assert windows(by_words, rows, window, options=Prompt("both")) == ["w0-w16", "w17-w33", "w20-w36", "w37-w44"]


@pytest.mark.parametrize(
    ("answer", "read"),
    [("w3", "w0-w12"), ("w6", "w0-w12"), ("w12 w13", "w5-w17"), ("w13", "w5-w17"), ("w29", "w20-w29")],
)
def test_training_reads_the_first_chunk_that_holds_the_answer(by_words, answer, read):
    window = replace(BARE, overflow="chunk")
    rows = [asks(some("w", 0, 30), answer=answer)]
    assert windows(by_words, rows, window, train=True) == [read]
    assert build_trees(rows, same(by_words), window, train=True).counts == (
        {"questions": 1, "truncated": 1, "dropped_outside": 0, "dropped_long": 0}
    )


def test_questions_of_one_chunk_share_it(by_words):
    window = replace(BARE, overflow="chunk")
    rows = [
        asks(some("w", 0, 18), "q0", "w1", id_="a"),
        asks(some("w", 0, 18), "q1", "w2", id_="b"),
        asks(some("w", 0, 18), "q1", "w17", id_="c"),
    ]
    trained, asked = (build_trees(rows, same(by_words), window, train=train).trees for train in (True, False))
    assert [[b.id for b in tree.branches] for tree in trained] == [["a", "b"], ["c"]]
    assert [[b.id for b in tree.branches] for tree in asked] == [["a", "b", "c"]] * 2


def test_texts_are_the_prompts_that_trees_are_made_of(by_words):
    rows = [asks(some("w", 0, 14), f" {some('q', 0, 13)} ", id_="a"), asks(" w1 ", answer="w1", id_="b")]
    options = Prompt(before="q9 ")
    found, counts = prompt_texts(rows, by_words, BARE, options)
    assert found == [
        ("a", f"q9 Context: {some('w', 0, 13)}\n\nQuestion: {some('q', 0, 12)}\n\nAnswer:"),
        ("b", "q9 Context: w1\n\nQuestion: q0\n\nAnswer:"),
    ]
    assert counts == {"questions": 2, "truncated": 1}
    trees = build_trees(rows, same(by_words), BARE, train=False, options=options).trees
    assert [tree.prefix_ids + tree.branches[0].prompt_ids for tree in trees] == [
        by_words(t).input_ids for _, t in found
    ]


def test_a_tree_counts_its_prefix_once_and_is_split_without_loss():
    branches = tuple(
        Branch(name, [1] * n, [2] * m) for name, n, m in (("a", 2, 1), ("b", 1, 2), ("c", 4, 0), ("d", 9, 9))
    )
    tree = Tree([7] * 5, branches)
    assert ([len(b) for b in branches], len(tree)) == ([3, 3, 4, 18], 33)

    def split(**limits) -> str:
        parts = list(tree.split(**limits))
        assert all(part.prefix_ids == tree.prefix_ids for part in parts)
        return " ".join("".join(b.id for b in part.branches) for part in parts)

    assert split() == "abcd"
    assert [split(max_tokens=n) for n in (1, 10, 11, 14, 15, 33)] == (
        ["a b c d", "a b c d", "ab c d", "ab c d", "abc d", "abcd"]
    )
    assert [split(max_questions=n) for n in (1, 2, 3, 4)] == ["a b c d", "ab cd", "abc d", "abcd"]
    assert split(max_tokens=11, max_questions=1) == "a b c d"
    assert split(max_tokens=15, max_questions=2) == "ab c d"


@pytest.mark.parametrize(
    ("rows", "prefix", "rests"),
    [
        (["123"], "12", ["3"]),
        (["123", "123"], "12", ["3", "3"]),
        (["1234", "1245", "129"], "12", ["34", "45", "9"]),
        (["12", "123"], "1", ["2", "23"]),
        (["123", "12"], "1", ["23", "2"]),
        (["3", "4"], "", ["3", "4"]),
    ],
)
def test_a_prefix_is_the_longest_that_leaves_every_branch_a_token(rows, prefix, rests):
    tree = tree_of([Branch(str(i), list(row), ["0"]) for i, row in enumerate(rows)])
    assert tree == Tree(list(prefix), tuple(Branch(str(i), list(rest), ["0"]) for i, rest in enumerate(rests)))


class Spans:
    """An encoding: of each token its characters; None is a special token."""

    def __init__(self, *spans):
        self.spans = spans

    def __len__(self):
        return len(self.spans)

    def token_to_chars(self, token):
        return self.spans[token]


@pytest.mark.parametrize(
    ("encoding", "within"),  # of the first 0, 1, 2, … characters
    [
        (Spans((0, 2), (2, 3)), [0, None, 1, 2, 2]),
        (Spans(None, (0, 2), (2, 3), None), [1, None, 2, 3, 3]),
        (Spans((0, 1), (2, 4)), [0, 1, 1, None, 2]),  # a character between tokens
    ],
)
def test_the_tokens_within_some_characters_are_those_that_end_there(encoding, within):
    assert [tokens_within(encoding, stop) for stop in range(5)] == within


@pytest.mark.parametrize(
    ("texts", "progress", "shown"), [(4999, True, False), (5000, True, True), (5000, False, False), (0, True, False)]
)
def test_many_texts_are_encoded_by_the_thousand_with_a_bar(monkeypatch, texts, progress, shown):
    seen = []

    class Bar:
        def __init__(self, total, desc, unit, disable):
            seen.append((total, desc, unit, not disable))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n):
            seen.append(n)

    def encode_batch(part, add_special_tokens):
        return [(text, add_special_tokens) for text in part]

    monkeypatch.setattr(tokens, "tqdm", Bar)
    tokenizer = SimpleNamespace(backend_tokenizer=SimpleNamespace(encode_batch=encode_batch))
    found = list(encode(tokenizer, [str(i) for i in range(texts)], progress=progress, special=False))
    assert found == [(str(i), False) for i in range(texts)]
    assert seen[0] == (texts, "tokenise", "text", shown)
    assert seen[1:] == [1000] * (texts // 1000) + [texts % 1000] * (texts % 1000 > 0)


def test_a_progress_bar_is_shown_where_trees_are_built_and_not_where_texts_are_cut(by_words, monkeypatch):
    monkeypatch.setattr(tokens, "MANY", 2)
    shown = []
    bar = tokens.tqdm
    monkeypatch.setattr(tokens, "tqdm", lambda disable, **rest: shown.append(not disable) or bar(disable=True, **rest))
    build_trees([asks("w0", id_="a"), asks("w0", "q1", id_="b")], same(by_words), BARE, train=False)
    assert shown == [False] * (len(shown) - 1) + [True]


# ---- controls ------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path, tiny_base):
    """(examples of dev, those of train, the tokenizer)"""
    dev, train = (read(str(squad_file(tmp_path / f"{i}.json", 6, 3, seed=i)), "dev").examples for i in range(2))
    return dev, train, load_tokenizer(str(tiny_base))


def texts_of(built: Trees, tokenizer) -> dict[str, str]:
    """The text of every prompt, whose ids are those of the whole text."""
    out = {}
    for tree in built.trees:
        for branch in tree.branches:
            ids = [*tree.prefix_ids, *branch.prompt_ids]
            out[branch.id] = tokenizer.decode(ids)
            assert tokenizer(out[branch.id], add_special_tokens=False).input_ids == ids
    return out


def test_shots_are_questions_of_different_articles_with_their_answers_before_every_prompt(asked):
    dev, train, tokenizer = asked
    options = prompt.fill(Prompt(shots=2, shots_seed=1), train)
    assert options == prompt.fill(Prompt(shots=2, shots_seed=1), train)
    others = {prompt.fill(Prompt(shots=2, shots_seed=i), train).before for i in range(8)}
    assert len(others) > 1
    assert len({prompt.fingerprint(replace(options, before=b)) for b in others}) == len(others)
    shown = [e for e in train if f"Question: {e.question}\n\nAnswer: {e.answers[0].text}\n\n" in options.before]
    assert len({e.title for e in shown}) >= 2
    plain = build_trees(dev, same(tokenizer), Window(), train=False)
    built = build_trees(dev, same(tokenizer), Window(), train=False, options=options)
    assert len(built.trees) == len(plain.trees) == 6  # shots and paragraph are read once
    before = texts_of(plain, tokenizer)
    assert all(
        text == f"<s>{options.before}{before[id_].removeprefix('<s>')}"
        for id_, text in texts_of(built, tokenizer).items()
    )
    n = len(tokenizer(options.before).input_ids)
    assert prompt.overhead(tokenizer, options) == n
    with pytest.raises(UserError, match="shots=4: train has 3 articles"):
        prompt.fill(Prompt(shots=4), train)


def shown(title: str, words: int, answer: str = "w0") -> Example:
    """A question of an article, of a paragraph of so many words; all of its fields have spaces around them."""
    e = Example(f"{title}{words}", title, f" {some('w', 0, words)}\n", f" {title}{words}? ", ())
    return replace(e, answers=(Answer(f" {answer} ", 0), Answer("w9", 0)))


@pytest.mark.parametrize("order", ["context", "question"])
@pytest.mark.parametrize("seed", range(4))
def test_shots_are_drawn_by_their_seed_from_the_short_paragraphs(seed, order):
    train = [shown(title, words) for words in (3, 120, 121, 200) for title in "DBAC"]
    rng = random.Random(seed)
    titles = rng.sample("ABCD", 3)
    drawn = [(title, rng.choice([3, 120])) for title in titles]
    texts = {"context": "Context: {0}\n\nQuestion: {1}\n\nAnswer: w0\n\n", "question": QUESTION_FIRST + " w0\n\n"}
    before = "".join(texts[order].format(some("w", 0, n), f"{title}{n}?") for title, n in drawn)
    options = Prompt(order, shots=3, shots_seed=seed)
    assert prompt.fill(options, train) == replace(options, before=before)


def test_shots_need_as_many_articles_with_short_paragraphs():
    train = [shown("A", 120), shown("A", 7), shown("B", 120), shown("C", 121)]
    assert prompt.fill(Prompt(shots=2), train).before.count("Answer:") == 2
    with pytest.raises(UserError, match=r"^prompt\.shots=3: train has 2 articles with short paragraphs$"):
        prompt.fill(Prompt(shots=3), train)


def test_earlier_questions_of_a_paragraph_come_with_their_answers(asked):
    dev, _, tokenizer = asked
    options = Prompt(earlier=True)
    found = texts_of(build_trees(dev, same(tokenizer), Window(), train=False, options=options), tokenizer)
    first, second, third = dev[:3]
    asked_as = "\n\nQuestion: {}\n\nAnswer:"
    one = f"<s>Context: {first.context}" + asked_as.format(first.question)
    two = f"{one} {first.answers[0].text}" + asked_as.format(second.question)
    assert found[first.id] == one
    assert found[second.id] == two
    assert found[third.id] == f"{two} {second.answers[0].text}" + asked_as.format(third.question)
    assert found[dev[3].id].count("Question:") == 1  # the next paragraph's
    assert prompt.fingerprint(options) != prompt.fingerprint()


def test_earlier_answers_stand_without_their_spaces_and_a_question_without_one_too(by_words):
    rows = [
        asks(some("w", 0, 14), "q0", " w1 ", id_="a"),
        replace(asks(some("w", 0, 14), "q1", id_="b"), answers=()),
        asks(some("w", 0, 14), "q2", id_="c"),
    ]
    found, _ = prompt_texts(rows, by_words, BARE, Prompt(earlier=True, before="q9 "))
    one = f"q9 Context: {some('w', 0, 13)}\n\nQuestion: q0\n\nAnswer:"
    two = f"{one} w1\n\nQuestion: q1\n\nAnswer:"
    assert found == [("a", one), ("b", two), ("c", f"{two} \n\nQuestion: q2\n\nAnswer:")]


def test_what_stands_beside_the_window_is_counted(by_words):
    assert prompt.overhead(by_words, Prompt()) == 0
    assert prompt.overhead(by_words, Prompt(before="w1 w2\n\n")) == 3  # with BOS
    by_words = copy.copy(by_words)
    by_words.chat_template = TEMPLATE
    around = CHAT.removesuffix("{}").replace(",", " ,").replace(".", " .").split()
    assert prompt.overhead(by_words, Prompt(chat=True)) == len(["<s>", "user", *around, "w9"])
    assert prompt.overhead(by_words, Prompt(chat=True, before="w1 w2")) == len(
        ["<s>", "user", *around, "w1", "w2", "w9"]
    )


def test_a_chat_has_one_message_of_the_user_and_asks_for_the_models(by_words):
    by_words = copy.copy(by_words)
    by_words.chat_template = TEMPLATE
    (tree,) = build_trees(
        [asks("w0")], same(by_words), BARE, train=False, options=Prompt(chat=True, before="w1 ")
    ).trees
    asked = f"user {CHAT.format('w1 Context: w0')}\n\nQuestion: q0\n\nAnswer: w9"
    assert tree.prefix_ids + tree.branches[0].prompt_ids == by_words(asked, add_special_tokens=False).input_ids


def test_a_template_that_changes_the_text_shares_nothing(by_words):
    by_words = copy.copy(by_words)
    by_words.chat_template = TEMPLATE.replace("m.content", "m.content | replace('Context', 'context')")
    rows = [asks("w0", f"q{i}", id_=f"{i}") for i in range(2)]
    trees = build_trees(rows, same(by_words), BARE, train=False, options=Prompt(chat=True)).trees
    assert [[b.id for b in tree.branches] for tree in trees] == [["0"], ["1"]]


def test_a_chat_is_in_the_models_own_template(asked):
    dev, _, tokenizer = asked
    options = Prompt(chat=True)
    with pytest.raises(UserError, match="no chat template"):
        build_trees(dev, same(tokenizer), Window(), train=False, options=options)
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [model]"
    built = build_trees(dev, same(tokenizer), Window(), train=False, options=options)
    found = texts_of(built, tokenizer)
    e = dev[0]
    plain = prompt.text(e.context, e.question)
    assert found[e.id] == f"<s>[user] {prompt.message(plain)} [model]"
    assert found[e.id].count("<s>") == 1
    assert len(built.trees) == 6  # each paragraph once here too
    assert prompt.overhead(tokenizer, options) > 10


def test_controls_are_of_models_as_they_are():
    for word in ("prompt.chat=true", "prompt.shots=1", "prompt.earlier=true"):
        with pytest.raises(UserError, match="without lora"):
            load("qlora7b", [word])
        load("raw7b", [word])
    for word in ("prompt.order=both", "window.overflow=chunk"):
        with pytest.raises(UserError, match="earlier"):
            load("raw7b", ["prompt.earlier=true", word])
