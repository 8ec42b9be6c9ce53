"""SQuAD v1.1: its questions from a file or the hub, every field checked, and subsets by article. Imports no torch."""

import functools
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from common.config import Data, EarlyStop
from common.errors import UserError
from common.files import read_json

SPLITS = {"train": "train", "dev": "validation"}  # our name → the hub's
HELD_OUT = ", held out"  # behind the source of an evaluation's questions, where they are of train
FILES = ("{split}-v1.1.json", "{split}-v1.1.json.gz", "squad-v1.1-{split}.json", "squad-v1.1-{split}.json.gz")
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    text: str
    start: int  # characters into the context


@dataclass(frozen=True)
class Example:
    id: str
    title: str
    context: str
    question: str
    answers: tuple[Answer, ...]  # never empty


@dataclass(frozen=True)
class Dataset:
    examples: list[Example]
    source: str  # file or hub id
    fixed_offsets: int = 0  # answers whose answer_start was repaired

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the questions, in hex: plain, gzipped and hub copies of the same questions agree."""
        digest, encode = hashlib.sha256(), json.JSONEncoder(ensure_ascii=False).encode
        for e in self.examples:
            row = [e.id, e.title, e.context, e.question, [[a.text, a.start] for a in e.answers]]
            digest.update(encode(row).encode())
        return digest.hexdigest()


def load(data: Data, split: str) -> Dataset:
    """The split that `data` names, limited to `data.train_paragraphs` or `data.dev_questions`."""
    dataset = read(data.train if split == "train" else data.dev, split, data.fix_offsets)
    if split == "train" and data.train_paragraphs:
        return replace(dataset, examples=first_paragraphs(dataset.examples, data.train_paragraphs))
    if split != "train" and data.dev_questions:
        return replace(dataset, examples=stratified(dataset.examples, data.dev_questions))
    return dataset


def read(source: str, split: str, fix_offsets: bool = False) -> Dataset:
    """The questions of `source`, a SQuAD v1.1 JSON file (plain or .gz) or a hub id; `split` is "train" or "dev".

    `fix_offsets` moves an answer to the place nearest its `answer_start`. Raises `UserError` with question and field.
    """
    path = locate(source, split)
    origin = str(path or source)
    articles = _articles(path) if path else hub_articles(source, split)
    examples: list[Example] = []
    fixed = 0
    for example in _examples(articles, origin):
        answers = tuple(_at_its_start(example, i, fix_offsets, origin) for i in range(len(example.answers)))
        moved = sum(a != b for a, b in zip(answers, example.answers, strict=True))
        fixed += moved
        examples.append(replace(example, answers=answers) if moved else example)
    _unique_ids(examples, origin)
    return Dataset(examples, origin, fixed)


def golds(source: str) -> list[Example]:
    """Ids, articles and gold texts alone: what the official rules read. Offsets may be wrong, or missing.

    Raises `UserError` with question and field.
    """
    path = locate(source, "dev")
    origin = str(path or source)
    examples = list(_examples(_articles(path) if path else hub_articles(source, "dev"), origin, golds_only=True))
    _unique_ids(examples, origin)
    return examples


def first_paragraphs(examples: list[Example], n: int) -> list[Example]:
    """All questions of the first `n` paragraphs."""
    seen: set[tuple[str, str]] = set()
    for i, example in enumerate(examples):
        seen.add((example.title, example.context))
        if len(seen) > n:
            return examples[:i]
    return examples


def stratified(examples: list[Example], n: int) -> list[Example]:
    """`n` questions in file order: articles in proportion (largest remainder), and of each the first by hash of id."""
    n = min(n, len(examples))
    by_article: dict[str, list[Example]] = {}
    for example in examples:
        by_article.setdefault(example.title, []).append(example)
    share = {title: len(rows) * n / len(examples) for title, rows in by_article.items()}
    take = {title: int(s) for title, s in share.items()}
    for title in sorted(share, key=lambda t: (take[t] - share[t], t))[: n - sum(take.values())]:
        take[title] += 1
    ids = {title: sorted((e.id for e in rows), key=_hash) for title, rows in by_article.items()}
    chosen = {id_ for title, ordered in ids.items() for id_ in ordered[: take[title]]}
    return [e for e in examples if e.id in chosen]


def hold_out(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """(rest, held out): whole articles, the first by hash of the title, until they hold `share` of the questions."""
    titles = sorted({e.title for e in examples}, key=_hash)
    if len(titles) < 2:
        raise UserError("early_stop.split=heldout needs a train set of at least two articles")
    held: set[str] = set()
    for title in titles[:-1]:
        held.add(title)
        if sum(e.title in held for e in examples) >= share * len(examples):
            break
    return [e for e in examples if e.title not in held], [e for e in examples if e.title in held]


def evaluated(data: Data, options: EarlyStop) -> Dataset:
    """The questions that an evaluation scores: dev, or what `selection` holds out of train.

    `options`: as they were in the adapter's training, if there was one. `data.dev_questions` limits both.
    """
    if data.split == "dev":
        return load(data, "dev")
    train = load(data, "train")
    _, held = hold_out(train.examples, options.heldout_share)
    held = stratified(held, data.dev_questions) if data.dev_questions else held
    return replace(train, examples=held, source=train.source + HELD_OUT)


def part(examples: list[Example], share: float, unit: Literal["article", "question"]) -> list[Example]:
    """The articles (or questions) whose number of questions is nearest to `share` of them all, one at least.

    They are the first in one fixed order, so that a smaller share is part of a larger one.
    """
    names = [e.title if unit == "article" else e.id for e in examples]
    # another order than that of `hold_out`, or a small share would change with early_stop.split
    order, sizes = sorted(set(names), key=lambda name: _hash(f"train_share {name}")), Counter(names)
    reached = list(itertools.accumulate(sizes[name] for name in order))
    last = min(range(len(order)), key=lambda i: abs(reached[i] - share * len(examples)))
    taken = set(order[: last + 1])
    return [e for e, name in zip(examples, names, strict=True) if name in taken]


def selection(train: Dataset, dev: Dataset, data: Data, options: EarlyStop) -> tuple[Dataset, Dataset]:
    """(questions to train on, questions whose EM or loss stops the training), as `data` and `early_stop` say.

    Articles are held out first, so the held-out set is the same for every `data.train_share`, which is of the rest.
    """
    if options.split == "heldout":
        rest, held = hold_out(train.examples, options.heldout_share)
        train, dev = replace(train, examples=rest), replace(train, examples=held)
    if data.train_share < 1:
        train = replace(train, examples=part(train.examples, data.train_share, data.train_unit))
    if options.by == "none":
        dev = replace(dev, examples=[])
    if options.questions:
        dev = replace(dev, examples=stratified(dev.examples, options.questions))
    return train, dev


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---- where the data is ---------------------------------------------------------------------------------------------


def locate(source: str, split: str) -> Path | None:
    """The file to read, or None for the hub. The folder `SQUAD_DIR` replaces SQuAD's hub id and no other."""
    path = Path(source)
    if path.is_file():
        return path
    if path.exists() or source.endswith((".json", ".jsonl", ".gz")) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        wrong = "a folder; name a file in it" if path.is_dir() else "no such file"
        raise UserError(f"{source}: {wrong} (data.{split})")
    folder = os.environ.get("SQUAD_DIR")
    if not folder or source != Data().dev:
        return None
    names = [name.format(split=split) for name in FILES]
    for name in names:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise UserError(f"SQUAD_DIR={folder}: no {split} file there; expected one of {', '.join(names)}")


