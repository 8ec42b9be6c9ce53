"""Greedy answers to questions that share paragraphs. This is the one place that chooses an engine.

In fp32 every answer has the token ids that `model.generate` returns for that question alone (a test). Llamas, with an
adapter or without, are decoded by `common.decode.batched`; all other models, and all with `eval.engine=plain`, by
`common.decode.plain`.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from common.config import Config, Eval
from common.data import plan
from common.data.squad import Example
from common.data.tokens import Ids, Tokenizers
from common.data.trees import Tree, build_trees
from common.decode import batched
from common.decode.answers import Prediction, Task, stop_tokens, to_text
from common.decode.chunks import merge
from common.decode.forward import Decoder
from common.decode.plain import answer_packs
from common.device import has_flash_attention, out_of_memory
from common.errors import UserError
from common.model import memory
from common.model.llama import Model, adapter_size, unsupported_reason
from common.runs import ranks, signals

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase


def answers(
    model: Model, tokenizers: Tokenizers, examples: Sequence[Example], config: Config, only: Iterable[str] | None = None
) -> dict[str, Prediction]:
    """Answers by id to `examples`, as `config` cuts, asks and decodes; `only`: of these ids alone.

    All examples are laid out first, because a prompt may hold earlier questions of its paragraph.
    """
    trees = build_trees(examples, tokenizers, config.window, config.prompt, train=False).trees
    if only is not None:
        wanted = set(only)
        kept = (Tree(t.prefix_ids, tuple(b for b in t.branches if b.id in wanted)) for t in trees)
        trees = [tree for tree in kept if tree.branches]
    return answer_trees(model, tokenizers.own, trees, stop_tokens(tokenizers.own), config.window.answer, config.eval)


def answer_trees(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trees: Sequence[Tree],
    stops: Sequence[int],
    max_new_tokens: int,
    options: Eval = Eval(),
    progress: str | None = "decode",
    check: Callable[[], None] = lambda: None,
    forced: Mapping[str, Ids] | None = None,
    round_: str = "evaluation",
) -> dict[str, Prediction]:
    """Answers by id to the questions of `trees`, or to this rank's part of them. The model's mode is restored.

    Several ranks take trees from the same sequence as they go; `round_` names this evaluation (`ranks.take`). Of a
    question that was read in several windows (`overflow: chunk`) the most probable answer is kept. `check` is called
    between passes; an exception that it raises ends the work. `forced`: by question, tokens to generate instead of the
    most probable ones, for timing models whose answers mean nothing. Raises `UserError` where the prompts do not fit
    the model's positions, or memory is too little.
    """
    longest = max((len(tree.prefix_ids) + max(map(len, tree.branches)) for tree in trees), default=0)
    check_positions(model, longest, max_new_tokens)
    task = Task(tokenizer, stops, max_new_tokens, options, check, forced or {}, round_)
    engine = answer_packs if engine_of(model, options) == "plain" else _answer_batched
    total = sum(len(tree.branches) for tree in trees) if ranks.count() == 1 else None  # a rank's share is not known
    training = model.training
    model.eval()
    found: list[Prediction] = []
    try:
        with tqdm(total=total, desc=progress, unit="question", disable=progress is None) as bar:
            for answer in engine(model, trees, task):
                found.append(answer)
                bar.update()
    finally:
        model.train(training)
    return merge(found)


def by_all_ranks(
    model: Model,
    tokenizers: Tokenizers,
    trees: Sequence[Tree],
    config: Config,
    check: Callable[[], None] = lambda: None,
    step: int | None = None,
) -> dict[str, Prediction] | None:
    """Answers by id to all questions of `trees`, on every rank; None where a signal stopped a rank (`signals.Stopped`).

    `step`: of the training that this evaluation interrupts, whose memory budget then holds.
    """
    own, stops = None, stop_tokens(tokenizers.own)
    options, progress = (config.eval, "decode") if step is None else (config.eval_in_training, "evaluate")
    shown, name = progress if PartialState().is_main_process else None, f"evaluation at {step or 0}"
    with contextlib.suppress(signals.Stopped):
        own = answer_trees(
            model, tokenizers.own, trees, stops, config.window.answer, options, shown, check, round_=name
        )
    parts = gather_object([own])
    return None if None in parts else merge(answer for part in parts for answer in part.values())


def check_positions(model: Model, prompt_tokens: int, answer_tokens: int) -> None:
    """Raises `UserError` where a prompt and its longest answer take more tokens than the model has positions."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most and prompt_tokens + answer_tokens > most:
        lower = "window.answer" if answer_tokens > prompt_tokens else "window.context, or ask for fewer prompt.shots"
        raise UserError(
            f"{prompt_tokens} tokens of a prompt and up to {answer_tokens} of its answer, and this model has {most} "
            f"positions: lower {lower}"
        )


def engine_of(model: Model, options: Eval) -> Literal["plain", "stream"]:
    """The name of the engine that `answer_trees` uses, as it stands in records."""
    return "plain" if options.engine == "plain" or unsupported_reason(model) else "stream"


def sizes_of(model: Model, options: Eval) -> memory.Decoding:
    """Tokens of a pass and of the KV cache. Raises `UserError` where memory is too little."""
    device, shapes = next(model.parameters()).device, memory.Shapes.of(model, adapter_size(model))
    return memory.decoding(options, shapes, device, capture=has_flash_attention(device, model.dtype))


def _answer_batched(model: Model, trees: Sequence[Tree], task: Task) -> Iterator[Prediction]:
    sizes, stops, options = sizes_of(model, task.options), set(task.stop_tokens), task.options
    with out_of_memory(f"lower {memory.BUDGET} (now {options.memory_budget_gib:g})"):
        decoder = Decoder(model, sizes.cache_tokens, sizes.pass_tokens if sizes.capture else 0)
        for mine in _streams(trees, options.parts, task.round):
            for a in batched.answers(decoder, mine, task, sizes.pass_tokens):
                text = to_text(task.tokenizer, a.token_ids)
                yield Prediction(a.branch.id, text, a.token_ids, a.logprob, a.token_ids[-1] not in stops, a.ties)


def _streams(trees: Sequence[Tree], parts: int | None, round_: str) -> Iterator[Iterable[Tree]]:
    """This rank's trees, largest first: one stream that ranks share as they go, or whole parts, one after the other.

    A part is decoded by itself, so its passes do not depend on the number or speed of ranks.
    """
    largest_first = sorted(trees, key=len, reverse=True)
    if parts is None:
        yield ranks.take(largest_first, round_)
    else:
        yield from ranks.take(plan.share(largest_first, parts), round_)
