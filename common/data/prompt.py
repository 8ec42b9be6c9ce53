"""The one prompt: its text, its token ids, its window, and the trees of questions that share a paragraph.

Training, evaluation and a single query all come through `build_trees`, so they read the same ids. Ids are the
tokenizer's ids of the whole text, as any other tool would make them; parts are never tokenised apart. Imports no torch
(a tokenizer is handed in).
"""

import bisect
import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from common.config import Config, Prompt, Window
from common.data import squad
from common.data.squad import Example
from common.errors import UserError

from tqdm import tqdm

VERSION = "1"
_CONTEXT = "Context: {}"
_QUESTION = "\n\nQuestion: {}\n\nAnswer:"
_TARGET = " {}"  # then EOS
_ORDERS = {  # of each, the text of context and question
    "context": _CONTEXT + _QUESTION,
    "question": "Question: {1}\n\nContext: {0}\n\nAnswer:",
    "both": "Question: {1}\n\nContext: {0}\n\nQuestion: {1}\n\nAnswer:",
}
_CHAT = (  # where only a chat answers: one message of the user
    "Answer the question with the shortest span of the context that answers it, copied word for word. Reply with "
    "nothing else.\n\n{}"
)
_SHARED = _CONTEXT + _QUESTION.partition(" {}")[0]  # what all questions of a paragraph begin with

MANY = 5000  # texts: so many take a while
SHOT_WORDS = 120  # of a paragraph that is shown with its answer

Ids = list[int]


def fingerprint(options: Prompt = Prompt()) -> str:
    """Changes with any byte of the prompt."""
    parts = [VERSION, _CONTEXT, _QUESTION, _TARGET]
    parts += [_ORDERS[options.order]] if options.order != "context" else []
    parts += [_CHAT] if options.chat else []
    parts += ["earlier"] if options.earlier else []
    parts += [options.before] if options.before else []
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def text(context: str, question: str, order: str = "context") -> str:
    """The prompt of one question, the same bytes for every system."""
    return _ORDERS[order].format(context, question)


def message(prompt: str) -> str:
    """A prompt as the one message of a chat."""
    return _CHAT.format(prompt)


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


def fill(options: Prompt, train: Iterable[Example]) -> Prompt:
    """The text of `options.shots`: of as many articles one question each, of paragraphs of at most `SHOT_WORDS`."""
    rng = random.Random(options.shots_seed)
    articles: dict[str, list[Example]] = {}
    for example in train:
        if len(example.context.split()) <= SHOT_WORDS:
            articles.setdefault(example.title, []).append(example)
    if len(articles) < options.shots:
        raise UserError(f"prompt.shots={options.shots}: train has {len(articles)} articles with short paragraphs")
    chosen = [rng.choice(articles[title]) for title in rng.sample(sorted(articles), options.shots)]
    return replace(options, before="".join(
        text(e.context.strip(), e.question.strip(), options.order) + _TARGET.format(e.answers[0].text.strip()) + "\n\n"
        for e in chosen
    ))  # fmt: skip


def filled(config: Config) -> Config:
    """A configuration whose prompt has the text of its shots."""
    if not config.prompt.shots:
        return config
    return replace(config, prompt=fill(config.prompt, squad.load(config.data, "train").examples))


def beside(tokenizer: Any, options: Prompt) -> int:
    """Tokens of every prompt that are beside its window, at most: shots, a chat's template."""
    around = _chat(tokenizer, options.before) if options.chat else options.before
    return len(_tokenize(tokenizer, [around])[0]) if around else 0


def _chat(tokenizer: Any, prompt: str) -> str:
    if not tokenizer.chat_template:
        raise UserError("prompt.chat: this model's tokenizer has no chat template")
    asked = [{"role": "user", "content": message(prompt)}]
    return tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)


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
        rows = [replace(row, prompt=_chat(tokenizer, row.prompt)) for row in rows]
    groups: dict[object, list[Branch]] = {}
    wholes = _encode(tokenizer, [row.prompt + row.target for row in rows], progress, special=not options.chat)
    for row, encoding in zip(rows, wholes, strict=True):
        ids = encoding.ids
        n = _tokens_within(encoding, len(row.prompt))
        if n is None or encoding.token_to_chars(len(ids) - 1) is None:
            what = "merges the prompt and the answer" if n is None else "adds an end to every text"
            raise UserError(f"question {row.id}: this tokenizer {what}; name another by base.tokenizer")
        answer_ids = [*ids[n:], tokenizer.eos_token_id] if train else []
        if len(answer_ids) > window.answer:
            counts["dropped_long"] += 1
            continue
        # a question whose ids differ from the others' in what all begin with gets a tree of its own
        same = _SHARED.format(row.context)
        start = row.prompt.rfind(same) if options.order == "context" else -1
        shared = _tokens_within(encoding, start + len(same)) if start >= 0 else None
        groups.setdefault((row.context, *ids[: shared or n]), []).append(Branch(row.id, ids[:n], answer_ids))
    return Trees([_tree(group) for group in groups.values()], dict(counts))


