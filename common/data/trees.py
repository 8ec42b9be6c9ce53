"""Trees: the ids of a paragraph once, and its questions as branches below it. Imports no torch."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from common.config import Prompt, Window
from common.data import prompt
from common.data.prompt import CONTEXT, QUESTION, TARGET, chat_text
from common.data.squad import Example
from common.data.tokens import Ids, Tokenizer, Tokenizers, encode, holds_special, tokens_within
from common.data.window import context_windows, fit
from common.errors import UserError


@dataclass(frozen=True)
class Branch:
    """One question below its paragraph's prefix; its length is in tokens."""

    id: str
    prompt_ids: Ids  # from behind the prefix up to "Answer:"; never empty
    answer_ids: Ids  # the target with EOS; empty when the answer is to be decoded
    offset: int = 0  # characters of the example's context before that part, where the answer is to be decoded

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class Tree:
    """A prefix that its branches share; its length is in tokens, the prefix counted once."""

    prefix_ids: Ids
    branches: tuple[Branch, ...]
    context: str = ""  # the part that is read, where answers are to be decoded

    def __len__(self) -> int:
        return len(self.prefix_ids) + sum(map(len, self.branches))

    @property
    def longest(self) -> int:
        """Tokens of the longest question, its prefix included."""
        return len(self.prefix_ids) + max(map(len, self.branches))

    def split(self, max_tokens: float = math.inf, max_questions: float = math.inf) -> Iterator["Tree"]:
        """Trees of at most that many tokens and branches (one branch at least), the prefix repeated in each."""
        group: list[Branch] = []
        for branch in self.branches:
            size = len(self.prefix_ids) + sum(map(len, group)) + len(branch)
            if group and (size > max_tokens or len(group) == max_questions):
                yield replace(self, branches=tuple(group))
                group = []
            group.append(branch)
        yield replace(self, branches=tuple(group))


@dataclass(frozen=True)
class Trees:
    trees: list[Tree]
    counts: dict[str, int]  # of questions, by what the window did to them; see `build_trees`


@dataclass(frozen=True)
class Row:
    """One question in one window, as text."""

    id: str
    context: str  # the part in the window
    offset: int  # characters of the example's context before it
    prompt: str
    target: str  # " answer", or "" when it is to be decoded


def build_trees(
    examples: Iterable[Example], tokenizers: Tokenizers, window: Window, options: Prompt = Prompt(), *, train: bool
) -> Trees:
    """Trees of all questions, each text cut to its window, and how many questions were cut or dropped.

    Questions of a paragraph form one tree if the context comes first in the prompt; otherwise each forms its own.
    `train` adds the first gold answer and EOS, and keeps of each question the first window that holds that answer.
    A line break in it, which would end a decoded answer, is trained as a space, which scores alike. Counts:
    `questions`, `truncated` (context cut, or read in several windows); train: `dropped_outside` (no window holds the
    answer), `dropped_long` (more tokens than `window.answer`), `dropped_special` (a special token in the answer; absent
    if 0). Raises `UserError` if the tokenizer merges prompt and answer, or appends a token to every text.
    """
    tokenizer, counts = tokenizers.own, Counter(questions=0, truncated=0)
    if train:
        counts.update(dropped_outside=0, dropped_long=0)
    rows = list(rows_of(list(examples), tokenizers.window, window, options, train, counts))
    if options.chat:  # the template has its own BOS
        rows = [replace(row, prompt=chat_text(tokenizer, row.prompt)) for row in rows]
    groups: dict[tuple[str, *tuple[int, ...]], list[Branch]] = {}
    wholes = encode(tokenizer, [row.prompt + row.target for row in rows], special=not options.chat, progress=True)
    for row, encoding in zip(rows, wholes, strict=True):
        ids = encoding.ids
        n = tokens_within(encoding, len(row.prompt))
        if n is None or encoding.token_to_chars(len(ids) - 1) is None:
            what = "merges the prompt and the answer" if n is None else "adds an end to every text"
            raise UserError(f"question {row.id}: this tokenizer {what}; name another by base.tokenizer")
        if train and holds_special(tokenizer, row.target):
            counts["dropped_special"] += 1
            continue
        answer_ids = [*ids[n:], tokenizer.eos_token_id] if train else []
        if len(answer_ids) > window.answer:
            counts["dropped_long"] += 1
            continue
        # grouped by ids: a question that the tokenizer merges with the shared text gets a tree of its own
        same = prompt.shared(row.context, options)
        start = -1 if same is None else row.prompt.rfind(same)
        prefix = tokens_within(encoding, start + len(same or "")) if start >= 0 else None
        groups.setdefault((row.context, *ids[: prefix or n]), []).append(
            Branch(row.id, ids[:n], answer_ids, 0 if train else row.offset)
        )
    trees = (tree_of(group, "" if train else key[0]) for key, group in groups.items())
    return Trees(list(trees), dict(counts))