def _articles(path: Path) -> list[object]:
    data = read_json(path)
    articles = data.get("data") if isinstance(data, dict) else data
    rows = articles if isinstance(articles, list) else []
    if rows and isinstance(rows[0], dict) and "question" in rows[0]:
        what = "a row for each question, as datasets writes them; SQuAD's layout is articles with paragraphs"
    elif isinstance(data, dict) and data and all(isinstance(value, str) for value in data.values()):
        what = "these seem to be predictions"
    else:
        what = ""
    if what or not isinstance(data, dict) or not isinstance(articles, list):
        raise UserError(f'{path}: not SQuAD v1.1: expected {{"data": [articles]}}{what and f"; {what}"}')
    return articles


def hub_articles(source: str, split: str) -> list[dict[str, object]]:
    """The hub's rows (one per question) in the layout of the official file. Raises `UserError` if the hub has none."""
    import datasets

    try:
        rows = datasets.load_dataset(source, split=SPLITS[split])
    except Exception as error:  # the hub's client raises many kinds; each means: not to be had from there
        what = f"the hub gave no such data set ({type(error).__name__})"
        advice = f"set SQUAD_DIR to a folder with {FILES[0].format(split=split)}, or data.{split} to a file"
        raise UserError(f"data.{split}={source}: {what}; {advice}") from error
    articles: dict[str, dict[str, list[object]]] = {}
    for row in rows:
        found = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        answers = [{"text": text, "answer_start": start} for text, start in found]
        qa = {"id": row["id"], "question": row["question"], "answers": answers}
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(qa)
    return [
        {"title": title, "paragraphs": [{"context": context, "qas": qas} for context, qas in paragraphs.items()]}
        for title, paragraphs in articles.items()
    ]