def texts(
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


# ---- the window ----------------------------------------------------------------------------------------------------

Span = tuple[int, int]  # characters


def _rows(
    examples: list[Example], tokenizer: Any, window: Window, options: Prompt, train: bool, counts: Counter[str]
) -> Iterator[_Row]:
    limit = window.context - options.spare(window)
    window = replace(window, context=limit, stride=min(window.stride, limit))
    contexts = list(dict.fromkeys(e.context.strip() for e in examples))
    windows = dict(zip(contexts, _context_windows(contexts, tokenizer, window), strict=True))
    questions = list(dict.fromkeys(e.question.strip() for e in examples))
    cut = dict(zip(questions, _fit(questions, _QUESTION, window.question, tokenizer), strict=True))
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
            target = _TARGET.format(answer.text.strip())
        for a, b in spans:
            part = context[a:b].strip()
            whole = text(part, question, options.order)
            if options.earlier:  # which `order=context` goes with
                answered.setdefault(context, _CONTEXT.format(part))
                whole = answered[context] + _QUESTION.format(question)
                gold = example.answers[0].text.strip() if example.answers else ""
                answered[context] = whole + _TARGET.format(gold)
            yield _Row(example.id, part, options.before + whole, target)


def _context_windows(contexts: list[str], tokenizer: Any, window: Window) -> list[list[Span]]:
    """For each context the spans to read: itself, its head (truncate), or overlapping windows (chunk)."""
    out: list[list[Span]] = []
    for context, stop in zip(contexts, _fit(contexts, _CONTEXT, window.context, tokenizer), strict=True):
        spans = [(0, stop)]
        if stop < len(context) and window.overflow == "chunk":
            starts = [a for a, _ in _offsets(tokenizer, context)[:: window.stride]]
            while spans[-1][1] < len(context):
                begun, reached = spans[-1]
                start = min([reached, *(a for a in starts if a > begun)])  # never a gap
                (length,) = _fit([context[start:]], _CONTEXT, window.context, tokenizer)
                spans.append((start, start + length))
        out.append(spans)
    return out


def _fit(texts: list[str], template: str, limit: int, tokenizer: Any) -> list[int]:
    """For each text, how many of its characters fit `limit` tokens inside `template`; cut between two tokens."""
    special = template is _CONTEXT  # it opens the prompt, so BOS counts with it
    filled = _tokenize(tokenizer, [template.format(t) for t in texts], special=special)
    return [
        len(t) if len(ids) <= limit else _cut(t, template, limit, tokenizer, special)
        for t, ids in zip(texts, filled, strict=True)
    ]


def _cut(whole: str, template: str, limit: int, tokenizer: Any, special: bool) -> int:
    stops = [stop for _, stop in _offsets(tokenizer, whole)]
    keep = min(len(stops), limit)
    while keep > 0:
        filled = template.format(whole[: stops[keep - 1]].strip())
        over = len(_tokenize(tokenizer, [filled], special=special)[0]) - limit
        if over <= 0:
            return stops[keep - 1]
        keep -= over
    raise UserError(f"a window of {limit} tokens leaves no room for text; raise window.context or window.question")


def _offsets(tokenizer: Any, whole: str) -> list[Span]:
    return tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


# ---- ids -----------------------------------------------------------------------------------------------------------


def _tokenize(tokenizer: Any, texts: list[str], special: bool = True) -> list[Ids]:
    return [encoding.ids for encoding in _encode(tokenizer, texts, special=special)]


def _encode(tokenizer: Any, texts: list[str], progress: bool = False, special: bool = True) -> Iterator[Any]:
    """`tokenizers.Encoding` of each text: what the tokenizer itself makes of it, and where each token lies in it."""
    with tqdm(total=len(texts), desc="tokenise", unit="text", disable=not progress or len(texts) < MANY) as bar:
        for i in range(0, len(texts), 1000):
            yield from tokenizer.backend_tokenizer.encode_batch(texts[i : i + 1000], add_special_tokens=special)
            bar.update(len(texts[i : i + 1000]))


def _tokens_within(encoding: Any, stop: int) -> int | None:
    """How many tokens lie in the first `stop` characters; None where one lies across that place.

    These are the ids of the first `stop` characters alone: a merge of BPE is made for what it joins, and none of them
    crossed the place, so what is behind it changed nothing before it.
    """

    def end(token: int) -> int:
        span = encoding.token_to_chars(token)
        return span[1] if span else token and stop + 1  # none: BOS is before all text, EOS behind

    n = bisect.bisect_right(range(len(encoding)), stop, key=end)
    span = encoding.token_to_chars(n) if n < len(encoding) else None
    return None if span and span[0] < stop else n
