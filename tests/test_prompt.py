"""One prompt, one window, one tokenisation: for training, evaluation and a single query."""

from dataclasses import replace

from common import prompt
from common.config import Prompt, Window, load
from common.errors import UserError
from common.model import load_tokenizer
from common.prompt import build_trees
from common.squad import Answer, Example, read
from tests.conftest import ROOT, squad_file

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
    trees = build_trees(questions, tokenizer, Window(), train=True, options=Prompt(order)).trees
    assert prompts(trees)["What is it?"] == tokenizer(text)["input_ids"]
    assert len(trees) == (1 if order == "context" else 2), "what comes behind a question is not shared"


@pytest.mark.parametrize("order", ["question", "both"])
def test_other_orders_stay_in_the_window_too(tokenizer, order):
    window, words = Window(context=120, question=40, stride=60), "Which canals of Utrecht were dug, and when? " * 20
    e = Example("q", "T", words, words, (Answer("Which", 0),))
    ids = prompts(build_trees([e], tokenizer, window, train=False, options=Prompt(order)).trees)["q"]
    assert window.context + window.question - 16 < len(ids) <= window.context + window.question


def test_the_fingerprint_changes_with_the_prompt_and_only_with_it(monkeypatch):
    assert prompt.fingerprint() == "debd7cbbbb31"  # a new prompt is a new version: say so in docs/log.md
    others = [prompt.fingerprint(Prompt(order)) for order in ("context", "question", "both")]
    assert others[0] == prompt.fingerprint()
    assert len(set(others)) == 3
    monkeypatch.setattr(prompt, "_QUESTION", "\n\nQ: {}\n\nAnswer:")
    assert prompt.fingerprint() != "debd7cbbbb31"


def test_ids_are_the_tokenizers_ids_of_the_whole_text_with_eos_behind(tokenizer, demo):
    for tree in build_trees(demo, tokenizer, ROOMY, train=True).trees:
        for branch in tree.branches:
            (e,) = [e for e in demo if e.id == branch.id]
            whole = prompt.text(e.context, e.question) + f" {e.answers[0].text}"
            expected = [*tokenizer(whole)["input_ids"], tokenizer.eos_token_id]
            assert tree.prefix_ids + branch.prompt_ids + branch.answer_ids == expected
            assert tokenizer.pad_token_id not in expected


def test_a_single_query_reads_the_ids_that_training_and_evaluation_read(tokenizer, demo):
    trained = prompts(build_trees(demo, tokenizer, ROOMY, train=True).trees)
    evaluated = prompts(build_trees(demo, tokenizer, ROOMY, train=False).trees)
    alone = {}
    for e in demo:
        alone |= prompts(build_trees([e], tokenizer, ROOMY, train=False).trees)
    assert trained == evaluated == alone


def test_questions_of_a_paragraph_share_one_tree_with_the_paragraph_in_its_prefix(tokenizer, demo):
    built = build_trees(demo, tokenizer, ROOMY, train=True)
    assert len(built.trees) == len({e.context for e in demo}) == 4
    for tree in built.trees:
        assert len(tree.branches) == 5
        (context,) = {e.context for e in demo if e.id in {branch.id for branch in tree.branches}}
        assert context in tokenizer.decode(tree.prefix_ids)
        assert all(branch.prompt_ids for branch in tree.branches)
    assert built.counts == {"questions": 20, "truncated": 0, "dropped_outside": 0, "dropped_long": 0}


def test_a_question_whose_ids_break_the_shared_prefix_gets_a_tree_of_its_own(tokenizer, demo, monkeypatch):
    encode = prompt._encode

    class Odd:
        def __init__(self, encoding):
            self.encoding, self.ids = encoding, [5, *encoding.ids[1:]]

        def __len__(self):
            return len(self.ids)

        def token_to_chars(self, token):
            return self.encoding.token_to_chars(token)

    def odd(tokenizer, texts, *args, **kwargs):
        rows = encode(tokenizer, texts, *args, **kwargs)
        return [Odd(row) if demo[1].question in text else row for text, row in zip(texts, rows, strict=True)]

    monkeypatch.setattr(prompt, "_encode", odd)
    trees = build_trees(demo[:5], tokenizer, Window(), train=False).trees
    assert sorted(len(tree.branches) for tree in trees) == [1, 4]


