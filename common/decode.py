"""Greedy decoding of packs: each paragraph is read once, then all its questions' answers grow side by side.

Exact: in fp32 every answer has the token ids that `model.generate` gives for that question alone (a test).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from common import meter, plan
from common.packing import Pack, logits, pack, pack_logits
from common.prompt import Tree

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

CPU_PACK_TOKENS, GPU_PACK_TOKENS = 8192, 4096


@dataclass(frozen=True)
class Prediction:
    id: str
    text: str
    token_ids: list[int]  # as decoded, the stop token included
    logprob: float  # of all decoded tokens, natural log
    hit_limit: bool  # stopped by the limit, not by itself


def stop_ids(tokenizer: Any) -> list[int]:
    """EOS, and every token whose text holds a line break."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return sorted({tokenizer.eos_token_id} | {i for i, text in enumerate(texts) if "\n" in text})


@torch.inference_mode()
def greedy(model: Any, pack: Pack, stops: Tensor, max_new_tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Decode all branches of a pack; yield per step (branch numbers [L], token ids [L], log-probabilities [L]).

    A branch's last token is its stop token, unless the limit came first. The keys and values of a step are appended to
    the pack's own, and the same rule of who sees whom goes on: nothing is copied per question.
    """
    cache = DynamicCache(config=model.config)
    layout = pack.layout
    live = torch.arange(len(pack.ids), device=pack.input_ids.device)
    at = layout[pack.prompt_ends]
    out = pack_logits(model, pack, pack.prompt_ends, cache)  # [B, V]
    for step in range(max_new_tokens):
        best, token = torch.log_softmax(out.float(), -1).max(-1)
        yield live, token, best
        going = ~torch.isin(token, stops)
        if step + 1 == max_new_tokens or not going.any():
            return
        live, token, at = live[going], token[going], at[going].next()
        layout = layout.then(at)
        out = logits(model, token, at, layout, cache=cache)  # [L, V]


def predict(
    model: Any,
    tokenizer: Any,
    trees: Sequence[Tree],
    stops: Sequence[int],
    max_new_tokens: int,
    pack_tokens: int | None = None,
    progress: str | None = "decode",
    check: Callable[[], None] = lambda: None,
) -> dict[str, Prediction]:
    """Answer every question of `trees`. The model is put into eval mode and back.

    A question read in several windows (`overflow: chunk`) keeps its most probable answer (`merge`). `check` is called
    between packs; what it raises ends the work.
    """
    device = next(model.parameters()).device
    pack_tokens = pack_tokens or (CPU_PACK_TOKENS if device.type == "cpu" else GPU_PACK_TOKENS)
    ends = torch.tensor(stops, device=device)
    packs = plan.fill(trees, pack_tokens)
    training = model.training
    model.eval()
    answers: list[Prediction] = []
    n = sum(len(tree.branches) for tree in trees)
    lower = f"lower eval.pack_tokens (now {pack_tokens})"
    try:
        with tqdm(total=n, desc=progress, unit="question", disable=progress is None) as bar, meter.out_of_memory(lower):
            for members in packs:
                check()
                answers += _answers(model, tokenizer, pack(members).to(device), ends, max_new_tokens, bar)
    finally:
        model.train(training)
    return merge(answers)


def merge(answers: Iterable[Prediction]) -> dict[str, Prediction]:
    """By id, the most probable where a question was read in several windows; in order of ids."""
    best: dict[str, Prediction] = {}
    for answer in answers:
        other = best.get(answer.id)
        if other is None or (answer.logprob, answer.token_ids) > (other.logprob, other.token_ids):
            best[answer.id] = answer
    return dict(sorted(best.items()))


def _answers(model: Any, tokenizer: Any, pack: Pack, stops: Tensor, max_new_tokens: int, bar: Any) -> list[Prediction]:
    tokens: list[list[int]] = [[] for _ in pack.ids]
    logprob = [0.0] * len(pack.ids)
    before = len(pack.ids)
    for live, step_tokens, step_logprob in greedy(model, pack, stops, max_new_tokens):
        for branch, token, p in zip(live.tolist(), step_tokens.tolist(), step_logprob.tolist(), strict=True):
            tokens[branch].append(token)
            logprob[branch] += p
        bar.update(before - len(live))
        before = len(live)
    bar.update(before)
    ended = set(stops.tolist())
    return [
        Prediction(id_, to_text(tokenizer, ids), ids, p, ids[-1] not in ended)
        for id_, ids, p in zip(pack.ids, tokens, logprob, strict=True)
    ]


def to_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The answer's first line, without special tokens and surrounding space."""
    return tokenizer.decode(token_ids, skip_special_tokens=True).partition("\n")[0].strip()
