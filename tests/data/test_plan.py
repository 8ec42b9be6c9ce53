"""The order of training is arithmetic: a pure function of (seed, epoch) that uses every tree once."""

import random
from collections import Counter

from common.config import Train
from common.data import plan
from common.data.trees import Branch, Tree

import pytest
from hypothesis import given
from hypothesis import strategies as st


def tree(number: int, branches: int, prefix: int = 10) -> Tree:
    return Tree([number] * prefix, tuple(Branch(f"{number}.{b}", [1, 2], [3, 0]) for b in range(branches)))


def ids(groups) -> list[str]:
    return [branch.id for members in groups for t in members for branch in t.branches]


TREES = [tree(i, 1 + i % 5) for i in range(40)]
sizes = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 60)), min_size=1, max_size=40)


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    def order(seed: int, epoch: int) -> list[str]:
        return ids(plan.epoch(TREES, seed, epoch, questions_per_step=8))

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@given(sizes, st.integers(1, 20), st.integers(0, 5))
def test_every_question_is_in_exactly_one_step_and_no_step_is_empty(shapes, questions_per_step, seed):
    trees = plan.bounded([tree(i, n, p) for i, (n, p) in enumerate(shapes)], questions_per_step)
    steps = plan.epoch(trees, seed, 0, questions_per_step)
    assert Counter(ids(steps)) == Counter(f"{i}.{b}" for i, (n, _) in enumerate(shapes) for b in range(n))
    assert len(steps) == plan.steps_per_epoch(trees, questions_per_step)
    assert all(steps)


@given(sizes, st.integers(30, 200))
def test_packs_keep_to_their_size_where_a_question_fits(shapes, pack_tokens):
    trees = [tree(i, n, p) for i, (n, p) in enumerate(shapes)]
    packs = plan.fill(trees, pack_tokens)
    assert all(packs), "no pack is empty"
    for members in packs:
        assert sum(map(len, members)) <= pack_tokens or [len(t.branches) for t in members] == [1]
    assert Counter(ids(packs)) == Counter(ids([trees]))


@given(sizes, st.integers(1, 8))
def test_ranks_share_every_tree_once_and_no_one_has_a_whole_tree_more_than_another(shapes, ranks):
    trees = [tree(i, n, p) for i, (n, p) in enumerate(shapes)]
    shares = plan.share(trees, ranks)
    assert len(shares) == ranks
    assert Counter(ids(shares)) == Counter(ids([trees]))
    assert shares[0] or not trees, "a rank without a share takes the first one's packs for an example"
    tokens = [sum(map(len, members)) for members in shares]
    assert max(tokens) - min(tokens) <= max(map(len, trees))
    most = max(tokens)
    giver = tokens.index(most)
    for i, others in enumerate(shares):
        for a in shares[giver] if i != giver and most > (1 + plan.EVEN) * sum(tokens) / ranks else ():
            changed = [(most - len(a) + len(b), tokens[i] + len(a) - len(b)) for b in [(), *others]]
            assert min(map(max, changed)) >= most, "a tree given or changed for another would have made the most less"
    assert plan.share(trees, 1) == [sorted(trees, key=len, reverse=True)]


def test_ranks_get_the_same_where_that_is_possible():
    trees = [tree(i, 1, prefix) for i, prefix in enumerate((26, 26, 16, 16, 16))]  # and 4 tokens each
    assert sorted(sum(map(len, members)) for members in plan.share(trees, 2)) == [60, 60]
    assert plan.fill([], 100) == []


@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 10))
def test_a_split_tree_keeps_prefix_and_branches_within_the_limits(branches, max_tokens, max_questions):
    whole = tree(7, branches, prefix=5)
    parts = list(whole.split(max_tokens, max_questions))
    assert [b for part in parts for b in part.branches] == list(whole.branches)
    for part in parts:
        assert part.prefix_ids == whole.prefix_ids
        assert len(part.branches) <= max_questions
        assert len(part) <= max_tokens or len(part.branches) == 1


