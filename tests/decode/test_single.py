"""A single answer is the greedy one, whatever is drafted; drafts come from the prompt."""

import contextlib
from types import SimpleNamespace

from common.config import Decode, Eval, Prompt, Window
from common.data.squad import Example
from common.data.tokens import Tokenizers
from common.decode import single
from common.decode.answers import Generation, stop_tokens
from common.decode.drafts import draft_from
from common.decode.forward import NextTokens, Pass
from common.decode.plain import Plain
from common.decode.single import DRAFT_TOKENS, Single
from common.errors import UserError
from common.model.load import load_tokenizer
from tests.conftest import same
from tests.decode.test_predict import LIMIT, NOTE, demo_trees, notes, system, truth

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig


def questions(tokenizer, paragraphs: int):
    trees = demo_trees(tokenizer, paragraphs)
    return [(tree, branch, tree.prefix_ids + branch.prompt_ids) for tree in trees for branch in tree.branches]


def test_every_answer_equals_generate_token_for_token(tiny_base):
    model, tokenizer = system(tiny_base)
    engine = Single(model, stop_tokens(tokenizer), LIMIT, 600)
    for _, branch, prompt in questions(tokenizer, 8):
        answer = engine.answer(prompt)
        assert answer.token_ids == truth(tiny_base, 8)[branch.id]
        assert answer.passes <= len(answer.token_ids)


def test_log_probability_is_that_of_the_tokens_whatever_was_drafted(tiny_base):
    model, tokenizer = system(tiny_base)
    engine = Single(model, [], 12, 600)
    for _, _, prompt in questions(tokenizer, 2):
        answer = engine.answer(prompt)
        ids = torch.tensor([prompt + answer.token_ids[:-1]])
        out = torch.log_softmax(model(input_ids=ids).logits[0, len(prompt) - 1 :].float(), -1)
        expected = out.gather(1, torch.tensor(answer.token_ids)[:, None])
        assert answer.logprob == pytest.approx(expected.sum().item(), abs=1e-3)
        assert answer.least == pytest.approx(expected.min().item(), abs=1e-3)


@pytest.mark.parametrize("draft", [[], [1] * DRAFT_TOKENS, "right", "half right"])
def test_drafts_change_the_number_of_passes_and_nothing_else(tiny_base, monkeypatch, draft):
    model, tokenizer = system(tiny_base)
    engine, limit = Single(model, [], 20, 600), 20
    _, _, prompt = questions(tokenizer, 1)[0]
    monkeypatch.setattr(single, "draft_from", lambda *_: [])
    truth = engine.answer(prompt)
    assert (truth.passes, truth.drafted, truth.accepted) == (limit, 0, 0)

    def drafted(prompt_ids, token_ids, most):
        right = truth.token_ids[len(token_ids) :][:most]
        if draft == "half right":
            return [*right[:3], *[(t + 1) % 99 for t in right[3:]]]
        return right if draft == "right" else draft[:most]

    monkeypatch.setattr(single, "draft_from", drafted)
    ticks: list[int] = []
    found = engine.answer(prompt, tick=ticks.append)
    assert found.token_ids == truth.token_ids
    assert sum(ticks) == limit
    assert len(ticks) == found.passes
    counts = found.passes, found.drafted, found.accepted
    if draft == "right":
        assert counts == (3, 15 + 2, 15 + 2)  # a token; 15 and one more; then at most three: two and one more
    if draft == "half right":  # a draft is twice as long as what was right of the last one, and one more
        assert counts == (6, 15 + 7 + 7 + 6 + 2, 3 + 3 + 3 + 3 + 2)
    if draft == [1] * DRAFT_TOKENS:
        assert counts == (20, 15 + 17, 0)  # after one that was all wrong, one token is tried at a time
    if not draft:
        assert counts == (20, 0, 0)


