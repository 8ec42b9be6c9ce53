"""Greedy answers to many questions in a stream of forward passes: what is read and what is decoded share each pass.

A pass takes one token of every answer that is growing, and fills up with whole paragraphs (and their questions) that
have not been read. So passes stay large to the end, and the base's 4-bit weights are dequantised for many tokens at
once. An answer that has ended gives its stretch of the arena back, and a paragraph whose last answer has (continuous
batching, as Orca has it: https://www.usenix.org/conference/osdi22/presentation/yu).

The host lays the next pass out while the device computes the last one, so it learns one pass late that an answer has
ended; that answer's one token too many is dropped.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from common.data.tokens import Ids
from common.data.trees import Branch, Tree
from common.decode.forward import Decoder, NextTokens, Pass
from common.decode.kv_cache import BlockAllocator
from common.errors import UserError
from common.model.memory import BUDGET

import torch


@dataclass
class ActiveAnswer:
    """One question's, growing."""

    branch: Branch
    stretch: tuple[int, int]  # of the arena: start, length; the last token of an answer is never read
    position: int  # of its first token
    script: Ids | None  # what to draw whatever the model says
    launched: int = 0  # tokens asked for, the last of which may be unknown yet
    row: int = -1  # in the last draw
    token_ids: Ids = field(default_factory=list)
    logprob: float = 0.0
    ties: int = 0
    ended: bool = False


@dataclass
class ActiveTree:
    """A tree that is in the arena: its prefix, and its answers."""

    prefix_ids: Ids
    stretch: tuple[int, int]
    answers: list[ActiveAnswer]

    def given_back(self, arena: BlockAllocator) -> bool:
        """Whether all answers have ended; the prefix is then given back."""
        over = all(answer.ended for answer in self.answers)
        if over:
            arena.give_back(*self.stretch)
        return over


def answers(
    reader: Decoder, trees: Iterable[Tree], stops: Sequence[int], limit: int, pass_tokens: int,
    scripts: Mapping[str, Ids] | None = None, check: Callable[[], None] = lambda: None,
) -> Iterator[ActiveAnswer]:  # fmt: skip
    """Every question's answer as it ends: at a stop token, or at `limit` tokens.

    One tree at most is asked for ahead of what there is room for, so several readers can share them out as they go.
    A pass has at most `pass_tokens` tokens, or one question's alone. `scripts`: by question, what is drawn in place of
    the most probable tokens. `check` is called between passes; what it raises ends the work.
    """
    if limit < 1:
        raise ValueError("an answer has one token at least")
    most = min(pass_tokens, reader.arena_tokens)
    parts = (part for tree in trees for part in tree.split(max_tokens=most))
    fitting = (part for tree in parts for part in _that_fit(tree, reader.arena_tokens, limit))
    upcoming = next(fitting, None)
    arena, ended = BlockAllocator(reader.arena_tokens), set(stops)
    reading: list[ActiveTree] = []
    before: tuple[NextTokens, NextTokens, list[ActiveAnswer], torch.cuda.Event | None] | None = None
    while upcoming or reading:
        check()
        growing = sum(_grows(a, limit) for r in reading for a in r.answers)
        new: list[ActiveTree] = []
        while upcoming and (growing + len(upcoming) <= pass_tokens or not growing):
            admitted = _admit(upcoming, arena, limit, scripts or {})
            if admitted is None:
                break
            new.append(admitted)
            growing += len(upcoming)
            upcoming = next(fitting, None)
        asked, laid_out = _lay_out(reader.device, new, reading, limit)
        now = None
        if laid_out is not None:
            drawn = reader.read(laid_out, before[0].token if before else None)
            on_host, event = drawn.to_host(wait=False), None
            if reader.device.type == "cuda":
                event = torch.cuda.Event()
                event.record()
            now = drawn, on_host, asked, event
        # a pass that is under way may still write where an answer has ended, but before any that is laid out later
        for answer in _take_in(before, ended, limit) if before else ():
            arena.give_back(*answer.stretch)
            yield answer
        before = now
        reading = [r for r in (*reading, *new) if not r.given_back(arena)]


