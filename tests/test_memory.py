"""A budget decides what is kept and how large packs are, and says so; what cannot fit is refused."""

import json

from common.config import Base, Eval, Lora, Train
from common.errors import UserError
from common.memory import GIB, LEAST_ARENA_TOKENS, LEAST_PASS_TOKENS, Shapes, choose, decoding, fit
from common.model import add_lora, load_base, parameter_counts
from tests.conftest import ROOT

import pytest
import torch

GPU, CPU = torch.device("cuda"), torch.device("cpu")
LLAMA = Shapes(int(3.6 * GIB), 39_976_960, 32, 4096, 11008, 4096, 4096, 32000, 2)
STEP, SHARE = 4126.0, 0.07  # tokens of 64 questions, and how many of them are answers


def total(choice) -> float:
    return sum(choice.counted.values()) / GIB


@pytest.mark.parametrize("budget", [6.5, 8, 14, 24, 60])
def test_a_choice_fits_its_budget_and_uses_it(budget):
    choice = choose(Train(fused=True, memory_budget_gib=budget), LLAMA, GPU, STEP, SHARE)
    assert total(choice) <= budget
    one_more = LLAMA.kept_per_token * choice.pack_tokens / GIB
    assert choice.keep_layers == 32 or total(choice) + one_more > budget
    assert choice.hold_layers == 32 or total(choice) + LLAMA.layer_matrices / GIB > budget
    assert f"{choice.keep_layers} of 32" in choice.sentence
    assert str(choice.pack_tokens) in choice.sentence


def test_more_memory_keeps_more():
    kept = [
        choose(Train(fused=True, memory_budget_gib=b), LLAMA, GPU, STEP, SHARE).keep_layers for b in (7, 8, 12, 16, 24)
    ]
    assert kept == sorted(kept)
    assert kept[0] < 8
    assert kept[-1] == 32


def test_too_little_memory_makes_packs_smaller_and_then_says_what_it_takes():
    whole = choose(Train(fused=True, memory_budget_gib=8), LLAMA, GPU, STEP, SHARE)
    small = choose(Train(fused=True, memory_budget_gib=5), LLAMA, GPU, STEP, SHARE)
    assert 512 <= small.pack_tokens < whole.pack_tokens
    assert total(small) <= 5
    with pytest.raises(
        UserError, match=r"memory_budget_gib=4, of which there are 4\.0: packs of 512 tokens take about 4\.\d GiB"
    ):
        choose(Train(fused=True, memory_budget_gib=4), LLAMA, GPU, STEP, SHARE)
    with pytest.raises(UserError, match=r"packs of 4096 tokens take about"):
        choose(Train(fused=True, memory_budget_gib=5, pack_tokens=4096), LLAMA, GPU, STEP, SHARE)


def test_a_budget_beyond_what_is_free_is_what_is_free():
    train = Train(memory_budget_gib=24)
    assert choose(train, LLAMA, GPU, STEP, SHARE, free=9 * GIB) == choose(
        Train(memory_budget_gib=9), LLAMA, GPU, STEP, SHARE
    )
    with pytest.raises(UserError, match=r"memory_budget_gib=24, of which there are 3\.0"):
        choose(train, LLAMA, GPU, STEP, SHARE, free=3 * GIB)


def test_matrices_are_not_held_in_the_room_of_an_evaluation_beside_graphs():
    train, free, evaluation = Train(memory_budget_gib=24), int(20.8 * GIB), LLAMA.evaluation(256, 4096)
    choice = choose(train, LLAMA, GPU, STEP, SHARE, free, evaluation)
    assert choice.keep_layers == 32
    assert sum(choice.counted.values()) + evaluation <= free
    assert choice.hold_layers < choose(train, LLAMA, GPU, STEP, SHARE, free).hold_layers


def test_without_a_budget_checkpointing_decides():
    assert choose(Train(gradient_checkpointing=True), LLAMA, GPU, STEP, SHARE).keep_layers == 0
    assert choose(Train(gradient_checkpointing=False), LLAMA, GPU, STEP, SHARE).keep_layers == 32


@pytest.mark.parametrize(("step", "pack"), [(4126, 4608), (8000, 8192), (10_000, 5632), (300, 512)])
def test_a_step_is_one_pack_or_a_few_equal_ones(step, pack):
    assert choose(Train(), LLAMA, GPU, step, SHARE).pack_tokens == pack


def test_a_cpu_has_small_packs_and_no_budget():
    choice = choose(Train(fused=True, memory_budget_gib=0.001), LLAMA, CPU, STEP, SHARE)
    assert choice.pack_tokens <= 1024
    assert "GiB" not in choice.sentence


def test_logits_count_where_they_are_more_than_a_layers_work():
    kind = "logits or one layer's work"
    few, many = (LLAMA.table(4096, answers, 32, 0)[kind] for answers in (100, 10_000))
    assert few == LLAMA.table(4096, 0, 32, 0)[kind]
    assert many == 14 * 32000 * 10_000


