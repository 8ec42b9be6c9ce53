"""Trees on disk, each file under a hash of all that decides its content, the code included. Imports no torch."""

import contextlib
import hashlib
import itertools
import json
import os
from pathlib import Path

from common.config import Prompt, Window
from common.data import prompt, tokens, trees
from common.data.squad import Dataset
from common.data.tokens import Tokenizers
from common.data.trees import Branch, Tree, Trees
from common.files import ROOT, atomic

import numpy as np
import tokenizers as tokenizers_package

FOLDER = ROOT / ".cache" / "trees"
CODE = Path(__file__).parent  # its files decide the ids


def build_trees(
    dataset: Dataset, tokenizers: Tokenizers, window: Window, options: Prompt = Prompt(), *, train: bool
) -> Trees:
    """`trees.build_trees`; from `tokens.MANY` questions on they are kept in `FOLDER`. A damaged file is rebuilt."""
    path, examples = None, dataset.examples
    if len(examples) >= tokens.MANY:
        own = tokenizers.own
        template = own.chat_template if options.chat else None
        settings = (prompt.fingerprint(options), options.spare(window), window, train, own.eos_token_id, template)
        code = [file.read_text() for file in sorted(CODE.glob("*.py"))] + [tokenizers_package.__version__]
        vocabularies = (t.backend_tokenizer.to_str() for t in (own, tokenizers.window))
        decides = hashlib.sha256()
        for part in (repr(settings), *code, *vocabularies, dataset.sha256):
            decides.update(part.encode())
        path = FOLDER / f"{decides.hexdigest()[:32]}.npz"
        with contextlib.suppress(Exception):  # absent, or damaged in one of many ways
            return _read(path)
    built = trees.build_trees(examples, tokenizers, window, options, train=train)
    if path:
        with contextlib.suppress(OSError):  # a full disk, or a folder that is not ours: the trees serve without a file
            _write(path, built)
    return built


def _write(path: Path, built: Trees) -> None:
    branches = [branch for tree in built.trees for branch in tree.branches]
    lists = [tree.prefix_ids for tree in built.trees] + [x for b in branches for x in (b.prompt_ids, b.answer_ids)]
    rest = built.counts, [branch.id for branch in branches], [tree.context for tree in built.trees]
    path.parent.mkdir(parents=True, exist_ok=True)
    # several processes may build the same trees
    with atomic(path, f".{os.getpid()}") as partial, partial.open("wb") as file:
        np.savez(
            file,
            ids=np.fromiter(itertools.chain.from_iterable(lists), np.int32),
            lengths=np.array([len(ids) for ids in lists], np.int32),
            branches=np.array([len(tree.branches) for tree in built.trees], np.int32),
            offsets=np.array([branch.offset for branch in branches], np.int32),
            rest=np.frombuffer(json.dumps(rest).encode(), np.uint8),
        )


def _read(path: Path) -> Trees:
    with np.load(path) as file:
        ids, lengths, sizes, offsets = (file[name].tolist() for name in ("ids", "lengths", "branches", "offsets"))
        counts, questions, contexts = json.loads(file["rest"].tobytes())
    ends = np.cumsum([0, *lengths]).tolist()
    parts = (ids[a:b] for a, b in itertools.pairwise(ends))
    prefixes = [next(parts) for _ in sizes]
    branches = (Branch(id_, next(parts), next(parts), at) for id_, at in zip(questions, offsets, strict=True))
    each = zip(prefixes, sizes, contexts, strict=True)
    return Trees([Tree(prefix, tuple(itertools.islice(branches, n)), context) for prefix, n, context in each], counts)