def _grows(answer: ActiveAnswer, limit: int) -> bool:
    return not answer.ended and answer.launched < limit


def _size(tree: Tree, limit: int) -> int:
    """Of a tree's stretches together."""
    return len(tree) + len(tree.branches) * (limit - 1)


def _that_fit(tree: Tree, arena_tokens: int, limit: int) -> Iterator[Tree]:
    """The tree, or parts of it whose stretches fit the arena."""
    if _size(tree, limit) <= arena_tokens:
        yield tree
    elif len(tree.branches) > 1:
        for part in tree.split(max_questions=len(tree.branches) // 2):
            yield from _that_fit(part, arena_tokens, limit)
    else:
        raise UserError(
            f"question {tree.branches[0].id} takes {_size(tree, limit)} tokens, and memory is for {arena_tokens}; "
            f"raise {BUDGET}; or lower window.context"
        )


def _admit(tree: Tree, arena: BlockAllocator, limit: int, scripts: Mapping[str, Ids]) -> ActiveTree | None:
    """Stretches for the tree's prefix and for each of its answers; None where the arena has no room."""
    lengths = [len(tree.prefix_ids), *(len(branch.prompt_ids) + limit - 1 for branch in tree.branches)]
    taken: list[tuple[int, int]] = []
    for length in lengths:
        start = arena.take(length)
        if start is None:
            for stretch in taken:
                arena.give_back(*stretch)
            return None
        taken.append((start, length))
    prefix, *own = taken
    grown = [
        ActiveAnswer(b, stretch, len(tree.prefix_ids), scripts.get(b.id))
        for b, stretch in zip(tree.branches, own, strict=True)
    ]
    return ActiveTree(tree.prefix_ids, prefix, grown)


def _lay_out(
    device: torch.device, new: list[ActiveTree], reading: list[ActiveTree], limit: int
) -> tuple[list[ActiveAnswer], Pass | None]:
    """The answers that draw a token in the next pass, and the pass; no pass where there is nothing to read."""
    ids: Ids = []
    drawn: list[int] = []
    position: list[int] = []
    slot: list[int] = []
    keep: list[int] = []
    forced: list[int] = []
    asked: list[ActiveAnswer] = []
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
        put(r.prefix_ids, 0, r.stretch[0], r.stretch[0])
    first = len(ids)
    drawn.extend([-1] * first)
    for r in (*reading, *new):
        grown = [a for a in r.answers if _grows(a, limit)]
        for a in grown:
            prompt, n, start = a.branch.prompt_ids, a.launched, a.stretch[0]
            if n:  # the token that it drew last
                put([0], a.position + len(prompt) + n - 1, start + len(prompt) + n - 1, start)
                drawn.append(a.row)
            else:
                put(prompt, a.position, start, start)
                drawn.extend([-1] * len(prompt))
            a.launched, a.row = n + 1, len(asked)
            keep.append(len(ids) - 1)
            forced.append(a.script[n] if a.script and n < len(a.script) else -1)
            asked.append(a)
        if grown:
            trees.append(len(ids) - first)
            prefix_start.append(r.stretch[0])
            prefix_used.append(len(r.prefix_ids))
    if not ids:
        return [], None
    lists = {
        "ids": ids, "drawn": drawn, "position": position, "slot": slot, "keep": keep, "forced": forced,
        "own": own, "own_start": [*own_start, 0], "own_used": own_used,
        "trees": trees, "prefix_start": [*prefix_start, 0], "prefix_used": prefix_used,
    }  # fmt: skip
    return asked, Pass.on(device, lists, first)


def _take_in(
    draw: tuple[NextTokens, NextTokens, list[ActiveAnswer], torch.cuda.Event | None], stops: set[int], limit: int
) -> Iterator[ActiveAnswer]:
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