# ---- structure -----------------------------------------------------------------------------------------------------


def _field(parent: object, key: str, kind: type[T], where: str) -> T:
    value = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        name = {"str": "a text", "list": "a list", "int": "a whole number"}[kind.__name__]
        raise UserError(f'{where}: "{key}" must be {name}, not {json.dumps(value)[:40]}')
    if isinstance(value, str) and not value.strip():
        raise UserError(f'{where}: "{key}" is empty')
    if isinstance(value, str) and not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise UserError(f'{where}: "{key}" holds half a character (a lone surrogate)')
    return value


def _unique_ids(examples: Sequence[Example], origin: str) -> None:
    """Raises `UserError` if an id stands twice, or there is no question."""
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise UserError(f"{origin}: question {example.id}: this id stands in the file twice")
        seen.add(example.id)
    if not examples:
        raise UserError(f"{origin}: holds no question")


def _examples(articles: Sequence[object], origin: str, golds_only: bool = False) -> Iterator[Example]:
    for i, article in enumerate(articles, 1):
        title = _field(article, "title", str, f"{origin}: article {i}")
        for j, paragraph in enumerate(_field(article, "paragraphs", list, f"{origin}: article {i} ({title})"), 1):
            where = f"{origin}: article {i} ({title}), paragraph {j}"
            context = _field(paragraph, "context", str, where)
            for qa in _field(paragraph, "qas", list, where):
                id_ = _field(qa, "id", str, where)
                asked = f"{origin}: question {id_}"
                question = _field(qa, "question", str, asked)
                rows = _field(qa, "answers", list, asked)
                if not rows:
                    v2 = "; is_impossible is of SQuAD v2" * (isinstance(qa, dict) and "is_impossible" in qa)
                    raise UserError(f"{asked}: has no answer; SQuAD v1.1 gives at least one{v2}")
                places = [f"{asked}: answer {k}" for k in range(1, len(rows) + 1)]
                texts = [_field(row, "text", str, where) for row, where in zip(rows, places, strict=True)]
                starts = [
                    0 if golds_only else _field(row, "answer_start", int, where)
                    for row, where in zip(rows, places, strict=True)
                ]
                answers = tuple(map(Answer, texts, starts))
                yield Example(id_, title, context, question, answers)


def _at_its_start(example: Example, i: int, fix: bool, origin: str) -> Answer:
    answer = example.answers[i]
    if answer.start >= 0 and example.context.startswith(answer.text, answer.start):
        return answer
    where = f'{origin}: question {example.id}: answer {i + 1} "{answer.text}"'
    if not fix:
        hint = "; data.fix_offsets=true repairs it" if answer.text in example.context else ""
        raise UserError(f"{where} does not occur at answer_start {answer.start}{hint}")
    starts = [k for k in range(len(example.context)) if example.context.startswith(answer.text, k)]
    if not starts:
        raise UserError(f"{where} does not occur in its context")
    return Answer(answer.text, min(starts, key=lambda k: abs(k - answer.start)))
