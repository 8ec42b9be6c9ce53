"""Greedy answers of packs are those of `model.generate`, one question at a time."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from common import decode, reader, squad
from common.config import Base, Eval, Window
from common.decode import predict, stop_ids, to_text
from common.model import load_base, load_tokenizer
from common.prompt import Branch, Tree, build_trees
from tests.conftest import ROOT
from tests.test_fused import adapter_weights
from tests.test_packing import lora_model, trees_of

import pytest
import torch

CPU = torch.device("cpu")
LIMIT = 8


def system(folder):
    return load_base(Base(str(folder), quant="none", dtype="fp32"), CPU), load_tokenizer(str(folder))


def demo_trees(tokenizer, paragraphs: int, window: Window | None = None) -> list[Tree]:
    examples = squad.first_paragraphs(squad.read(str(ROOT / "demo" / "dev.json"), "dev").examples, paragraphs)
    return build_trees(examples, tokenizer, window or Window(), train=False).trees


def generated(model, tokenizer, tree: Tree, branch: Branch, stops: list[int]) -> list[int]:
    """What `model.generate` answers to one question alone."""
    prompt = torch.tensor([tree.prefix_ids + branch.prompt_ids], device=model.device)
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=LIMIT,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    return out[0, prompt.shape[1] :].tolist()


@functools.cache
def truth(folder: Path, paragraphs: int, questions: int = 5) -> dict[str, list[int]]:
    """What `model.generate` answers to each of so many of the demo's questions alone, by a base as it is."""
    model, tokenizer = system(folder)
    stops = stop_ids(tokenizer)
    return {
        branch.id: generated(model, tokenizer, tree, branch, stops)
        for tree in demo_trees(tokenizer, paragraphs)
        for branch in tree.branches[:questions]
    }


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize(("base", "paragraphs", "questions"), [("tiny_base", 8, 5), ("smollm2_base", 1, 3)])
def test_every_answer_equals_generate_at_batch_one_token_for_token(base, paragraphs, questions, engine, request):
    folder = request.getfixturevalue(base)
    model, tokenizer = system(folder)
    trees = [Tree(tree.prefix_ids, tree.branches[:questions]) for tree in demo_trees(tokenizer, paragraphs)]
    answers = predict(model, tokenizer, trees, stop_ids(tokenizer), LIMIT, Eval(engine), progress=None)
    assert len(answers) == questions * paragraphs
    assert {id_: answer.token_ids for id_, answer in answers.items()} == truth(folder, paragraphs, questions)
    assert len({tuple(answer.token_ids) for answer in answers.values()}) > 1


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_answers_do_not_depend_on_how_trees_are_packed(tiny_base, engine):
    model, tokenizer = system(tiny_base)
    trees, stops = demo_trees(tokenizer, 6), stop_ids(tokenizer)
    one_pack = predict(model, tokenizer, trees, stops, LIMIT, Eval(engine, pass_tokens=100_000), progress=None)
    for options in (Eval(engine, pass_tokens=600), Eval(engine, parts=2), Eval(engine, parts=100)):
        many = predict(model, tokenizer, trees, stops, LIMIT, options, progress=None)
        assert {k: v.token_ids for k, v in one_pack.items()} == {k: v.token_ids for k, v in many.items()}
    assert one_pack.keys() == {branch.id for tree in trees for branch in tree.branches}


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_what_is_read_together_in_parts_is_so_whoever_takes_them(tiny_base, engine, monkeypatch):
    model, tokenizer = system(tiny_base)
    trees, stops = demo_trees(tokenizer, 9), stop_ids(tokenizer)

    def read(mine: Callable[[int], bool], parts: int | None = 3) -> list[tuple[int, ...]]:
        """The tokens of each pass of a rank that takes the items whose numbers are `mine`."""
        passes: list[tuple[int, ...]] = []
        forward, whole = reader.Reader.read, decode.logits

        def seen(self, new, before=None):
            passes.append(tuple(new.ids.tolist()))
            return forward(self, new, before)

        def seen_plain(model, ids, *args, **kwargs):
            passes.append(tuple(ids.tolist()))
            return whole(model, ids, *args, **kwargs)

        with monkeypatch.context() as changed:
            changed.setattr(decode.ranks, "take", lambda items, _: (x for i, x in enumerate(items) if mine(i)))
            changed.setattr(reader.Reader, "read", seen)
            changed.setattr(decode, "logits", seen_plain)
            predict(model, tokenizer, trees, stops, LIMIT, Eval(engine, pass_tokens=700, parts=parts), progress=None)
        return passes

    alone = read(lambda i: True)
    assert sorted(alone) == sorted(read(lambda i: i == 1) + read(lambda i: i != 1))
    if engine == "auto":  # the plain engine's packs are parts already
        together = read(lambda i: True, None)
        assert len(together) < len(alone)
        assert sorted(together) != sorted(read(lambda i: i == 1, None) + read(lambda i: i != 1, None))


def test_limit_is_kept_and_reported(tiny_base):
    model, tokenizer = system(tiny_base)
    trees = demo_trees(tokenizer, 2)
    never_stop = predict(model, tokenizer, trees, [], 5, progress=None)
    assert all(len(answer.token_ids) == 5 and answer.hit_limit for answer in never_stop.values())
    everything = list(range(len(tokenizer)))
    at_once = predict(model, tokenizer, trees, everything, 5, progress=None)
    assert all(len(answer.token_ids) == 1 and not answer.hit_limit for answer in at_once.values())


