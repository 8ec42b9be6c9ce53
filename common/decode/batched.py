"""Greedy answers to many questions by continuous batching (https://www.usenix.org/conference/osdi22/presentation/yu).

A pass takes one token of every growing answer and fills up with whole new trees. So passes stay large to the end, and
each dequantises the 4-bit weights for many tokens. The host builds a batch while the device computes the one before, so
an answer that has ended costs one token more. Batch composition changes rounding, which can flip a token between two
nearly equal logits.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from common.data.tokens import Ids
from common.data.trees import Branch, Tree
from common.decode.answers import Generation, Task
from common.decode.forward import Batch, Decoder, NextTokens, Pass
from common.decode.kv_cache import Block, BlockAllocator
from common.decode.spans import Automaton, Quotes
from common.errors import UserError
from common.model.memory import BUDGET

import torch


@dataclass(kw_only=True)
class ActiveAnswer(Generation):
    branch: Branch
    block: Block  # for the prompt and all answer tokens but the last, which is never fed back
    limit: int  # tokens
    forced: Ids  # the first answer tokens, whatever the logits are
    launched: int = 0  # tokens generated, the last one perhaps in a pass in flight
    quotes: Automaton | None = None  # of its context, where an answer is one
    row: int = -1  # of the last pass's output
    ended: bool = False

    @property
    def growing(self) -> bool:
        return not self.ended and self.launched < self.limit


@dataclass
class ActiveTree:
    prefix_ids: Ids
    block: Block  # for the prefix
    answers: list[ActiveAnswer]

    @property
    def ended(self) -> bool:
        return all(answer.ended for answer in self.answers)


class InFlight(NamedTuple):
    """A pass whose output may not be on the host yet."""

    rows: list[ActiveAnswer]  # the answers that the output's rows belong to
    out: NextTokens  # on the device
    on_host: NextTokens
    copied: torch.cuda.Event | None  # None: the device is the host


def answers(decoder: Decoder, trees: Iterable[Tree], task: Task, pass_tokens: int) -> Iterator[ActiveAnswer]:
    """Every question's answer as it ends. Raises `UserError` if a question exceeds the KV cache.

    At most one tree is taken from `trees` ahead of its pass, so that several decoders can share them. A pass has at
    most `pass_tokens` tokens, or one question's alone.
    """
    limit, capacity, stop_tokens = task.max_new_tokens, decoder.cache_tokens, set(task.stop_tokens)
    stops = torch.tensor(task.stop_tokens, device=decoder.device)
    if limit < 1:
        raise ValueError("an answer has one token at least")
    parts, cache = fitting(trees, pass_tokens, capacity, lambda tree: limit - 1), BlockAllocator(capacity)
    upcoming = next(parts, None)
    active: list[ActiveTree] = []
    in_flight: InFlight | None = None
    while upcoming or active:
        task.check()
        tokens = sum(answer.growing for tree in active for answer in tree.answers)
        new: list[ActiveTree] = []
        while upcoming and (tokens + len(upcoming) <= pass_tokens or not tokens):
            if not (scheduled := schedule(upcoming, cache, task)):
                break
            new.append(scheduled)
            tokens += len(upcoming)
            upcoming = next(parts, None)
        rows, batch = build_batch(active, new)
        launched = None
        if batch.ids:
            new_pass, before = batch.to(decoder.device), in_flight.out if in_flight else None
            out = decoder.forward(new_pass, before.token if before else None, quotes_of(rows, new_pass, before, stops))
            on_host = out.to_host(wait=False)
            copied = torch.cuda.current_stream().record_event() if decoder.device.type == "cuda" else None
            launched = InFlight(rows, out, on_host, copied)
        for answer in process_outputs(in_flight, stop_tokens) if in_flight else ():
            # Safe to free: the pass in flight may still write here, but every later pass is queued behind it.
            cache.free(answer.block)
            yield answer
        in_flight = launched
        active += new
        for tree in (tree for tree in active if tree.ended):
            cache.free(tree.block)
        active = [tree for tree in active if not tree.ended]


def fitting(
    trees: Iterable[Tree], pass_tokens: int, capacity: int, per_answer: Callable[[Tree], int]
) -> Iterator[Tree]:
    """The trees, in parts that fit a pass and a KV cache of `capacity` tokens. Raises `UserError` where none does.

    `per_answer`: slots that each answer needs beside the prompt.
    """
    for tree in trees:
        for part in tree.split(max_tokens=min(pass_tokens, capacity)):
            yield from _split_to_fit(part, capacity, per_answer)


def _split_to_fit(tree: Tree, capacity: int, per_answer: Callable[[Tree], int]) -> Iterator[Tree]:
    """The tree, or parts of it whose blocks fit a KV cache of `capacity` tokens."""
    size = len(tree) + len(tree.branches) * per_answer(tree)
    if size <= capacity:
        yield tree
    elif len(tree.branches) > 1:
        for part in tree.split(max_questions=len(tree.branches) // 2):
            yield from _split_to_fit(part, capacity, per_answer)
    else:
        takes = f"question {tree.branches[0].id} takes {size} tokens, and memory is for {capacity}"
        raise UserError(f"{takes}; raise {BUDGET}; or lower window.context")


def schedule(tree: Tree, cache: BlockAllocator, task: Task) -> ActiveTree | None:
    """The tree with blocks for its prefix and each of its answers; None if the KV cache has no space for all."""
    limit, branches = task.max_new_tokens, tree.branches
    blocks = cache.allocate(len(tree.prefix_ids), *(len(branch.prompt_ids) + limit - 1 for branch in branches))
    if blocks is None:
        return None
    quotes = task.quotes(tree)
    own = [
        ActiveAnswer(branch=b, block=x, limit=limit, forced=task.forced.get(b.id, []), quotes=quotes)
        for b, x in zip(branches, blocks[1:], strict=True)
    ]
    return ActiveTree(tree.prefix_ids, blocks[0], own)


def build_batch(active: list[ActiveTree], new: list[ActiveTree]) -> tuple[list[ActiveAnswer], Batch]:
    """The next pass, and the answer that each row of its output belongs to; it is empty if no answer grows."""
    batch, rows = Batch(), list[ActiveAnswer]()
    for tree in new:
        batch.add(tree.prefix_ids, tree.block.start)
    for tree in (*active, *new):
        before = len(batch.ids)
        for answer in (a for a in tree.answers if a.growing):
            prompt, n, position = answer.branch.prompt_ids, answer.launched, len(tree.prefix_ids)
            if n:  # the last token may not be on the host yet
                batch.add([0], answer.block.start, position, len(prompt) + n - 1, answer.row)
            else:
                batch.add(prompt, answer.block.start, position)
            answer.launched, answer.row = n + 1, len(rows)
            batch.keep.append(len(batch.ids) - 1)
            batch.forced += answer.forced[n : n + 1] or [-1]
            rows.append(answer)
        if added := len(batch.ids) - before:
            batch.trees.append(batch.trees[-1] + added)
            batch.prefix_start[-1:] = [tree.block.start, 0]
            batch.prefix_used.append(len(tree.prefix_ids))
    return rows, batch


def quotes_of(rows: list[ActiveAnswer], new: Pass, before: NextTokens | None, stops: torch.Tensor) -> Quotes | None:
    """The automata of a pass's rows in their states after the pass before; None where answers need not be quotes."""
    automata = [answer.quotes for answer in rows if answer.quotes]
    return Quotes(automata, stops, before and before.state, new.previous_row[new.keep]) if automata else None


def process_outputs(done: InFlight, stop_tokens: set[int]) -> Iterator[ActiveAnswer]:
    """Waits for a pass and appends its next tokens to their answers; yields the answers that end."""
    if done.copied:
        done.copied.synchronize()
    for answer, *found in zip(done.rows, *(x.tolist() for x in done.on_host[:3]), strict=True):
        if not answer.ended and answer.append(*found, stop_tokens, answer.limit):
            answer.ended = True
            yield answer
