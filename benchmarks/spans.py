"""Spans by construction: whether every gold answer can be given, what it costs, and llguidance's grammar beside it.

    python -m benchmarks.spans [MODEL] [key=value ...] [--beside 50]

Counts the gold answers of dev that stand in what is read of their context and keep to the limit of tokens, and of these
those that cannot be given, where they stand, token by token. `--beside N` (needs `pip install llguidance==1.9.1`)
follows the first gold of every question of each N-th paragraph by both, and compares the tokens that may come next at
each step. Times are of one answer on the host (`Automaton.advance`), and per token of a pass of 64 (`Quotes`). A CPU is
enough; no weights are read.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from common.config import load
from common.data import cache, squad
from common.data.tokens import Ids, Tokenizer
from common.data.window import answer_limit
from common.decode.spans import FIRST, Automata, Automaton, Quotes, State, vocabulary
from common.errors import UserError, one_line_errors
from common.model.load import load_tokenizers
from common.parser import Parser

import numpy as np
import torch

ROWS = 64
# a quote, or a space and a quote; it begins with no white space
GRAMMAR = """\
start: QUOTE | SPACED
QUOTE: %regex {} & /\\S(.|\\n)*/
SPACED: " " QUOTE
"""
took: defaultdict[str, float] = defaultdict(float)
times: defaultdict[str, int] = defaultdict(int)


def main(argv: list[str]) -> None:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-raw")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--beside", type=int, help="compare with llguidance on one of so many paragraphs")
    args = parser.parse_intermixed_args(argv)
    config = load(args.model, args.overrides)
    tokenizers = load_tokenizers(config)
    tokenizer, eos, limit = tokenizers.own, tokenizers.own.eos_token_id, answer_limit(config.window, config.decode)
    dev = squad.load(config.data, "dev")
    examples = {example.id: example for example in dev.examples}
    trees = cache.build_trees(dev, tokenizers, config.window, config.prompt, train=False).trees
    tokens, theirs = vocabulary(tokenizer, len(tokenizer)), None
    if args.beside:
        theirs = Theirs(tokenizer)
    automata = Automata(tokens, [t.context for t in trees], config.decode.whole_words, torch.device("cpu"))
    golds = refused = steps = unlike = 0
    logits, stops = torch.randn(ROWS, len(tokenizer)), torch.tensor([eos])
    for number, tree in enumerate(trees):
        with timed("ours, a context"):
            automaton = automata(tree.context)
        compared = theirs is not None and number % args.beside == 0
        if theirs and compared:
            theirs.begin(tree.context)
            with timed(f"ours, a token of a pass of {ROWS}", ROWS):
                Quotes([automaton] * ROWS, stops).choose(logits)
        for branch in tree.branches:
            for i, gold in enumerate(examples[branch.id].answers):
                ids = tokenizer(" " + gold.text.strip(), add_special_tokens=False).input_ids
                start = gold.start - branch.offset
                if len(ids) >= limit or tree.context[start:][: len(gold.text)] != gold.text or start < 0:
                    continue
                golds += 1
                refused += not given(automaton, ids, gold.text.strip())
                if theirs and compared and not i:
                    for ours, other in zip(followed(automaton, ids, eos), theirs.followed(ids), strict=True):
                        steps, unlike = steps + 1, unlike + (not np.array_equal(ours, other))
    micro = {what: 1e6 * seconds / times[what] for what, seconds in took.items()}
    for what, value in micro.items():
        print(f"{what:34} {value:8.0f} µs")
    print(f"{golds} golds can stand in an answer; {refused} of them cannot be given")
    if theirs:
        print(f"llguidance: other tokens are allowed at {unlike} of {steps} steps")
    print(json.dumps({"microseconds": micro, "golds": golds, "refused": refused, "steps": steps, "unlike": unlike}))


@contextmanager
def timed(what: str, n: int = 1) -> Iterator[None]:
    """Adds to the time of `what`, of which `n` are done."""
    began = time.perf_counter()
    yield
    took[what] += time.perf_counter() - began
    times[what] += n


def given(automaton: Automaton, ids: Ids, text: str) -> bool:
    """True if the tokens are allowed one by one, an answer may end behind them, and they are read as `text`."""
    state = automaton.nodes[0]
    for token in ids:
        state = automaton.advance(state, token)
    return may_end(automaton, state) and automaton.quote(ids).text == text


def may_end(automaton: Automaton, state: State) -> bool:
    return bool((state & automaton.nodes[1]).any() and not state[:FIRST].any())


def followed(automaton: Automaton, ids: Ids, eos: int) -> Iterator[np.ndarray]:
    """The tokens that may come next, ascending, before each of `ids` and behind them."""
    state = automaton.nodes[0]
    for token in [*ids, None]:
        with timed("ours, a token"):
            source, edges, _ = automaton.edges
            allowed = np.unique(edges[state[source]])
        yield np.union1d(allowed, [eos]) if may_end(automaton, state) else allowed
        if token is not None:
            with timed("ours, a token", 0):
                state = automaton.advance(state, token)


class Theirs:
    """llguidance's matcher. Raises `UserError` where it is not installed, or refuses the grammar."""

    def __init__(self, tokenizer: Tokenizer):
        try:
            import llguidance.hf
            import llguidance.numpy
        except ImportError as error:
            raise UserError(f"{error}: .venv/bin/pip install llguidance==1.9.1") from error
        self.module, self.size = llguidance, len(tokenizer)
        self.tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=self.size)
        self.mask = llguidance.numpy.allocate_token_bitmask(1, self.size)

    def begin(self, context: str) -> None:
        with timed("llguidance, a context"):
            grammar = GRAMMAR.format(json.dumps({"substring_chars": context}))
            self.matcher = self.module.LLMatcher(self.tokenizer, grammar)
        if self.matcher.is_error():
            raise UserError(f"llguidance: {self.matcher.get_error()}")

    def followed(self, ids: Ids) -> Iterator[np.ndarray]:
        """The tokens that may come next by llguidance, as `followed` yields ours."""
        self.matcher.reset()
        for token in [*ids, None]:
            with timed("llguidance, a token"):
                self.module.numpy.fill_next_token_bitmask(self.matcher, self.mask, 0)
            yield np.flatnonzero(np.unpackbits(self.mask[0].view(np.uint8), bitorder="little")[: self.size])
            if token is not None:
                with timed("llguidance, a token", 0):
                    self.matcher.consume_token(token)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
