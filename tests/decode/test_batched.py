"""Batched decoding answers as each question alone, whatever the sizes of its passes and its KV cache."""

import gc
import random
import weakref

from common.config import Eval
from common.data.trees import Branch, Tree
from common.decode import batched
from common.decode.answers import Task
from common.decode.forward import Decoder, NextTokens, Pass
from common.decode.kv_cache import Block, BlockAllocator
from common.errors import UserError
from common.model.pack import build_pack
from tests.decode.test_predict import demo_trees, system

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

STOPS = [7, 8, 9]


def answers_of(decoder, trees, stops=STOPS, limit=6, pass_tokens=512, forced=None, check=lambda: None):
    task = Task(None, stops, limit, Eval(), check, forced or {}, "")
    return {a.branch.id: a for a in batched.answers(decoder, trees, task, pass_tokens)}


def tokens_of(answers) -> dict[str, list[int]]:
    return {id_: a.token_ids for id_, a in answers.items()}


@pytest.fixture
def passes(monkeypatch):
    """Every pass that is computed."""
    seen: list[Pass] = []
    forward = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, new, *rest: seen.append(new) or forward(self, new, *rest))
    return seen


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=60))
def test_blocks_never_overlap_and_all_are_freed(orders):
    cache, allocated = BlockAllocator(100), []
    for length, free in orders:
        if free and allocated:
            cache.free(allocated.pop(random.Random(length).randrange(len(allocated))))
        elif blocks := cache.allocate(length):
            allocated += blocks
            assert [block.length for block in blocks] == [length]
        else:
            assert max((n for _, n in cache.gaps), default=0) < length
        used = [slot for start, n in (*allocated, *cache.gaps) for slot in range(start, start + n)]
        assert sorted(used) == list(range(100))
    for block in allocated:
        cache.free(block)
    assert cache.gaps == [(0, 100)]


def test_blocks_are_allocated_together_or_not_at_all():
    cache = BlockAllocator(10)
    assert cache.allocate(3, 4) == [(0, 3), (3, 4)]
    cache.free(Block(0, 3))
    assert cache.allocate(3, 4) is None
    assert cache.gaps == [(0, 3), (7, 3)]
    assert cache.allocate(2, 3, 1) == [(0, 2), (7, 3), (2, 1)], "each in the first gap that holds it"
    assert cache.gaps == []


@pytest.mark.parametrize(
    ("pass_tokens", "cache_tokens", "padded"), [(64, 4096, 700), (900, 1500, 300), (4096, 500, 500), (1000, 8192, 1000)]
)
def test_answers_do_not_depend_on_passes_and_cache(tiny_base, passes, pass_tokens, cache_tokens, padded):
    """`padded`: passes of up to so many tokens are padded as for CUDA graphs."""
    model, tokenizer = system(tiny_base)
    trees = demo_trees(tokenizer, 8)
    expected = answers_of(Decoder(model, 8192), trees, pass_tokens=8192)
    assert len({tuple(ids) for ids in tokens_of(expected).values()}) > 3
    passes.clear()
    decoder = Decoder(model, cache_tokens, padded)
    found = answers_of(decoder, trees, pass_tokens=pass_tokens)
    assert tokens_of(found) == tokens_of(expected)
    assert all(found[id_].logprob == pytest.approx(answer.logprob, abs=1e-4) for id_, answer in expected.items())
    assert decoder.captured.seen
    assert any(len(new.ids) > padded for new in passes) == (padded == 300)
    longest = max(len(t.prefix_ids) + len(b) for t in trees for b in t.branches)
    assert max(len(new.ids) for new in passes) <= max(pass_tokens, longest)
    assert all(slot < cache_tokens for new in passes for slot in new.slot.tolist())


def next_after(path: list[int]) -> int:
    """The next token, a function of all tokens that are attended to, in order."""
    return sum((i + 1) * (token + 3) for i, token in enumerate(path)) % 23


class Paths:
    """A decoder whose cache holds tokens instead of keys, so that the tokens that each pass attends to can be read."""

    device = torch.device("cpu")

    def __init__(self, cache_tokens: int):
        self.cache_tokens, self.cache = cache_tokens, [-1] * cache_tokens

    def forward(self, new: Pass, previous: torch.Tensor | None = None, quotes: None = None) -> NextTokens:
        ids = [
            previous[row].item() if row >= 0 else id_
            for row, id_ in zip(new.previous_row.tolist(), new.ids.tolist(), strict=True)
        ]
        slots, positions = new.slot.tolist(), new.position.tolist()
        for slot, id_ in zip(slots, ids, strict=True):
            self.cache[slot] = id_
        own, start, used, trees, prefix, prefix_used = new.reach.host
        token = []
        for row in new.keep.tolist():
            at = next(i for i in range(len(used)) if own[i] <= row < own[i + 1])
            tree = next(i for i in range(len(prefix_used)) if row - new.reach.first < trees[i + 1])
            seen = self.cache[prefix[tree] : prefix[tree] + prefix_used[tree]] + self.cache[start[at] :][: used[at]]
            assert slots[row] == start[at] + used[at] - 1
            assert positions[row] == len(seen) - 1
            token.append(next_after(seen))
        return NextTokens(torch.tensor(token), torch.zeros(len(token)), torch.zeros(len(token), dtype=torch.bool))


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
def test_any_schedule_answers_as_each_question_alone_would(shapes, pass_tokens, cache_tokens, limit, stops):
    trees = [
        Tree(prefix, tuple(Branch(f"{t}.{b}", prompt, []) for b, prompt in enumerate(prompts)))
        for t, (prefix, prompts) in enumerate(shapes)
    ]
    found = answers_of(Paths(cache_tokens), trees, pass_tokens=pass_tokens, limit=limit, stops=sorted(stops))
    assert sorted(found) == sorted(branch.id for tree in trees for branch in tree.branches)
    for tree in trees:
        for branch in tree.branches:
            path = tree.prefix_ids + branch.prompt_ids
            expected: list[int] = []
            while len(expected) < limit and not set(expected) & stops:
                expected.append(next_after(path + expected))
            assert found[branch.id].token_ids == expected