def prompt_texts(
    examples: Iterable[Example], tokenizer: Tokenizer, window: Window, options: Prompt = Prompt()
) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(id, prompt) of every question, cut to the window, for a model that takes text; counts as of `build_trees`."""
    counts = Counter(questions=0, truncated=0)
    rows = rows_of(list(examples), tokenizer, window, options, False, counts)
    return [(row.id, row.prompt) for row in rows], dict(counts)


def parts_read(
    examples: Iterable[Example], tokenizer: Tokenizer, window: Window, options: Prompt = Prompt()
) -> dict[str, list[tuple[str, int]]]:
    """The parts of its context that are read, by question id, each with its first character's place in the context."""
    read: dict[str, list[tuple[str, int]]] = {}
    for row in rows_of(list(examples), tokenizer, window, options, False, Counter()):
        read.setdefault(row.id, []).append((row.context, row.offset))
    return read


def tree_of(branches: list[Branch], context: str = "") -> Tree:
    """The tree of branches that hold whole prompts: their longest common prefix, less a prompt's last token."""
    low, high = min(b.prompt_ids for b in branches), max(b.prompt_ids for b in branches)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    n = min(same, min(len(b.prompt_ids) for b in branches) - 1)
    return Tree(low[:n], tuple(replace(b, prompt_ids=b.prompt_ids[n:]) for b in branches), context)


def on_one_line(text: str) -> str:
    """An answer as it can be decoded: without space around it, each line break a space."""
    return " ".join(line.strip() for line in text.strip().split("\n"))


def rows_of(
    examples: list[Example], tokenizer: Tokenizer, window: Window, options: Prompt, train: bool, counts: Counter[str]
) -> Iterator[Row]:
    """One row per question and window; `counts` grows by what the window did."""
    limit = window.context - options.spare(window)
    window = replace(window, context=limit, stride=min(window.stride, limit))
    contexts = list(dict.fromkeys(e.context.strip() for e in examples))
    windows = dict(zip(contexts, context_windows(contexts, tokenizer, window), strict=True))
    questions = list(dict.fromkeys(e.question.strip() for e in examples))
    cut = dict(zip(questions, fit(questions, QUESTION, window.question, tokenizer), strict=True))
    answered: dict[str, str] = {}  # context → the prompt so far, with its earlier questions and answers
    for example in examples:
        context, question = example.context.strip(), example.question.strip()
        question = question[: cut[question]].rstrip()
        spans, target = windows[context], ""
        counts["questions"] += 1
        counts["truncated"] += spans != [(0, len(context))]
        if train:
            answer = example.answers[0]
            start = answer.start - (len(example.context) - len(example.context.lstrip()))
            start += len(answer.text) - len(answer.text.lstrip())
            stop = start + len(answer.text.strip())
            spans = [(a, b) for a, b in spans if a <= start and stop <= b][:1]
            counts["dropped_outside"] += not spans
            target = TARGET.format(on_one_line(answer.text))
        for a, b in spans:
            part = context[a:b].strip()
            at = context.find(part, a) + len(example.context) - len(example.context.lstrip())
            whole = prompt.text(part, question, options)
            if options.earlier:  # the context comes first then: `Prompt` requires it
                answered.setdefault(context, CONTEXT.format(part))
                whole = answered[context] + QUESTION.format(question)
                gold = on_one_line(example.answers[0].text) if example.answers else ""
                answered[context] = whole + TARGET.format(gold)
            yield Row(example.id, part, at, options.before + whole, target)
