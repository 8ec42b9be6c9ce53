"""One question at a time, at low latency: the prompt in one pass, then several tokens per pass by prompt lookup.

A pass takes the last token and a draft (`common.decode.drafts`) and computes the greedy token after each. The draft is
kept as far as it agrees, with one token more: the answer is greedy whatever the draft. On a GPU with fused attention a
pass is one CUDA graph, captured for a few lengths to which passes are padded.
"""

import functools
from collections.abc import Callable, Sequence

from common.config import Config, Eval, Window
from common.data.squad import Example
from common.data.tokens import Ids, Tokenizers
from common.data.trees import build_trees
from common.decode import chunks, plain, predict
from common.decode.answers import Generation, Tick, need_finite, to_text
from common.decode.drafts import draft_from
from common.decode.forward import Batch, Decoder, NextTokens
from common.errors import UserError
from common.model import varlen
from common.model.llama import Model
from common.model.nf4 import MATMUL_TOKENS
from common.model.tree_mask import need_embedded

import torch

# with the last token as many as NF4 products take: 2.3 passes per SQuAD question, 6.2 without drafts (docs/log.md)
DRAFT_TOKENS = MATMUL_TOKENS - 1
PROMPT_SIZES = (64, 128, 192, 256, 384)  # tokens that graphs are captured for, besides the longest prompt
Capture = Callable[[torch.cuda.CUDAGraph], torch.cuda.graph]


class Single:
    """The engine for Llamas. `most_tokens`: of a prompt and its answer."""

    name = "drafts"

    def __init__(self, model: Model, stop_tokens: Sequence[int], limit: int, most_tokens: int):
        # a draft may reach beyond the last token, and padding needs a slot of its own
        self.model, self.decoder = model, Decoder(model, most_tokens + DRAFT_TOKENS + 1)
        self.stop_tokens, self.limit, self.most_prompt = set(stop_tokens), limit, most_tokens - limit
        # shortest first; both are empty without fused attention
        self.prompt_graphs, self.draft_graphs = list[_Captured](), list[_Captured]()
        if varlen.kernels(self.decoder.device, self.decoder.base.dtype):
            capture = functools.partial(torch.cuda.graph, pool=torch.cuda.graph_pool_handle())
            lengths = [*(n for n in PROMPT_SIZES if n < self.most_prompt), self.most_prompt]
            # the longest first, because the others then reuse its memory
            self.prompt_graphs = [_Captured(self.decoder, n, 1, capture) for n in reversed(lengths)][::-1]
            self.draft_graphs = [_Captured(self.decoder, n, n, capture) for n in (1, DRAFT_TOKENS + 1)]

    def answer(
        self, prompt_ids: Ids, forced: Ids | None = None, to_the_limit: bool = False, tick: Tick = lambda n: None
    ) -> Generation:
        """The greedy answer, up to and with a stop token, or `limit` tokens.

        `forced`: tokens that replace the most probable ones. `to_the_limit`: stop tokens do not end it. Raises
        `UserError` for a prompt too long.
        """
        if not 0 < (n := len(prompt_ids)) <= self.most_prompt:
            raise UserError(f"a prompt of {n} tokens; 1 to {self.most_prompt} can be asked: lower window.context")
        answer, new, cached, draft_length = Generation(), prompt_ids, 0, DRAFT_TOKENS
        stop_tokens = set[int]() if to_the_limit else self.stop_tokens
        while True:
            draft, known = new[1:] if cached else [], len(answer.token_ids)
            out = self._forward(new, cached, len(draft) + 1, (forced or [])[known : known + len(draft) + 1])
            answer.passes += 1
            answer.drafted += len(draft)
            for i, (token, logprob, tie) in enumerate(zip(*(x.tolist() for x in out), strict=True)):
                done = answer.append(token, logprob, tie, stop_tokens, self.limit)
                if done or i == len(draft) or token != draft[i]:
                    answer.accepted += i
                    break
            tick(len(answer.token_ids) - known)
            if done:
                return answer
            cached = len(prompt_ids) + len(answer.token_ids) - 1
            # a graph takes as long for a short draft; without graphs only an accepted draft makes the next one longer
            draft_length = 2 * i + 1 if draft and not self.draft_graphs else draft_length
            most = min(DRAFT_TOKENS, draft_length, self.limit - len(answer.token_ids) - 1)
            new = [answer.token_ids[-1], *draft_from(prompt_ids, answer.token_ids, most)]

    def _forward(self, new: Ids, cached: int, asks: int, forced: Ids) -> NextTokens:
        """The next tokens of the last `asks` tokens of `new`, on the host; more rows may follow."""
        for captured in self.draft_graphs if cached else self.prompt_graphs:
            if captured.length >= len(new):
                return captured(new, cached, forced)
        batch = _batch(new, cached, forced, len(new), asks, 0).to(self.decoder.device)
        return self.decoder.forward(batch).to_host()


