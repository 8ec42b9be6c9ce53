"""Greedy answers of packs are those of `model.generate`, one question at a time."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from common.config import Base, Decode, Eval, Window
from common.data import plan, squad
from common.data.squad import Example
from common.data.trees import Branch, Tree, build_trees
from common.decode import forward, plain, predict
from common.decode.answers import Generation, Prediction, gold_ids, stop_tokens, to_prediction, to_text
from common.decode.chunks import merge
from common.decode.predict import answer_trees, check_positions
from common.errors import UserError
from common.model import memory
from common.model.load import load_base, load_tokenizer
from common.runs import ranks
from tests.conftest import ROOT, same
from tests.model.test_pack import lora_model, trees_of
from tests.train.test_fused import adapter_weights, first_layers

import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig

CPU = torch.device("cpu")
LIMIT = 8


def system(folder):
    return load_base(Base(str(folder), quant="none", dtype="fp32"), CPU), load_tokenizer(str(folder))


def demo_trees(tokenizer, paragraphs: int, window: Window | None = None) -> list[Tree]:
    examples = squad.first_paragraphs(squad.read(str(ROOT / "demo" / "dev.json"), "dev").examples, paragraphs)
    return build_trees(examples, same(tokenizer), window or Window(), train=False).trees


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
    stops = stop_tokens(tokenizer)
    return {
        branch.id: generated(model, tokenizer, tree, branch, stops)
        for tree in demo_trees(tokenizer, paragraphs)
        for branch in tree.branches[:questions]
    }


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize(("base", "paragraphs", "questions"), [("tiny_base", 8, 5), ("smollm2_base", 1, 3)])
def test_every_answer_equals_generate_at_batch_one_token_for_token(
    base, paragraphs, questions, engine, request, tmp_path_factory
):
    folder = request.getfixturevalue(base)
    if base == "smollm2_base":
        folder = first_layers(folder, tmp_path_factory.getbasetemp() / "first-layers", 4)
    model, tokenizer = system(folder)
    trees = [Tree(tree.prefix_ids, tree.branches[:questions]) for tree in demo_trees(tokenizer, paragraphs)]
    answers = answer_trees(model, tokenizer, trees, stop_tokens(tokenizer), LIMIT, Eval(engine), progress=None)
    assert len(answers) == questions * paragraphs
    assert {id_: answer.token_ids for id_, answer in answers.items()} == truth(folder, paragraphs, questions)
    assert len({tuple(answer.token_ids) for answer in answers.values()}) > 1


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_answers_do_not_depend_on_how_trees_are_packed(tiny_base, engine):
    model, tokenizer = system(tiny_base)
    trees, stops = demo_trees(tokenizer, 6), stop_tokens(tokenizer)
    one_pack = answer_trees(model, tokenizer, trees, stops, LIMIT, Eval(engine, pass_tokens=100_000), progress=None)
    for options in (Eval(engine, pass_tokens=600), Eval(engine, parts=2), Eval(engine, parts=100)):
        many = answer_trees(model, tokenizer, trees, stops, LIMIT, options, progress=None)
        assert {k: v.token_ids for k, v in one_pack.items()} == {k: v.token_ids for k, v in many.items()}
    assert one_pack.keys() == {branch.id for tree in trees for branch in tree.branches}


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_passes_of_a_part_are_the_same_whichever_rank_takes_it(tiny_base, engine, monkeypatch):
    model, tokenizer = system(tiny_base)
    trees, stops = demo_trees(tokenizer, 9), stop_tokens(tokenizer)

    def passes_of(mine: Callable[[int], bool], parts: int | None = 3) -> list[tuple[int, ...]]:
        """The tokens of each pass of a rank that takes the items whose numbers are `mine`."""
        passes: list[tuple[int, ...]] = []
        forward_pass, whole = forward.Decoder.forward, plain.logits

        def seen(self, new, *rest):
            passes.append(tuple(new.ids.tolist()))
            return forward_pass(self, new, *rest)

        def seen_plain(model, ids, *args, **kwargs):
            passes.append(tuple(ids.tolist()))
            return whole(model, ids, *args, **kwargs)

        with monkeypatch.context() as changed:
            changed.setattr(ranks, "take", lambda items, _: (x for i, x in enumerate(items) if mine(i)))
            changed.setattr(forward.Decoder, "forward", seen)
            changed.setattr(plain, "logits", seen_plain)
            options = Eval(engine, pass_tokens=700, parts=parts)
            answer_trees(model, tokenizer, trees, stops, LIMIT, options, progress=None)
        return passes

    alone = passes_of(lambda i: True)
    assert sorted(alone) == sorted(passes_of(lambda i: i == 1) + passes_of(lambda i: i != 1))
    if engine == "auto":  # the plain engine's packs are parts already
        together = passes_of(lambda i: True, None)
        assert len(together) < len(alone)
        assert sorted(together) != sorted(passes_of(lambda i: i == 1, None) + passes_of(lambda i: i != 1, None))


def test_limit_is_kept_and_reported(tiny_base):
    model, tokenizer = system(tiny_base)
    trees = demo_trees(tokenizer, 2)
    never_stop = answer_trees(model, tokenizer, trees, [], 5, progress=None)
    assert all(len(answer.token_ids) == 5 and answer.hit_limit for answer in never_stop.values())
    everything = list(range(len(tokenizer)))
    at_once = answer_trees(model, tokenizer, trees, everything, 5, progress=None)
    assert all(len(answer.token_ids) == 1 and not answer.hit_limit for answer in at_once.values())


def test_log_probability_is_that_of_the_decoded_tokens(tiny_base):
    model, tokenizer = system(tiny_base)
    (tree,) = demo_trees(tokenizer, 1)
    for answer in answer_trees(model, tokenizer, [tree], [], 4, progress=None).values():
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
    alone = [answer_trees(model, tokenizer, [t], [], 4, progress=None)[t.branches[0].id] for t in apart]
    same_id = [Tree(tree.prefix_ids, (replace(branch, id="q"),)) for branch in branches]
    (kept,) = answer_trees(model, tokenizer, same_id, [], 4, progress=None).values()
    best = max(alone, key=lambda answer: answer.logprob)
    assert (kept.token_ids, kept.id) == (best.token_ids, "q")


def test_stops_are_eos_and_every_token_with_a_line_break(tiny_base):
    tokenizer = load_tokenizer(str(tiny_base))
    stops = stop_tokens(tokenizer)
    assert tokenizer.eos_token_id in stops
    assert set(tokenizer("\n", add_special_tokens=False).input_ids) <= set(stops)
    assert not set(tokenizer(" plain words", add_special_tokens=False).input_ids) & set(stops)


def test_line_breaks_end_no_answer_that_ends_at_eos_alone(tiny_base):
    tokenizer = load_tokenizer(str(tiny_base))
    assert stop_tokens(tokenizer, None, Decode(stop="eos")) == [tokenizer.eos_token_id]
    ids = tokenizer(" an answer \nmore", add_special_tokens=False).input_ids
    whole, line = (
        to_prediction(tokenizer, Branch("q", [5], []), Generation([*ids, 1]), [1], Decode(stop=stop)).text
        for stop in ("eos", "line")
    )
    assert (whole, line) == ("an answer \nmore", "an answer")


def test_text_is_the_first_line_without_special_tokens(tiny_base):
    tokenizer = load_tokenizer(str(tiny_base))
    ids = tokenizer(" an answer \nmore", add_special_tokens=False).input_ids
    assert to_text(tokenizer, [*ids, tokenizer.eos_token_id]) == "an answer"
    assert to_text(tokenizer, [tokenizer.eos_token_id]) == ""


def test_predict_leaves_the_model_in_the_mode_it_was_in(tiny_base):
    model, tokenizer = system(tiny_base)
    model.train()
    answer_trees(model, tokenizer, demo_trees(tokenizer, 1), [], 2, progress=None)
    assert model.training


def test_nothing_to_answer_is_no_error(tiny_base):
    model, tokenizer = system(tiny_base)
    assert answer_trees(model, tokenizer, [], [], 2, progress=None) == {}


def test_the_plain_engine_stores_keys_and_values_of_a_prefix_once(tiny_base, monkeypatch):
    model, tokenizer = system(tiny_base)
    (tree,) = demo_trees(tokenizer, 1)
    caches = []
    original = plain.DynamicCache
    monkeypatch.setattr(plain, "DynamicCache", lambda **kw: caches.append(original(**kw)) or caches[-1])
    four = Tree(tree.prefix_ids, tuple(Branch(f"{i}", [5], []) for i in range(4)))
    answer_trees(model, tokenizer, [four], [], 3, Eval("plain"), progress=None)
    (cache,) = caches
    assert cache.get_seq_length() == len(tree.prefix_ids) + 4 + 4 * 2  # prefix, prompts, all but the last tokens


def test_an_adapter_answers_alike_by_either_engine_and_not_as_the_base(tiny_base):
    trees, _ = trees_of(tiny_base, 6, train=False)
    model, tokenizer = lora_model(tiny_base, "nf4"), load_tokenizer(str(tiny_base))
    for p in adapter_weights(model):
        torch.nn.init.normal_(p, std=0.2)
    found = [answer_trees(model, tokenizer, trees, [], 6, Eval(engine), progress=None) for engine in ("auto", "plain")]
    streamed, plain = ({k: v.token_ids for k, v in answers.items()} for answers in found)
    assert streamed == plain
    with model.disable_adapter():
        base = answer_trees(model, tokenizer, trees, [], 6, Eval("plain"), progress=None)
    assert streamed != {k: v.token_ids for k, v in base.items()}
    for id_, answer in found[0].items():
        assert answer.logprob == pytest.approx(found[1][id_].logprob, abs=1e-3)


def test_a_model_that_is_no_llama_is_answered_by_the_plain_engine(tiny_base, monkeypatch):
    model, tokenizer = system(tiny_base)
    trees = demo_trees(tokenizer, 2)
    expected = answer_trees(model, tokenizer, trees, [], 4, progress=None)
    model.config.hidden_act = "gelu"  # what the layers have built in stays as it is
    monkeypatch.setattr(predict, "Decoder", None)
    found = answer_trees(model, tokenizer, trees, [], 4, progress=None)
    assert {k: v.token_ids for k, v in found.items()} == {k: v.token_ids for k, v in expected.items()}


# ---- answers that end by themselves ----------------------------------------------------------------------------------

NOTE = "Note 1: here are the otter, the chisel, the north gate and nothing more."
BOTH = pytest.mark.parametrize("engine", ["auto", "plain"])


def notes(tokenizer, context: str = NOTE) -> list[Tree]:
    """Which animal, and which place: a token and EOS, and two and EOS."""
    asked = [Example(kind, "T", context, f"Which {kind} is meant?", ()) for kind in ("animal", "place")]
    return build_trees(asked, same(tokenizer), Window(), train=False).trees


@BOTH
@pytest.mark.parametrize(
    ("limit", "texts", "cut"),
    [
        (1, ("otter", "north"), (True, True)),
        (2, ("otter", "north gate"), (False, True)),  # EOS falls exactly on the limit: it has ended by itself
        (3, ("otter", "north gate"), (False, False)),
        (9, ("otter", "north gate"), (False, False)),
    ],
)
def test_what_ends_by_its_stop_token_is_not_cut_by_the_limit(answering_base, engine, limit, texts, cut):
    model, tokenizer = system(answering_base)
    found = answer_trees(model, tokenizer, notes(tokenizer), stop_tokens(tokenizer), limit, Eval(engine), progress=None)
    animal, place = found["animal"], found["place"]
    assert (animal.text, place.text) == texts
    assert (animal.hit_limit, place.hit_limit) == cut
    assert [len(answer.token_ids) for answer in (animal, place)] == [min(2, limit), min(3, limit)]
    assert [answer.token_ids[-1] == tokenizer.eos_token_id for answer in (animal, place)] == [not c for c in cut]


@BOTH
def test_the_probability_of_an_answer_is_that_of_its_stop_token_too(answering_base, engine):
    model, tokenizer = system(answering_base)
    (tree,) = notes(tokenizer)
    stops = [tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in ("otter", "gate")]
    found = answer_trees(model, tokenizer, [tree], stops, 9, Eval(engine), progress=None)
    assert {id_: answer.text for id_, answer in found.items()} == {"animal": "otter", "place": "north gate"}
    for branch in tree.branches:
        prompt, ids = tree.prefix_ids + branch.prompt_ids, found[branch.id].token_ids
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].double()
        steps = [logits[len(prompt) - 1 + i].softmax(-1)[token] for i, token in enumerate(ids)]
        assert found[branch.id].logprob == pytest.approx(torch.stack(steps).log().sum().item(), abs=1e-4)
        assert found[branch.id].least == pytest.approx(torch.stack(steps).log().min().item(), abs=1e-4)
        assert max(steps[-1], torch.stack(steps).prod()) < 0.9999


def test_tokens_that_another_ties_with_are_counted_in_batches(answering_base):
    model, tokenizer = system(answering_base)
    trees, stops = notes(tokenizer), stop_tokens(tokenizer)
    (gate,) = tokenizer(" gate", add_special_tokens=False).input_ids
    assert {a.ties for a in answer_trees(model, tokenizer, trees, stops, 9, progress=None).values()} == {0}
    assert {a.ties for a in answer_trees(model, tokenizer, trees, stops, 9, Eval("plain"), progress=None).values()} == {
        None
    }
    with torch.no_grad():
        model.lm_head.weight[-1] = model.lm_head.weight[gate]
    found = answer_trees(model, tokenizer, trees, stops, 9, progress=None)
    assert (found["animal"].ties, found["place"].ties) == (0, 1)


def test_forced_tokens_are_generated_in_batches_and_refused_by_the_plain_engine(answering_base):
    model, tokenizer = system(answering_base)
    trees, stops = notes(tokenizer), stop_tokens(tokenizer)
    ids = gold_ids(tokenizer, "chisel", 9)
    found = answer_trees(model, tokenizer, trees, stops, 9, progress=None, forced={"animal": ids})
    assert (found["animal"].text, found["animal"].token_ids) == ("chisel", ids)
    assert found["place"].text == "north gate"
    assert found["animal"].logprob < -1
    with pytest.raises(ValueError, match="forces no tokens"):
        answer_trees(model, tokenizer, trees, stops, 9, Eval("plain"), progress=None, forced={"animal": ids})


def test_the_ids_of_a_gold_answer_end_with_eos_within_the_limit(answering_base):
    tokenizer = load_tokenizer(str(answering_base))
    north, gate = tokenizer(" north gate", add_special_tokens=False).input_ids
    assert gold_ids(tokenizer, "north gate", 9) == [north, gate, 1]
    assert gold_ids(tokenizer, "north gate", 3) == [north, gate, 1]
    assert gold_ids(tokenizer, "north gate", 2) == [north, 1]
    assert gold_ids(tokenizer, "north gate", 1) == [1]


# ---- of several windows ----------------------------------------------------------------------------------------------


def answered(id_: str, text: str, logprob: float | None, *ids: int) -> Prediction:
    return Prediction(id_, text, list(ids), logprob, False)


@pytest.mark.parametrize(
    ("answers", "kept"),
    [
        ([answered("q", "sure", -0.1, 5), answered("q", "unsure", -2.0, 9)], "sure"),
        ([answered("q", "unsure", -2.0, 9), answered("q", "sure", -0.1, 5)], "sure"),
        ([answered("q", "b", -2.0, 9), answered("q", "sure", -0.1, 5), answered("q", "c", -3.0, 7)], "sure"),
        ([answered("q", "low", -1.0, 4, 9), answered("q", "high", -1.0, 5)], "high"),  # as likely: whatever came first
        ([answered("q", "high", -1.0, 5), answered("q", "low", -1.0, 4, 9)], "high"),
    ],
)
def test_of_a_questions_answers_the_most_probable_stays_in_whatever_order_they_come(answers, kept):
    others = [answered("z", "z", -1.0, 1), answered("a", "a", -5.0, 1)]
    found = merge([others[0], *answers, others[1]])
    assert list(found) == ["a", "q", "z"]
    assert {id_: answer.text for id_, answer in found.items()} == {"a": "a", "q": kept, "z": "z"}


def test_answers_without_a_probability_are_not_merged():
    for other in (None, -9.0):
        with pytest.raises(AssertionError, match="one window"):
            merge([answered("q", "early", None), answered("q", "late", other)])


@BOTH
def test_the_window_that_holds_the_answer_answers(answering_base, engine):
    """The others answer too: they have nothing to copy, and are less sure."""
    model, tokenizer = system(answering_base)
    apart = [notes(tokenizer, text)[0] for text in ("Note 2: nothing is here at all, and nothing more.", NOTE)]
    for trees in (apart, apart[::-1]):
        found = answer_trees(model, tokenizer, trees, stop_tokens(tokenizer), 9, Eval(engine), progress=None)
        assert {id_: answer.text for id_, answer in found.items()} == {"animal": "otter", "place": "north gate"}


# ---- what it does beside ---------------------------------------------------------------------------------------------


def test_a_prompt_and_its_answer_may_take_all_positions_and_no_more():
    model = SimpleNamespace(config=LlamaConfig(max_position_embeddings=100))
    check_positions(model, 90, 10)
    check_positions(model, 10, 90)
    check_positions(SimpleNamespace(config=PreTrainedConfig()), 10**6, 10**6)
    words = (
        "91 tokens of a prompt and up to 10 of its answer, and this model has 100 positions: lower window.context, or"
    )
    with pytest.raises(UserError, match=rf"^{words} ask for fewer prompt\.shots$"):
        check_positions(model, 91, 10)
    with pytest.raises(UserError, match=r"^10 tokens .* up to 91 of its answer.*: lower window\.answer$"):
        check_positions(model, 10, 91)
    with pytest.raises(UserError, match=r"lower window\.context"):
        check_positions(model, 51, 51)


def test_the_longest_question_of_the_largest_paragraph_decides_whether_positions_suffice(tiny_base):
    model, tokenizer = system(tiny_base)
    two, one = (Branch("a", [5] * 10, []), Branch("b", [5] * 4, [])), (Branch("c", [5], []),)
    trees = [Tree([5] * 30, two), Tree([5] * 36, one)]
    model.config.max_position_embeddings = 44
    assert len(answer_trees(model, tokenizer, trees, [], 4, progress=None)) == 3
    with pytest.raises(UserError, match="40 tokens of a prompt and up to 5 of its answer"):
        answer_trees(model, tokenizer, trees, [], 5, progress=None)


def test_stops_are_the_tokens_that_byte_level_vocabularies_write_as_a_line_break(answering_base):
    tokenizer = load_tokenizer(str(answering_base))
    assert stop_tokens(tokenizer) == sorted({1} | {i for token, i in tokenizer.get_vocab().items() if "Ċ" in token})
    assert len(stop_tokens(tokenizer)) > 1


def test_text_ends_where_its_first_line_does(answering_base):
    tokenizer = load_tokenizer(str(answering_base))
    for text, expected in (("\nnorth gate", ""), (" north\n gate\n", "north"), ("  gate ", "gate")):
        assert to_text(tokenizer, tokenizer(text, add_special_tokens=False).input_ids) == expected
    assert to_text(tokenizer, []) == ""


@BOTH
def test_work_is_left_between_passes_and_the_model_is_then_as_it_was(tiny_base, engine):
    model, tokenizer = system(tiny_base)
    model.train()
    passes: list[bool] = []

    def check() -> None:
        passes.append(model.training)
        if len(passes) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_trees(model, tokenizer, demo_trees(tokenizer, 4), [], 4, Eval(engine, pass_tokens=400), None, check)
    assert passes == [False, False]
    assert model.training
    model.eval()
    answer_trees(model, tokenizer, demo_trees(tokenizer, 1), [], 1, progress=None)
    assert not model.training


@pytest.mark.parametrize(("given", "used"), [(None, 8192), (300, 300)])
def test_the_plain_engines_packs_have_as_many_tokens_as_asked_for(tiny_base, monkeypatch, given, used):
    model, tokenizer = system(tiny_base)
    asked: list[int] = []
    monkeypatch.setattr(plain.plan, "fill", lambda trees, tokens: asked.append(tokens) or plan.pack_up(trees))
    monkeypatch.setattr(plan, "pack_up", lambda trees: [[tree] for tree in trees], raising=False)
    answer_trees(model, tokenizer, demo_trees(tokenizer, 1), [], 1, Eval("plain", pass_tokens=given), progress=None)
    assert asked == [used]


@pytest.mark.parametrize("kernels", [True, False])
def test_sizes_are_of_this_model_and_passes_are_captured_with_fused_attention(tiny_base, monkeypatch, kernels):
    model, _ = system(tiny_base)
    options, asked = Eval(memory_budget_gib=3), []
    found = SimpleNamespace(kernels=lambda device, dtype: "some" if kernels and dtype == torch.float32 else None)
    monkeypatch.setattr(predict, "varlen", found)
    monkeypatch.setattr(predict.memory, "decoding", lambda *args, **capture: asked.append((args, capture)) or "sizes")
    assert predict.sizes_of(model, options) == "sizes"
    assert asked == [((options, memory.Shapes.of(model), CPU), {"capture": kernels})]


@pytest.mark.parametrize(("capture", "capture_tokens"), [(True, 77), (False, 0)])
def test_batched_decoding_has_its_sizes(tiny_base, monkeypatch, capture, capture_tokens):
    model, tokenizer = system(tiny_base)
    asked: list[tuple] = []
    monkeypatch.setattr(predict, "sizes_of", lambda model, options: memory.Decoding(77, 3000, capture))
    monkeypatch.setattr(predict, "Decoder", lambda *args: asked.append(args[1:]) or forward.Decoder(args[0], args[1]))
    answers = predict.batched.answers
    monkeypatch.setattr(predict.batched, "answers", lambda *args: asked.append(args[3]) or answers(*args))
    assert len(answer_trees(model, tokenizer, demo_trees(tokenizer, 1), [], 1, progress=None)) == 5
    assert asked == [(3000, capture_tokens), 77]


@pytest.mark.parametrize("fails", [{0}, {3}, {9}, {2, 5, 11}, {0, 1, 2, 3}])
def test_where_memory_runs_out_answering_goes_on_in_smaller_passes(tiny_base, monkeypatch, capsys, fails):
    model, tokenizer = system(tiny_base)
    trees, passes, compute = demo_trees(tokenizer, 12), [], forward.Decoder.forward
    monkeypatch.setattr(predict, "sizes_of", lambda model, options: memory.Decoding(2048, 2000))
    truth = answer_trees(model, tokenizer, trees, [], 4, progress=None)

    def scarce(self, new, *rest):
        passes.append(len(new.ids))
        if len(passes) - 1 in fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, new, *rest)

    monkeypatch.setattr(forward.Decoder, "forward", scarce)
    task = predict.Task(tokenizer, [], 4, Eval(), lambda: None, {}, "a round")
    found = []

    def stream():
        found.append((yield from predict._answer_stream(model, iter(trees), task, memory.Decoding(2048, 2000, True))))

    answers = list(stream())
    assert sorted(a.id for a in answers) == sorted(truth), "each once"
    assert all(a.token_ids == truth[a.id].token_ids for a in answers)
    noted = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: out of GPU memory")]
    sizes = [1024, 512, 256, 128][: len(fails)]
    assert noted == [f"note: out of GPU memory; answering goes on in passes of {n} tokens" for n in sizes]
    assert found == [memory.Decoding(sizes[-1], 1536)]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"sliding_window": 30}, "a sliding window from 30 on"),
        ({"sliding_window": 30, "use_sliding_window": False}, None),
        ({"sliding_window": 44}, None),
        (
            {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 30}},
            "positions that longer",
        ),
        ({"rope_parameters": {"rope_type": "default", "original_max_position_embeddings": 30}}, None),
    ],
)
def test_a_text_beyond_a_sliding_window_or_stretched_positions_is_refused(config, says):
    settings = SimpleNamespace(max_position_embeddings=None, **config)
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=None, get_text_config=lambda: settings))
    if says is None:
        return check_positions(model, 40, 4)
    with pytest.raises(UserError, match=rf"^44 tokens of a prompt and its answer, and this model has {says}"):
        check_positions(model, 40, 4)


def test_ids_that_the_model_has_no_embedding_of_are_refused(tiny_base):
    model, tokenizer = system(tiny_base)
    (tree,) = demo_trees(tokenizer, 1)
    beyond = Tree(tree.prefix_ids, (Branch("q", [model.config.vocab_size], []),))
    with pytest.raises(UserError, match=r"^the tokenizer has a token 500, and the model embeds 500: "):
        answer_trees(model, tokenizer, [tree, beyond], [], 4, progress=None)


def test_what_ran_out_of_memory_once_keeps_its_smaller_passes(tiny_base, monkeypatch, capsys):
    model, tokenizer = system(tiny_base)
    sizes, compute = [], predict.batched.answers
    monkeypatch.setattr(predict, "sizes_of", lambda model, options: memory.Decoding(1024, 2000))

    def answers(decoder, trees, task, pass_tokens):
        sizes.append(pass_tokens)
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(decoder, trees, task, pass_tokens)

    monkeypatch.setattr(predict.batched, "answers", answers)
    answer_trees(model, tokenizer, demo_trees(tokenizer, 4), [], 2, Eval(parts=3), progress=None)
    assert sizes == [1024, 512, 512, 512]


def test_where_not_even_the_smallest_passes_fit_it_is_an_error(tiny_base, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, tokenizer = system(tiny_base)
    monkeypatch.setattr(forward.Decoder, "forward", full)
    with pytest.raises(UserError, match=r"^out of GPU memory; lower eval\.memory_budget_gib or, .* \(now 12\)"):
        answer_trees(model, tokenizer, demo_trees(tokenizer, 1), [], 4, progress=None)


def test_progress_is_of_questions_and_of_as_many_as_there_are(tiny_base, capsys):
    model, tokenizer = system(tiny_base)
    answer_trees(model, tokenizer, demo_trees(tokenizer, 2), [], 1, progress="some work")
    assert "some work: 100%" in (shown := capsys.readouterr().err)
    assert "10/10" in shown
    answer_trees(model, tokenizer, demo_trees(tokenizer, 2), [], 1, progress=None)
    assert capsys.readouterr().err == ""


def test_the_largest_paragraphs_go_first_and_parts_are_taken_one_by_one(monkeypatch):
    small, large, middle = (Tree([5] * n, (Branch(f"{n}", [5], []),)) for n in (3, 30, 10))
    rounds: list[str] = []
    monkeypatch.setattr(ranks, "take", lambda items, name: rounds.append(name) or iter(items))
    (stream,) = predict._streams([small, large, middle], None, "evaluation at 3")
    assert list(stream) == [large, middle, small]
    parts = list(predict._streams([small, large, middle], 2, "evaluation at 4"))
    assert [sorted(len(tree) for tree in part) for part in parts] == [[31], [4, 11]]
    assert rounds == ["evaluation at 3", "evaluation at 4"]
