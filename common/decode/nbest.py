"""The most probable quotes of a context, by best-first search over its automaton (`decode.nbest`).

A path is a sequence of tokens along the automaton (`common.decode.spans`). Its probability is the model's, among all
tokens, times that of ending there. A longer path is never more probable, so the most probable path that is not expanded
yet bounds all that can still be found, and the sum over these paths bounds the probability that is missing. The greedy
path is expanded too, wherever it leads. Several paths can spell one answer: their probabilities are summed over equal
strings by the official normalisation.
"""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from common.config import Decode
from common.data.tokens import Ids
from common.data.trees import Branch, Tree
from common.decode.answers import Prediction, Task
from common.decode.spans import FIRST, Automaton, Quote
from common.metrics.score import f1, normalize

import numpy as np

REST = 0.01  # the search ends where at most this share of the probability found can still be missing
WIDTH = 4  # paths that are expanded together
EXPANSIONS = 8  # per answer that is asked for: the most paths that are expanded


class State:
    """Where paths have come to: a set of nodes of the automaton. `Paths` has each set once: searches meet it often."""

    def __init__(self, paths: "Paths", nodes: tuple[int, ...]):
        self.paths, behind = paths, dict[int, list[int]]()
        for node in nodes:
            for edge in range(paths.begin[node], paths.begin[node + 1]):
                behind.setdefault(paths.token[edge], []).append(paths.target[edge])
        ordered = sorted(behind)
        self.tokens = np.array(ordered, np.int64)  # that lead on, ascending
        self._behind: list[list[int] | State] = [behind[token] for token in ordered]
        # an answer that has come here may end
        self.may_end = nodes[0] >= FIRST and any(paths.ends[node] for node in nodes)

    def behind(self, i: int) -> "State":
        """The state behind the i-th token."""
        found = self._behind[i]
        if isinstance(found, list):
            found = self._behind[i] = self.paths.state(tuple(sorted(set(found))))
        return found


class Paths:
    """A context's automaton as searches walk it: from state to state, on the host. A paragraph's questions share it.

    Lists, because a state has few edges: numpy's calls would take longer than what they do.
    """

    def __init__(self, quotes: Automaton):
        self.quotes = quotes
        source, token, target = quotes.edges
        order, size = np.argsort(source, kind="stable"), quotes.nodes.shape[1]
        self.token, self.target, self.ends = token[order].tolist(), target[order].tolist(), quotes.nodes[1].tolist()
        self.begin = np.searchsorted(source[order], np.arange(size + 1)).tolist()  # of each node's edges
        self._states: dict[tuple[int, ...], State] = {}
        self._keys: dict[bytes, str] = {}
        self.first = self.state(tuple(np.flatnonzero(quotes.nodes[0]).tolist()))

    def state(self, nodes: tuple[int, ...]) -> State:
        """The state of these nodes, ascending."""
        if nodes not in self._states:
            self._states[nodes] = State(self, nodes)
        return self._states[nodes]

    def key(self, ids: Ids) -> str:
        """What answers of these tokens are summed by: their text, by the official normalisation."""
        spelt = b"".join(self.quotes.vocabulary.bytes[token] or b"" for token in ids)
        if spelt not in self._keys:
            self._keys[spelt] = normalize(self.quotes.quote(ids).text)
        return self._keys[spelt]


class Path(NamedTuple):
    ids: tuple[int, ...]  # tokens
    logprob: float  # of them, natural log
    least: float  # of the tokens' log-probabilities
    state: State  # where it has come to


class Ended(NamedTuple):
    """A path that is an answer."""

    path: Path
    logprob: float  # with that of ending
    least: float
    cut: bool  # by the limit, not by a stop token


@dataclass
class Answer:
    """All paths that spell one string, by the official normalisation."""

    best: Ended  # the most probable one, of equal ones the first that was found
    ended: list[Ended] = field(default_factory=list)
    mass: float = 0.0  # the sum of their probabilities

    def add(self, ended: Ended) -> None:
        self.ended.append(ended)
        self.mass += math.exp(ended.logprob)
        self.best = max(self.best, ended, key=lambda e: e.logprob)


class _Children(NamedTuple):
    """The paths that are one token longer than an expanded one, the most probable first."""

    parent: Path
    order: np.ndarray  # [n] of the parent's state's tokens
    logprobs: np.ndarray  # [n] of each token alone, in that order

    def token(self, i: int) -> int:
        return int(self.parent.state.tokens[self.order[i]])

    def path(self, i: int) -> Path:
        own, state = float(self.logprobs[i]), self.parent.state.behind(int(self.order[i]))
        return Path((*self.parent.ids, self.token(i)), self.parent.logprob + own, min(self.parent.least, own), state)


