"""The order of training is arithmetic: a pure function of (seed, epoch) that uses every tree once."""

from collections import Counter

from common import plan
from common.prompt import Branch, Tree

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
