"""The stream answers what each question alone would answer, whatever its passes and its arena hold."""

import gc
import random
import weakref

from common.data.trees import Branch, Tree
from common.decode import batched
from common.decode.forward import Decoder, NextTokens, Pass
from common.decode.kv_cache import BlockAllocator
from common.errors import UserError
from common.model.pack import build_pack
from tests.decode.test_predict import demo_trees, system

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

STOPS = [7, 8, 9]


def answers_of(reader, trees, **more):
    return {a.branch.id: a for a in batched.answers(reader, trees, more.pop("stops", STOPS), more.pop("limit", 6),
                                                   more.pop("pass_tokens", 512), **more)}  # fmt: skip


def tokens_of(answers) -> dict[str, list[int]]:
    return {id_: a.token_ids for id_, a in answers.items()}


@pytest.fixture
def passes(monkeypatch):
    """Every pass that is read, as it is laid out."""
    seen: list[Pass] = []
    read = Decoder.read
    monkeypatch.setattr(Decoder, "read", lambda self, new, before=None: seen.append(new) or read(self, new, before))
    return seen


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=60))
def test_stretches_never_overlap_and_all_come_back(orders):
    arena, given_out = BlockAllocator(100), []
    for length, back in orders:
        if back and given_out:
            arena.give_back(*given_out.pop(random.Random(length).randrange(len(given_out))))
        elif (start := arena.take(length)) is not None:
            given_out.append((start, length))
        else:
            assert max((n for _, n in arena.free), default=0) < length
        used = [slot for start, n in (*given_out, *arena.free) for slot in range(start, start + n)]
        assert sorted(used) == list(range(100))
    for stretch in given_out:
        arena.give_back(*stretch)
    assert arena.free == [(0, 100)]


@pytest.mark.parametrize(
    ("pass_tokens", "arena_tokens", "padded"), [(64, 4096, 700), (900, 1500, 300), (4096, 500, 500), (1000, 8192, 1000)]
)
def test_answers_do_not_depend_on_passes_and_arena(tiny_base, passes, pass_tokens, arena_tokens, padded):
    """`padded`: up to as many tokens a pass is laid out as a GPU would record it."""
    model, tokenizer = system(tiny_base)
    trees = demo_trees(tokenizer, 8)
    expected = answers_of(Decoder(model, 8192), trees, pass_tokens=8192)
    assert len({tuple(ids) for ids in tokens_of(expected).values()}) > 3
    passes.clear()
    reader = Decoder(model, arena_tokens, padded)
    found = answers_of(reader, trees, pass_tokens=pass_tokens)
    assert tokens_of(found) == tokens_of(expected)
    assert all(found[id_].logprob == pytest.approx(answer.logprob, abs=1e-4) for id_, answer in expected.items())
    assert reader.recorded.met
    assert any(len(new.ids) > padded for new in passes) == (padded == 300)
    longest = max(len(t.prefix_ids) + len(b) for t in trees for b in t.branches)
    assert max(len(new.ids) for new in passes) <= max(pass_tokens, longest)
    assert all(slot < arena_tokens for new in passes for slot in new.slot.tolist())


def said_after(path: list[int]) -> int:
    """A model of a kind: the next token is a function of all that a token sees, in order."""
    return sum((i + 1) * (token + 3) for i, token in enumerate(path)) % 23


class Paths:
    """Stands for a reader: its arena holds tokens in place of keys, so that what each pass sees can be looked up."""

    device = torch.device("cpu")

    def __init__(self, arena_tokens: int):
        self.arena_tokens, self.arena = arena_tokens, [-1] * arena_tokens

    def read(self, new: Pass, before: torch.Tensor | None = None) -> NextTokens:
        ids = [
            before[row].item() if row >= 0 else id_
            for row, id_ in zip(new.drawn.tolist(), new.ids.tolist(), strict=True)
        ]
        slots, positions = new.slot.tolist(), new.position.tolist()
        for slot, id_ in zip(slots, ids, strict=True):
            self.arena[slot] = id_
        own, start, used, trees, prefix, prefix_used = new.reach.host
        token = []
        for row in new.keep.tolist():
            at = next(i for i in range(len(used)) if own[i] <= row < own[i + 1])
            tree = next(i for i in range(len(prefix_used)) if row - new.reach.first < trees[i + 1])
            seen = self.arena[prefix[tree] : prefix[tree] + prefix_used[tree]] + self.arena[start[at] :][: used[at]]
            assert slots[row] == start[at] + used[at] - 1
            assert positions[row] == len(seen) - 1
            token.append(said_after(seen))
        drawn = torch.tensor(token)
        return NextTokens(drawn, torch.zeros(len(token)), torch.zeros(len(token), dtype=torch.bool))