class Search:
    """The search of one question's answers: an engine computes what is `wanted` and says what it `found`."""

    def __init__(self, paths: Paths, stop_tokens: Sequence[int], limit: int, n: int):
        """`limit`: tokens of a path, the stop token included. `n`: answers that the search is for."""
        self.paths, self.stops, self.limit, self.n = paths, np.array(stop_tokens), limit, n
        self.answers: dict[str, Answer] = {}
        self.greedy: Path | None = None  # the greedy answer, once it is known
        self.expanded = 0
        self.rest = 1.0  # probability of all paths that are not expanded: what the answers may still gain, at most
        self._open: list[tuple[float, int, _Children, int]] = []  # heap: of each parent the best child not given yet
        self._serial = itertools.count()
        self._next: Path | None = Path((), 0.0, 0.0, paths.first)  # of the greedy path

    def tokens(self, path: Path) -> np.ndarray:
        """The tokens whose log-probabilities behind `path` are asked for: those that end it, then those that go on."""
        return np.concatenate([self.stops, path.state.tokens])

    def wanted(self) -> list[Path]:
        """Up to `WIDTH` paths to expand next, together; none where the search is done. Each is given once."""
        out = [self._next] if self._next else []
        while self._open and len(out) < WIDTH and not self._enough(-self._open[0][0]):
            path = self._pop()
            if len(path.ids) == self.limit:
                self._cut(path)
            else:
                out.append(path)
        self.expanded += len(out)
        return out

    def found(self, path: Path, logprobs: np.ndarray) -> None:
        """The log-probabilities [n], among all tokens, of `tokens(path)`."""
        logprobs, n_stops = logprobs.astype(np.float64), len(self.stops)
        stop, going = logprobs[:n_stops], logprobs[n_stops:]
        may_end = path.state.may_end
        order = np.argsort(-going, kind="stable")  # of equal ones the least token first
        children = _Children(path, order, going[order])
        self.rest += math.exp(path.logprob) * (float(np.exp(going).sum()) - 1)
        if may_end:
            self._end(path, float(np.logaddexp.reduce(stop)), cut=False)
        if path is not self._next:
            self._push(children, 0)
            return
        ending = min(zip(-stop, self.stops, strict=True)) if may_end else (math.inf, 0)
        if not len(going) or ending < (-children.logprobs[0], children.token(0)):
            self.greedy, self._next = path, None
            self._push(children, 0)
            return
        self._next = children.path(0)
        if len(self._next.ids) == self.limit:
            self._cut(self._next)
            self.greedy, self._next = self._next, None
        self._push(children, 1)

    def _enough(self, logprob: float) -> bool:
        """True if paths of this log-probability need not be expanded, or not before the greedy answer is known."""
        if self.greedy is None:
            return logprob < math.log(REST)
        total = math.fsum(answer.mass for answer in self.answers.values())
        exact = sum(answer.best.logprob >= logprob for answer in self.answers.values()) >= self.n
        return exact or self.rest <= REST * total or self.expanded >= EXPANSIONS * self.n

    def quote(self, path: Path) -> Quote:
        """The text of a path, and its place."""
        return self.paths.quotes.quote(list(path.ids))

    def _pop(self) -> Path:
        _, _, children, i = heapq.heappop(self._open)
        self._push(children, i + 1)
        return children.path(i)

    def _push(self, children: _Children, i: int) -> None:
        if i < len(children.order):
            bound = children.parent.logprob + float(children.logprobs[i])
            heapq.heappush(self._open, (-bound, next(self._serial), children, i))

    def _cut(self, path: Path) -> None:
        self._end(path, 0.0, cut=True)
        self.rest -= math.exp(path.logprob)

    def _end(self, path: Path, logprob: float, cut: bool) -> None:
        ended = Ended(path, path.logprob + logprob, min(path.least, logprob), cut)
        self.answers.setdefault(self.paths.key(list(path.ids)), Answer(ended)).add(ended)


def searches(tree: Tree, task: Task) -> list[Search]:
    """A search for each question of a tree."""
    quotes, n = task.quotes(tree), task.decode.nbest
    assert quotes
    assert n
    if task.forced:
        raise ValueError("an n-best search forces no tokens")
    paths = Paths(quotes)
    return [Search(paths, task.stop_tokens, task.max_new_tokens, n) for _ in tree.branches]


def choose(search: Search, by: str, length_exponent: float) -> str:
    """The key of the answer that `decode.choose` means, of equal ones the first in alphabetical order.

    A path of n tokens, that of ending included, weighs exp(logprob / n ** length_exponent). By "path": the answer with
    the weightiest path; by "mass": with the greatest sum over its paths (most often an exact match); by "risk": with
    the greatest expected F1, the sums being the probabilities of the other answers (minimum Bayes risk,
    https://arxiv.org/abs/cs/0407005).
    """
    weights = {
        key: [math.exp(e.logprob / (len(e.path.ids) + (not e.cut)) ** length_exponent) for e in answer.ended]
        for key, answer in search.answers.items()
    }
    values = {key: max(each) if by == "path" else math.fsum(each) for key, each in weights.items()}
    if by == "risk":
        values = {key: math.fsum(values[other] * f1(key, other) for other in values) for key in values}
    return min(values, key=lambda key: (-values[key], key))


def to_prediction(search: Search, branch: Branch, decode: Decode) -> Prediction:
    """The chosen answer; its tokens are those of its most probable path."""
    ranked = sorted(search.answers.items(), key=lambda item: (-item[1].mass, item[0]))
    path, logprob, least, cut = search.answers[choose(search, decode.choose, decode.length_exponent)].best
    quote = search.quote(path)
    assert search.greedy
    return Prediction(
        branch.id,
        quote.text,
        [*path.ids, *([] if cut else search.stops[:1].tolist())],
        logprob,
        cut,
        span=(quote.span[0] + branch.offset, quote.span[1] + branch.offset),
        least=least,
        nbest=[(search.quote(answer.best.path).text, answer.mass) for _, answer in ranked[: search.n]],
        rest=max(0.0, search.rest),
        greedy=search.quote(search.greedy).text,
    )