Engine = Single | plain.Plain


def engine(model: Model, stop_tokens: Sequence[int], window: Window, options: Eval, overhead: int = 0) -> Engine:
    """The engine that `options` and the model (in eval mode) allow, for prompts of the window and `overhead` tokens."""
    if predict.engine_of(model, options) == "plain":
        return plain.Plain(model, stop_tokens, window.answer)
    # another window tokenizer counts its own tokens, of which this model's may need up to twice as many
    return Single(model, stop_tokens, window.answer, window.tokens * (2 if window.tokenizer else 1) + overhead)


def ask(
    engine: Engine,
    tokenizers: Tokenizers,
    example: Example,
    config: Config,
    forced: Ids | None = None,
    to_the_limit: bool = False,
    tick: Tick = lambda n: None,
) -> tuple[str, list[Generation], bool]:
    """End to end: the answer, one generation per window (the most probable first), and whether the window cuts."""
    built = build_trees([example], tokenizers, config.window, train=False, options=config.prompt)
    predict.check_positions(engine.model, max(map(len, built.trees)), config.window.answer)
    need_embedded(engine.model.config, built.trees)
    found = [engine.answer(t.prefix_ids + t.branches[0].prompt_ids, forced, to_the_limit, tick) for t in built.trees]
    for answer in found:
        need_finite(f"question {example.id}", answer.logprob, engine.model.dtype)
    found.sort(key=chunks.by_probability, reverse=True)
    return to_text(tokenizers.own, found[0].token_ids), found, bool(built.counts["truncated"])


class _Captured:
    """A CUDA graph of a pass of `length` tokens, with the next token of the last of them (`asks` 1) or of each."""

    def __init__(self, decoder: Decoder, length: int, asks: int, capture: Capture):
        self.length, self.asks, self.unused = length, asks, decoder.cache_tokens - 1
        batch = _batch([0] * length, 0, [], length, asks, self.unused)
        self.flat = batch.flatten().to(decoder.device)
        batch.own_used = [decoder.cache_tokens]  # the kernel's launch is captured for the most keys that there may be
        new = batch.split(self.flat)
        decoder.forward(new)  # compiles, loads kernels
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        with capture(self.graph):
            self.out = decoder.forward(new)

    def __call__(self, new: Ids, cached: int, forced: Ids) -> NextTokens:
        batch = _batch(new, cached, forced, self.length, self.asks, self.unused)
        self.flat.copy_(batch.flatten().pin_memory(), non_blocking=True)
        self.graph.replay()
        return self.out.to_host()


def _batch(new: Ids, cached: int, forced: Ids, length: int, asks: int, unused: int) -> Batch:
    """`new` after `cached` tokens of the block at slot 0, padded to `length` tokens; padding has the slot `unused`."""
    batch = Batch()
    batch.add(new, 0, cached=cached)
    for values, padding in ((batch.ids, 0), (batch.previous_row, -1), (batch.position, 0), (batch.slot, unused)):
        values += [padding] * (length - len(new))
    batch.keep = [len(new) - 1] if asks == 1 else list(range(asks))
    batch.forced = [*forced, *[-1] * (asks - len(forced))]
    return batch
