"""Greedy decoding by transformers' and PEFT's own modules: the reference, and the engine of all that is no Llama."""

from collections.abc import Iterator, Sequence

from common.data import plan
from common.data.tokens import Ids
from common.data.trees import Branch, Tree
from common.decode.answers import Generation, Prediction, Task, Tick, to_text
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
def greedy(model: Model, pack: Pack, stops: Tensor, max_new_tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per step (branch numbers [L], token ids [L], log-probabilities [L]) of the L branches that have not ended.

    New keys and values are appended to the pack's own under the same tree mask, so nothing is copied per question.
    """
    # without the model's configuration, by which a layer with a sliding window would keep but the pack's last tokens
    cache, layout = DynamicCache(), pack.layout
    live, at = torch.arange(len(pack.ids), device=pack.input_ids.device), layout[pack.prompt_ends]
    out = pack_logits(model, pack, pack.prompt_ends, cache)  # [B, V]
    for step in range(max_new_tokens):
        best, token = torch.log_softmax(out.float(), -1).max(-1)
        yield live, token, best
        open_ = ~torch.isin(token, stops)
        if step + 1 == max_new_tokens or not open_.any():
            return
        live, at = live[open_], at[open_].next()
        layout = layout.then(at)
        out = logits(model, token[open_], at, layout, cache=cache)  # [L, V]


def answer_packs(model: Model, trees: Sequence[Tree], task: Task) -> Iterator[Prediction]:
    """Answers pack by pack; ranks take packs as they go."""
    if task.forced:
        raise ValueError("the plain engine forces no tokens")
    device = next(model.parameters()).device
    pack_tokens = task.options.pass_tokens or (CPU_PACK_TOKENS if device.type == "cpu" else GPU_PACK_TOKENS)
    stops = torch.tensor(task.stop_tokens, device=device)
    with out_of_memory(f"lower eval.pass_tokens (now {pack_tokens})"):
        for members in ranks.take(plan.fill(trees, pack_tokens), task.round):
            task.check()
            pack = build_pack(members).to(device)
            tokens, logprob = [Ids() for _ in pack.ids], [0.0] * len(pack.ids)
            for step in greedy(model, pack, stops, task.max_new_tokens):
                for branch, token, p in zip(*(x.tolist() for x in step), strict=True):
                    tokens[branch].append(token)
                    logprob[branch] += p
            for id_, ids, p in zip(pack.ids, tokens, logprob, strict=True):
                yield Prediction(id_, to_text(task.tokenizer, ids), ids, p, ids[-1] not in task.stop_tokens)


class Plain:
    """Single queries by transformers' and PEFT's own modules, a token per pass."""

    name = "plain"

    def __init__(self, model: Model, stops: Sequence[int], limit: int):
        self.model, self.limit = model, limit
        self.stops = torch.tensor(stops, device=next(model.parameters()).device)

    def answer(
        self, prompt_ids: Ids, forced: Ids | None = None, to_the_limit: bool = False, tick: Tick = lambda n: None
    ) -> Generation:
        """The greedy answer, as of `single.Single.answer`; tokens cannot be forced."""
        if forced:
            raise ValueError("the plain engine forces no tokens")
        answer, stops = Generation(), self.stops[:0] if to_the_limit else self.stops
        batch = build_pack([Tree(prompt_ids[:-1], (Branch("", prompt_ids[-1:], []),))]).to(stops.device)
        for _, token, logprob in greedy(self.model, batch, stops, self.limit):
            answer.token_ids += token.tolist()
            answer.logprob += logprob.item()
            answer.passes += 1
            tick(1)
        return answer