def test_forced_tokens_are_generated(tiny_base):
    model, tokenizer = system(tiny_base)
    _, _, prompt = questions(tokenizer, 1)[0]
    stop = tokenizer.eos_token_id
    span = prompt[10:19]
    found = Single(model, [stop], 32, 600).answer(prompt, forced=[*span, stop])
    assert found.token_ids == [*span, stop]
    assert found.passes < len(span), "spans of the prompt are drafted"
    assert found.accepted > 0
    only_first = Single(model, [stop], 4, 600).answer(prompt, forced=[77])
    assert only_first.token_ids[0] == 77
    assert len(only_first.token_ids) <= 4


def test_a_prompt_that_is_too_long_is_refused(tiny_base):
    model, _ = system(tiny_base)
    engine = Single(model, [], 4, 40)
    assert len(engine.answer([5] * 36).token_ids) == 4
    for length in (0, 37):
        with pytest.raises(UserError, match=f"a prompt of {length} tokens; 1 to 36 can be asked"):
            engine.answer([5] * length)


def test_padding_changes_nothing_and_has_a_slot_of_its_own(tiny_base):
    """As in a graph, on a CPU."""
    model, tokenizer = system(tiny_base)
    _, _, prompt = questions(tokenizer, 1)[0]
    engine = Single(model, [], 4, len(prompt) + 60)
    decoder, unused = engine.decoder, engine.decoder.cache_tokens - 1
    decoder.layers.keys.fill_(torch.nan)
    decoder.layers.values.fill_(torch.nan)
    n, outputs = len(prompt), []
    passes = ((prompt, 0, n), ([5, 6, 7], n, 3), (prompt, 0, n + 20), ([5, 6, 7], n, DRAFT_TOKENS + 1))
    for new, cached, padded in passes:
        batch = single._batch(new, cached, [], padded, 3 if cached else 1, unused)
        outputs.append(decoder.forward(batch.to(decoder.device)))
    for plain, with_padding in zip(outputs[:2], outputs[2:], strict=True):
        assert torch.equal(plain.token, with_padding.token)
        torch.testing.assert_close(plain.logprob, with_padding.logprob)
    assert decoder.layers.keys[:, n + 3 : unused].isnan().all()
    assert not decoder.layers.keys[:, : n + 3].isnan().any()


ids = st.lists(st.integers(0, 6), min_size=1, max_size=40)


@given(ids, ids, st.integers(0, 8))
def test_a_draft_is_what_follows_somewhere_in_the_prompt(prompt, tokens, most):
    draft = draft_from(prompt, tokens, most)
    assert len(draft) <= most
    if most and tokens[-1] in prompt[:-1]:
        assert draft
        assert any(prompt[i : i + 1 + len(draft)] == [tokens[-1], *draft] for i in range(len(prompt)))
    elif tokens[-1] not in prompt[:-1]:
        assert draft == []


def test_the_longest_match_wins_and_then_the_place_that_the_question_is_about():
    prompt = [50, 1, 2, 10, 11, 51, 1, 3, 12, 13, 52, 1, 3, 14, 15]
    assert draft_from(prompt, [1, 2], 2) == [10, 11]
    far = [1, 20, 21, *[0] * 60, 30, 31, 1, 22, 23, *[0] * 60, *[99] * 20, 30, 31]
    assert draft_from(far, [1], 2) == [22, 23]


def test_the_plain_engine_answers_alike_a_token_a_pass(answering_base):
    model, tokenizer = system(answering_base)
    stops, window = stop_tokens(tokenizer), Window(context=250, answer=16)
    fast, plain = (single.engine(model, stops, window, Eval(engine)) for engine in ("auto", "plain"))
    assert (fast.name, plain.name) == ("drafts", "plain")
    for prompt, n in zip(prompts(tokenizer), (2, 3), strict=True):
        for to_the_limit in (False, True):
            ticks: list[list[int]] = [[], []]
            ours, theirs = (
                e.answer(prompt, None, to_the_limit, t.append) for e, t in zip((fast, plain), ticks, strict=True)
            )
            assert ours.token_ids == theirs.token_ids
            assert len(ours.token_ids) == (16 if to_the_limit else n)
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
            assert ticks[1] == [1] * theirs.passes == [1] * len(theirs.token_ids)
            assert sum(ticks[0]) == len(ours.token_ids)
            assert len(ticks[0]) == ours.passes