def test_steps_are_of_nearly_equal_size():
    counts = [len(ids([step])) for step in plan.epoch(TREES, 0, 0, questions_per_step=20)]
    assert all(15 <= count <= 25 for count in counts)


# ---- by hand -------------------------------------------------------------------------------------------------------


def of_questions(*counts: int) -> list[Tree]:
    """Trees a, b, c … of so many questions."""
    return [
        Tree([], tuple(Branch(f"{name}{i}", [1], [0]) for i in range(n)))
        for name, n in zip("abcdefgh", counts, strict=False)
    ]


def of_tokens(*sizes: int) -> list[Tree]:
    """Trees of one question and so many tokens."""
    return [Tree([], (Branch(str(size), [1] * size, []),)) for size in sizes]


def tokens(groups) -> list[list[int]]:
    return [[len(t) for t in members] for members in groups]


def names(groups) -> str:
    """Each group's trees by their letter."""
    return " ".join("".join(t.branches[0].id[0] for t in members) for members in groups)


@pytest.mark.parametrize(("questions", "a_step", "steps"), [(12, 4, 3), (11, 4, 2), (12, 12, 1), (3, 4, 1), (7, 1, 7)])
def test_an_epoch_has_as_many_steps_as_are_full(questions, a_step, steps):
    assert plan.steps_per_epoch(of_questions(1, questions - 1), a_step) == steps


@pytest.mark.parametrize(
    ("seed", "epoch", "order", "steps"),  # of a, b, c, d, e, f with 1, 2, 3, 1, 2, 3 questions: three shares of four
    [(0, 0, "aedbfc", "aed bf c"), (0, 1, "aecdfb", "aec df b"), (1, 0, "cbefda", "cb ef da")],
)
def test_the_order_of_an_epoch_is_pinned(seed, epoch, order, steps):
    shuffled = list("abcdef")
    random.Random(f"{seed} {epoch}").shuffle(shuffled)
    assert "".join(shuffled) == order
    assert names(plan.epoch(of_questions(1, 2, 3, 1, 2, 3), seed, epoch, questions_per_step=4)) == steps


def test_an_epoch_leaves_the_trees_in_their_order():
    trees = list(TREES)
    plan.epoch(trees, 0, 0, 8)
    assert trees == TREES


def test_only_trees_of_more_questions_than_a_step_are_split():
    whole = of_questions(5, 2, 1)
    parts = plan.bounded(whole, 2)
    assert [[b.id for b in part.branches] for part in parts] == [
        ["a0", "a1"],
        ["a2", "a3"],
        ["a4"],
        ["b0", "b1"],
        ["c0"],
    ]
    assert plan.bounded(whole, 5) == whole


@pytest.mark.parametrize(
    ("sizes", "ranks", "shares"),
    [
        ((3, 9, 5), 1, [[9, 5, 3]]),
        ((2, 4, 3), 2, [[4], [3, 2]]),
        ((1, 1, 4, 2), 2, [[4], [2, 1, 1]]),
        ((5,), 3, [[5], [], []]),
        ((), 2, [[], []]),
        ((3, 3, 2, 2, 2), 2, [[2, 2, 2], [3, 3]]),  # 7 and 5 by the largest first; then 3 changed for 2
        ((6, 9, 4, 9, 6, 7, 7), 3, [[9, 7], [9, 7], [4, 6, 6]]),  # of 15, 15, 18 the last changes a 7 for a 6, twice
        ((493, 493, 3, 3, 2, 2, 2), 2, [[493, 2, 2, 2], [493, 3, 3]]),  # 500 of 499: more than 0.2 % above the mean
        ((494, 494, 3, 3, 2, 2, 2), 2, [[494, 3, 2, 2], [494, 3, 2]]),  # 501 of 500: not more
    ],
)
def test_shares_of_ranks_are_pinned(sizes, ranks, shares):
    assert tokens(plan.share(of_tokens(*sizes), ranks)) == shares


