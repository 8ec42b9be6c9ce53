"""SQuAD v1.1: read it, check every field of it, split it by article. Imports no torch."""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.config import Data
from common.errors import UserError

SPLITS = {"train": "train", "dev": "validation"}  # our name → the hub's
FILES = ("{split}-v1.1.json", "{split}-v1.1.json.gz", "squad-v1.1-{split}.json", "squad-v1.1-{split}.json.gz")


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

    @property
    def sha256(self) -> str:
        """Of the content, so that plain, gzipped and hub copies of the same questions agree."""
        digest = hashlib.sha256()
        for e in self.examples:
            row = [e.id, e.title, e.context, e.question, [[a.text, a.start] for a in e.answers]]
            digest.update(json.dumps(row, ensure_ascii=False).encode())
        return digest.hexdigest()


def load(data: Data, split: str) -> Dataset:
    """The split as configured: read, and cut down where `data` asks for it."""
    if split == "train":
        dataset = read(data.train, split, data.fix_offsets)
        limited = (
            first_paragraphs(dataset.examples, data.train_paragraphs) if data.train_paragraphs else dataset.examples
        )
    else:
        dataset = read(data.dev, split, data.fix_offsets)
        limited = stratified(dataset.examples, data.dev_questions) if data.dev_questions else dataset.examples
    return replace(dataset, examples=limited)


def read(source: str, split: str, fix_offsets: bool = False) -> Dataset:
    """Read `source`, a SQuAD v1.1 JSON file (plain or .gz) or a hub id; `split` is "train" or "dev".

    Where `SQUAD_DIR` is set, a hub id is replaced by that folder's file. Raises `UserError` naming file, question and
    field. An answer that is not at its `answer_start` is an error, unless `fix_offsets` finds it elsewhere.
    """
    path = locate(source, split)
    origin, articles = (str(path), _articles(path)) if path else (source, hub_articles(source, split))
    examples: list[Example] = []
    seen: set[str] = set()
    fixed = 0
    for example in _examples(articles, origin):
        if example.id in seen:
            raise UserError(f"{origin}: question {example.id}: this id stands in the file twice")
        seen.add(example.id)
        answers = tuple(_at_its_start(example, i, fix_offsets, origin) for i in range(len(example.answers)))
        fixed += sum(a != b for a, b in zip(answers, example.answers, strict=True))
        examples.append(replace(example, answers=answers))
    if not examples:
        raise UserError(f"{origin}: holds no question")
    return Dataset(examples, origin, fixed)


def first_paragraphs(examples: list[Example], n: int) -> list[Example]:
    """All questions of the first `n` paragraphs."""
    kept: set[tuple[str, str]] = set()
    out = []
    for example in examples:
        key = (example.title, example.context)
        if key not in kept and len(kept) == n:
            break
        kept.add(key)
        out.append(example)
    return out


def stratified(examples: list[Example], n: int) -> list[Example]:
    """A fixed subset of `n` questions: each article in proportion (largest remainder), by hash of the id within it.

    Depends on nothing but the ids, so it is the same for every system, seed and machine. File order is kept.
    """
    n = min(n, len(examples))
    by_article: dict[str, list[Example]] = {}
    for example in examples:
        by_article.setdefault(example.title, []).append(example)
    share = {title: len(rows) * n / len(examples) for title, rows in by_article.items()}
    take = {title: int(s) for title, s in share.items()}
    for title in sorted(share, key=lambda t: (take[t] - share[t], t))[: n - sum(take.values())]:
        take[title] += 1
    chosen = {e.id for title, rows in by_article.items() for e in sorted(rows, key=_by_hash)[: take[title]]}
    return [e for e in examples if e.id in chosen]