def prompts(tokenizer, context: str = NOTE) -> list[list[int]]:
    """Of the answers "otter" and "north gate"."""
    return [tree.prefix_ids + branch.prompt_ids for tree in notes(tokenizer, context) for branch in tree.branches]


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_what_ends_by_its_stop_token_is_the_same_however_near_the_limit(answering_base, limit):
    model, tokenizer = system(answering_base)
    stops = stop_tokens(tokenizer)
    north, gate = tokenizer(" north gate", add_special_tokens=False).input_ids
    for engine in (Single(model, stops, limit, 200), Plain(model, stops, limit)):
        answer = engine.answer(prompts(tokenizer)[1])
        assert answer.token_ids == [north, gate, 1][:limit]


def test_the_probability_of_a_single_answer_is_that_of_its_stop_token_too(answering_base):
    model, tokenizer = system(answering_base)
    prompt = prompts(tokenizer)[1]
    north, _ = tokenizer(" north gate", add_special_tokens=False).input_ids
    expected = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)[north].item()
    assert -3 < expected < -0.01
    for engine in (Single(model, [north], 9, 200), Plain(model, [north], 9)):
        answer = engine.answer(prompt)
        assert answer.token_ids == [north]
        assert answer.logprob == pytest.approx(expected, abs=1e-4)


def test_single_queries_count_tokens_that_another_ties_with(answering_base):
    model, tokenizer = system(answering_base)
    stops = stop_tokens(tokenizer)
    (gate,) = tokenizer(" gate", add_special_tokens=False).input_ids
    animal, place = prompts(tokenizer)
    assert Single(model, stops, 9, 200).answer(place).ties == 0
    with torch.no_grad():
        model.lm_head.weight[-1] = model.lm_head.weight[gate]
    engine = Single(model, stops, 9, 200)
    assert (engine.answer(animal).ties, engine.answer(place).ties) == (0, 1)


def test_the_plain_engine_forces_no_tokens(answering_base):
    model, tokenizer = system(answering_base)
    with pytest.raises(ValueError, match="forces no tokens"):
        Plain(model, [1], 4).answer(prompts(tokenizer)[0], forced=[5])


@pytest.mark.parametrize(
    ("window", "overhead", "most"),
    [
        (Window(context=300, question=50, answer=16), 0, 366),
        (Window(context=300, question=50, answer=16), 7, 373),
        (Window(context=300, question=50, answer=16, tokenizer="another"), 7, 2 * 366 + 7),
    ],
)
def test_an_engine_has_capacity_for_its_window_and_overhead(tiny_base, window, overhead, most):
    model, _ = system(tiny_base)
    engine = single.engine(model, [1], window, Eval(), overhead)
    assert (engine.limit, engine.most_prompt, engine.stop_tokens) == (16, most - 16, {1})
    assert engine.decoder.cache_tokens == most + DRAFT_TOKENS + 1
    assert isinstance(single.engine(model, [1], window, Eval("plain"), overhead), Plain)
    model.config.hidden_act = "gelu"
    assert isinstance(single.engine(model, [1], window, Eval(), overhead), Plain)


def test_what_prompts_begin_with_alike_is_read_once_and_changes_no_answer(tiny_base, monkeypatch):
    """Whatever was asked before: another text, one that begins with it, the same again, one token."""
    model, tokenizer = system(tiny_base)
    asked = [prompt for _, _, prompt in questions(tokenizer, 2)]
    asked += [asked[0], asked[0], asked[0][:20], asked[0][:21], [5], [5], [7], asked[-1]]
    stops = stop_tokens(tokenizer)
    fresh, kept = (Single(model, stops, LIMIT, 600) for _ in range(2))
    expected = [fresh.answer(prompt).token_ids for prompt in asked]
    read, forward = [], Single._forward
    monkeypatch.setattr(Single, "_forward", lambda self, new, *rest: read.append(len(new)) or forward(self, new, *rest))
    kept.keeps_prompt = True
    tokens = []
    for prompt, answer in zip(asked, expected, strict=True):
        read.clear()
        assert kept.answer(prompt).token_ids == answer
        tokens.append(read[0])
    assert tokens[0] == len(asked[0])
    assert 1 < tokens[1] < 40 < len(asked[1]), "the question's own"
    assert tokens[-7:] == [1, 1, 1, 1, 1, 1, len(asked[-1])], "a prompt has one token more than is kept, at least"