@pytest.mark.parametrize(
    ("sizes", "pack_tokens", "packs"),
    [
        ((5, 5), 10, [[5, 5]]),
        ((5, 6), 10, [[6], [5]]),
        ((2, 3, 4, 5, 6), 10, [[6, 4], [5, 3, 2]]),  # 9 and 11 by the largest first
        ((2, 3, 3, 6), 10, [[6, 2], [3, 3]]),  # 9 and 5 by the first that fits
        ((3, 12), 10, [[12], [3]]),
        ((12, 9, 1, 9, 1), 10, [[12], [9, 1], [9, 1]]),
        ((12, 6, 3, 3, 2), 10, [[12], [6, 2], [3, 3]]),
        ((4, 4, 4, 3, 3, 2), 10, [[4, 4, 2], [4, 3, 3]]),
        ((7, 4, 3, 3, 3), 10, [[7, 3], [4, 3, 3]]),
    ],
)
def test_packs_are_pinned(sizes, pack_tokens, packs):
    assert tokens(plan.fill(of_tokens(*sizes), pack_tokens)) == packs


def test_a_tree_larger_than_a_pack_is_split_there():
    whole = Tree([7] * 5, tuple(Branch(name, [1, 2], [3, 0]) for name in "abc"))
    assert [[len(t) for t in members] for members in plan.fill([whole], 17)] == [[17]]
    assert [[[b.id for b in t.branches] for t in members] for members in plan.fill([whole], 16)] == [
        [["a", "b"]],
        [["c"]],
    ]
    assert [[[b.id for b in t.branches] for t in members] for members in plan.fill([whole], 12)] == (
        [[["a"]], [["b"]], [["c"]]]
    )


def test_trees_of_a_size_keep_their_order_in_packs_and_shares():
    trees = of_questions(2, 2, 2, 2, 2)
    assert names(plan.fill(trees, 8)) == "ad be c"
    assert names(plan.share(trees, 2)) == "ace bd"


# ---- a whole training ----------------------------------------------------------------------------------------------


def planned(seed: int = 0, **train) -> plan.Plan:
    return plan.Plan(TREES, Train(**{"questions_per_step": 8, **train}), seed)


def test_a_plan_has_as_many_steps_as_its_epochs_and_at_most_max_steps():
    questions = sum(len(t.branches) for t in TREES)
    assert questions == 120
    assert (planned().steps_per_epoch, planned().total_steps) == (15, 15)
    assert planned(epochs=2.5).total_steps == 38  # 37.5, rounded to even
    assert planned(epochs=0.01).total_steps == 1
    assert planned(epochs=3.0, max_steps=20).total_steps == 20
    assert planned(max_steps=20).total_steps == 15


def test_a_step_is_that_of_its_epoch_whatever_was_asked_before():
    p = planned(seed=3)
    epochs = [plan.epoch(p.trees, 3, number, 8) for number in range(3)]
    for step in (0, 14, 15, 44, 16, 0):
        assert p.step(step) == epochs[step // 15][step % 15]


def test_a_plans_trees_have_no_more_questions_than_a_step():
    assert max(len(t.branches) for t in planned(questions_per_step=3).trees) == 3
    assert Counter(ids([planned(questions_per_step=3).trees])) == Counter(ids([TREES]))


def test_without_shared_prefixes_each_question_reads_a_prefix_of_its_own():
    assert planned().rows(TREES) == TREES
    rows = planned(share_prefixes=False).rows(TREES)
    assert [len(row.branches) for row in rows] == [1] * 120
    assert rows[1] == Tree(TREES[1].prefix_ids, TREES[1].branches[:1])


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_ranks_and_packs_of_a_step_hold_it_once(share_prefixes):
    p = planned(share_prefixes=share_prefixes)
    trees = p.step(4)
    packs = [pack for rank in range(3) for pack in p.share(trees, rank, 3, pack_tokens=60)]
    assert Counter(ids(packs)) == Counter(ids([trees]))
    assert p.share(trees, 1, 3, 60) == plan.fill(plan.share(p.rows(trees), 3)[1], 60)
