"""One question at a time, at low latency: the prompt in one pass, then several tokens per pass by prompt lookup.

A pass takes the last token and a draft (`common.decode.drafts`) and computes the greedy token after each. The draft is
kept as far as it agrees, with one token more: the answer is greedy whatever the draft. On a GPU with fused attention a
pass is one CUDA graph, captured for a few lengths to which passes are padded.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

from common.config import Config, Decode, Eval, Window
from common.data.squad import Example
from common.data.tokens import Ids, Tokenizers
from common.data.trees import Tree, build_trees
from common.data.window import answer_limit
from common.decode import chunks, nbest, nbest_batched, plain, predict
from common.decode.answers import Generation, Prediction, Task, Tick, need_finite, to_prediction
from common.decode.drafts import draft_from
from common.decode.forward import Batch, Decoder, NextTokens, Pass, choose
from common.decode.spans import Automaton, Quotes, State, with_words
from common.errors import UserError
from common.model import varlen
from common.model.llama import Model
from common.model.nf4 import MATMUL_TOKENS
from common.model.tree_mask import need_embedded

import numpy as np
import torch
from torch import Tensor

# with the last token as many as NF4 products take: 2.3 passes per SQuAD question, 6.2 without drafts (docs/log.md)
DRAFT_TOKENS = MATMUL_TOKENS - 1
PROMPT_SIZES = (64, 128, 192, 256, 384)  # tokens that graphs are captured for, besides the longest prompt
Capture = Callable[[torch.cuda.CUDAGraph], torch.cuda.graph]
Out = NextTokens | Tensor  # next tokens; or, where they depend on what an answer may be, the logits


class Single:
    """The engine for Llamas. `most_tokens`: of a prompt and its answer. `spans`: answers are quotes.

    `searched`: `search` finds them.
    """

    name = "drafts"

    def __init__(
        self,
        model: Model,
        stop_tokens: Sequence[int],
        limit: int,
        most_tokens: int,
        spans: bool = False,
        searched: bool = False,
    ):
        # a draft may reach beyond the last token, and padding needs a slot of its own
        lanes = (nbest.WIDTH - 1) * limit if searched else 0
        self.model, self.decoder = model, Decoder(model, most_tokens + DRAFT_TOKENS + 1 + lanes)
        self.stop_tokens, self.limit, self.most_prompt = set(stop_tokens), limit, most_tokens - limit
        self.spans = spans
        self.keeps_prompt = False  # whether the cache keeps a prompt: what the next one shares is not read again
        self.held = Ids()  # the prompt that it keeps
        # shortest first; both are empty without fused attention
        self.prompt_graphs, self.draft_graphs = list[_Captured](), list[_Captured]()
        if varlen.kernels(self.decoder.device, self.decoder.base.dtype) and not searched:
            capture = functools.partial(torch.cuda.graph, pool=torch.cuda.graph_pool_handle())
            lengths = [*(n for n in PROMPT_SIZES if n < self.most_prompt), self.most_prompt]
            # the longest first, because the others then reuse its memory
            of: Callable[[Pass], Out] = self.decoder.logits if spans else self.decoder.forward
            self.prompt_graphs = [_Captured(self.decoder, n, 1, of, capture) for n in reversed(lengths)][::-1]
            self.draft_graphs = [_Captured(self.decoder, n, n, of, capture) for n in (1, DRAFT_TOKENS + 1)]

    def answer(
        self,
        prompt_ids: Ids,
        forced: Ids | None = None,
        to_the_limit: bool = False,
        tick: Tick = lambda n: None,
        quotes: Automaton | None = None,
    ) -> Generation:
        """The greedy answer, up to and with a stop token, or `limit` tokens.

        `forced`: tokens that replace the most probable ones. `to_the_limit`: stop tokens do not end it. `quotes`: of
        the context, if the engine was made for `spans`. Raises `UserError` for a prompt too long.
        """
        if not 0 < (n := len(prompt_ids)) <= self.most_prompt:
            raise UserError(f"a prompt of {n} tokens; 1 to {self.most_prompt} can be asked: lower window.context")
        both = zip(prompt_ids[:-1], self.held, strict=False)
        cached = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
        answer, new, draft_length, self.held = Generation(), prompt_ids[cached:], DRAFT_TOKENS, []
        if self.spans != bool(quotes):
            raise ValueError("quotes are of an engine that was made for spans")
        stop_tokens = set[int]() if to_the_limit else self.stop_tokens
        state = quotes.nodes[0] if quotes else np.zeros(0, bool)
        while True:
            draft, known = new[1:] if answer.token_ids else [], len(answer.token_ids)
            given = (forced or [])[known : known + len(draft) + 1]
            out = self._forward(new, cached, draft, given, quotes, state)
            answer.passes += 1
            answer.drafted += len(draft)
            for i, (token, logprob, tie) in enumerate(zip(*(x.tolist() for x in out[:3]), strict=True)):
                done = answer.append(token, logprob, tie, stop_tokens, self.limit)
                state = quotes.advance(state, token) if quotes else state
                if done or i == len(draft) or token != draft[i]:
                    answer.accepted += i
                    break
            tick(len(answer.token_ids) - known)
            if done:
                self.held = prompt_ids if self.keeps_prompt else []
                return answer
            cached = len(prompt_ids) + len(answer.token_ids) - 1
            # a graph takes as long for a short draft; without graphs only an accepted draft makes the next one longer
            draft_length = 2 * i + 1 if draft and not self.draft_graphs else draft_length
            most = min(DRAFT_TOKENS, draft_length, self.limit - len(answer.token_ids) - 1)
            new = [answer.token_ids[-1], *draft_from(prompt_ids, answer.token_ids, most)]

    def _forward(
        self, new: Ids, cached: int, draft: Ids, forced: Ids, quotes: Automaton | None, state: State
    ) -> NextTokens:
        """The next token of the last of `new` and, of a draft, of each, on the host; of free answers more may follow.

        `state`: of `quotes`, before the draft.
        """
        asks = len(draft) + 1
        graphs = self.draft_graphs if cached and len(new) == asks else self.prompt_graphs
        captured = next((graph for graph in graphs if graph.length >= len(new)), None)
        if captured:
            out = captured(new, cached, forced)
        else:
            batch = _batch(new, cached, forced, len(new), asks, 0).to(self.decoder.device)
            out = self.decoder.logits(batch) if self.spans else self.decoder.forward(batch)
        if isinstance(out, NextTokens):
            return out.to_host()
        assert quotes
        rows = Quotes([quotes] * asks, torch.tensor(sorted(self.stop_tokens), device=out.device))
        states = [state]
        for token in draft:
            states.append(quotes.advance(states[-1], token))
        rows.state = torch.from_numpy(np.stack(states)).to(out.device)
        given = torch.tensor([*forced, *[-1] * (asks - len(forced))], device=out.device)
        return choose(out[:asks], given, rows).to_host()


Engine = Single | plain.Plain


def engine(
    model: Model,
    stop_tokens: Sequence[int],
    window: Window,
    options: Eval,
    overhead: int = 0,
    decode: Decode = Decode(),
) -> Engine:
    """The engine that `options` and the model (in eval mode) allow, for prompts of the window and `overhead` tokens."""
    limit = answer_limit(window, decode)
    if predict.engine_of(model, options) == "plain":
        return plain.Plain(model, stop_tokens, limit)
    # another window tokenizer counts its own tokens, of which this model's may need up to twice as many
    most = (window.tokens - window.answer + limit) * (2 if window.tokenizer else 1) + overhead
    return Single(model, stop_tokens, limit, most, decode.spans, decode.nbest is not None)


def ask(
    engine: Engine,
    tokenizers: Tokenizers,
    example: Example,
    config: Config,
    forced: Ids | None = None,
    to_the_limit: bool = False,
    tick: Tick = lambda n: None,
) -> tuple[Prediction, list[Generation], bool]:
    """End to end: the answer, one generation per window (the most probable first), and whether the window cuts."""
    built = build_trees([example], tokenizers, config.window, train=False, options=config.prompt)
    predict.check_positions(engine.model, max(map(len, built.trees)), answer_limit(config.window, config.decode))
    need_embedded(engine.model.config, built.trees)
    trees = with_words(built.trees) if config.decode.spans else built.trees
    quotes_of = predict.quotes_of(engine.model, tokenizers.own, config.decode)
    if config.decode.nbest:
        searched = [search(engine, tokenizers, tree, config) for tree in trees]
        searched.sort(key=lambda one: chunks.by_probability(one[0]), reverse=True)
        return searched[0][0], [generation for _, generation in searched], bool(built.counts["truncated"])
    asked = [(tree, quotes_of(tree.context)) for tree in trees]
    found = []
    for tree, quotes in asked:
        prompt_ids = tree.prefix_ids + tree.branches[0].prompt_ids
        answer = engine.answer(prompt_ids, forced, to_the_limit, tick, quotes)
        need_finite(f"question {example.id}", answer.logprob, engine.model.dtype)
        found.append((answer, tree.branches[0], quotes))
    found.sort(key=lambda one: chunks.by_probability(one[0]), reverse=True)
    best, branch, quotes = found[0]
    prediction = to_prediction(tokenizers.own, branch, best, engine.stop_tokens, config.decode, quotes)
    if config.decode.snap:
        (prediction,) = predict.snapped({branch.id: prediction}, built.trees).values()
    return prediction, [answer for answer, _, _ in found], bool(built.counts["truncated"])


def search(engine: Engine, tokenizers: Tokenizers, tree: Tree, config: Config) -> tuple[Prediction, Generation]:
    """The answer to a tree's only question, chosen from the most probable ones; passes are not counted."""
    quotes = predict.quotes_of(engine.model, tokenizers.own, config.decode)
    task = Task(
        tokenizers.own,
        sorted(engine.stop_tokens),
        engine.limit,
        config.eval,
        lambda: None,
        {},
        "question",
        lambda tree: quotes(tree.context),
        config.decode,
    )
    if isinstance(engine, plain.Plain):
        (answer,) = plain.answer_packs(engine.model, [tree], task)
    else:
        (found,) = nbest_batched.answers(engine.decoder, [tree], task, len(tree))
        answer = nbest.to_prediction(found.search, found.branch, config.decode)
    assert answer.logprob is not None
    return answer, Generation(answer.token_ids, answer.logprob)


