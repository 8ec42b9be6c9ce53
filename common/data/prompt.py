"""The one prompt: its text, its token ids, its window, and the trees of questions that share a paragraph.

Training, evaluation and a single query all come through `build_trees`, so they read the same ids. Ids are the
tokenizer's ids of the whole text, as any other tool would make them; parts are never tokenised apart. Imports no torch
(a tokenizer is handed in).
"""

import hashlib
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from common.config import Config, Prompt
from common.data import squad
from common.data.squad import Example
from common.data.tokens import tokenize
from common.errors import UserError

VERSION = "1"
CONTEXT = "Context: {}"
QUESTION = "\n\nQuestion: {}\n\nAnswer:"
TARGET = " {}"  # then EOS
_ORDERS = {  # of each, the text of context and question
    "context": CONTEXT + QUESTION,
    "question": "Question: {1}\n\nContext: {0}\n\nAnswer:",
    "both": "Question: {1}\n\nContext: {0}\n\nQuestion: {1}\n\nAnswer:",
}
_CHAT = (  # where only a chat answers: one message of the user
    "Answer the question with the shortest span of the context that answers it, copied word for word. Reply with "
    "nothing else.\n\n{}"
)
SHARED = CONTEXT + QUESTION.partition(" {}")[0]  # what all questions of a paragraph begin with

SHOT_WORDS = 120  # of a paragraph that is shown with its answer


def fingerprint(options: Prompt = Prompt()) -> str:
    """Changes with any byte of the prompt."""
    parts = [VERSION, CONTEXT, QUESTION, TARGET]
    parts += [_ORDERS[options.order]] if options.order != "context" else []
    parts += [_CHAT] if options.chat else []
    parts += ["earlier"] if options.earlier else []
    parts += [options.before] if options.before else []
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def text(context: str, question: str, order: str = "context") -> str:
    """The prompt of one question, the same bytes for every system."""
    return _ORDERS[order].format(context, question)


def message(prompt: str) -> str:
    """A prompt as the one message of a chat."""
    return _CHAT.format(prompt)


def fill(options: Prompt, train: Iterable[Example]) -> Prompt:
    """The text of `options.shots`: of as many articles one question each, of paragraphs of at most `SHOT_WORDS`."""
    rng = random.Random(options.shots_seed)
    articles: dict[str, list[Example]] = {}
    for example in train:
        if len(example.context.split()) <= SHOT_WORDS:
            articles.setdefault(example.title, []).append(example)
    if len(articles) < options.shots:
        raise UserError(f"prompt.shots={options.shots}: train has {len(articles)} articles with short paragraphs")
    chosen = [rng.choice(articles[title]) for title in rng.sample(sorted(articles), options.shots)]
    return replace(options, before="".join(
        text(e.context.strip(), e.question.strip(), options.order) + TARGET.format(e.answers[0].text.strip()) + "\n\n"
        for e in chosen
    ))  # fmt: skip


def filled(config: Config) -> Config:
    """A configuration whose prompt has the text of its shots."""
    if not config.prompt.shots:
        return config
    return replace(config, prompt=fill(config.prompt, squad.load(config.data, "train").examples))


def beside(tokenizer: Any, options: Prompt) -> int:
    """Tokens of every prompt that are beside its window, at most: shots, a chat's template."""
    around = chat_text(tokenizer, options.before) if options.chat else options.before
    return len(tokenize(tokenizer, [around])[0]) if around else 0


def chat_text(tokenizer: Any, prompt: str) -> str:
    if not tokenizer.chat_template:
        raise UserError("prompt.chat: this model's tokenizer has no chat template")
    asked = [{"role": "user", "content": message(prompt)}]
    return tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)


# ---- the window ----------------------------------------------------------------------------------------------------


# ---- ids -----------------------------------------------------------------------------------------------------------
