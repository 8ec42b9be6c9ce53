"""A constrained answer is the greedy one among all substrings of its context, whatever tokens are made of."""

import json
from dataclasses import replace
from types import SimpleNamespace

from common.config import Decode, Eval, Prompt, Window
from common.data.squad import Example
from common.data.trees import Branch, Tree
from common.decode import single, spans
from common.decode.answers import stop_tokens
from common.decode.forward import choose
from common.decode.plain import Plain
from common.decode.predict import answer_trees, answers, quotes_of
from common.decode.single import Single
from common.decode.spans import BORDER, FIRST, Quotes, Vocabulary, automata, automaton_of, token_bytes, vocabulary
from common.errors import UserError
from common.model.load import load_tokenizer
from tests.conftest import ROOT, same
from tests.decode.test_predict import LIMIT, demo_trees, system

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

SPANS = Decode(spans=True)
EOS = 0
# characters of one to four bytes, spaces of two kinds and a line break
TEXT = st.text(st.sampled_from("aab é\n京🏛\u00a0.1"), min_size=1, max_size=14)
PIECES = [
    b"a",
    b"b",
    b" a",
    b" ",
    b"ab",
    b"aa",
    b" \n",
    b"\n",
    b"\xa9",
    b"\xc3",
    b"\xc3\xa9b",
    b"a ",
    b"\xe4\xba",
    b".1",
]


def vocabulary_of(extra: list[bytes] = PIECES) -> Vocabulary:
    """EOS, every byte, and longer pieces, some of which split characters; one byte twice, as Llama-2 has the space."""
    return Vocabulary([None, *(bytes([n]) for n in range(256)), *extra])


def fits(context: str, start: int, text: str, whole_words: bool) -> bool:
    """True if `text` begins with a character that is no space and, with whole words, cuts none at either end."""
    ends = [k for k in (start, start + len(text)) if 0 < k < len(context)]
    cuts = any(context[k - 1].isalnum() and context[k].isalnum() for k in ends)
    return not text[0].isspace() and not (whole_words and cuts)


def quotes(context: str, whole_words: bool) -> set[bytes]:
    """Every quote of a context, by definition."""
    places = [(i, context[i:j]) for i in range(len(context)) for j in range(i + 1, len(context) + 1)]
    return {text.encode() for i, text in places if fits(context, i, text, whole_words)}


def allowed(tokens: Vocabulary, whole: set[bytes], sofar: bytes) -> list[int]:
    """Tokens that lead towards a quote, behind one space at most, and EOS behind one."""
    answers = whole | {b" " + quote for quote in whole}
    starts = {answer[:n] for answer in answers for n in range(1, len(answer) + 1)}
    going = [token for token, text in enumerate(tokens.bytes) if text and sofar + text in starts]
    return [EOS, *going] if sofar in answers else going


@given(context=TEXT, whole_words=st.booleans(), seed=st.integers(0, 2**20))
def test_the_most_probable_quote_is_chosen_token_by_token(context, whole_words, seed):
    """Against brute force: of all tokens those that all substrings allow, of these the most probable one."""
    tokens = vocabulary_of()
    if not any(c.isalnum() for c in context):
        with pytest.raises(ValueError, match="without a word"):
            automaton_of(tokens, context, whole_words)
        return
    automaton, whole = automaton_of(tokens, context, whole_words), quotes(context, whole_words)
    other = automaton_of(tokens, "a rather longer context beside it", whole_words)
    draw = torch.Generator().manual_seed(seed)
    sofar, answer, state, host = b"", [], None, automaton.nodes[0]
    for step in range(12):
        # few different logits, so that some are equal; EOS is not too rare
        logits = torch.randint(8, (2, len(tokens.bytes)), generator=draw).float()
        logits[:, EOS] += 2
        row = torch.tensor([-1, 0 if step else -1])
        found = choose(logits, None, Quotes([other, automaton], torch.tensor([EOS]), before(state), row))
        may = allowed(tokens, whole, sofar)
        best = max(logits[1, may])
        expected = [token for token in may if logits[1, token] == best]
        assert found.token[1] == expected[0]
        assert found.tie[1] == (len(expected) > 1)
        assert found.logprob[1].item() == pytest.approx(logits[1].log_softmax(-1)[expected[0]].item(), abs=1e-5)
        host, state = automaton.advance(host, expected[0]), found.state[1]
        assert np.flatnonzero(host).tolist() == state.nonzero()[:, 0].tolist()
        if expected[0] == EOS:
            break
        answer, sofar = [*answer, expected[0]], sofar + tokens.bytes[expected[0]]
    else:
        return
    text, (start, stop) = automaton.quote(answer)
    found = sofar.removeprefix(b" ").decode()
    places = [i for i in range(len(context)) if context.startswith(found, i) and fits(context, i, found, whole_words)]
    assert (text, start) == (found.rstrip(), places[0])
    assert context[start:stop] == text


