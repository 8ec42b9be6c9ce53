"""The trees of each optimizer step: a pure function of (seed, epoch), so resuming is arithmetic. Imports no torch."""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.config import Train
from common.data.trees import Tree

EVEN = 0.002  # share of the mean load by which ranks may differ: less than a step's time varies by itself


@dataclass
class Plan:
    """All steps of a training. Every rank computes the same plan."""

    trees: list[Tree]  # of at most `train.questions_per_step` questions each
    train: Train
    seed: int
    _epoch: tuple[int, list[list[Tree]]] = field(default=(-1, []), repr=False)  # the last one asked for

    def __post_init__(self) -> None:
        self.trees = bounded(self.trees, self.train.questions_per_step)

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.trees, self.train.questions_per_step)

    @property
    def total_steps(self) -> int:
        steps = max(1, round(self.train.epochs * self.steps_per_epoch))
        return min(steps, self.train.max_steps or steps)

    def rows(self, trees: Sequence[Tree]) -> list[Tree]:
        """`trees` as they are computed: unchanged, or without shared prefixes one tree per question."""
        if self.train.share_prefixes:
            return list(trees)
        return [row for tree in trees for row in tree.split(max_questions=1)]

    def step(self, number: int) -> list[Tree]:
        """The trees of a step, counted from 0."""
        n, i = divmod(number, self.steps_per_epoch)
        if self._epoch[0] != n:
            self._epoch = n, epoch(self.trees, self.seed, n, self.train.questions_per_step)
        return self._epoch[1][i]

    def share(self, trees: Sequence[Tree], rank: int, ranks: int, pack_tokens: int) -> list[list[Tree]]:
        """One rank's trees of a step, by pack."""
        return fill(share(self.rows(trees), ranks)[rank], pack_tokens)


def bounded(trees: Sequence[Tree], max_questions: int) -> list[Tree]:
    """Split trees of more questions than one step has; the rest stays as it is."""
    return [part for tree in trees for part in tree.split(max_questions=max_questions)]


def steps_per_epoch(trees: Sequence[Tree], questions_per_step: int) -> int:
    return max(1, _questions(trees) // questions_per_step)


def epoch(trees: Sequence[Tree], seed: int, epoch: int, questions_per_step: int) -> list[list[Tree]]:
    """The trees of each step of one epoch: always `steps_per_epoch` of them, every tree in exactly one.

    Trees are shuffled, so a step mixes paragraphs of many articles. Tree i belongs to the step in whose equal share of
    the questions its first question falls; no step is empty where no tree exceeds `questions_per_step` (`bounded`).
    """
    order = list(trees)
    random.Random(f"{seed} {epoch}").shuffle(order)
    n_steps, n_questions = steps_per_epoch(order, questions_per_step), _questions(order)
    steps: list[list[Tree]] = [[] for _ in range(n_steps)]
    before = 0
    for tree in order:
        steps[before * n_steps // n_questions].append(tree)
        before += len(tree.branches)
    return steps


def share(trees: Sequence[Tree], ranks: int) -> list[list[Tree]]:
    """Divide a step's `trees` so that no rank has many more tokens than another.

    The largest first, each to who has least; then whoever has most gives a tree, or changes one for a smaller one, as
    long as that makes the most less and it is not within `EVEN` of the mean.
    """
    size = [len(tree) for tree in trees]
    shares, nothing = _largest_first(size, ranks), len(trees)
    size.append(0)
    tokens = [sum(size[i] for i in mine) for mine in shares]
    while max(tokens) > (1 + EVEN) * sum(tokens) / ranks:
        giver = tokens.index(max(tokens))
        most, taker, given, taken = min(
            (max(tokens[giver] - moved, tokens[rank] + moved), rank, i, j)
            for rank in range(ranks)
            if rank != giver
            for i in shares[giver]
            for j in (nothing, *shares[rank])
            if (moved := size[i] - size[j]) > 0
        )
        if most >= tokens[giver]:
            break
        shares[giver].remove(given)
        shares[taker].append(given)
        if taken != nothing:
            shares[taker].remove(taken)
            shares[giver].append(taken)
        for rank in (giver, taker):
            tokens[rank] = sum(size[i] for i in shares[rank])
    return [[trees[i] for i in mine] for mine in shares]


def _largest_first(size: Sequence[int], parts: int) -> list[list[int]]:
    """Numbers of `size` in parts: the largest first, each to the part that has least."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for i in sorted(range(len(size)), key=lambda i: -size[i]):
        least = tokens.index(min(tokens))
        shares[least].append(i)
        tokens[least] += size[i]
    return shares


def fill(trees: Sequence[Tree], pack_tokens: int) -> list[list[Tree]]:
    """As few packs as first-fit decreasing finds, each of at most `pack_tokens`; a larger tree is split.

    As many packs of nearly the same size, where these keep to `pack_tokens` too: a small last one would be slow.

    Only a single question that is longer than `pack_tokens` has a pack above it.
    """
    parts = [part for tree in trees for part in tree.split(max_tokens=pack_tokens)]
    packs: list[list[Tree]] = []
    room: list[int] = []
    for tree in sorted(parts, key=len, reverse=True):
        fits = next((i for i, free in enumerate(room) if len(tree) <= free), None)
        if fits is None:
            packs.append([])
            room.append(pack_tokens)
            fits = len(packs) - 1
        packs[fits].append(tree)
        room[fits] -= len(tree)
    equal = [[parts[i] for i in mine] for mine in _largest_first([len(part) for part in parts], len(packs))]
    return equal if all(len(pack) == 1 or sum(map(len, pack)) <= pack_tokens for pack in equal) else packs


def _questions(trees: Sequence[Tree]) -> int:
    return sum(len(tree.branches) for tree in trees)