class _Captured:
    """A CUDA graph of a pass of `length` tokens, with the next token of the last of them (`asks` 1) or of each."""

    def __init__(self, decoder: Decoder, length: int, asks: int, of: Callable[[Pass], Out], capture: Capture):
        self.length, self.asks, self.unused = length, asks, decoder.cache_tokens - 1
        batch = _batch([0] * length, 0, [], length, asks, self.unused)
        self.flat = batch.flatten().to(decoder.device)
        batch.own_used = [decoder.cache_tokens]  # the kernel's launch is captured for the most keys that there may be
        new = batch.split(self.flat)
        of(new)  # compiles, loads kernels
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        with capture(self.graph):
            self.out = of(new)

    def __call__(self, new: Ids, cached: int, forced: Ids) -> Out:
        """The output of the replayed pass, valid until the next call."""
        batch = _batch(new, cached, forced, self.length, self.asks, self.unused)
        self.flat.copy_(batch.flatten().pin_memory(), non_blocking=True)
        self.graph.replay()
        return self.out


def _batch(new: Ids, cached: int, forced: Ids, length: int, asks: int, unused: int) -> Batch:
    """`new` after `cached` tokens of the block at slot 0, padded to `length` tokens; padding has the slot `unused`."""
    batch = Batch()
    batch.add(new, 0, cached=cached)
    for values, padding in ((batch.ids, 0), (batch.previous_row, -1), (batch.position, 0), (batch.slot, unused)):
        values += [padding] * (length - len(new))
    batch.keep = [len(new) - 1] if asks == 1 else list(range(asks))
    batch.forced = [*forced, *[-1] * (asks - len(forced))]
    return batch
