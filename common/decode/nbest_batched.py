"""The n-best engine: searches of many questions by continuous batching over one KV cache (`common.decode.nbest`).

A tree's first pass reads its paragraph and its questions. Then each question has a block of the KV cache of its own:
its whole prompt, and `WIDTH` lanes behind it. A pass takes up to `WIDTH` paths of a question, each in the lane that
holds most of it already. A question waits while its pass computes; others fill the next one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import NamedTuple

from common.data.trees import Branch, Tree
from common.decode.answers import Task, need_finite
from common.decode.batched import fitting
from common.decode.forward import Batch, Decoder
from common.decode.kv_cache import Block, BlockAllocator
from common.decode.nbest import WIDTH, Path, Search, searches
from common.model.memory import LOGITS_SHARE

import numpy as np
import torch
from torch import Tensor


class Feed(NamedTuple):
    """A path to expand, in a lane that holds its first `cached` tokens."""

    path: Path
    lane: int
    cached: int


@dataclass
class Question:
    branch: Branch
    search: Search
    prompt: int  # tokens, those of the tree's prefix included
    block: Block  # for the prompt, then for the lanes
    lane_tokens: int
    lanes: list[tuple[int, ...]] = field(default_factory=lambda: [()] * WIDTH)  # the path that each lane holds
    waits: bool = False  # for a pass in flight

    def feeds(self) -> list[Feed]:
        """The paths to expand next; none where the search is done."""
        free, out = set(range(WIDTH)), list[Feed]()
        for path in self.search.wanted():
            # of the lane with most of the path; the last token is fed in any case
            shared = {lane: _alike(self.lanes[lane], path.ids[:-1]) for lane in free}
            lane = max(free, key=lambda lane: (shared[lane], -lane))
            free.remove(lane)
            self.lanes[lane] = path.ids
            out.append(Feed(path, lane, shared[lane]))
        return out


class InFlight(NamedTuple):
    """A pass whose output may not be on the host yet."""

    rows: list[tuple[Question, Path]]
    counts: list[int]  # log-probabilities of each row
    logprobs: Tensor  # of all rows, one after the other
    copied: torch.cuda.Event | None  # None: the device is the host


def answers(decoder: Decoder, trees: Iterable[Tree], task: Task, pass_tokens: int) -> Iterator[Question]:
    """Every question as its search ends. Raises `UserError` if one exceeds the KV cache.

    As `batched.answers`; a pass has at most `pass_tokens` tokens, or those of one tree or one question.
    """
    lane_tokens, cache = task.max_new_tokens - 1, BlockAllocator(decoder.cache_tokens)  # the last token is never fed

    def per_answer(tree: Tree) -> int:
        """Slots beside a question's prompt: lanes, and a copy of what it shares with others."""
        return WIDTH * lane_tokens + (len(tree.prefix_ids) if len(tree.branches) > 1 else 0)

    parts = fitting(trees, pass_tokens, decoder.cache_tokens, per_answer)
    upcoming, most_rows = next(parts, None), pass_tokens * LOGITS_SHARE
    active: list[Question] = []
    in_flight: InFlight | None = None
    while upcoming or active:
        task.check()
        asked: list[tuple[Question, list[Feed]]] = []
        tokens = rows = 0
        finished = set[int]()
        for question in (q for q in active if not q.waits):
            if tokens < pass_tokens and rows < most_rows:
                if feeds := question.feeds():
                    asked.append((question, feeds))
                    tokens += sum(len(path.ids) - cached for path, _, cached in feeds)
                    rows += len(feeds)
                else:
                    finished.add(id(question))
                    cache.free(question.block)
                    yield question
        active = [q for q in active if id(q) not in finished]
        new: list[tuple[Tree, Block, list[Question]]] = []
        while upcoming and ((tokens + len(upcoming) <= pass_tokens and rows < most_rows) or not tokens):
            if not (scheduled := schedule(upcoming, cache, task, lane_tokens)):
                break
            new.append((upcoming, *scheduled))
            tokens += len(upcoming)
            rows += len(upcoming.branches)
            upcoming = next(parts, None)
        batch, asking = build_batch(asked, new)
        launched = launch(decoder, batch, asking) if asking else None
        for tree, block, questions in new:
            if block not in (question.block for question in questions):
                decoder.copy(block, [question.block for question in questions], len(tree.prefix_ids))
                cache.free(block)  # every later pass is queued behind the copies
            active += questions
        if in_flight:
            process_outputs(in_flight, decoder.dtype)
        in_flight = launched


