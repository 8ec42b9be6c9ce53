"""Trees on disk: tokenising a whole split takes a while, so the same questions, tokenizer and window do it once.

A file is found by a hash of all that decides what is in it, code included, so it is never out of date. Imports no
torch.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import Prompt, Window
from common.data import prompt, tokens, trees
from common.data.squad import Example
from common.data.trees import Branch, Tree, Trees
from common.files import ROOT

import numpy as np
import tokenizers

FOLDER = ROOT / ".cache" / "trees"


def build_trees(
    examples: Sequence[Example], tokenizer: Any, window: Window, *, train: bool, options: Prompt = Prompt(),
    window_tokenizer: Any = None,
) -> Trees:  # fmt: skip
    """`trees.build_trees`, kept in `FOLDER` where there are many questions. An unreadable file is made anew."""

    def build() -> Trees:
        return trees.build_trees(
            examples, tokenizer, window, train=train, options=options, window_tokenizer=window_tokenizer
        )

    if len(examples) < tokens.MANY:
        return build()
    template = tokenizer.chat_template if options.chat else None
    decides = hashlib.sha256(
        repr((prompt.fingerprint(options), window, train, tokenizer.eos_token_id, template)).encode()
    )
    code = [Path(module).read_text() for module in (__file__, prompt.__file__)] + [tokenizers.__version__]
    vocabularies = (t.backend_tokenizer.to_str() for t in (tokenizer, window_tokenizer or tokenizer))
    for part in (*code, *vocabularies, *map(repr, examples)):
        decides.update(part.encode())
    path = FOLDER / f"{decides.hexdigest()[:32]}.npz"
    try:
        return _read(path)
    except Exception:  # absent, or damaged in one of many ways
        built = build()
    try:
        _write(path, built)
    except OSError:  # no room, or no folder of ours: then without
        with contextlib.suppress(OSError):
            _partial(path).unlink()
    return built


def _write(path: Path, built: Trees) -> None:
    trees = built.trees
    branches = [branch for tree in trees for branch in tree.branches]
    lists = [tree.prefix_ids for tree in trees] + [x for b in branches for x in (b.prompt_ids, b.answer_ids)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with _partial(path).open("wb") as file:
        np.savez(
            file,
            ids=np.fromiter((i for ids in lists for i in ids), np.int32),
            lengths=np.array([len(ids) for ids in lists], np.int32),
            branches=np.array([len(tree.branches) for tree in trees], np.int32),
            rest=np.frombuffer(json.dumps([built.counts, [branch.id for branch in branches]]).encode(), np.uint8),
        )
    os.replace(_partial(path), path)


def _partial(path: Path) -> Path:
    return path.with_suffix(f".{os.getpid()}")


def _read(path: Path) -> Trees:
    with np.load(path) as file:
        ids, lengths, sizes = (file[name].tolist() for name in ("ids", "lengths", "branches"))
        counts, questions = json.loads(file["rest"].tobytes())
    ends = np.cumsum([0, *lengths]).tolist()
    parts = (ids[a:b] for a, b in itertools.pairwise(ends))
    prefixes = [next(parts) for _ in sizes]
    branches = (Branch(question, next(parts), next(parts)) for question in questions)
    trees = [Tree(prefix, tuple(itertools.islice(branches, n))) for prefix, n in zip(prefixes, sizes, strict=True)]
    return Trees(trees, counts)