def before(state: torch.Tensor | None) -> torch.Tensor | None:
    return None if state is None else state[None]


@given(TEXT)
def test_edges_are_where_tokens_stand(context):
    tokens, data = vocabulary_of(), context.encode()
    bytes_ = torch.tensor([*data, BORDER], dtype=torch.int32)
    places = torch.arange(len(data), dtype=torch.int32)
    found = tokens.edges(bytes_, places, places, torch.zeros_like(places))
    expected = {
        (i, token, i + len(text))
        for token, text in enumerate(tokens.bytes)
        for i in places.tolist()
        if text and data.startswith(text, i)
    }
    assert sorted(map(tuple, found.T.tolist())) == sorted(expected)


@given(st.lists(TEXT.filter(lambda text: any(map(str.isalnum, text))), min_size=1, max_size=6), st.booleans())
def test_automata_that_are_made_together_are_those_that_are_made_alone(contexts, whole_words):
    """Nothing leads across the border between two contexts, though there is a token of its byte."""
    tokens, device = vocabulary_of([*PIECES, bytes([BORDER]), bytes([ord("a"), BORDER])]), torch.device("cpu")
    together = automata(tokens, contexts, whole_words, device)
    for context, one in zip(contexts, together, strict=True):
        (alone,) = automata(tokens, [context], whole_words, device)
        assert sorted(one.edges.T.tolist()) == sorted(alone.edges.T.tolist())
        assert (one.nodes == alone.nodes).all()
        assert (one.char == alone.char).all()
        assert (one.context, one.data) == (context, context.encode())


def test_automata_are_made_ahead_of_their_contexts(monkeypatch):
    """In whatever order they are asked for, each is of its context; made are those that come next."""
    contexts, made = [f"number {i}" for i in range(10)], []
    build = spans.automata
    monkeypatch.setattr(
        spans, "automata", lambda tokens, block, *more: made.append(block) or build(tokens, block, *more)
    )
    monkeypatch.setattr(spans, "BLOCK", 4)
    of = spans.Automata(vocabulary_of(), [*contexts, *contexts], False, torch.device("cpu"))
    for i in (0, 1, 3, 5, 0, 9):
        assert of(contexts[i]).context == contexts[i]
    assert [len(block) for block in made] == [4, 4, 4, 1]


@pytest.mark.parametrize(
    ("answer", "text", "start", "whole_words"),
    [
        (b" the| end", "the end", 10, False),
        (b"the|n", "then", 4, False),
        (b"the", "the", 0, False),  # the first of three places
        (b"the", "the", 0, True),
        (b"he", "he", 1, False),
        (b"then|,| ", "then,", 4, False),  # without the space behind it
        (b" caf|\xc3", "caf", 18, False),  # the limit came within a character
        (b"end| caf|\xc3", "end", 14, True),  # and within a word
        (b"ca", "ca", 18, True),  # of a first word that has no end yet, what there is
        (b" ", "", 0, False),
        (b"elsewhere", "", 0, False),
    ],
)
def test_a_quote_is_the_first_place_of_an_answer(answer, text, start, whole_words):
    context = "the then, the end café"
    pieces = [piece for piece in answer.split(b"|") if piece]
    found = automaton_of(Vocabulary([None, *pieces]), context, whole_words).quote(range(1, len(pieces) + 1))
    assert found == (text, (start, start + len(text)))
    assert context[slice(*found.span)] == text


