"""Greedy answers to questions that share paragraphs: each paragraph is read once, whatever the engine.

Exact: in fp32 every answer has the token ids that `model.generate` gives for that question alone (a test). Llamas, with
an adapter or without, go through `common.decode.batched`; any other model, and whoever asks for it, through `greedy`,
which runs transformers' and PEFT's own modules pack by pack.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.config import Eval
from common.data import plan
from common.data.prompt import Ids, Tree
from common.decode import batched as stream
from common.decode.forward import Reader
from common.errors import UserError
from common.model import attention, memory
from common.model.pack import Pack, logits, pack, pack_logits
from common.runs import gauges as meter
from common.runs import ranks
from common.train import fused

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

CPU_PACK_TOKENS, GPU_PACK_TOKENS = 8192, 4096  # of `greedy`


@dataclass(frozen=True)
class Prediction:
    id: str
    text: str
    token_ids: list[int]  # as decoded, the stop token included
    logprob: float | None  # of all decoded tokens, natural log; None where a host does not say
    hit_limit: bool  # stopped by the limit, not by itself
    ties: int | None = None  # tokens with whose logit another's was equal; None where it was not looked


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
    options: Eval = Eval(),
    progress: str | None = "decode",
    check: Callable[[], None] = lambda: None,
    scripts: Mapping[str, Ids] | None = None,
    round_: str = "evaluation",
) -> dict[str, Prediction]:
    """Answer the questions of `trees`, or this rank's part of them. The model is put into eval mode and back.

    Several ranks take trees from the same sequence as they go; `round_` names this time (`ranks.take`).

    A question read in several windows (`overflow: chunk`) keeps its most probable answer (`merge`). `check` is called
    between passes; what it raises ends the work. `scripts`: by question, the tokens to draw whatever the model says,
    for timing models whose answers mean nothing.
    """
    check_positions(
        model, max((len(t.prefix_ids) + max(map(len, t.branches)) for t in trees), default=0), max_new_tokens
    )
    training = model.training
    model.eval()
    total = sum(len(tree.branches) for tree in trees) if ranks.count() == 1 else None  # who takes how many is not known
    engine = {"plain": _by_packs, "stream": _by_stream}[engine_of(model, options)]
    answers: list[Prediction] = []
    try:
        with tqdm(total=total, desc=progress, unit="question", disable=progress is None) as bar:
            for answer in engine(model, tokenizer, trees, stops, max_new_tokens, options, check, scripts or {}, round_):
                answers.append(answer)
                bar.update()
    finally:
        model.train(training)
    return merge(answers)


def check_positions(model: Any, prompt_tokens: int, answer_tokens: int) -> None:
    """Raises `UserError` where a prompt and the longest answer to it take more tokens than the model has positions."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most and prompt_tokens + answer_tokens > most:
        knob = "window.answer" if answer_tokens > prompt_tokens else "window.context, or ask for fewer prompt.shots"
        raise UserError(
            f"{prompt_tokens} tokens of a prompt and up to {answer_tokens} of its answer, and this model has {most} "
            f"positions: lower {knob}"
        )


def engine_of(model: Any, options: Eval) -> Literal["plain", "stream"]:
    """What `predict` answers by."""
    return "plain" if options.engine == "plain" or fused.unreadable(model) else "stream"


def sizes_of(model: Any, options: Eval) -> memory.Decoding:
    """What the stream reads with. Raises `UserError` where memory is too little."""
    device, shapes = next(model.parameters()).device, memory.Shapes.of(model, fused.adapter_size(model))
    return memory.decoding(options, shapes, device, record=attention.has_flash(device, model.dtype))


def _by_stream(
    model: Any, tokenizer: Any, trees: Sequence[Tree], stops: Sequence[int], limit: int, options: Eval,
    check: Callable[[], None], scripts: Mapping[str, Ids], round_: str,
) -> Iterator[Prediction]:  # fmt: skip
    ended, room = set(stops), sizes_of(model, options)
    with meter.out_of_memory(f"lower {memory.BUDGET} (now {options.memory_budget_gib:g})"):
        reader = Reader(model, room.arena_tokens, room.pass_tokens if room.record else 0)
        for mine in _streams(trees, options.parts, round_):
            for a in stream.answers(reader, mine, stops, limit, room.pass_tokens, scripts, check):
                hit_limit = a.token_ids[-1] not in ended
                text = to_text(tokenizer, a.token_ids)
                yield Prediction(a.branch.id, text, a.token_ids, a.logprob, hit_limit, a.ties)


def _streams(trees: Sequence[Tree], parts: int | None, round_: str) -> Iterator[Iterable[Tree]]:
    """What this rank reads, largest first: one stream of trees taken as there is room, or whole parts, one by one.

    In parts, who shares a pass with whom does not depend on how many ranks there are, nor on which is faster.
    """
    largest_first = sorted(trees, key=len, reverse=True)
    if parts is None:
        yield ranks.take(largest_first, round_)
    else:
        yield from ranks.take(plan.share(largest_first, parts), round_)


def _by_packs(
    model: Any, tokenizer: Any, trees: Sequence[Tree], stops: Sequence[int], limit: int, options: Eval,
    check: Callable[[], None], scripts: Mapping[str, Ids], round_: str,
) -> Iterator[Prediction]:  # fmt: skip
    if scripts:
        raise ValueError("the plain engine follows no scripts")
    device = next(model.parameters()).device
    pack_tokens = options.pass_tokens or (CPU_PACK_TOKENS if device.type == "cpu" else GPU_PACK_TOKENS)
    ends = torch.tensor(stops, device=device)
    with meter.out_of_memory(f"lower eval.pass_tokens (now {pack_tokens})"):
        for members in ranks.take(plan.fill(trees, pack_tokens), round_):
            check()
            yield from _answers(model, tokenizer, pack(members).to(device), ends, limit)


def merge(answers: Iterable[Prediction]) -> dict[str, Prediction]:
    """By id, the most probable where a question was read in several windows; in order of ids."""
    best: dict[str, Prediction] = {}
    for answer in answers:
        other = best.get(answer.id)
        if (
            other is None
            or other.logprob is None
            or (answer.logprob, answer.token_ids) > (other.logprob, other.token_ids)
        ):
            best[answer.id] = answer
    return dict(sorted(best.items()))


def _answers(model: Any, tokenizer: Any, pack: Pack, stops: Tensor, max_new_tokens: int) -> list[Prediction]:
    tokens: list[list[int]] = [[] for _ in pack.ids]
    logprob = [0.0] * len(pack.ids)
    for live, step_tokens, step_logprob in greedy(model, pack, stops, max_new_tokens):
        for branch, token, p in zip(live.tolist(), step_tokens.tolist(), step_logprob.tolist(), strict=True):
            tokens[branch].append(token)
            logprob[branch] += p
    ended = set(stops.tolist())
    return [
        Prediction(id_, to_text(tokenizer, ids), ids, p, ids[-1] not in ended)
        for id_, ids, p in zip(pack.ids, tokens, logprob, strict=True)
    ]


def gold_ids(tokenizer: Any, text: str, limit: int) -> Ids:
    """A gold answer as a script: its ids and EOS, `limit` at most."""
    ids = tokenizer(" " + text, add_special_tokens=False).input_ids
    return [*ids[: limit - 1], tokenizer.eos_token_id]


def to_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The answer's first line, without special tokens and surrounding space."""
    return tokenizer.decode(token_ids, skip_special_tokens=True).partition("\n")[0].strip()