def schedule(tree: Tree, cache: BlockAllocator, task: Task, lane_tokens: int) -> tuple[Block, list[Question]] | None:
    """The prefix's block, and the questions in theirs; None if the KV cache has no space for all."""
    prefix, alone = len(tree.prefix_ids), len(tree.branches) == 1
    sizes = [prefix + len(branch.prompt_ids) + WIDTH * lane_tokens for branch in tree.branches]
    # a single question's prefix is read where its block begins: nothing is copied
    blocks = cache.allocate(*([] if alone else [prefix]), *sizes)
    if blocks is None:
        return None
    own = zip(tree.branches, searches(tree, task), blocks if alone else blocks[1:], strict=True)
    return blocks[0], [
        Question(branch, search, prefix + len(branch.prompt_ids), block, lane_tokens) for branch, search, block in own
    ]


def build_batch(
    asked: Sequence[tuple[Question, list[Feed]]], new: Sequence[tuple[Tree, Block, list[Question]]]
) -> tuple[Batch, list[tuple[Question, Path]]]:
    """The next pass, and the path that each row of its logits comes after."""
    batch, rows = Batch(), list[tuple[Question, Path]]()
    for tree, block, _ in new:
        batch.add(tree.prefix_ids, block.start)
    first = len(batch.ids)

    def end_tree(prefix: Block, used: int) -> None:
        batch.trees.append(len(batch.ids) - first)
        batch.prefix_start[-1:] = [prefix.start, 0]
        batch.prefix_used.append(used)

    def add(question: Question, path: Path, ids: list[int], start: int, position: int, cached: int) -> None:
        batch.add(ids, start, position, cached)
        batch.keep.append(len(batch.ids) - 1)
        rows.append((question, path))
        question.waits = True

    for tree, block, questions in new:
        for question in questions:
            (path,), prefix = question.search.wanted(), len(tree.prefix_ids)
            add(question, path, question.branch.prompt_ids, question.block.start + prefix, prefix, 0)
        end_tree(block, len(tree.prefix_ids))
    for question, feeds in asked:
        for path, lane, cached in feeds:
            start = question.block.start + question.prompt + lane * question.lane_tokens
            add(question, path, list(path.ids[cached:]), start, question.prompt, cached)
        end_tree(question.block, question.prompt)
    return batch, rows


def launch(decoder: Decoder, batch: Batch, rows: list[tuple[Question, Path]]) -> InFlight:
    """Queues a pass and the copy of the log-probabilities that its searches ask for."""
    device = decoder.device
    tokens = [question.search.tokens(path) for question, path in rows]
    counts = [len(t) for t in tokens]
    logits = decoder.logits(batch.to(device)).float()
    asked = torch.from_numpy(np.stack([np.repeat(np.arange(len(rows)), counts), np.concatenate(tokens)]))
    row, token = asked.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else asked
    logprobs = (logits[row, token] - logits.logsumexp(-1)[row]).to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream().record_event() if device.type == "cuda" else None
    return InFlight(rows, counts, logprobs, copied)


def process_outputs(done: InFlight, dtype: torch.dtype) -> None:
    """Waits for a pass and hands its log-probabilities to the searches. Raises `UserError` for one that is not finite.

    `dtype`: that was computed in.
    """
    if done.copied:
        done.copied.synchronize()
    ends = np.cumsum([0, *done.counts])
    for (question, path), (a, b) in zip(done.rows, pairwise(ends), strict=True):
        found = done.logprobs[a:b].numpy()
        need_finite(f"question {question.branch.id}", float(found.sum()), dtype)
        question.search.found(path, found)
        question.waits = False


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