# ---- end to end ------------------------------------------------------------------------------------------------------


def config_of(window: Window | None = None, prompt: Prompt = Prompt()) -> SimpleNamespace:
    return SimpleNamespace(window=window or Window(), prompt=prompt, decode=Decode())


class Answers:
    """An engine with given answers, one prompt after the other."""

    def __init__(self, *answers: tuple[float, list[int]], positions: int = 1000):
        self.answers = [Generation(ids, logprob) for logprob, ids in answers]
        config = LlamaConfig(max_position_embeddings=positions, vocab_size=10**6)
        self.model = SimpleNamespace(config=config, dtype=torch.float32)
        self.asked: list[tuple] = []
        self.stop_tokens = {1}

    def answer(self, *asked) -> Generation:
        self.asked.append(asked)
        return self.answers[len(self.asked) - 1]


@pytest.mark.parametrize(
    ("answers", "order"),
    [
        ([(-3.0, [7]), (-0.5, [8]), (-2.0, [9])], [8, 9, 7]),
        ([(-0.5, [8]), (-2.0, [9]), (-3.0, [7])], [8, 9, 7]),
        ([(-1.0, [7]), (-1.0, [9]), (-1.0, [8])], [9, 8, 7]),  # as likely: as `chunks.merge` decides
    ],
)
def test_of_several_windows_the_most_probable_answer_comes_first(answering_base, answers, order):
    tokenizer = load_tokenizer(str(answering_base))
    context = " ".join(f"Sentence {i} says nothing much." for i in range(12))
    example = Example("asked", "", context, "Which?", ())
    window = Window(context=64, stride=40, answer=16, overflow="chunk")
    engine = Answers(*answers, *[(-9.0, [5])] * 9)
    prediction, found, cut = single.ask(engine, same(tokenizer), example, config_of(window))
    assert [answer.token_ids[0] for answer in found[:3]] == order
    assert len(found) == len(engine.asked) > 3
    assert prediction.text == tokenizer.decode([order[0]]).strip()
    assert cut


def test_a_query_is_its_prompt_and_is_answered_as_asked(answering_base):
    tokenizers = same(load_tokenizer(str(answering_base)))
    example, engine = Example("asked", "", NOTE, "Which animal is meant?", ()), Answers((-1.0, [9]))
    tick = [].append
    config = config_of(prompt=Prompt(before="Before. "))
    prediction, (answer,), cut = single.ask(engine, tokenizers, example, config, [5], True, tick)
    ((ids, forced, to_the_limit, ticked, quotes),) = engine.asked
    assert quotes is None
    assert tokenizers.own.decode(ids) == f"<s>Before. Context: {NOTE}\n\nQuestion: Which animal is meant?\n\nAnswer:"
    assert (forced, to_the_limit, ticked) == ([5], True, tick)
    assert (prediction.text, answer.token_ids, cut) == (tokenizers.own.decode([9]).strip(), [9], False)
    single.ask(engine := Answers((-1.0, [9])), tokenizers, example, config_of())
    assert engine.asked[0][1:3] == (None, False)


def test_the_windows_tokenizer_cuts_the_context(answering_base, tiny_base):
    tokenizer, other = (load_tokenizer(str(base)) for base in (answering_base, tiny_base))
    example, config = Example("asked", "", "zebra " * 30, "Which?", ()), config_of(Window(context=40, stride=40))
    by_own, by_other = Answers((-1.0, [9])), Answers((-1.0, [9]))
    assert single.ask(by_own, same(tokenizer), example, config)[2]
    assert single.ask(by_other, Tokenizers(tokenizer, other), example, config)[2]
    asked = [tokenizer.decode(engine.asked[0][0]).count("zebra") for engine in (by_own, by_other)]
    assert asked[0] != asked[1]


