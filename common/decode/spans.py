"""Answers as quotes: greedy decoding that can only give what stands in the context that was read (`decode.spans`).

A context's automaton has a node for each of its bytes, and an edge (node, token, node) wherever the bytes of a token
stand in it; bytes, because tokenizers split characters. A state is a set of nodes: the places that an answer may have
come to. An answer begins at a character that is no white space, behind one space at most that the context need not
have, and may end where a character does; with whole words, where words do. The next token is the most probable one on
an edge out of the state. States are kept and advanced on the device, for the host of the batched engine learns of a
token one pass late.
"""

import functools
import json
from collections.abc import Sequence
from typing import NamedTuple

from common.data.tokens import Ids, Span, Tokenizer
from common.data.trees import Tree
from common.errors import UserError

import numpy as np
import torch
from torch import Tensor

# nodes: an answer without a token is at START and where it may begin, one that is a space at SPACE and there;
# node FIRST + i: the first i bytes of the context are passed
START, SPACE, FIRST = 0, 1, 2
ELEMENTS = 2**20  # rows × edges that are looked at together: some 50 MiB, which the margins of memory hold
Edges = np.ndarray  # [3, E] int: node, token, node
State = np.ndarray  # [N] bool


class Vocabulary:
    """The bytes of tokens, None of special ones, as a trie: nodes are numbered, the root is 0."""

    def __init__(self, token_bytes: Sequence[bytes | None]):
        self.bytes = token_bytes
        tokens = np.array([token for token, text in enumerate(token_bytes) if text])
        texts = [text for text in token_bytes if text]
        sizes = np.array([len(text) for text in texts])
        flat, start = np.frombuffer(b"".join(texts), np.uint8), np.cumsum(sizes) - sizes
        node, keys, n = np.zeros(len(texts), np.int64), [], 1
        for depth in range(sizes.max()):  # level by level, so that numpy does the work
            longer = np.flatnonzero(sizes > depth)
            key, inverse = np.unique(node[longer] * 256 + flat[start[longer] + depth], return_inverse=True)
            keys.append(key)
            node[longer] = n + inverse
            n += len(key)
        self.keys = np.concatenate(keys)  # ascending, by level and within it: the n-th is the way to node n + 1
        self.tokens = tokens[np.argsort(node, kind="stable")]  # by the node where they end
        self.count = np.bincount(node, minlength=n)
        self.first = np.cumsum(self.count) - self.count

    def child(self, node: np.ndarray, byte: np.ndarray) -> np.ndarray:
        """The number of each node's child by a byte, 0 where there is none."""
        key = node * 256 + byte
        place = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        return np.where(self.keys[place] == key, place + 1, 0)

    def tokens_at(self, node: int) -> np.ndarray:
        """The tokens that end at a node."""
        return self.tokens[self.first[node] :][: self.count[node]]

    def edges(self, data: np.ndarray, source: np.ndarray, at: np.ndarray, node: np.ndarray) -> Edges:
        """(source, token, place behind it) of every token that leads from a node of the trie along `data`.

        `source`, `at` and `node` [n]: what to call each beginning, the place in `data` where it reads on, and the node
        of what it has read before.
        """
        passed = [(source[node > 0], node[node > 0], at[node > 0])]
        while len(at):
            inside = at < len(data)
            source, at, node = source[inside], at[inside], node[inside]
            node = self.child(node, data[at])
            source, at, node = (x[node > 0] for x in (source, at + 1, node))
            passed.append((source, node, at))
        source, node, at = (np.concatenate(parts) for parts in zip(*passed, strict=True))
        count = self.count[node]
        nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)  # of the node's tokens
        tokens = self.tokens[np.repeat(self.first[node], count) + nth]
        return np.stack([np.repeat(source, count), tokens, np.repeat(at, count)])


class Quote(NamedTuple):
    text: str
    span: Span  # characters of the context