def test_tokens_of_both_kinds_of_tokenizers_have_their_bytes(tiny_base, tmp_path):
    """A text's tokens spell it; special tokens have none. Other tokenizers are refused."""
    text = "Two  spaces, naïve 東京 🏛️\n\ta tab."
    for tokenizer in (load_tokenizer(str(tiny_base)), sentencepiece(tmp_path)):
        spelt = token_bytes(tokenizer)
        ids = tokenizer(" " + text, add_special_tokens=False).input_ids
        assert b"".join(spelt[token] for token in ids).decode() == " " + text
        assert [spelt[token] for token in tokenizer.all_special_ids] == [None] * len(tokenizer.all_special_ids)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?")))
    with pytest.raises(UserError, match="tokens have no bytes of their own"):
        token_bytes(words)


def sentencepiece(folder) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama-2's: spaces are ▁, and what has no token is spelt byte by byte."""
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{n:02X}>" for n in range(256)),
        "▁",
        "▁▁",
        "T",
        "w",
        "o",
        "▁T",
        "▁Tw",
        "n",
        "a",
        "ï",
        "東",
    ]
    merges = [("▁", "▁"), ("▁", "T"), ("▁T", "w")]
    model = models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


# ---- engines -------------------------------------------------------------------------------------------------------


def by_masks(model, tokenizer, tree: Tree, branch: Branch, limit: int) -> list[int]:
    """Greedy tokens of one question alone, of those alone that the automaton allows, pass by pass without a cache."""
    tokens, eos = vocabulary(tokenizer, model.config.vocab_size), tokenizer.eos_token_id
    automaton = automaton_of(tokens, tree.context)
    state, answer, prompt = automaton.nodes[0], [], tree.prefix_ids + branch.prompt_ids
    while len(answer) < limit and eos not in answer:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, -1]
        source, token, _ = automaton.edges
        may = set(token[state[source]].tolist())
        if answer and (state & automaton.nodes[1])[FIRST:].any() and set(answer) != {space_of(tokens)}:
            may.add(eos)
        answer.append(max(sorted(may), key=lambda token: logits[token].item()))
        state = automaton.advance(state, answer[-1])
    return answer


def space_of(tokens: Vocabulary) -> int:
    return tokens.bytes.index(b" ")


def test_every_engine_gives_the_same_quotes(tiny_base):
    """In fp32: the batched engine, single questions with drafts, the modules, and masked logits without a cache."""
    model, tokenizer = system(tiny_base)
    trees, stops = demo_trees(tokenizer, 3), stop_tokens(tokenizer, model, SPANS)
    assert stops == [tokenizer.eos_token_id], "a line break is text"
    batched, plain = (
        answer_trees(model, tokenizer, trees, stops, LIMIT, Eval(engine, pass_tokens=400), progress=None, decode=SPANS)
        for engine in ("auto", "plain")
    )
    free = answer_trees(model, tokenizer, trees, stops, LIMIT, progress=None)
    engines = Single(model, stops, LIMIT, 600, spans=True), Plain(model, stops, LIMIT)
    quotes_in = quotes_of(model, tokenizer, SPANS)
    for tree in trees:
        for branch in tree.branches:
            answer, prompt = batched[branch.id], tree.prefix_ids + branch.prompt_ids
            assert answer.token_ids == plain[branch.id].token_ids == by_masks(model, tokenizer, tree, branch, LIMIT)
            for engine in engines:
                alone = engine.answer(prompt, quotes=quotes_in(tree.context))
                assert alone.token_ids == answer.token_ids
                assert alone.logprob == pytest.approx(answer.logprob, abs=1e-3)
            assert answer.text
            assert tree.context[slice(*answer.span)] == answer.text == plain[branch.id].text
    assert any(batched[i].token_ids != free[i].token_ids for i in free), "the constraint binds here"
    assert all(answer.span is None for answer in free.values())