def test_prefill_and_decode_share_passes(tiny_base, passes):
    model, tokenizer = system(tiny_base)
    trees = demo_trees(tokenizer, 8)
    found = answers_of(Decoder(model, 8192), trees, pass_tokens=1000, stops=[], limit=4)
    assert any((new.previous_row >= 0).any() and (new.previous_row < 0).any() for new in passes)
    read = sum(len(new.ids) for new in passes)
    assert read == sum(map(len, trees)) + 3 * len(found), "each paragraph once, each token but the last once"


def test_an_answer_that_has_ended_costs_one_token_more_at_most(tiny_base, passes):
    model, tokenizer = system(tiny_base)
    (tree,) = demo_trees(tokenizer, 1)
    everything = list(range(len(tokenizer)))
    found = answers_of(Decoder(model, 2048), [tree], stops=everything, limit=9, pass_tokens=2048)
    assert all(len(a.token_ids) == 1 for a in found.values())
    assert len(passes) <= 2


def test_forced_tokens_are_generated_and_the_rest_is_the_models(tiny_base):
    model, tokenizer = system(tiny_base)
    trees = demo_trees(tokenizer, 3)
    decoder, some = Decoder(model, 4096), trees[0].branches[0].id
    free = answers_of(decoder, trees)
    forced = answers_of(decoder, trees, forced={some: [20, 21, 7]})
    assert forced[some].token_ids == [20, 21, 7]
    assert tokens_of({**forced, some: free[some]}) == tokens_of(free)
    echo = answers_of(decoder, trees, forced={some: free[some].token_ids[:2]})
    assert tokens_of(echo) == tokens_of(free), "forcing the most probable tokens changes nothing"


def test_ties_are_counted(tiny_base):
    model, tokenizer = system(tiny_base)
    trees = demo_trees(tokenizer, 1)
    assert sum(a.ties for a in answers_of(Decoder(model, 1024), trees).values()) == 0
    head = model.lm_head.weight.data
    head[:] = head[:1].clone()
    tied = answers_of(Decoder(model, 1024), trees, stops=[], limit=3)
    assert all(a.ties == 3 for a in tied.values())


def test_a_question_that_exceeds_the_cache_is_named(tiny_base):
    model, _ = system(tiny_base)
    tree = Tree([5] * 20, (Branch("long", [6] * 30, []),))
    with pytest.raises(UserError, match="question long takes 55 tokens, and memory is for 54"):
        answers_of(Decoder(model, 54), [tree])
    assert answers_of(Decoder(model, 55), [tree])["long"].token_ids


def test_a_decoders_memory_is_freed_without_the_garbage_collector(tiny_base):
    model, tokenizer = system(tiny_base)
    decoder = Decoder(model, 2048, 512)
    answers_of(decoder, demo_trees(tokenizer, 2))
    cache, buffer = weakref.ref(decoder.layers.keys), weakref.ref(decoder.captured.x)
    gc.collect()
    gc.disable()
    try:
        del decoder
        assert cache() is buffer() is None
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


def test_a_pass_generates_the_models_next_tokens(tiny_base):
    model, tokenizer = system(tiny_base)
    (tree,) = demo_trees(tokenizer, 1)
    decoder, pack = Decoder(model, 2048), build_pack([tree])
    task = Task(tokenizer, STOPS, 6, Eval(), lambda: None, {}, "")
    rows, batch = batched.build_batch([], [batched.schedule(tree, BlockAllocator(2048), task)])
    assert batch.ids == pack.input_ids.tolist()
    assert batch.position == pack.layout.position.tolist()
    out = decoder.forward(batch.to(decoder.device))
    for answer, token, logprob in zip(rows, out.token, out.logprob, strict=True):
        ids = torch.tensor([tree.prefix_ids + answer.branch.prompt_ids])
        expected = torch.log_softmax(model(input_ids=ids).logits[0, -1].float(), -1)
        assert token == expected.argmax()
        assert logprob.item() == pytest.approx(expected.max().item(), abs=1e-4)
