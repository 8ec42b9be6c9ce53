"""The engines' layers against PEFT's modules, before the first answer on a card (`common.model.first_use`).

A prefix with two branches is read in one pass, and each goes on by a token in another: large products and small ones,
attention over new tokens and over cached ones.
"""

from common.config import Eval
from common.data.trees import Branch, Tree
from common.decode import batched
from common.decode.answers import Task
from common.decode.forward import Decoder
from common.model import first_use, tree_mask
from common.model.first_use import Found
from common.model.llama import Model
from common.model.pack import build_pack

import torch

PREFIX, PROMPT, ANSWER = 48, 8, 2  # tokens, of any kind
# nats that two answers' log-probabilities are apart together, from which on they differ: bf16 alone brings each 0.1
# apart (docs/log.md)
FAR = {2: 1.0, 4: 0.01}  # by the bytes of a number


def mismatch(model: Model) -> str | None:
    """Why this device must decode by the modules; None if the engines' layers agree with them."""
    return first_use.mismatch(model, "decoding", lambda: compare(model))


@torch.no_grad()
def compare(model: Model) -> Found:
    """The log-probabilities of two given answers, by both ways. The model's mode is restored."""
    training, most = model.training, model.config.vocab_size
    draw = torch.Generator().manual_seed(0)
    sizes = PREFIX, PROMPT, ANSWER, PROMPT, ANSWER
    prefix, *parts = (torch.randint(most, (n,), generator=draw).tolist() for n in sizes)
    branches = tuple(Branch(str(i), parts[2 * i], parts[2 * i + 1]) for i in range(2))
    task = Task(None, [], ANSWER, Eval(), lambda: None, {b.id: b.answer_ids for b in branches}, "")
    model.eval()
    try:
        pack = build_pack([Tree(prefix, branches)]).to(model.device)
        scores = tree_mask.pack_logits(model, pack, pack.target_index).float().log_softmax(-1)
        expected = scores.gather(1, pack.target_ids[:, None]).view(2, ANSWER).sum(1).tolist()
        asked = Tree(prefix, tuple(Branch(b.id, b.prompt_ids, []) for b in branches))
        decoder = Decoder(model, PREFIX + 2 * (PROMPT + ANSWER))
        found = {a.branch.id: a.logprob for a in batched.answers(decoder, [asked], task, PREFIX + 2 * PROMPT)}
    finally:
        model.train(training)
    off = sum(abs(found[b.id] - truth) for b, truth in zip(branches, expected, strict=True))
    return Found("log-probability", sum(found.values()), sum(expected), off, FAR[model.dtype.itemsize])
