"""The engines' layers are held against PEFT's modules before the first answer; what differs decodes by the modules."""

from common.config import Eval
from common.decode import batched, first_use, predict
from common.model import attention, llama
from common.model import first_use as kept
from tests.model.test_pack import lora_model

import pytest
import torch


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_layers_that_agree_are_near(tiny_base, quant):
    model = lora_model(tiny_base, quant).train()
    found = first_use.compare(model)
    assert found.distance < 1e-4
    assert found.ours == pytest.approx(found.expected, abs=1e-4)
    assert found.expected < -1
    assert found.most == 0.01
    assert model.training, "its mode is restored"
    assert first_use.compare(lora_model(tiny_base, quant, "bf16")).most == 1.0


@pytest.mark.parametrize(("owner", "broken"), [(llama, "swiglu"), (llama, "rotate"), (attention, "over_cache")])
def test_a_kernel_that_computes_something_else_is_far(tiny_base, monkeypatch, owner, broken):
    model, right = lora_model(tiny_base), getattr(owner, broken)

    def wrong(*args):
        out = right(*args)
        return tuple(x * 1.5 for x in out) if isinstance(out, tuple) else out * 1.5

    monkeypatch.setattr(owner, broken, wrong)
    assert first_use.compare(model).distance > 0.01


def test_two_answers_are_read_in_one_pass_and_go_on_in_another(tiny_base, monkeypatch):
    seen, answers = [], batched.answers

    def noted(decoder, trees, task, pass_tokens):
        seen.append((decoder.cache_tokens, trees, task, pass_tokens))
        return answers(decoder, trees, task, pass_tokens)

    monkeypatch.setattr(batched, "answers", noted)
    first_use.compare(lora_model(tiny_base))
    first_use.compare(lora_model(tiny_base))
    (cache, (tree,), task, pass_tokens), (_, (again,), _, _) = seen
    assert again == tree, "the same texts each time"
    assert [len(tree.prefix_ids), *(len(b.prompt_ids) for b in tree.branches)] == [48, 8, 8]
    assert (cache, pass_tokens, task.max_new_tokens) == (68, 64, 2)
    first, second = tree.branches
    assert first.prompt_ids != second.prompt_ids
    assert [len(ids) for ids in task.forced.values()] == [2, 2]
    assert task.forced[first.id] != task.forced[second.id]


def test_numbers_that_are_none_are_far(tiny_base, monkeypatch):
    right = attention.over_cache
    monkeypatch.setattr(attention, "over_cache", lambda *args: right(*args) * float("nan"))
    assert not first_use.compare(lora_model(tiny_base)).distance <= 1e9


def test_what_differs_is_answered_by_the_modules(tiny_base, monkeypatch):
    model, ways = lora_model(tiny_base).eval(), []
    assert predict.engine_of(model, Eval()) == "stream"
    monkeypatch.setattr(
        kept, "mismatch", lambda model, way, compare: ways.append((way, compare().what)) or "it is wrong"
    )
    assert predict.engine_of(model, Eval()) == "plain"
    assert ways == [("decoding", "log-probability")]
    assert predict.engine_of(model, Eval("plain")) == "plain"
    assert len(ways) == 1
    assert torch.is_grad_enabled()