def hold_out(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Split into (rest, held out): whole articles, picked by hash of the title, until `share` of the questions."""
    titles = sorted({e.title for e in examples}, key=lambda title: hashlib.sha256(title.encode()).hexdigest())
    if len(titles) < 2:
        raise UserError("early_stop.split=heldout needs a train set of at least two articles")
    held: set[str] = set()
    for title in titles[:-1]:
        held.add(title)
        if sum(e.title in held for e in examples) >= share * len(examples):
            break
    return [e for e in examples if e.title not in held], [e for e in examples if e.title in held]


def _by_hash(example: Example) -> str:
    return hashlib.sha256(example.id.encode()).hexdigest()


# ---- where the data is ---------------------------------------------------------------------------------------------


def locate(source: str, split: str) -> Path | None:
    """The file to read, or None for the hub. Of hub ids `SQUAD_DIR` stands for SQuAD's alone."""
    hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and not source.endswith((".json", ".jsonl", ".gz"))
    if not hub_id or Path(source).exists():
        if not Path(source).is_file():
            wrong = "a folder; name a file in it" if Path(source).is_dir() else "no such file"
            raise UserError(f"{source}: {wrong} (data.{split})")
        return Path(source)
    folder = os.environ.get("SQUAD_DIR")
    if not folder or source != Data().dev:
        return None
    candidates = [Path(folder) / name.format(split=split) for name in FILES]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"SQUAD_DIR={folder}: no {split} file there; expected one of {', '.join(p.name for p in candidates)}"
    )


def _articles(path: Path) -> list[Any]:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); is the file complete?") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); is the file complete?") from error
    articles = data.get("data") if isinstance(data, dict) else None
    if not isinstance(articles, list):
        raise UserError(f'{path}: not SQuAD v1.1: expected {{"data": [articles]}}')
    return articles


def hub_articles(source: str, split: str) -> list[Any]:
    """The hub's rows, one a question, put back into the official layout's articles and paragraphs."""
    import datasets

    try:
        rows = datasets.load_dataset(source, split=SPLITS[split])
    except Exception as error:  # the hub's client raises many kinds; each means: not to be had from there
        raise UserError(
            f"data.{split}={source}: the hub gave no such data set ({type(error).__name__}); "
            f"set SQUAD_DIR to a folder with {FILES[0].format(split=split)}, or data.{split} to a file"
        ) from error
    articles: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        answers = [
            {"text": text, "answer_start": start}
            for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        ]
        qa = {"id": row["id"], "question": row["question"], "answers": answers}
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(qa)
    return [
        {"title": title, "paragraphs": [{"context": context, "qas": qas} for context, qas in paragraphs.items()]}
        for title, paragraphs in articles.items()
    ]


# ---- structure -----------------------------------------------------------------------------------------------------


def _field(parent: Any, key: str, kind: type, where: str) -> Any:
    value = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {str: "a text", list: "a list", int: "a whole number"}
        raise UserError(f'{where}: "{key}" must be {names[kind]}, not {json.dumps(value)[:40]}')
    if isinstance(value, str) and not value.strip():
        raise UserError(f'{where}: "{key}" is empty')
    if isinstance(value, str) and not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise UserError(f'{where}: "{key}" holds half a character (a lone surrogate)')
    return value


def _examples(articles: list[Any], origin: str) -> Iterator[Example]:
    for i, article in enumerate(articles, 1):
        title = _field(article, "title", str, f"{origin}: article {i}")
        paragraphs = _field(article, "paragraphs", list, f"{origin}: article {i} ({title})")
        for j, paragraph in enumerate(paragraphs, 1):
            where = f"{origin}: article {i} ({title}), paragraph {j}"
            context = _field(paragraph, "context", str, where)
            for qa in _field(paragraph, "qas", list, where):
                id_ = _field(qa, "id", str, where)
                where_q = f"{origin}: question {id_}"
                question = _field(qa, "question", str, where_q)
                answers = _field(qa, "answers", list, where_q)
                if not answers:
                    raise UserError(f"{where_q}: has no answer; SQuAD v1.1 gives at least one")
                yield Example(
                    id_,
                    title,
                    context,
                    question,
                    tuple(
                        Answer(
                            _field(a, "text", str, f"{where_q}: answer {k}"),
                            _field(a, "answer_start", int, f"{where_q}: answer {k}"),
                        )
                        for k, a in enumerate(answers, 1)
                    ),
                )


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