class Automaton:
    """The quotes of one context."""

    def __init__(self, vocabulary: Vocabulary, context: str, whole_words: bool = False):
        """Raises `ValueError` for a context without a word (`with_words`)."""
        self.vocabulary, self.context, self.data = vocabulary, context, context.encode()
        data = np.frombuffer(self.data, np.uint8)
        starts = (data & 0xC0) != 0x80  # of UTF-8's characters
        self.char = np.append(np.cumsum(starts) - 1, len(context))  # that each byte is of
        space, word = (np.array([test(c) for c in context], bool) for test in (str.isspace, str.isalnum))
        if not word.any():
            raise ValueError("a context without a word has no quote")
        within = np.zeros(len(context) + 1, bool)  # places between two characters of a word
        within[1:-1] = whole_words & word[:-1] & word[1:]
        places, begins = np.arange(len(data)), np.flatnonzero(starts & ~(space | within[:-1])[self.char[:-1]])
        blank = vocabulary.child(np.zeros(1, np.int64), np.array([ord(" ")]))
        source = np.concatenate([places + FIRST, np.full_like(begins, START)])
        node = np.concatenate([np.zeros_like(places), np.repeat(blank, len(begins))])
        spaces = vocabulary.tokens_at(blank[0])
        edges = vocabulary.edges(data, source, np.concatenate([places, begins]), node)
        edges[2] += FIRST
        self.edges = np.concatenate([edges, [[START] * len(spaces), spaces, [SPACE] * len(spaces)]], axis=1)
        # those of the first state; those where an answer may end
        self.nodes = np.zeros((2, len(data) + 1 + FIRST), bool)
        self.nodes[0, [START, *(begins + FIRST)]] = True
        self.nodes[1, FIRST + 1 :] = np.append(starts, True)[1:] & ~within[self.char[1:]]
        self._there: tuple[Tensor, Tensor] | None = None

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The edges [3, E] int32 and the nodes [2, N] bool on a device, copied once."""
        if self._there is None:
            edges, nodes = torch.from_numpy(self.edges.astype(np.int32)), torch.from_numpy(self.nodes)
            if device.type == "cuda":  # from pinned memory, for which the host need not wait
                edges, nodes = (x.pin_memory().to(device, non_blocking=True) for x in (edges, nodes))
            self._there = edges, nodes
        return self._there

    def advance(self, state: State, token: int) -> State:
        """The state behind a token, on the host."""
        source, tokens, target = self.edges
        after = np.zeros_like(state)
        after[target[(tokens == token) & state[source]]] = True
        return after

    def quote(self, token_ids: Ids) -> Quote:
        """The first place of a decoded answer; stop tokens, which have no bytes, are left out.

        What the limit has cut ends where an answer may, or, within its first word, at its last whole character.
        """
        found = b"".join(self.vocabulary.bytes[token] or b"" for token in token_ids).removeprefix(b" ")
        places = [i for i in _places(self.data, found) if self.nodes[0, i + FIRST]]
        if not places:
            return Quote("", (0, 0))
        n = len(found)
        place = next((i for i in places if self.nodes[1, i + n + FIRST]), places[0])
        stop = next((i for i in range(place + n, place, -1) if self.nodes[1, i + FIRST]), place + n)
        start = int(self.char[place])
        text = self.context[start : self.char[stop]].rstrip()
        return Quote(text, (start, start + len(text)))


class Quotes:
    """The automata of a pass's K next tokens and the states that they are in, on the device."""

    state: Tensor  # [K, N] bool

    def __init__(
        self, automata: Sequence[Automaton], stops: Tensor, before: Tensor | None = None, row: Tensor | None = None
    ):
        """`stops` [S] end an answer; the state is that of `row` [K] in `before`, or the first one where that is -1."""
        self.stops, device = stops, stops.device
        distinct = {id(a): a for a in automata}
        number = {key: i for i, key in enumerate(distinct)}
        edges, nodes = zip(*(a.on(device) for a in distinct.values()), strict=True)
        self.edges, self.nodes = torch.cat(edges, dim=1), torch.cat(nodes, dim=1)
        sizes = torch.tensor([[x.shape[1] for x in part] for part in (edges, nodes)])
        of_row = [number[id(a)] for a in automata]
        self.longest, self.most = sizes[:, of_row].amax(1).tolist()
        ranges = torch.stack([sizes.cumsum(1) - sizes, sizes])[:, :, of_row]
        if device.type == "cuda":  # from pinned memory, or the host would wait for the pass in flight
            ranges = ranges.pin_memory()
        ranges = ranges.to(device, non_blocking=True)
        self.edge_start, self.node_start, self.edge_count, self.node_count = ranges.flatten(0, 1)  # [K] each
        self.state = self._of_nodes(0)
        if before is not None and row is not None:
            n, old = min(self.most, before.shape[1]), torch.zeros_like(self.state)
            old[:, :n] = before[row.clamp(min=0), :n]
            self.state = torch.where((row >= 0)[:, None], old, self.state)

    def choose(self, logits: Tensor, forced: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(next tokens [K] int64, whether another was as probable [K] bool, the states behind them [K, N] bool).

        Of the tokens on edges out of a state, and of the stop tokens where an answer may end, the most probable one; of
        equal ones the least. Where no edge leaves a state, the answer ends. `forced` [K]: token to take instead, or -1.
        """
        step, state = max(1, ELEMENTS // self.longest), self.state
        may_end = (state & self._of_nodes(1)).any(1) & ~state[:, :FIRST].any(1)
        stopping = torch.where(may_end[:, None], logits[:, self.stops], -torch.inf)  # [K, S]
        found = []
        for start in range(0, len(logits), step):
            part = slice(start, start + step)
            place = torch.arange(self.longest, device=logits.device)
            index = (self.edge_start[part, None] + place).clamp_(max=self.edges.shape[1] - 1)
            source, token, target = (x[index].long() for x in self.edges)  # [k, E] each
            open_ = (place < self.edge_count[part, None]) & state[part].gather(1, source)
            scores = torch.where(open_, logits[part].gather(1, token), -torch.inf)
            best = torch.maximum(scores.amax(1), stopping[part].amax(1))[:, None]
            none = logits.shape[1]
            equal = torch.where(open_ & (scores == best), token, none)
            stops = torch.where(may_end[part, None] & (stopping[part] == best), self.stops, none)
            chosen = torch.minimum(equal.amin(1), stops.amin(1))
            others = torch.stack([((x != none) & (x != chosen[:, None])).any(1) for x in (equal, stops)])
            chosen = torch.where(chosen == none, self.stops[0], chosen)
            if forced is not None:
                chosen = torch.where(forced[part] >= 0, forced[part], chosen)
            after = torch.zeros(state[part].shape, dtype=torch.int32, device=logits.device)
            after.scatter_add_(1, target, (open_ & (token == chosen[:, None])).int())
            found.append((chosen, others.any(0), after > 0))
        token, tie, after = (torch.cat(x) for x in zip(*found, strict=True))
        return token, tie, after

    def _of_nodes(self, which: int) -> Tensor:
        place = torch.arange(self.most, device=self.nodes.device)
        index = (self.node_start[:, None] + place).clamp_(max=self.nodes.shape[1] - 1)
        return self.nodes[which][index] & (place < self.node_count[:, None])


def with_words(trees: Sequence[Tree]) -> list[Tree]:
    """The trees whose context has a word. Raises `UserError` for a question of which none has."""
    kept = [tree for tree in trees if any(map(str.isalnum, tree.context))]
    quoted = {branch.id for tree in kept for branch in tree.branches}
    for branch in (branch for tree in trees for branch in tree.branches):
        if branch.id not in quoted:
            raise UserError(f"question {branch.id}: no word is in what is read of its context, and decode.spans quotes")
    return kept


@functools.lru_cache(maxsize=512)  # a paragraph's questions may be in several trees, and asked one by one
def automaton(vocabulary: Vocabulary, context: str, whole_words: bool) -> "Automaton":
    """The automaton of a context, made once."""
    return Automaton(vocabulary, context, whole_words)


@functools.lru_cache(maxsize=4)
def vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer's first `size` tokens, those that a model has logits for; made once.

    Raises `UserError` as `token_bytes` does.
    """
    return Vocabulary(token_bytes(tokenizer)[:size])


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """The bytes of each token, None of special ones. Raises `UserError` where they depend on a token's neighbours."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    decoder = json.dumps(backend["decoder"], ensure_ascii=False)
    added = {token["id"]: token for token in backend["added_tokens"]}
    if '"ByteLevel"' in decoder:
        table = _byte_level()

        def own(text: str) -> bytes:
            return bytes(table[character] for character in text)
    elif "\u2581" in decoder or '"Metaspace"' in decoder:

        def own(text: str) -> bytes:
            is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
            return bytes([int(text[3:5], 16)]) if is_byte else text.replace("\u2581", " ").encode()
    else:
        raise UserError("decode.spans: this tokenizer's tokens have no bytes of their own, as GPT-2's and Llama-2's do")
    texts = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    out: list[bytes | None] = []
    for token, text in enumerate(texts):
        if token in special or text is None or (token in added and added[token]["special"]):
            out.append(None)
        else:
            out.append(added[token]["content"].encode() if token in added else own(text))
    return out


@functools.cache
def _byte_level() -> dict[str, int]:
    """GPT-2's character of each byte: itself where it is printed, else one from 256 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _places(data: bytes, found: bytes) -> list[int]:
    """The places where `found` stands in `data`, ascending."""
    places, at = list[int](), data.find(found) if found else -1
    while at >= 0:
        places.append(at)
        at = data.find(found, at + 1)
    return places