tokens = st.integers(0, 22)
some_trees = st.lists(
    st.tuples(
        st.lists(tokens, min_size=1, max_size=9),
        st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=9,
)


@given(some_trees, st.integers(1, 60), st.integers(25, 90), st.integers(1, 9), st.sets(tokens, max_size=8))
def test_any_schedule_answers_as_each_question_alone_would(shapes, pass_tokens, arena_tokens, limit, stops):
    trees = [
        Tree(prefix, tuple(Branch(f"{t}.{b}", prompt, []) for b, prompt in enumerate(prompts)))
        for t, (prefix, prompts) in enumerate(shapes)
    ]
    found = answers_of(Paths(arena_tokens), trees, pass_tokens=pass_tokens, limit=limit, stops=sorted(stops))
    assert sorted(found) == sorted(branch.id for tree in trees for branch in tree.branches)
    for tree in trees:
        for branch in tree.branches:
            path = tree.prefix_ids + branch.prompt_ids
            expected: list[int] = []
            while len(expected) < limit and not set(expected) & stops:
                expected.append(said_after(path + expected))
            assert found[branch.id].token_ids == expected


def test_what_is_read_and_what_is_decoded_share_passes(tiny_base, passes):
    model, tokenizer = system(tiny_base)
    trees = demo_trees(tokenizer, 8)
    found = answers_of(Decoder(model, 8192), trees, pass_tokens=1000, stops=[], limit=4)
    assert any((new.drawn >= 0).any() and (new.drawn < 0).any() for new in passes)
    read = sum(len(new.ids) for new in passes)
    assert read == sum(map(len, trees)) + 3 * len(found), "each paragraph once, each token but the last once"


def test_an_answer_that_has_ended_costs_one_token_more_at_most(tiny_base, passes):
    model, tokenizer = system(tiny_base)
    (tree,) = demo_trees(tokenizer, 1)
    everything = list(range(len(tokenizer)))
    found = answers_of(Decoder(model, 2048), [tree], stops=everything, limit=9, pass_tokens=2048)
    assert all(len(a.token_ids) == 1 for a in found.values())
    assert len(passes) <= 2


def test_a_script_is_what_is_drawn_and_the_rest_is_the_models(tiny_base):
    model, tokenizer = system(tiny_base)
    trees = demo_trees(tokenizer, 3)
    reader, some = Decoder(model, 4096), trees[0].branches[0].id
    free = answers_of(reader, trees)
    scripted = answers_of(reader, trees, scripts={some: [20, 21, 7]})
    assert scripted[some].token_ids == [20, 21, 7]
    assert tokens_of({**scripted, some: free[some]}) == tokens_of(free)
    echo = answers_of(reader, trees, scripts={some: free[some].token_ids[:2]})
    assert tokens_of(echo) == tokens_of(free), "what it would have drawn anyway changes nothing"


def test_ties_are_counted(tiny_base):
    model, tokenizer = system(tiny_base)
    trees = demo_trees(tokenizer, 1)
    assert sum(a.ties for a in answers_of(Decoder(model, 1024), trees).values()) == 0
    head = model.lm_head.weight.data
    head[:] = head[:1].clone()
    tied = answers_of(Decoder(model, 1024), trees, stops=[], limit=3)
    assert all(a.ties == 3 for a in tied.values())


def test_a_question_that_no_arena_holds_is_named(tiny_base):
    model, _ = system(tiny_base)
    tree = Tree([5] * 20, (Branch("long", [6] * 30, []),))
    with pytest.raises(UserError, match="question long takes 55 tokens, and memory is for 54"):
        answers_of(Decoder(model, 54), [tree])
    assert answers_of(Decoder(model, 55), [tree])["long"].token_ids


def test_a_readers_memory_is_given_back_without_waiting_for_a_collector(tiny_base):
    model, tokenizer = system(tiny_base)
    reader = Decoder(model, 2048, 512)
    answers_of(reader, demo_trees(tokenizer, 2))
    arena, between = weakref.ref(reader.layers.keys), weakref.ref(reader.recorded.x)
    gc.collect()
    gc.disable()
    try:
        del reader
        assert arena() is between() is None
    finally:
        gc.enable()


def test_being_asked_to_stop_ends_it_between_passes(tiny_base, passes):
    model, tokenizer = system(tiny_base)

    def check():
        if len(passes) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answers_of(Decoder(model, 1024), demo_trees(tokenizer, 4), stops=[], check=check)
    assert len(passes) == 2


def test_a_pass_draws_what_the_model_says(tiny_base):
    model, tokenizer = system(tiny_base)
    (tree,) = demo_trees(tokenizer, 1)
    reader, batch = Decoder(model, 2048), build_pack([tree])
    asked, new = batched._lay_out(reader.device, [batched._admit(tree, BlockAllocator(2048), 6, {})], [], 6)
    assert new.ids.tolist() == batch.input_ids.tolist()
    assert new.position.tolist() == batch.layout.position.tolist()
    drawn = reader.read(new)
    for a, token, logprob in zip(asked, drawn.token, drawn.logprob, strict=True):
        ids = torch.tensor([tree.prefix_ids + a.branch.prompt_ids])
        expected = torch.log_softmax(model(input_ids=ids).logits[0, -1].float(), -1)
        assert token == expected.argmax()
        assert logprob.item() == pytest.approx(expected.max().item(), abs=1e-4)
