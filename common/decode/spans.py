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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

from common.data.tokens import Ids, Span, Tokenizer
from common.data.trees import Tree
from common.decode import spans_rows
from common.errors import UserError

import numpy as np
import torch
from torch import Tensor

# nodes: an answer without a token is at START and where it may begin, one that is a space at SPACE and there;
# node FIRST + i: the first i bytes of the context are passed
START, SPACE, FIRST = 0, 1, 2
BLOCK = 128  # contexts whose automata are made together: some 40 MiB
BORDER = 0xFF  # behind each context's bytes: no byte of UTF-8
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
        count = np.bincount(node, minlength=n)
        parts = (
            np.concatenate(keys),  # ascending, by level and within it: the n-th is the way to node n + 1
            tokens[np.argsort(node, kind="stable")],  # by the node where they end: from the third on, by the fourth
            np.cumsum(count) - count,
            count,
        )
        self.trie = tuple(torch.from_numpy(part.astype(np.int32)) for part in parts)
        self._there: dict[torch.device, tuple[Tensor, ...]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The trie on a device, copied once: keys, tokens, and each node's first token and count of them."""
        if device not in self._there:
            self._there[device] = tuple(part.to(device) for part in self.trie)
        return self._there[device]

    def child(self, node: Tensor, byte: Tensor) -> Tensor:
        """The number of each node's child by a byte, 0 where there is none."""
        keys, *_ = self.on(node.device)
        key = node * 256 + byte
        place = torch.searchsorted(keys, key, out_int32=True).clamp_(max=len(keys) - 1)
        return torch.where(keys[place] == key, place + 1, 0)

    def edges(self, data: Tensor, source: Tensor, at: Tensor, node: Tensor) -> Tensor:
        """(source, token, place behind it) of every token that leads from a node along `data`; [3, E] int32.

        `source`, `at` and `node` [n] int32: what to call each beginning, the place in `data` where it reads on, and the
        node of what it has read before. No token leads across a `BORDER`, with which `data` [bytes] int32 ends.
        """
        _, tokens, first, count = self.on(data.device)
        passed = [(source[node > 0], node[node > 0], at[node > 0])]
        while len(at):
            byte = data[at]
            node = torch.where(byte == BORDER, 0, self.child(node, byte))
            (kept,) = torch.nonzero(node, as_tuple=True)
            source, node, at = source[kept], node[kept], at[kept] + 1
            passed.append((source, node, at))
        source, node, at = (torch.cat(parts) for parts in zip(*passed, strict=True))
        counts = count[node]
        of = torch.arange(len(node), device=data.device).repeat_interleave(counts)
        nth = torch.arange(len(of), device=data.device) - (counts.cumsum(0) - counts)[of]  # of the node's tokens
        return torch.stack([source[of], tokens[first[node[of]] + nth], at[of]])


class Quote(NamedTuple):
    text: str
    span: Span  # characters of the context


@dataclass
class Automaton:
    """The quotes of one context."""

    vocabulary: Vocabulary
    context: str
    data: bytes  # of the context
    char: np.ndarray  # [bytes + 1] that each byte is of
    nodes: np.ndarray  # [2, N] bool: those of the first state; those where an answer may end
    there: tuple[Tensor, Tensor]  # the edges [3, E] int32, and the nodes, on some device

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The edges and the nodes on a device, copied once."""
        if self.there[0].device != device:
            self.there = self.there[0].to(device), self.there[1].to(device)
        return self.there

    @functools.cached_property
    def edges(self) -> np.ndarray:
        """[3, E]: node, token, node; on the host."""
        return self.there[0].cpu().numpy()

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


def automata(
    vocabulary: Vocabulary, contexts: Sequence[str], whole_words: bool, device: torch.device
) -> list[Automaton]:
    """The automata of contexts, made together on a device.

    Raises `ValueError` for a context without a word (`with_words`).
    """
    if not all(any(map(str.isalnum, context)) for context in contexts):
        raise ValueError("a context without a word has no quote")
    # ---- bytes, behind each context a border -----------------------------------------------------------------------
    text = "".join(f"{context}\0" for context in contexts)
    data = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    encoded = [context.encode() for context in contexts]
    size = np.array([len(part) + 1 for part in encoded])
    start = np.cumsum(size) - size
    of, border = np.repeat(np.arange(len(size)), size), start + size - 1  # of each byte: its context
    data[border] = BORDER
    first_byte = (data & 0xC0) != 0x80  # of a character
    char = np.cumsum(first_byte) - 1  # that each byte is of
    space, word = (_true_of(test, text) for test in (str.isspace, str.isalnum))
    within = np.zeros(len(text), bool)  # whether a character goes on with a word
    within[1:] = whole_words & word[:-1] & word[1:]

    # ---- nodes: FIRST, then one for each byte and the border, context after context --------------------------------
    node, base = np.arange(len(data)) + FIRST * (of + 1), start + FIRST * np.arange(len(size))
    begins, ends = first_byte & ~(space | within)[char], first_byte & ~within[char]
    begins[border] = ends[start] = False
    nodes = np.zeros((2, len(data) + FIRST * len(size)), bool)
    nodes[0, node], nodes[1, node], nodes[0, base + START] = begins, ends, True

    # ---- edges, on the device ---------------------------------------------------------------------------------------
    def there(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(device)

    places, beginnings, bases = np.delete(np.arange(len(data)), border), np.flatnonzero(begins), there(base)
    root = torch.zeros(1, dtype=torch.int32, device=device)
    blank = vocabulary.child(root, root + ord(" "))
    edges = vocabulary.edges(
        there(data),
        there(np.concatenate([node[places], base[of[beginnings]] + START])),
        there(np.concatenate([places, beginnings])),
        torch.cat([root.expand(len(places)), blank.expand(len(beginnings))]),
    )
    context_of = there(of)[edges[2]]
    edges[2] += FIRST * (context_of + 1)
    _, tokens, first, count = vocabulary.on(device)
    spaces = tokens[first[blank[0]] :][: count[blank[0]]]
    blanks = torch.stack(torch.broadcast_tensors(bases[:, None] + START, spaces, bases[:, None] + SPACE))
    edges = torch.cat([edges, blanks.flatten(1)], dim=1)
    context_of = torch.cat([context_of, there(np.arange(len(size))).repeat_interleave(len(spaces))])
    edges[::2] -= bases[context_of]
    edges = edges[:, context_of.argsort(stable=True)]
    by_context = edges.split(context_of.bincount(minlength=len(size)).tolist(), dim=1)
    sizes = (size + FIRST).tolist()
    nodes_there = torch.from_numpy(nodes).to(device).split(sizes, dim=1)
    return [
        Automaton(vocabulary, context, encoded[i], char[a:b] - char[a], nodes[:, c:d], (by_context[i], nodes_there[i]))
        for i, (context, a, b, c, d) in enumerate(
            zip(contexts, start, start + size, base, base + size + FIRST, strict=True)
        )
    ]


def _true_of(test: Callable[[str], bool], text: str) -> np.ndarray:
    """[characters] bool; of ASCII by a table."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    found = np.array([test(chr(code)) for code in range(128)])[np.minimum(codes, 127)]
    for i in np.flatnonzero(codes > 127).tolist():
        found[i] = test(text[i])
    return found


class Automata:
    """A function from a context to its automaton, which is made with those of the `BLOCK` contexts from it on."""

    def __init__(self, vocabulary: Vocabulary, contexts: Iterable[str], whole_words: bool, device: torch.device):
        """`contexts`: those that will be asked for, about in this order."""
        self.vocabulary, self.whole_words, self.device = vocabulary, whole_words, device
        self.contexts = list(dict.fromkeys(contexts))
        self.number = {context: i for i, context in enumerate(self.contexts)}
        self.kept: dict[str, Automaton] = {}

    def __call__(self, context: str) -> Automaton:
        if context not in self.kept:
            block = self.contexts[self.number[context] :][:BLOCK]
            made = automata(self.vocabulary, block, self.whole_words, self.device)
            self.kept = dict(zip(block, made, strict=True))
        return self.kept[context]


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
        self.most = int(sizes[1].max())
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
        of_rows: ModuleType = spans_rows
        if logits.is_cuda:
            from common.decode import spans_kernels as of_rows  # torch for a CPU comes without Triton
        mine = self.edges, self.edge_start, self.edge_count, self.state
        may_end = (self.state & self._of_nodes(1)).any(1) & ~self.state[:, :FIRST].any(1)
        stopping = torch.where(may_end[:, None], logits[:, self.stops], -torch.inf)  # [K, S]
        score, least, greatest = of_rows.best(logits, *mine)
        best = torch.maximum(score, stopping.amax(1))
        going, ending = (score == best) & (greatest >= 0), may_end[:, None] & (stopping == best[:, None])
        none = logits.shape[1]
        ends = torch.where(ending, self.stops, none)
        token = torch.minimum(torch.where(going, least.long(), none), ends.amin(1))
        tie = (going & (greatest != token)) | (ending & (ends != token[:, None])).any(1)
        token = torch.where(token == none, self.stops[0], token)
        if forced is not None:
            token = torch.where(forced >= 0, forced, token)
        return token, tie, of_rows.advance(*mine, token)

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


@functools.lru_cache(maxsize=512)  # of a paragraph's questions that are asked one by one
def automaton_of(vocabulary: Vocabulary, context: str, whole_words: bool = False) -> Automaton:
    """The automaton of one context, on the host, made once."""
    return automata(vocabulary, [context], whole_words, torch.device("cpu"))[0]


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