def test_matrices_of_a_small_model_are_held():
    small = Shapes(10**8, 4_884_480, 30, 576, 1536, 576, 192, 49152, 2)
    assert choose(Train(), small, GPU, STEP, SHARE).hold_layers == 30
    assert choose(Train(), LLAMA, GPU, STEP, SHARE).hold_layers == 0


def test_what_a_budget_leaves_when_all_activations_are_kept_holds_matrices():
    held = [choose(Train(memory_budget_gib=b), LLAMA, GPU, STEP, SHARE).hold_layers for b in (8, 18, 24, 60)]
    assert held[:1] == [0]
    assert held == sorted(held)
    assert 8 < held[2] < 32 == held[3]


def test_shapes_are_those_of_the_model(smollm2_base):
    model = add_lora(load_base(Base(str(smollm2_base)), CPU), Lora(), seed=0)
    trained, frozen = parameter_counts(model)
    shapes = Shapes.of(model, trained)
    assert (shapes.layers, shapes.hidden, shapes.intermediate, shapes.query, shapes.key) == (30, 576, 1536, 576, 192)
    matrices = shapes.layers * shapes.layer_matrices // shapes.item
    embeddings = shapes.vocabulary * shapes.hidden
    assert 0 <= frozen - matrices - embeddings < 0.001 * frozen  # norms
    four_bit, double_quantised = matrices / 2, matrices / 64
    assert shapes.base_bytes == pytest.approx(four_bit + double_quantised + 4 * embeddings, rel=0.01)


def test_the_figures_used_here_are_those_of_7bs_config():
    c = json.loads((ROOT / "configs" / "shapes" / "llama-2-7b" / "config.json").read_text())
    assert (c["num_hidden_layers"], c["hidden_size"], c["intermediate_size"], c["vocab_size"]) == (
        LLAMA.layers, LLAMA.hidden, LLAMA.intermediate, LLAMA.vocabulary,
    )  # fmt: skip


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("room", [3, 4, 8, 40])
def test_decoding_fits_what_there_is_and_uses_it(room, record):
    sizes = fit(Eval(), LLAMA, room * GIB, record)
    assert sizes.record == record
    assert LLAMA.evaluation(sizes.pass_tokens, sizes.arena_tokens, record) <= room * GIB
    assert sizes.arena_tokens >= LEAST_ARENA_TOKENS
    larger = fit(Eval(), LLAMA, (room + 1) * GIB, record)
    assert larger.pass_tokens > sizes.pass_tokens or larger == fit(Eval(), LLAMA, 80 * GIB, record)
    assert fit(Eval(pass_tokens=700), LLAMA, room * GIB, record).pass_tokens == 700


def test_passes_are_not_recorded_where_that_leaves_no_arena():
    least = LLAMA.evaluation(LEAST_PASS_TOKENS, LEAST_ARENA_TOKENS)
    assert fit(Eval(), LLAMA, least, record=True) == fit(Eval(), LLAMA, least)
    recorded = LLAMA.evaluation(LEAST_PASS_TOKENS, LEAST_ARENA_TOKENS, record=True)
    assert not fit(Eval(), LLAMA, recorded - 1, record=True).record
    assert fit(Eval(), LLAMA, recorded, record=True).record


def test_too_little_for_decoding_is_said():
    with pytest.raises(UserError, match=r"decoding takes 1\.\d GiB beside the base, and 12 GiB leave 0\.9: raise eval"):
        fit(Eval(), LLAMA, int(0.9 * GIB))
    assert fit(Eval(), LLAMA, 2 * GIB).arena_tokens >= LEAST_ARENA_TOKENS
    assert decoding(Eval(memory_budget_gib=0.1), LLAMA, CPU, record=False).arena_tokens > 0, "a CPU has no such budget"


@pytest.mark.parametrize("step", [STEP, 200.0])
@pytest.mark.parametrize("budget", [6.5, 8, 14, 24, 25.5, 30, 40, 60])
def test_an_evaluation_fits_between_two_steps(budget, step):
    """Beside what stays: base, held matrices, adapter, optimizer; or nothing is chosen."""
    evaluation = LLAMA.evaluation(LEAST_PASS_TOKENS, LEAST_ARENA_TOKENS)
    choice = choose(Train(memory_budget_gib=budget), LLAMA, GPU, step, SHARE, 70 * GIB, evaluation)
    static = sum(choice.counted[name] for name in ("base", "held matrices", "adapter", "optimizer"))
    assert static + evaluation <= budget * GIB
    sizes = fit(Eval(memory_budget_gib=budget), LLAMA, int(budget * GIB) - static)
    assert sizes.arena_tokens >= LEAST_ARENA_TOKENS


def test_a_budget_without_room_for_an_evaluation_is_refused_before_the_first_step():
    evaluation = LLAMA.evaluation(LEAST_PASS_TOKENS, LEAST_ARENA_TOKENS)
    with pytest.raises(UserError, match=r"memory_budget_gib=4\.9, .* an evaluation between two steps takes 5\.\d GiB"):
        choose(Train(memory_budget_gib=4.9), LLAMA, GPU, STEP, SHARE, 70 * GIB, evaluation)