def test_a_query_beyond_the_models_positions_is_refused(answering_base):
    tokenizers = same(load_tokenizer(str(answering_base)))
    example = Example("asked", "", NOTE, "Which animal is meant?", ())
    n = len(prompts(tokenizers.own)[0])
    single.ask(Answers((-1.0, [9]), positions=n + 32), tokenizers, example, config_of())
    with pytest.raises(
        UserError, match=rf"^{n} tokens of a prompt and up to 32 of its answer.*: lower window\.context"
    ):
        single.ask(Answers((-1.0, [9]), positions=n + 31), tokenizers, example, config_of())
    windows = config_of(Window(context=64, stride=40, answer=16, overflow="chunk"))
    context = " ".join(f"Sentence {i} says nothing." for i in range(14))
    example = Example("asked", "", context, "Which animal is meant?", ())
    single.ask(engine := Answers(*[(-1.0, [9])] * 9), tokenizers, example, windows)
    n = max(len(ids) for ids, *_ in engine.asked)
    assert n > min(len(ids) for ids, *_ in engine.asked)
    single.ask(Answers(*[(-1.0, [9])] * 9, positions=n + 16), tokenizers, example, windows)
    with pytest.raises(UserError, match=rf"^{n} tokens of a prompt and up to 16"):
        single.ask(Answers(*[(-1.0, [9])] * 9, positions=n + 15), tokenizers, example, windows)


# ---- graphs, imitated on a CPU ---------------------------------------------------------------------------------------