def test_white_space_around_the_fields_changes_nothing(tokenizer):
    plain = [example("The old canal is long.", "canal")]
    spaced = [Example("q", "T", " \n The old canal is long. ", " Which one?\n", (Answer(" canal ", 10),))]
    assert build_trees(plain, tokenizer, Window(), train=True) == build_trees(spaced, tokenizer, Window(), train=True)


WORDS = st.lists(
    st.sampled_from(["canal", "bridge", "Zürich", "運河", "1820", "an", "x.", "…"]), min_size=1, max_size=60
)


@given(WORDS.map(" ".join), WORDS.map(" ".join))
def test_nothing_is_longer_than_its_window(tokenizer, context, question):
    e = Example("q", "T", context, question, (Answer(context.split()[0], 0),))
    for train in (True, False):
        for tree in build_trees([e], tokenizer, SMALL, train=train).trees:
            for branch in tree.branches:
                assert len(tree.prefix_ids) + len(branch.prompt_ids) <= SMALL.context + SMALL.question
                assert len(branch.answer_ids) <= SMALL.answer


@given(WORDS.map(" ".join), WORDS.map(" ".join), st.text(max_size=20).map(str.strip).filter(bool))
def test_the_prompts_ids_are_what_the_tokenizer_makes_of_the_prompt_alone(tokenizer, context, question, more):
    e = Example("q", "T", f"{context} {more}", question, (Answer(more, len(context) + 1),))
    (tree,) = build_trees([e], tokenizer, Window(context=3000, question=3000, answer=300), train=True).trees
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
        build_trees(demo, ends, ROOMY, train=False)

    letters = sorted({c for e in demo for c in prompt.text(e.context, e.question) + e.answers[0].text})
    vocabulary = {token: i for i, token in enumerate(["</s>", *letters, ": "])}
    joins = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, [(":", " ")])), eos_token="</s>")
    with pytest.raises(UserError, match=f"question {demo[0].id}: this tokenizer merges the prompt and the answer"):
        build_trees(demo, joins, Window(context=3000, question=3000, answer=300), train=True)


