"""Trees of questions that share a paragraph. Training, evaluation and a single query all read what `build_trees` makes.

Imports no torch.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from common.config import Prompt, Window
from common.data.prompt import CONTEXT, QUESTION, SHARED, TARGET, chat_text, text
from common.data.squad import Example
from common.data.tokens import Ids, encode, tokens_within
from common.data.window import context_windows, fit
from common.errors import UserError


@dataclass(frozen=True)
class Branch:
    """One question below its paragraph's prefix."""

    id: str
    prompt_ids: Ids  # what follows the prefix, up to and with "Answer:"; never empty
    answer_ids: Ids  # the target with EOS; empty when the answer is to be decoded

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class Tree:
    """A paragraph once, and its questions as branches."""

    prefix_ids: Ids
    branches: tuple[Branch, ...]

    def __len__(self) -> int:
        return len(self.prefix_ids) + sum(map(len, self.branches))

    def split(self, max_tokens: float = math.inf, max_questions: float = math.inf) -> Iterator["Tree"]:
        """Trees of at most that many tokens and branches (one branch at least), the prefix repeated in each."""
        group: list[Branch] = []
        for branch in self.branches:
            size = len(self.prefix_ids) + sum(map(len, group)) + len(branch)
            if group and (size > max_tokens or len(group) == max_questions):
                yield Tree(self.prefix_ids, tuple(group))
                group = []
            group.append(branch)
        yield Tree(self.prefix_ids, tuple(group))


@dataclass(frozen=True)
class Trees:
    trees: list[Tree]
    counts: dict[str, int]  # what the window did; see `build_trees`


@dataclass(frozen=True)
class _Row:
    """One question in one window, as text."""

    id: str
    context: str
    prompt: str
    target: str  # " answer", or "" when it is to be decoded


def build_trees(
    examples: Iterable[Example],
    tokenizer: Any,
    window: Window,
    *,
    train: bool,
    options: Prompt = Prompt(),
    window_tokenizer: Any = None,
    progress: bool = True,
) -> Trees:
    """Cut every text to its window, tokenise, and gather the questions of a paragraph below their common prefix.

    Where the question comes first nothing is shared: each has a tree of its own.

    `train` adds the first gold answer and EOS; there a question goes to the first window that holds its answer, or is
    dropped. Counts: `questions`, `truncated` (context cut, or read in windows), `dropped_outside` and `dropped_long`
    (train: the answer lies outside the window, or has more tokens than `window.answer`).
    """
    counts = Counter(questions=0, truncated=0)
    if train:
        counts.update(dropped_outside=0, dropped_long=0)
    rows = list(_rows(list(examples), window_tokenizer or tokenizer, window, options, train, counts))
    if options.chat:  # the template has its own BOS
        rows = [replace(row, prompt=chat_text(tokenizer, row.prompt)) for row in rows]
    groups: dict[object, list[Branch]] = {}
    wholes = encode(tokenizer, [row.prompt + row.target for row in rows], progress, special=not options.chat)
    for row, encoding in zip(rows, wholes, strict=True):
        ids = encoding.ids
        n = tokens_within(encoding, len(row.prompt))
        if n is None or encoding.token_to_chars(len(ids) - 1) is None:
            what = "merges the prompt and the answer" if n is None else "adds an end to every text"
            raise UserError(f"question {row.id}: this tokenizer {what}; name another by base.tokenizer")
        answer_ids = [*ids[n:], tokenizer.eos_token_id] if train else []
        if len(answer_ids) > window.answer:
            counts["dropped_long"] += 1
            continue
        # a question whose ids differ from the others' in what all begin with gets a tree of its own
        same = SHARED.format(row.context)
        start = row.prompt.rfind(same) if options.order == "context" else -1
        shared = tokens_within(encoding, start + len(same)) if start >= 0 else None
        groups.setdefault((row.context, *ids[: shared or n]), []).append(Branch(row.id, ids[:n], answer_ids))
    return Trees([_tree(group) for group in groups.values()], dict(counts))


def prompt_texts(
    examples: Iterable[Example], tokenizer: Any, window: Window, options: Prompt = Prompt()
) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(id, prompt) of every question, cut to the window, for a model that takes text; counts as of `build_trees`."""
    counts = Counter(questions=0, truncated=0)
    rows = list(_rows(list(examples), tokenizer, window, options, False, counts))
    return [(row.id, row.prompt) for row in rows], dict(counts)


def _tree(branches: list[Branch]) -> Tree:
    """Lift the longest common id prefix out of the branches; the last prompt token stays in its branch."""
    low, high = min(b.prompt_ids for b in branches), max(b.prompt_ids for b in branches)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    n = min(same, min(len(b.prompt_ids) for b in branches) - 1)
    return Tree(low[:n], tuple(Branch(b.id, b.prompt_ids[n:], b.answer_ids) for b in branches))


def _rows(
    examples: list[Example], tokenizer: Any, window: Window, options: Prompt, train: bool, counts: Counter[str]
) -> Iterator[_Row]:
    limit = window.context - options.spare(window)
    window = replace(window, context=limit, stride=min(window.stride, limit))
    contexts = list(dict.fromkeys(e.context.strip() for e in examples))
    windows = dict(zip(contexts, context_windows(contexts, tokenizer, window), strict=True))
    questions = list(dict.fromkeys(e.question.strip() for e in examples))
    cut = dict(zip(questions, fit(questions, QUESTION, window.question, tokenizer), strict=True))
    answered: dict[str, str] = {}  # a paragraph with the questions so far, and their answers
    for example in examples:
        context, question = example.context.strip(), example.question.strip()
        question = question[: cut[question]].rstrip()
        spans = windows[context]
        counts["questions"] += 1
        counts["truncated"] += spans != [(0, len(context))]
        target = ""
        if train:
            answer = example.answers[0]
            start = answer.start - (len(example.context) - len(example.context.lstrip()))
            start += len(answer.text) - len(answer.text.lstrip())
            stop = start + len(answer.text.strip())
            spans = [(a, b) for a, b in spans if a <= start and stop <= b][:1]
            counts["dropped_outside"] += not spans
            target = TARGET.format(answer.text.strip())
        for a, b in spans:
            part = context[a:b].strip()
            whole = text(part, question, options.order)
            if options.earlier:  # which `order=context` goes with
                answered.setdefault(context, CONTEXT.format(part))
                whole = answered[context] + QUESTION.format(question)
                gold = example.answers[0].text.strip() if example.answers else ""
                answered[context] = whole + TARGET.format(gold)
            yield _Row(example.id, part, options.before + whole, target)