def test_passes_are_captured_for_a_few_lengths_the_longest_first_and_the_shortest_that_fits_is_replayed(
    answering_base, monkeypatch
):
    model, tokenizer = system(answering_base)
    stops, used = stop_tokens(tokenizer), []

    class Captured:
        """A pass as the graph computes it: padded, with the next token of the last token or of each."""

        def __init__(self, decoder, length, asks, of, capture):
            assert of == decoder.forward
            self.decoder, self.length, self.asks = decoder, length, asks
            assert capture.func is torch.cuda.graph
            captured.append((length, asks, capture.keywords["pool"]))

        def __call__(self, new, cached, forced):
            used.append((self.length, len(new), cached > 0))
            batch = single._batch(new, cached, forced, self.length, self.asks, self.decoder.cache_tokens - 1)
            return self.decoder.forward(batch.to(self.decoder.device))

    captured: list[tuple] = []
    monkeypatch.setattr(single, "_Captured", Captured)
    monkeypatch.setattr(single, "varlen", SimpleNamespace(kernels=lambda device, dtype: "some"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", iter(["one pool"]).__next__)
    engine = Single(model, stops, 9, 209)
    lengths = [(200, 1), (192, 1), (128, 1), (64, 1), (1, 1), (16, 16)]
    assert captured == [(*length, "one pool") for length in lengths]
    forced = [*tokenizer(" north gate", add_special_tokens=False).input_ids, 1]
    prompt = prompts(tokenizer)[1]
    assert engine.answer(prompt).token_ids == forced
    assert used[0] == (next(n for n in (64, 128, 192) if n >= len(prompt)), len(prompt), False)
    assert all(length == (1 if n == 1 else 16) for length, n, cached in used if cached)
    assert len(used) > 1
    used.clear()
    engine.answer([5] * 64)
    engine.answer([5] * 65)
    assert [n for n in used if not n[2]] == [(64, 64, False), (128, 65, False)]
    monkeypatch.setattr(single, "varlen", SimpleNamespace(kernels=lambda device, dtype: None))
    assert Single(model, stops, 9, 209).prompt_graphs == []


def test_a_graph_is_captured_of_a_padded_pass_and_replayed_with_another(monkeypatch):
    done: list[str] = []
    passes: list[Pass] = []
    out = NextTokens(torch.tensor([7]), torch.tensor([-0.5]), torch.tensor([False]))

    def forward(new: Pass) -> NextTokens:
        passes.append(new)
        done.append("forward")
        return out

    def capture(graph):
        done.append("capture")
        return contextlib.nullcontext()

    decoder = SimpleNamespace(cache_tokens=50, device=torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty cache"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: done.append("replay")))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    captured = single._Captured(decoder, 4, 2, forward, capture)
    assert done == ["forward", "synchronize", "empty cache", "capture", "forward"]
    first, second = passes
    assert first is second
    assert first.ids.tolist() == [0] * 4
    assert first.position.tolist() == [0, 1, 2, 3]
    assert first.keep.tolist() == [0, 1]
    assert (first.reach.host[2], first.reach.first) == ([50], 4)  # as many keys as there may be
    found = captured([7, 8, 9], 5, [3])
    assert done[-1] == "replay"
    assert first.ids.tolist() == [7, 8, 9, 0]  # the captured tensors hold the new pass
    assert first.position.tolist() == [5, 6, 7, 0]
    assert first.slot.tolist() == [5, 6, 7, 49]
    assert first.forced.tolist() == [3, -1]
    assert (found.token.tolist(), found.logprob.tolist(), found.tie.tolist()) == ([7], [-0.5], [False])


# ---- drafts, by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "tokens", "most", "draft"),
    [
        ([1, 2, 3, 4, 5], [2], 2, [3, 4]),
        ([1, 2, 3, 4, 5], [9, 2], 2, [3, 4]),
        ([1, 2, 3, 4, 5], [4], 9, [5]),
        ([1, 2, 3, 4, 5], [5], 9, []),  # nothing follows it
        ([1, 2, 3, 4, 5], [2], 0, []),
        ([1, 2, 3, 4, 5], [2], -1, []),
        ([1, 2, 3, 4, 5], [6], 2, []),
        ([1, 2, 3, 4, 5], [1], 1, [2]),  # the first place counts too
        ([7, 2, 3, 8, 2, 4], [8, 2], 1, [4]),  # two tokens alike before one
        ([9, 1, 2, 3, 4, 50, 8, 2, 3, 4, 51], [1, 2, 3, 4], 1, [50]),  # four alike before three
        ([8, 9, 1, 2, 3, 4, 50, 7, 9, 1, 2, 3, 4, 51], [7, 9, 1, 2, 3, 4], 1, [50]),  # a fifth is not looked at
    ],
)
def test_drafts_are_what_follows_the_longest_match_of_up_to_four_tokens(prompt, tokens, most, draft):
    assert draft_from(prompt, tokens, most) == draft


def test_a_rare_word_of_the_question_weighs_more_than_a_common_one():
    common, rare, gap, asked = 30, 31, [0] * 60, [99] * 20
    by_common = [5, common, 1, 22]
    by_rare = [5, rare, 1, 23]
    prompt = [*[common] * 9, *gap, *by_common, *gap, *by_rare, *gap, *asked, common, rare]
    assert draft_from(prompt, [1], 1) == [23]
    assert draft_from([*gap, *by_common, *gap, *by_rare, *gap, *asked, common, common], [1], 1) == [22]


def test_the_question_itself_is_no_place_to_draft_from_where_there_is_another():
    prompt = [1, 22, *[0] * 40, 30, 31, 1, 23, 30, 31]
    assert draft_from(prompt, [1], 1) == [22]


def test_tokens_near_a_place_are_those_of_24_on_either_side():
    gap, asked = [0] * 60, [*[99] * 20, 31]

    def prompt(before: int) -> list[int]:
        """A token of the question so many before the second of two places; nothing of it is near the first."""
        return [1, 21, *gap, 31, *[0] * (before - 2), 1, 22, *gap, *asked]

    assert draft_from(prompt(24), [1], 1) == [22]
    assert draft_from(prompt(25), [1], 1) == [21]


def test_a_pass_of_one_block_by_hand():
    assert vars(single._batch([7, 8], 5, [9], 4, 2, 99)) == {
        **{"ids": [7, 8, 0, 0], "previous_row": [-1] * 4, "position": [5, 6, 0, 0], "slot": [5, 6, 99, 99]},
        **{"keep": [0, 1], "forced": [9, -1]},
        **{"own": [0, 2], "own_start": [0, 0], "own_used": [7]},
        **{"trees": [0], "prefix_start": [0], "prefix_used": []},
    }
    assert single._batch([7, 8, 9], 0, [], 3, 1, 99).keep == [2]
    assert single._batch([7, 8, 9], 0, [], 3, 1, 99).forced == [-1]