def test_a_long_context_is_cut_alike_whatever_the_question(tokenizer):
    context = " ".join(f"word{i}" for i in range(200))
    long, short = (example(context, "word0", question) for question in ("Which? " * 30, "Which?"))
    texts = [
        tokenizer.decode(prompts(build_trees([e], tokenizer, SMALL, train=False).trees)["q"]) for e in (long, short)
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
    by_other = build_trees([example(context, "word0")], tokenizer, SMALL, train=False, window_tokenizer=cutter)
    by_itself = build_trees([example(context, "word0")], cutter, SMALL, train=False)
    texts = [tok.decode(prompts(b.trees)["q"], skip_special_tokens=True)
             for tok, b in ((tokenizer, by_other), (cutter, by_itself))]  # fmt: skip
    assert texts[0] == texts[1]


def test_a_training_answer_outside_the_window_is_dropped_and_counted(tokenizer):
    context = " ".join(f"word{i}" for i in range(100))
    rows = [example(context, "word1", id_="in"), example(context, "word99", id_="out")]
    built = build_trees(rows, tokenizer, SMALL, train=True)
    assert prompts(built.trees).keys() == {"in"}
    assert built.counts == {"questions": 2, "truncated": 2, "dropped_outside": 1, "dropped_long": 0}
    assert prompts(build_trees(rows, tokenizer, SMALL, train=False).trees).keys() == {"in", "out"}


def test_a_training_answer_too_long_to_be_decoded_is_dropped_and_counted(tokenizer):
    context = " ".join(f"w{i}" for i in range(12))
    built = build_trees([example(context, context)], tokenizer, SMALL, train=True)
    assert (built.trees, built.counts["dropped_long"]) == ([], 1)


def test_chunks_cover_the_whole_context_and_training_takes_the_one_that_holds_the_answer(tokenizer):
    chunk = replace(SMALL, overflow="chunk")
    words = [f"word{i}" for i in range(100)]
    context = " ".join(words)
    windows = build_trees([example(context, "word7")], tokenizer, chunk, train=False).trees
    texts = [tokenizer.decode(tree.prefix_ids).partition("Context: ")[2] for tree in windows]
    assert len(windows) > 3
    assert all(any(word in text.split() for text in texts) for word in words)
    for word in ("word2", "word50", "word99"):
        (tree,) = build_trees([example(context, word)], tokenizer, chunk, train=True).trees
        assert word in tokenizer.decode(tree.prefix_ids)


# ---- controls ------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path, tiny_base):
    """(examples of dev, those of train, the tokenizer)"""
    dev, train = (read(str(squad_file(tmp_path / f"{i}.json", 6, 3, seed=i)), "dev").examples for i in range(2))
    return dev, train, load_tokenizer(str(tiny_base))


def texts_of(built: prompt.Trees, tokenizer) -> dict[str, str]:
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
    plain = prompt.build_trees(dev, tokenizer, Window(), train=False)
    built = prompt.build_trees(dev, tokenizer, Window(), train=False, options=options)
    assert len(built.trees) == len(plain.trees) == 6  # shots and paragraph are read once
    before = texts_of(plain, tokenizer)
    assert all(
        text == f"<s>{options.before}{before[id_].removeprefix('<s>')}"
        for id_, text in texts_of(built, tokenizer).items()
    )
    n = len(tokenizer(options.before).input_ids)
    assert prompt.beside(tokenizer, options) == n
    with pytest.raises(UserError, match="shots=4: train has 3 articles"):
        prompt.fill(Prompt(shots=4), train)


def test_earlier_questions_of_a_paragraph_come_with_their_answers(asked):
    dev, _, tokenizer = asked
    options = Prompt(earlier=True)
    found = texts_of(prompt.build_trees(dev, tokenizer, Window(), train=False, options=options), tokenizer)
    first, second, third = dev[:3]
    asked_as = "\n\nQuestion: {}\n\nAnswer:"
    one = f"<s>Context: {first.context}" + asked_as.format(first.question)
    two = f"{one} {first.answers[0].text}" + asked_as.format(second.question)
    assert found[first.id] == one
    assert found[second.id] == two
    assert found[third.id] == f"{two} {second.answers[0].text}" + asked_as.format(third.question)
    assert found[dev[3].id].count("Question:") == 1  # the next paragraph's
    assert prompt.fingerprint(options) != prompt.fingerprint()


def test_a_chat_is_in_the_models_own_template(asked):
    dev, _, tokenizer = asked
    options = Prompt(chat=True)
    with pytest.raises(UserError, match="no chat template"):
        prompt.build_trees(dev, tokenizer, Window(), train=False, options=options)
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [model]"
    built = prompt.build_trees(dev, tokenizer, Window(), train=False, options=options)
    found = texts_of(built, tokenizer)
    e = dev[0]
    plain = prompt.text(e.context, e.question)
    assert found[e.id] == f"<s>[user] {prompt.message(plain)} [model]"
    assert found[e.id].count("<s>") == 1
    assert len(built.trees) == 6  # each paragraph once here too
    assert prompt.beside(tokenizer, options) > 10


def test_controls_are_of_models_as_they_are():
    for word in ("prompt.chat=true", "prompt.shots=1", "prompt.earlier=true"):
        with pytest.raises(UserError, match="without lora"):
            load("qlora7b", [word])
        load("raw7b", [word])
    for word in ("prompt.order=both", "window.overflow=chunk"):
        with pytest.raises(UserError, match="earlier"):
            load("raw7b", ["prompt.earlier=true", word])
