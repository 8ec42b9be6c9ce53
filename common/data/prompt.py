"""The text of a prompt: its template, the shots before it and the chat around it. Imports no torch."""

import hashlib
import random
import re
from collections.abc import Iterable
from dataclasses import replace

from common.config import Prompt
from common.data.squad import Example
from common.data.tokens import Tokenizer, tokenize
from common.errors import UserError, first_line

VERSION = "1"
CONTEXT = "Context: {}"
QUESTION = "\n\nQuestion: {}\n\nAnswer:"
TARGET = " {}"  # then EOS
SHARED = CONTEXT + QUESTION.partition(" {}")[0]  # the part that all questions of a paragraph share
_ORDERS = {  # {0} is the context, {1} the question
    "context": CONTEXT + QUESTION,
    "question": "Question: {1}\n\nContext: {0}\n\nAnswer:",
    "both": "Question: {1}\n\nContext: {0}\n\nQuestion: {1}\n\nAnswer:",
}
_CHAT = (
    "Answer the question with the shortest span of the context that answers it, copied word for word. Reply with "
    "nothing else.\n\n{}"
)
SHOT_WORDS = 120  # longest paragraph of a shot: about the mean of SQuAD's, so that several shots fit


def fingerprint(options: Prompt = Prompt()) -> str:
    """12 hex digits that change with any byte of the prompt."""
    parts = [VERSION, CONTEXT, QUESTION, TARGET]
    parts += [_ORDERS[options.order]] if options.order != "context" else []
    parts += [_CHAT] if options.chat else []
    parts += ["earlier"] if options.earlier else []
    parts += [options.before] if options.before else []
    parts += [options.template] if options.template else []
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def text(context: str, question: str, options: Prompt = Prompt()) -> str:
    """The prompt of one question, the same bytes for every system."""
    if not options.template:
        return _ORDERS[options.order].format(context, question)
    head, first, middle, second, tail = re.split(r"\{(context|question)\}", options.template)
    given = {"context": context, "question": question}
    return f"{head}{given[first]}{middle}{given[second]}{tail}"


def shared(context: str, options: Prompt) -> str | None:
    """The part of a prompt that all questions of a paragraph share, from the context on; None if none is shared."""
    if not options.template:
        return SHARED.format(context) if options.order == "context" else None
    _, first, middle, _, _ = re.split(r"\{(context|question)\}", options.template)
    return f"{context}{middle}".rstrip() if first == "context" else None


def message(prompt: str) -> str:
    """A prompt as the one message of a user to a chat model, with the instruction before it."""
    return _CHAT.format(prompt)


def chat_text(tokenizer: Tokenizer, prompt: str) -> str:
    """A prompt as one message in the chat template of `tokenizer`, up to where the model answers."""
    if not tokenizer.chat_template:
        raise UserError("prompt.chat: this model's tokenizer has no chat template")
    asked = [{"role": "user", "content": message(prompt)}]
    try:
        return tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and may raise anything
        raise UserError(f"prompt.chat: this model's chat template fails ({first_line(error)})") from error


def fill(options: Prompt, train: Iterable[Example]) -> Prompt:
    """`options` with the text of its shots: one question each of `shots` articles, with a short paragraph."""
    rng = random.Random(options.shots_seed)
    articles: dict[str, list[Example]] = {}
    for example in train:
        if len(example.context.split()) <= SHOT_WORDS:
            articles.setdefault(example.title, []).append(example)
    if len(articles) < options.shots:
        raise UserError(f"prompt.shots={options.shots}: train has {len(articles)} articles with short paragraphs")
    chosen = [rng.choice(articles[title]) for title in rng.sample(sorted(articles), options.shots)]
    asked = (text(e.context.strip(), e.question.strip(), options) for e in chosen)
    answers = (TARGET.format(e.answers[0].text.strip()) for e in chosen)
    return replace(options, before="".join(f"{q}{a}\n\n" for q, a in zip(asked, answers, strict=True)))


def overhead(tokenizer: Tokenizer, options: Prompt) -> int:
    """Tokens that a prompt may have beyond its window: those of the shots, the template and the chat template."""
    around = options.before + options.template
    around = chat_text(tokenizer, around) if options.chat else around
    return len(tokenize(tokenizer, [around])[0]) if around else 0