@pytest.mark.parametrize("overflow", ["truncate", "chunk"])
def test_places_are_of_the_whole_context_as_it_was_given(tiny_base, overflow):
    """Space in front, and windows that begin behind it."""
    model, tokenizer = system(tiny_base)
    context = " \n " + " ".join(f"Stone {i} is naïve, as number {i * 7} is." for i in range(12))
    examples = [Example(f"q{i}", "", context, f"Which {i}?", ()) for i in range(6)]
    window = Window(context=48, stride=30, question=16, answer=16, overflow=overflow)
    config = SimpleNamespace(window=window, prompt=Prompt(), decode=SPANS, eval=Eval())
    found = answers(model, same(tokenizer), examples, config)
    engine = single.engine(model, stop_tokens(tokenizer, model, SPANS), window, Eval(), 0, SPANS)
    starts = set()
    for example in examples:
        alone, _, _ = single.ask(engine, same(tokenizer), example, config)
        for answer in (found[example.id], alone):
            assert answer.text == context[slice(*answer.span)] != ""
            starts.add(answer.span[0])
    assert max(starts) > (150 if overflow == "chunk" else 0)


def test_the_fixed_number_of_tokens_of_a_timing_is_reached_by_both_engines(tiny_base):
    """Behind the end of an answer nothing is left to quote, so it ends again and again."""
    model, tokenizer = system(tiny_base)
    (tree, *_), stops = demo_trees(tokenizer, 1), stop_tokens(tokenizer, model, SPANS)
    quotes, prompt = quotes_of(model, tokenizer, SPANS)(tree.context), tree.prefix_ids + tree.branches[0].prompt_ids
    for engine in (Single(model, stops, 40, 600, spans=True), Plain(model, stops, 40)):
        assert len(engine.answer(prompt, to_the_limit=True, quotes=quotes).token_ids) == 40


def test_a_context_without_a_word_is_an_error_that_names_its_question(tiny_base):
    model, tokenizer = system(tiny_base)
    trees = [Tree([5], (Branch("fine", [6], []),), "A word."), Tree([5], (Branch("odd", [6], []),), "?! …")]
    with pytest.raises(UserError, match="question odd: no word is in what is read of its context"):
        answer_trees(model, tokenizer, trees, [1], 4, progress=None, decode=SPANS)
    assert len(answer_trees(model, tokenizer, trees, [1], 4, progress=None)) == 2
    windows = [*trees, replace(trees[1], context="A word, then.")]
    found = answer_trees(model, tokenizer, windows, [1], 4, progress=None, decode=SPANS)
    assert found["odd"].text, "of several windows one has a word"


def test_forced_tokens_are_taken_and_followed(tiny_base):
    model, tokenizer = system(tiny_base)
    (tree, *_), stops = demo_trees(tokenizer, 1), stop_tokens(tokenizer, model, SPANS)
    words = " ".join(tree.context.split()[2:4])
    forced = tokenizer(" " + words, add_special_tokens=False).input_ids
    first = tree.branches[0]
    found = answer_trees(model, tokenizer, [tree], stops, 16, progress=None, forced={first.id: forced}, decode=SPANS)[
        first.id
    ]
    alone = Single(model, stops, 16, 600, spans=True).answer(
        tree.prefix_ids + first.prompt_ids, forced, quotes=quotes_of(model, tokenizer, SPANS)(tree.context)
    )
    assert found.token_ids[: len(forced)] == forced
    assert found.token_ids == alone.token_ids
    assert found.text.startswith(words)


def test_an_engine_for_quotes_takes_nothing_else(tiny_base):
    model, tokenizer = system(tiny_base)
    quotes = quotes_of(model, tokenizer, SPANS)("A canal.")
    for constrained, given_quotes in ((True, None), (False, quotes)):
        with pytest.raises(ValueError, match="made for spans"):
            Single(model, [1], 4, 60, constrained).answer([5, 6], quotes=given_quotes)


@pytest.mark.parametrize("whole_words", [False, True])
def test_every_gold_of_the_demo_can_be_given(tiny_base, whole_words):
    tokenizer = load_tokenizer(str(tiny_base))
    tokens, n = Vocabulary(token_bytes(tokenizer)), 0
    for article in json.loads((ROOT / "demo" / "dev.json").read_text())["data"]:
        for paragraph in article["paragraphs"]:
            automaton = automaton_of(tokens, paragraph["context"], whole_words)
            for answer in (a["text"] for question in paragraph["qas"] for a in question["answers"]):
                ids, state = tokenizer(" " + answer, add_special_tokens=False).input_ids, automaton.nodes[0]
                for token in ids:
                    state = automaton.advance(state, token)
                assert (state & automaton.nodes[1]).any()
                assert automaton.quote(ids).text == answer
                n += 1
    assert n > 100
