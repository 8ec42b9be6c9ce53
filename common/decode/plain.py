"""Greedy decoding by transformers' and PEFT's own modules: the reference, and the engine of all that is no Llama."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from common.data import plan
from common.data.tokens import Ids
from common.data.trees import Branch, Tree
from common.decode import nbest
from common.decode.answers import Generation, Prediction, Task, Tick, need_finite, to_prediction
from common.decode.forward import choose
from common.decode.nbest import Path, Search, searches
from common.decode.spans import Automaton, Quotes
from common.device import out_of_memory
from common.model.llama import Model
from common.model.pack import Pack, build_pack
from common.model.tree_mask import logits, pack_logits
from common.runs import ranks

import torch
from torch import Tensor
from transformers import DynamicCache

CPU_PACK_TOKENS, GPU_PACK_TOKENS = 8192, 4096  # prompts of one pack: the logits and the cache fit beside a 7B base


@torch.inference_mode()
def greedy(
    model: Model,
    pack: Pack,
    stops: Tensor,
    max_new_tokens: int,
    automata: Sequence[Automaton] = (),
    to_the_limit: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per step (branch numbers [L], token ids [L], log-probabilities [L]) of the L branches that have not ended.

    `automata`: of each branch's context, where answers are quotes. `to_the_limit`: `stops` do not end them. New keys
    and values are appended to the pack's own under the same tree mask, so nothing is copied per question.
    """
    # without the model's configuration, by which a layer with a sliding window would keep but the pack's last tokens
    cache, layout = DynamicCache(), pack.layout
    live, at = torch.arange(len(pack.ids), device=pack.input_ids.device), layout[pack.prompt_ends]
    out = pack_logits(model, pack, pack.prompt_ends, cache)  # [B, V]
    state, before = None, torch.full_like(live, -1)
    for step in range(max_new_tokens):
        quotes = Quotes([automata[i] for i in live.tolist()], stops, state, before) if automata else None
        token, logprob, _, state = choose(out, None, quotes)
        yield live, token, logprob
        open_ = ~torch.isin(token, stops[:0] if to_the_limit else stops)
        if step + 1 == max_new_tokens or not open_.any():
            return
        live, at, before = live[open_], at[open_].next(), open_.nonzero()[:, 0]
        layout = layout.then(at)
        out = logits(model, token[open_], at, layout, cache=cache)  # [L, V]


def answer_packs(model: Model, trees: Sequence[Tree], task: Task) -> Iterator[Prediction]:
    """Answers pack by pack; ranks take packs as they go."""
    if task.forced:
        raise ValueError("the plain engine forces no tokens")
    if task.decode.nbest:
        yield from _search_packs(model, trees, task)
        return
    device = next(model.parameters()).device
    pack_tokens = task.options.pass_tokens or (CPU_PACK_TOKENS if device.type == "cpu" else GPU_PACK_TOKENS)
    stops = torch.tensor(task.stop_tokens, device=device)
    with out_of_memory(f"lower eval.pass_tokens (now {pack_tokens})"):
        for members in ranks.take(plan.fill(trees, pack_tokens), task.round):
            task.check()
            pack = build_pack(members).to(device)
            asked = [
                (branch, quotes) for tree in members for quotes in (task.quotes(tree),) for branch in tree.branches
            ]
            found, automata = [Generation() for _ in asked], [quotes for _, quotes in asked if quotes]
            for step in greedy(model, pack, stops, task.max_new_tokens, automata):
                for number, token, logprob in zip(*(x.tolist() for x in step), strict=True):
                    found[number].append(token, logprob, 0, (), task.max_new_tokens)
            for (branch, quotes), answer in zip(asked, found, strict=True):
                yield to_prediction(task.tokenizer, branch, answer, task.stop_tokens, task.decode, quotes)


@torch.inference_mode()
def _search_packs(model: Model, trees: Sequence[Tree], task: Task) -> Iterator[Prediction]:
    """As `answer_packs`, by n-best searches. Every path is read with its whole prompt, pack by pack."""
    device = next(model.parameters()).device
    pack_tokens = task.options.pass_tokens or (CPU_PACK_TOKENS if device.type == "cpu" else GPU_PACK_TOKENS)
    with out_of_memory(f"lower eval.pass_tokens (now {pack_tokens})"):
        for members in ranks.take(plan.fill(trees, pack_tokens), task.round):
            open_ = [(tree, *one) for tree in members for one in zip(tree.branches, searches(tree, task), strict=True)]
            while open_:
                task.check()
                asked: list[tuple[Tree, Branch, Search, Path]] = []
                for tree, branch, search in open_:
                    paths = search.wanted()
                    longer = (replace(branch, prompt_ids=[*branch.prompt_ids, *path.ids]) for path in paths)
                    asked += [(tree, one, search, path) for one, path in zip(longer, paths, strict=True)]
                    if not paths:
                        yield nbest.to_prediction(search, branch, task.decode)
                left = {id(search) for _, _, search, _ in asked}
                open_ = [one for one in open_ if id(one[2]) in left]
                if not asked:
                    break
                groups = (list(group) for _, group in groupby(asked, key=lambda one: id(one[0])))
                read = [replace(group[0][0], branches=tuple(b for _, b, _, _ in group)) for group in groups]
                pack = build_pack(read).to(device)
                logprobs = pack_logits(model, pack, pack.prompt_ends).float().log_softmax(-1)
                for (_, branch, search, path), row in zip(asked, logprobs, strict=True):
                    found = row[torch.from_numpy(search.tokens(path)).to(device)].cpu().numpy()
                    need_finite(f"question {branch.id}", float(found.sum()), model.dtype)
                    search.found(path, found)


class Plain:
    """Single queries by transformers' and PEFT's own modules, a token per pass."""

    name = "plain"
    keeps_prompt = False  # it reads every prompt anew

    def __init__(self, model: Model, stops: Sequence[int], limit: int):
        self.model, self.limit, self.stop_tokens = model, limit, set(stops)
        self.stops = torch.tensor(stops, device=next(model.parameters()).device)

    def answer(
        self,
        prompt_ids: Ids,
        forced: Ids | None = None,
        to_the_limit: bool = False,
        tick: Tick = lambda n: None,
        quotes: Automaton | None = None,
    ) -> Generation:
        """The greedy answer, as of `single.Single.answer`; tokens cannot be forced."""
        if forced:
            raise ValueError("the plain engine forces no tokens")
        answer, automata = Generation(), [quotes] if quotes else []
        batch = build_pack([Tree(prompt_ids[:-1], (Branch("", prompt_ids[-1:], []),))]).to(self.stops.device)
        for _, token, logprob in greedy(self.model, batch, self.stops, self.limit, automata, to_the_limit):
            answer.append(int(token), logprob.item(), 0, (), self.limit)
            answer.passes += 1
            tick(1)
        return answer
