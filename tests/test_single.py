"""A single answer is the greedy one, whatever is drafted; drafts come from the prompt."""

from common import single
from common.config import Eval, Window
from common.decode import stop_ids
from common.errors import UserError
from common.reader import Pass
from common.single import DRAFT, Single, draft_from
from tests.test_decode import LIMIT, demo_trees, system, truth

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


def questions(tokenizer, paragraphs: int):
    return [(tree, branch, tree.prefix_ids + branch.prompt_ids) for tree in demo_trees(tokenizer, paragraphs)
            for branch in tree.branches]  # fmt: skip


def test_every_answer_equals_generate_token_for_token(tiny_base):
    model, tokenizer = system(tiny_base)
    engine = Single(model, stop_ids(tokenizer), LIMIT, 600)
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
        expected = out.gather(1, torch.tensor(answer.token_ids)[:, None]).sum().item()
        assert answer.logprob == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("draft", [[], [1] * DRAFT, "right", "half right"])
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
    if draft == "right":
        assert found.passes == 3  # the first token, 16 more, the last three
        assert found.accepted == found.drafted == 17
    if draft == "half right":
        assert found.passes == 6  # four tokens a pass after the first
    if draft == [1] * DRAFT:
        assert found.drafted > 0


def test_a_script_is_what_is_drawn(tiny_base):
    model, tokenizer = system(tiny_base)
    _, _, prompt = questions(tokenizer, 1)[0]
    stop = tokenizer.eos_token_id
    span = prompt[10:19]
    found = Single(model, [stop], 32, 600).answer(prompt, script=[*span, stop])
    assert found.token_ids == [*span, stop]
    assert found.passes < len(span), "spans of the prompt are drafted"
    assert found.accepted > 0
    only_first = Single(model, [stop], 4, 600).answer(prompt, script=[77])
    assert only_first.token_ids[0] == 77
    assert len(only_first.token_ids) <= 4


def test_a_prompt_that_is_too_long_is_refused(tiny_base):
    model, _ = system(tiny_base)
    engine = Single(model, [], 4, 40)
    assert len(engine.answer([5] * 36).token_ids) == 4
    for length in (0, 37):
        with pytest.raises(UserError, match=f"a prompt of {length} tokens; 1 to 36 can be asked"):
            engine.answer([5] * length)


def test_padding_changes_nothing_and_is_kept_apart(tiny_base):
    """As a graph has it, on a CPU."""
    model, tokenizer = system(tiny_base)
    _, _, prompt = questions(tokenizer, 1)[0]
    engine = Single(model, [], 4, len(prompt) + 60)
    reader, unused = engine.reader, engine.reader.arena_tokens - 1
    reader.layers.keys.fill_(torch.nan)
    reader.layers.values.fill_(torch.nan)
    n, drawn = len(prompt), []
    for new, before, padded in ((prompt, 0, n), ([5, 6, 7], n, 3), (prompt, 0, n + 20), ([5, 6, 7], n, DRAFT + 1)):
        lists = single._lists(new, before, [], padded, 3 if before else 1, unused)
        drawn.append(reader.read(Pass.on(reader.device, lists, len(new))))
    for plain, with_padding in zip(drawn[:2], drawn[2:], strict=True):
        assert torch.equal(plain.token, with_padding.token)
        torch.testing.assert_close(plain.logprob, with_padding.logprob)
    assert reader.layers.keys[:, n + 3 : unused].isnan().all()
    assert not reader.layers.keys[:, : n + 3].isnan().any()


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


def test_the_plain_engine_answers_alike_a_token_a_pass(tiny_base):
    model, tokenizer = system(tiny_base)
    stops, window = stop_ids(tokenizer), Window(context=500)
    fast, plain = (single.engine(model, stops, window, Eval(engine)) for engine in ("auto", "plain"))
    assert (fast.name, plain.name) == ("drafts", "plain")
    for _, _, prompt in questions(tokenizer, 2):
        for to_the_limit in (False, True):
            ticks: list[int] = []
            ours, theirs = (e.answer(prompt, None, to_the_limit, ticks.append) for e in (fast, plain))
            assert ours.token_ids == theirs.token_ids
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
            assert sum(ticks) == 2 * len(ours.token_ids)
            assert theirs.passes == len(theirs.token_ids)
            assert not to_the_limit or len(ours.token_ids) == 32
