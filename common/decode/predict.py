"""Greedy answers to questions that share paragraphs. This is the one place that chooses an engine.

In fp32 an answer has the token ids that `model.generate` returns for the question alone (a test). Llamas are decoded by
`common.decode.batched`; all other models, and all with `eval.engine=plain`, by `common.decode.plain`.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from common.config import Config, Decode, Eval
from common.data import plan
from common.data.squad import Example
from common.data.tokens import Ids, Tokenizers
from common.data.trees import Branch, Tree, build_trees
from common.data.window import answer_limit
from common.decode import batched, chunks, first_use, nbest, nbest_batched, plain, snap, spans
from common.decode.answers import Prediction, Task, need_finite, stop_tokens, to_prediction
from common.decode.forward import Decoder
from common.device import out_of_memory
from common.errors import UserError
from common.model import memory, varlen
from common.model.llama import Model, adapter_size, unsupported_reason
from common.model.tree_mask import need_embedded, need_plain_span
from common.runs import ranks, signals
from common.runs.progress import QuestionBar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

DECODE = "decode"  # the bar of an evaluation that is not a training's


def answers(
    model: Model, tokenizers: Tokenizers, examples: Sequence[Example], config: Config, only: Iterable[str] | None = None
) -> dict[str, Prediction]:
    """Answers by id to `examples`, as `config` cuts, asks and decodes; `only`: of these ids alone.

    All examples are laid out first, because a prompt may hold earlier questions of its paragraph.
    """
    trees = build_trees(examples, tokenizers, config.window, config.prompt, train=False).trees
    if only is not None:
        wanted = set(only)
        kept = (replace(t, branches=tuple(b for b in t.branches if b.id in wanted)) for t in trees)
        trees = [tree for tree in kept if tree.branches]
    stops, limit = stop_tokens(tokenizers.own, model, config.decode), answer_limit(config.window, config.decode)
    return answer_trees(model, tokenizers.own, trees, stops, limit, config.eval, decode=config.decode)


def answer_trees(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trees: Sequence[Tree],
    stops: Sequence[int],
    max_new_tokens: int,
    options: Eval = Eval(),
    progress: str | None = DECODE,
    check: Callable[[], None] = lambda: None,
    forced: Mapping[str, Ids] | None = None,
    round_: str = "evaluation",
    decode: Decode = Decode(),
) -> dict[str, Prediction]:
    """Answers by id to the questions of `trees`, or to this rank's part of them. The model's mode is restored.

    Several ranks take trees from the same sequence as they go. Of a question that was read in several windows
    (`overflow: chunk`) the most probable answer is kept. `check`, `forced`, `round_` and `decode`: as in `Task`. Raises
    `UserError` where the prompts do not fit the model's positions, memory is too little, logits are not finite, or a
    context has no word and answers are quotes.
    """
    longest = max((tree.longest for tree in trees), default=0)
    check_positions(model, longest, max_new_tokens)
    need_embedded(model.config, trees)
    trees = spans.with_words(trees) if decode.spans else trees
    quotes = quotes_of(model, tokenizer, decode, [tree.context for tree in _largest_first(trees)])
    settings = tokenizer, stops, max_new_tokens, options, check, forced or {}, round_
    task = Task(*settings, lambda tree: quotes(tree.context), decode)
    engine = plain.answer_packs if engine_of(model, options) == "plain" else _answer_batched
    total = sum(len(tree.branches) for tree in trees) if ranks.count() == 1 else None  # a rank's share is not known
    kind = QuestionBar if progress == DECODE else tqdm  # a training's own forecast covers its evaluations
    bar = kind(engine(model, trees, task), progress, total, unit="question", disable=progress is None)
    training = model.training
    model.eval()
    try:
        found = chunks.merge(_finite(bar, model.dtype))
    finally:
        model.train(training)
    return snapped(found, trees) if decode.snap else found


def snapped(found: dict[str, Prediction], trees: Iterable[Tree]) -> dict[str, Prediction]:
    """The answers as the spans that are most like them, of what was read; those with no word of it stay."""
    windows: dict[str, list[tuple[str, int]]] = {}
    for tree in trees:
        for branch in tree.branches:
            windows.setdefault(branch.id, []).append((tree.context, branch.offset))
    return {id_: snap.of(answer, windows[id_]) for id_, answer in found.items()}


def _finite(answers: Iterable[Prediction], dtype: torch.dtype) -> Iterator[Prediction]:
    for answer in answers:
        need_finite(f"question {answer.id}", answer.logprob, dtype)
        yield answer


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
    decode = config.decode if step is None else Decode()  # trainings are compared by what they say freely
    own, tokenizer, stops = None, tokenizers.own, stop_tokens(tokenizers.own, model, decode)
    limit = answer_limit(config.window, decode)
    options, progress = (config.eval, DECODE) if step is None else (config.eval_in_training, "evaluate")
    shown, name = progress if PartialState().is_main_process else None, f"evaluation at {step or 0}"
    with contextlib.suppress(signals.Stopped):
        own = answer_trees(model, tokenizer, trees, stops, limit, options, shown, check, None, name, decode)
    parts = gather_object([own])
    return None if None in parts else chunks.merge(answer for part in parts for answer in part.values())


def check_positions(model: Model, prompt_tokens: int, answer_tokens: int) -> None:
    """Raises `UserError` where a prompt and its longest answer take more tokens than the model has positions.

    A sliding window, and positions that longer texts stretch, are limits too: packs and trees know neither.
    """
    need_plain_span(model.config, prompt_tokens + answer_tokens)
    most = getattr(model.config, "max_position_embeddings", None)
    if most and prompt_tokens + answer_tokens > most:
        lower = "window.answer" if answer_tokens > prompt_tokens else "window.context, or ask for fewer prompt.shots"
        takes = f"{prompt_tokens} tokens of a prompt and up to {answer_tokens} of its answer"
        raise UserError(f"{takes}, and this model has {most} positions: lower {lower}")


def quotes_of(
    model: Model, tokenizer: PreTrainedTokenizerBase, options: Decode, contexts: Sequence[str] | None = None
) -> Callable[[str], spans.Automaton | None]:
    """The function from a context to its automaton, or to None where answers need not be quotes.

    `contexts`: those that it will be asked for, in about this order; None: any, one at a time.
    """
    if not options.spans:
        return lambda context: None
    vocabulary = spans.vocabulary(tokenizer, model.config.vocab_size)
    if contexts is None:
        return lambda context: spans.automaton_of(vocabulary, context, options.whole_words)
    # a search walks automata on the host
    device = torch.device("cpu") if options.nbest else next(model.parameters()).device
    return spans.Automata(vocabulary, contexts, options.whole_words, device)


def engine_of(model: Model, options: Eval) -> Literal["plain", "stream"]:
    """The name of the engine that `answer_trees` uses, as it stands in records."""
    plainly = options.engine == "plain" or unsupported_reason(model) or first_use.mismatch(model)
    return "plain" if plainly else "stream"


def sizes_of(model: Model, options: Eval) -> memory.Decoding:
    """Tokens of a pass and of the KV cache. Raises `UserError` where memory is too little."""
    device, shapes = next(model.parameters()).device, memory.Shapes.of(model, adapter_size(model))
    return memory.decoding(options, shapes, device, capture=varlen.kernels(device, model.dtype) is not None)


def _answer_batched(model: Model, trees: Sequence[Tree], task: Task) -> Iterator[Prediction]:
    sizes, budget = sizes_of(model, task.options), task.options.memory_budget_gib
    lower = "free the GPU" if budget == "auto" else f"lower {memory.BUDGET} (now {budget:g})"
    with out_of_memory(lower):
        for mine in _streams(trees, task.options.parts, task.round):
            sizes = yield from _answer_stream(model, mine, task, sizes)


def _answer_stream(
    model: Model, trees: Iterable[Tree], task: Task, sizes: memory.Decoding
) -> Generator[Prediction, None, memory.Decoding]:
    """All answers of `trees`; returns the sizes that they were read in.

    Where memory runs out, the missing ones are asked again, in passes half as large.
    """
    source = iter(trees)
    missing: list[Tree] = []  # of a try that ran out of memory
    while True:
        taken: list[Tree] = []
        answered: set[int] = set()  # branches by identity: of one that was read in several windows the id is the same
        decoder = None
        try:
            decoder = Decoder(model, sizes.cache_tokens, sizes.pass_tokens if sizes.capture else 0)
            todo = _noted(itertools.chain(missing, source), taken)
            for branch, answer in _answered(decoder, todo, task, sizes.pass_tokens):
                answered.add(id(branch))
                yield answer
            return sizes
        except torch.OutOfMemoryError:
            if sizes == sizes.half():
                raise
        del decoder
        torch.cuda.empty_cache()
        sizes = sizes.half()
        print(f"note: out of GPU memory; answering goes on in passes of {sizes.pass_tokens} tokens", file=sys.stderr)
        left = ((t, tuple(b for b in t.branches if id(b) not in answered)) for t in (*taken, *missing[len(taken) :]))
        missing = [replace(t, branches=branches) for t, branches in left if branches]


def _answered(
    decoder: Decoder, trees: Iterable[Tree], task: Task, pass_tokens: int
) -> Iterator[tuple[Branch, Prediction]]:
    """Each question and its answer, as it ends: greedy, or chosen from the most probable ones."""
    if task.decode.nbest:
        for q in nbest_batched.answers(decoder, trees, task, pass_tokens):
            yield q.branch, nbest.to_prediction(q.search, q.branch, task.decode)
        return
    for a in batched.answers(decoder, trees, task, pass_tokens):
        yield a.branch, to_prediction(task.tokenizer, a.branch, a, task.stop_tokens, task.decode, a.quotes, ties=True)


def _noted(trees: Iterable[Tree], taken: list[Tree]) -> Iterator[Tree]:
    for tree in trees:
        taken.append(tree)
        yield tree


def _streams(trees: Sequence[Tree], parts: int | None, round_: str) -> Iterator[Iterable[Tree]]:
    """This rank's trees, largest first: one stream that ranks share as they go, or whole parts, one after the other.

    A part is decoded by itself, so its passes do not depend on the number or speed of ranks.
    """
    if parts is None:
        yield ranks.take(_largest_first(trees), round_)
    else:
        yield from ranks.take(plan.share(_largest_first(trees), parts), round_)


def _largest_first(trees: Sequence[Tree]) -> list[Tree]:
    return sorted(trees, key=len, reverse=True)
