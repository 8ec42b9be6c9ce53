"""Greedy answers to many questions in a stream of forward passes: what is read and what is decoded share each pass.

A pass takes one token of every answer that is growing, and fills up with whole paragraphs (and their questions) that
have not been read. So passes stay large to the end, and the base's 4-bit weights are dequantised for many tokens at
once. A paragraph whose last answer has ended gives its stretch of the arena to the next (continuous batching, as Orca,
https://www.usenix.org/conference/osdi22/presentation/yu, has it).

The host lays the next pass out while the device computes the last one, so it learns one pass late that an answer has
ended; that answer's one token too many is dropped.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from common.prompt import Branch, Ids, Tree
from common.reader import Drawn, Pass, Reader

import torch


@dataclass
class Answer:
    """One question's, growing."""

    branch: Branch
    start: int  # of its stretch in the arena
    position: int  # of its first token
    script: Ids | None  # what to draw whatever the model says
    launched: int = 0  # tokens asked for, the last of which may be unknown yet
    row: int = -1  # in the last draw
    token_ids: Ids = field(default_factory=list)
    logprob: float = 0.0
    ties: int = 0
    ended: bool = False


@dataclass
class Reading:
    """A tree that is in the arena."""

    tree: Tree
    start: int
    size: int
    answers: list[Answer]


class Arena:
    """Stretches of `size` tokens, given out and taken back: first fit."""

    def __init__(self, size: int):
        self.free = [(0, size)]  # start, length; rising, never touching

    def take(self, length: int) -> int | None:
        """Where a stretch begins; None where no gap is that long."""
        for i, (start, gap) in enumerate(self.free):
            if gap >= length:
                self.free[i : i + 1] = [(start + length, gap - length)] if gap > length else []
                return start
        return None

    def give_back(self, start: int, length: int) -> None:
        merged: list[tuple[int, int]] = []
        for a, n in sorted([*self.free, (start, length)]):
            if merged and sum(merged[-1]) == a:
                merged[-1] = merged[-1][0], merged[-1][1] + n
            else:
                merged.append((a, n))
        self.free = merged


def answers(
    reader: Reader, trees: Sequence[Tree], stops: Sequence[int], limit: int, pass_tokens: int,
    scripts: Mapping[str, Ids] | None = None, check: Callable[[], None] = lambda: None,
) -> Iterator[Answer]:  # fmt: skip
    """Every question's answer as it ends: at a stop token, or at `limit` tokens.

    A pass has at most `pass_tokens` tokens, or one question's alone. `scripts`: by question, what is drawn in place of
    the most probable tokens. `check` is called between passes; what it raises ends the work.
    """
    if limit < 1:
        raise ValueError("an answer has one token at least")
    most = min(pass_tokens, reader.arena_tokens)
    parts = [part for tree in trees for part in tree.split(max_tokens=most)]
    waiting = deque(part for tree in parts for part in _that_fit(tree, reader.arena_tokens, limit))
    arena, ended = Arena(reader.arena_tokens), set(stops)
    reading: list[Reading] = []
    before: tuple[Drawn, Drawn, list[Answer], torch.cuda.Event | None] | None = None
    while waiting or reading:
        check()
        growing = sum(_grows(a, limit) for r in reading for a in r.answers)
        new: list[Reading] = []
        while waiting and (growing + len(waiting[0]) <= pass_tokens or not growing):
            size = _size(waiting[0], limit)
            start = arena.take(size)
            if start is None:
                break
            new.append(_admit(waiting.popleft(), start, size, scripts or {}))
            growing += len(new[-1].tree)
        asked, laid_out = _lay_out(reader.device, new, reading, limit)
        now = None
        if laid_out is not None:
            drawn = reader.read(laid_out, before[0].token if before else None)
            on_host, event = drawn.to("cpu"), None
            if reader.device.type == "cuda":
                event = torch.cuda.Event()
                event.record()
            now = drawn, on_host, asked, event
        if before:
            yield from _take_in(before, ended, limit)
        before, reading = now, reading + new
        for r in [r for r in reading if all(a.ended for a in r.answers)]:
            # a pass that is under way may still write there, but comes before any that is laid out from here on
            arena.give_back(r.start, r.size)
            reading.remove(r)


