"""Greedy answers to questions that share paragraphs: each paragraph is read once, whatever the engine.

Exact: in fp32 every answer has the token ids that `model.generate` gives for that question alone (a test). Llamas, with
an adapter or without, go through `common.decode.batched`; any other model, and whoever asks for it, through `greedy`,
which runs transformers' and PEFT's own modules pack by pack.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from common.config import Eval
from common.data import plan
from common.data.tokens import Ids
from common.data.trees import Tree
from common.decode import batched
from common.decode.answers import Prediction, to_text
from common.decode.chunks import merge
from common.decode.forward import Decoder
from common.decode.plain import answer_packs
from common.device import has_flash_attention, out_of_memory
from common.errors import UserError
from common.model import memory
from common.model.llama import adapter_size, unsupported_reason
from common.runs import ranks

from tqdm import tqdm


def answer_trees(
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
    engine = {"plain": answer_packs, "stream": _by_stream}[engine_of(model, options)]
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
    """What `answer_trees` answers by."""
    return "plain" if options.engine == "plain" or unsupported_reason(model) else "stream"


def sizes_of(model: Any, options: Eval) -> memory.Decoding:
    """What the stream reads with. Raises `UserError` where memory is too little."""
    device, shapes = next(model.parameters()).device, memory.Shapes.of(model, adapter_size(model))
    return memory.decoding(options, shapes, device, record=has_flash_attention(device, model.dtype))


def _by_stream(
    model: Any, tokenizer: Any, trees: Sequence[Tree], stops: Sequence[int], limit: int, options: Eval,
    check: Callable[[], None], scripts: Mapping[str, Ids], round_: str,
) -> Iterator[Prediction]:  # fmt: skip
    ended, room = set(stops), sizes_of(model, options)
    with out_of_memory(f"lower {memory.BUDGET} (now {options.memory_budget_gib:g})"):
        reader = Decoder(model, room.arena_tokens, room.pass_tokens if room.record else 0)
        for mine in _streams(trees, options.parts, round_):
            for a in batched.answers(reader, mine, stops, limit, room.pass_tokens, scripts, check):
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
