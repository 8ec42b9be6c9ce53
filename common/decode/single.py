"""One question at a time, as soon as possible: the prompt in one pass, then several tokens a pass, drafted from it.

An answer is nearly always a span of its context, so what follows the last tokens in the prompt is a good guess of what
comes next (prompt lookup, as transformers' `prompt_lookup_num_tokens` has it). A pass reads the last token and a draft,
and draws after each of them what the model would draw: as much of the draft as equals that is kept, and one token more.
So the answer is the greedy one, whatever the draft.

On a GPU with flash attention a pass is one CUDA graph, recorded for a few lengths; shorter ones are padded. Elsewhere
the same passes run as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

from common.config import Eval, Prompt, Window
from common.data.squad import Example
from common.data.tokens import Ids
from common.data.trees import build_trees
from common.decode import predict
from common.decode.answers import Generation, to_text
from common.decode.drafts import draft_from
from common.decode.forward import Decoder, NextTokens, Pass
from common.decode.plain import Plain
from common.device import has_flash_attention
from common.errors import UserError
from common.model.llama import unsupported_reason
from common.model.nf4 import FEW

import torch

DRAFT = FEW - 1  # tokens: with the one before them as many as a pass may have without a 16-bit copy of each matrix
PROMPTS = (64, 128, 192, 256, 384)  # tokens that a graph is recorded for, beside the most that there may be


class Single:
    """Answers one prompt after the other. `most_tokens`: of a prompt and its answer."""

    name = "drafts"

    def __init__(self, model: Any, stops: Sequence[int], limit: int, most_tokens: int):
        # a draft may reach beyond the last token, and padding goes to a slot of its own
        self.model, self.reader = model, Decoder(model, most_tokens + DRAFT + 1)
        self.stops, self.limit, self.most_prompt = set(stops), limit, most_tokens - limit
        self.prompts: list[_Recorded] = []  # rising; none where there are no graphs
        self.drafts: list[_Recorded] = []  # likewise
        if has_flash_attention(self.reader.device, self.reader.base.dtype):
            pool = None
            # the largest first: the others find room in its memory
            for length in reversed([*(n for n in PROMPTS if n < self.most_prompt), self.most_prompt]):
                self.prompts.insert(0, _Recorded(self.reader, length, 1, pool))
                pool = self.prompts[0].graph.pool()
            self.drafts = [_Recorded(self.reader, length, length, pool) for length in (1, DRAFT + 1)]

    def answer(
        self, prompt_ids: Ids, script: Ids | None = None, to_the_limit: bool = False,
        tick: Callable[[int], None] = lambda n: None,
    ) -> Generation:  # fmt: skip
        """The greedy answer: up to and with a stop token, or `limit` tokens.

        `script`: what is drawn in place of the most probable tokens. `to_the_limit`: a stop token does not end it.
        `tick` is called whenever tokens are known, with their number. Raises `UserError` for a prompt too long.
        """
        if not 0 < len(prompt_ids) <= self.most_prompt:
            n, most = len(prompt_ids), self.most_prompt
            raise UserError(f"a prompt of {n} tokens; 1 to {most} can be asked: lower window.context")
        answer, new, before, hope = Generation(), prompt_ids, 0, DRAFT
        stops = set[int]() if to_the_limit else self.stops
        while True:
            draft = new[1:] if before else []
            known = len(answer.token_ids)
            drawn = self._read(new, before, len(draft) + 1, (script or [])[known : known + len(draft) + 1])
            answer.passes += 1
            answer.drafted += len(draft)
            rows = zip(drawn.token.tolist(), drawn.logprob.tolist(), drawn.tie.tolist(), strict=True)
            for i, (token, logprob, tie) in zip(range(len(draft) + 1), rows, strict=False):
                answer.token_ids.append(token)
                answer.logprob += logprob
                answer.ties += tie
                done = token in stops or len(answer.token_ids) == self.limit
                if done or i == len(draft) or token != draft[i]:
                    answer.accepted += i
                    break
            tick(len(answer.token_ids) - known)
            if done:
                return answer
            before = len(prompt_ids) + len(answer.token_ids) - 1
            # a graph takes as long for a short draft; elsewhere a longer one is tried where the last was right
            hope = 2 * i + 1 if draft and not self.drafts else hope
            most = min(DRAFT, hope, self.limit - len(answer.token_ids) - 1)
            new = [answer.token_ids[-1], *draft_from(prompt_ids, answer.token_ids, most)]

    def _read(self, new: Ids, before: int, asks: int, forced: Ids) -> NextTokens:
        """What is drawn after each of the last `asks` tokens of `new`, on the host; more rows may follow."""
        for recorded in self.drafts if before else self.prompts:
            if recorded.length >= len(new):
                return recorded(new, before, forced)
        lists = _lists(new, before, forced, len(new), asks, 0)
        return self.reader.read(Pass.on(self.reader.device, lists, len(new))).to_host()


def engine(model: Any, stops: Sequence[int], window: Window, options: Eval, beside: int = 0) -> Single | Plain:
    """What `options.engine` and the model allow; for prompts and answers of this window, and `beside` tokens more.

    The model is in eval mode.
    """
    if options.engine == "plain" or unsupported_reason(model):
        return Plain(model, stops, window.answer)
    # another tokenizer cuts the text by its own tokens, of which this one may make more
    return Single(model, stops, window.answer, window.tokens * (2 if window.tokenizer else 1) + beside)


def ask(
    engine: Single | Plain, tokenizer: Any, example: Example, window: Window, window_tokenizer: Any | None = None,
    script: Ids | None = None, to_the_limit: bool = False, tick: Callable[[int], None] = lambda n: None,
    prompt: Prompt = Prompt(),
) -> tuple[str, list[Generation], bool]:  # fmt: skip
    """From text to text: the answer, what it took (the most probable first, where the context is read in windows), and
    whether the context was longer than the window."""
    built = build_trees([example], tokenizer, window, train=False, options=prompt, window_tokenizer=window_tokenizer)
    predict.check_positions(engine.model, max(map(len, built.trees)), window.answer)
    prompts = [tree.prefix_ids + tree.branches[0].prompt_ids for tree in built.trees]
    found = [engine.answer(ids, script, to_the_limit, tick) for ids in prompts]
    found.sort(key=lambda answer: (answer.logprob, answer.token_ids), reverse=True)
    return to_text(tokenizer, found[0].token_ids), found, bool(built.counts["truncated"])


class _Recorded:
    """A pass of `length` tokens as a CUDA graph, which draws after the last of them, or after each."""

    def __init__(self, reader: Decoder, length: int, asks: int, pool: Any):
        self.length, self.asks, self.unused = length, asks, reader.arena_tokens - 1
        lists = _lists([0] * length, 0, [], length, asks, self.unused)
        self.flat = Pass.flat(lists).to(reader.device)
        # the most keys that there may be, and no longer those of this pass, is what the host knows of the reach
        new = Pass.of(self.flat, {**lists, "own_used": [reader.arena_tokens]}, length)
        reader.read(new)  # compiles, loads kernels
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.drawn = reader.read(new)

    def __call__(self, new: Ids, before: int, forced: Ids) -> NextTokens:
        lists = _lists(new, before, forced, self.length, self.asks, self.unused)
        self.flat.copy_(Pass.flat(lists).pin_memory(), non_blocking=True)
        self.graph.replay()
        return self.drawn.to_host()


def _lists(new: Ids, before: int, forced: Ids, length: int, asks: int, unused: int) -> dict[str, list[int]]:
    """A pass of one stretch: `new` after `before` tokens, padded to `length`; padding has the slot `unused`."""
    n, pad = len(new), [0] * (length - len(new))
    keep = [n - 1] if asks == 1 else list(range(asks))
    return {
        "ids": [*new, *pad], "drawn": [-1] * length, "position": [*range(before, before + n), *pad],
        "slot": [*range(before, before + n), *(unused for _ in pad)],
        "keep": keep, "forced": [*forced, *[-1] * (asks - len(forced))],
        "own": [0, n], "own_start": [0, 0], "own_used": [before + n], "trees": [0], "prefix_start": [0],
        "prefix_used": [],
    }  # fmt: skip