def test_log_probability_is_that_of_the_decoded_tokens(tiny_base):
    model, tokenizer = system(tiny_base)
    (tree,) = demo_trees(tokenizer, 1)
    for answer in predict(model, tokenizer, [tree], [], 4, progress=None).values():
        (branch,) = [b for b in tree.branches if b.id == answer.id]
        prompt = tree.prefix_ids + branch.prompt_ids
        out = model(input_ids=torch.tensor([prompt + answer.token_ids[:-1]])).logits[0, len(prompt) - 1 :]
        expected = torch.log_softmax(out, -1).gather(1, torch.tensor(answer.token_ids)[:, None]).sum()
        assert answer.logprob == pytest.approx(expected.item(), abs=1e-4)


def test_of_several_windows_the_most_probable_answer_stays(tiny_base):
    model, tokenizer = system(tiny_base)
    tree = demo_trees(tokenizer, 1)[0]
    branches = tree.branches[:2]
    apart = [Tree(tree.prefix_ids, (branch,)) for branch in branches]
    alone = [predict(model, tokenizer, [t], [], 4, progress=None)[t.branches[0].id] for t in apart]
    same_id = [Tree(tree.prefix_ids, (replace(branch, id="q"),)) for branch in branches]
    (kept,) = predict(model, tokenizer, same_id, [], 4, progress=None).values()
    best = max(alone, key=lambda answer: answer.logprob)
    assert (kept.token_ids, kept.id) == (best.token_ids, "q")


def test_stops_are_eos_and_every_token_with_a_line_break(tiny_base):
    tokenizer = load_tokenizer(str(tiny_base))
    stops = stop_ids(tokenizer)
    assert tokenizer.eos_token_id in stops
    assert set(tokenizer("\n", add_special_tokens=False).input_ids) <= set(stops)
    assert not set(tokenizer(" plain words", add_special_tokens=False).input_ids) & set(stops)


def test_text_is_the_first_line_without_special_tokens(tiny_base):
    tokenizer = load_tokenizer(str(tiny_base))
    ids = tokenizer(" an answer \nmore", add_special_tokens=False).input_ids
    assert to_text(tokenizer, [*ids, tokenizer.eos_token_id]) == "an answer"
    assert to_text(tokenizer, [tokenizer.eos_token_id]) == ""


def test_predict_leaves_the_model_in_the_mode_it_was_in(tiny_base):
    model, tokenizer = system(tiny_base)
    model.train()
    predict(model, tokenizer, demo_trees(tokenizer, 1), [], 2, progress=None)
    assert model.training


def test_nothing_to_answer_is_no_error(tiny_base):
    model, tokenizer = system(tiny_base)
    assert predict(model, tokenizer, [], [], 2, progress=None) == {}


def test_the_plain_engine_stores_keys_and_values_of_a_prefix_once(tiny_base, monkeypatch):
    model, tokenizer = system(tiny_base)
    (tree,) = demo_trees(tokenizer, 1)
    caches = []
    original = decode.DynamicCache
    monkeypatch.setattr(decode, "DynamicCache", lambda **kw: caches.append(original(**kw)) or caches[-1])
    four = Tree(tree.prefix_ids, tuple(Branch(f"{i}", [5], []) for i in range(4)))
    predict(model, tokenizer, [four], [], 3, Eval("plain"), progress=None)
    (cache,) = caches
    assert cache.get_seq_length() == len(tree.prefix_ids) + 4 + 4 * 2  # prefix, prompts, all but the last tokens


def test_an_adapter_answers_alike_by_either_engine_and_not_as_the_base(tiny_base):
    trees, _ = trees_of(tiny_base, 6, train=False)
    model, tokenizer = lora_model(tiny_base, "nf4"), load_tokenizer(str(tiny_base))
    for p in adapter_weights(model):
        torch.nn.init.normal_(p, std=0.2)
    found = [predict(model, tokenizer, trees, [], 6, Eval(engine), progress=None) for engine in ("auto", "plain")]
    streamed, plain = ({k: v.token_ids for k, v in answers.items()} for answers in found)
    assert streamed == plain
    with model.disable_adapter():
        base = predict(model, tokenizer, trees, [], 6, Eval("plain"), progress=None)
    assert streamed != {k: v.token_ids for k, v in base.items()}
    for id_, answer in found[0].items():
        assert answer.logprob == pytest.approx(found[1][id_].logprob, abs=1e-3)


def test_a_model_that_is_no_llama_goes_the_plain_way(tiny_base, monkeypatch):
    model, tokenizer = system(tiny_base)
    trees = demo_trees(tokenizer, 2)
    expected = predict(model, tokenizer, trees, [], 4, progress=None)
    model.config.hidden_act = "gelu"  # what the layers have built in stays as it is
    monkeypatch.setattr(decode, "Reader", None)
    found = predict(model, tokenizer, trees, [], 4, progress=None)
    assert {k: v.token_ids for k, v in found.items()} == {k: v.token_ids for k, v in expected.items()}