def _grows(answer: Answer, limit: int) -> bool:
    return not answer.ended and answer.launched < limit


def _size(tree: Tree, limit: int) -> int:
    """Of a tree's stretch: the last token of an answer is never read."""
    return len(tree) + len(tree.branches) * (limit - 1)


def _that_fit(tree: Tree, arena_tokens: int, limit: int) -> Iterator[Tree]:
    """The tree, or parts of it whose stretches fit the arena."""
    if _size(tree, limit) <= arena_tokens:
        yield tree
    elif len(tree.branches) > 1:
        for part in tree.split(max_questions=len(tree.branches) // 2):
            yield from _that_fit(part, arena_tokens, limit)
    else:
        raise ValueError(f"question {tree.branches[0].id} needs {_size(tree, limit)} tokens of the arena")


def _admit(tree: Tree, start: int, size: int, scripts: Mapping[str, Ids]) -> Reading:
    at, position, grown = start + len(tree.prefix_ids), len(tree.prefix_ids), []
    room = (size - len(tree)) // len(tree.branches)
    for branch in tree.branches:
        grown.append(Answer(branch, at, position, scripts.get(branch.id)))
        at += len(branch.prompt_ids) + room
    return Reading(tree, start, size, grown)


def _lay_out(
    device: torch.device, new: list[Reading], reading: list[Reading], limit: int
) -> tuple[list[Answer], Pass | None]:
    """The answers that draw a token in the next pass, and the pass; no pass where there is nothing to read."""
    ids: Ids = []
    drawn: list[int] = []
    position: list[int] = []
    slot: list[int] = []
    keep: list[int] = []
    forced: list[int] = []
    asked: list[Answer] = []
    own, own_start, own_used = [0], [], []
    trees, prefix_start, prefix_used = [0], [], []

    def put(tokens: Ids, at: int, where: int, start: int) -> None:
        """Tokens whose first has position `at` and slot `where`, of a stretch that begins at `start`."""
        ids.extend(tokens)
        position.extend(range(at, at + len(tokens)))
        slot.extend(range(where, where + len(tokens)))
        own.append(len(ids))
        own_start.append(start)
        own_used.append(where + len(tokens) - start)

    for r in new:
        put(r.tree.prefix_ids, 0, r.start, r.start)
    first = len(ids)
    drawn.extend([-1] * first)
    for r in (*reading, *new):
        grown = [a for a in r.answers if _grows(a, limit)]
        for a in grown:
            prompt, n = a.branch.prompt_ids, a.launched
            if n:  # the token that it drew last
                put([0], a.position + len(prompt) + n - 1, a.start + len(prompt) + n - 1, a.start)
                drawn.append(a.row)
            else:
                put(prompt, a.position, a.start, a.start)
                drawn.extend([-1] * len(prompt))
            a.launched, a.row = n + 1, len(asked)
            keep.append(len(ids) - 1)
            forced.append(a.script[n] if a.script and n < len(a.script) else -1)
            asked.append(a)
        if grown:
            trees.append(len(ids) - first)
            prefix_start.append(r.start)
            prefix_used.append(len(r.tree.prefix_ids))
    if not ids:
        return [], None
    reach = (own, [*own_start, 0], own_used, trees, [*prefix_start, 0], prefix_used)
    return asked, Pass.lay_out(
        device, first, ids=ids, drawn=drawn, position=position, slot=slot, keep=keep, forced=forced, reach=reach
    )


def _take_in(
    draw: tuple[Drawn, Drawn, list[Answer], torch.cuda.Event | None], stops: set[int], limit: int
) -> Iterator[Answer]:
    """Give each answer what it drew; yield those that end by it."""
    _, drawn, asked, event = draw
    if event:
        event.synchronize()
    for a, token, logprob, tie in zip(
        asked, drawn.token.tolist(), drawn.logprob.tolist(), drawn.tie.tolist(), strict=True
    ):
        if a.ended:
            continue
        a.token_ids.append(token)
        a.logprob += logprob
        a.ties += tie
        if token in stops or len(a.token_ids) == limit:
            a.ended = True
            yield a
