"""A budget decides what is kept and how large packs are, and says so; what cannot fit is refused."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

from common.config import Base, Eval, Lora, Train
from common.errors import UserError
from common.model.adapter import add_lora
from common.model.load import load_base, parameter_counts
from common.model.memory import (
    GIB,
    LEAST_CACHE_TOKENS,
    LEAST_PASS_TOKENS,
    Decoding,
    Shapes,
    available_bytes,
    choose,
    decoding,
    fit,
)
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
    assert f"{choice.keep_layers} of 32" in choice.description
    assert str(choice.pack_tokens) in choice.description


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


def test_matrices_are_not_held_in_the_memory_of_an_evaluation_beside_graphs():
    train, free, evaluation = Train(memory_budget_gib=24), int(20.8 * GIB), LLAMA.decoding_bytes(256, 4096)
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
    assert "GiB" not in choice.description


def test_logits_count_where_they_are_more_than_a_layers_work():
    kind = "logits or one layer's work"
    few, many = (LLAMA.training_bytes(4096, answers, 32, 0)[kind] for answers in (100, 10_000))
    assert few == LLAMA.training_bytes(4096, 0, 32, 0)[kind]
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


@pytest.mark.parametrize(
    ("base", "constants"),
    [
        (Base("tiny", dtype="fp32"), 36_864 // 2 + 576 + 7 * 4),  # a byte a block of 64, and fp32 for 256 of these
        (Base("tiny", dtype="fp32", double_quant=False), 36_864 // 2 + 4 * 576),
        (Base("tiny", dtype="fp32", quant="none"), 4 * 36_864),
        (Base("tiny", dtype="bf16", quant="none"), 2 * 36_864),
    ],
)
def test_shapes_are_those_of_the_model(tiny_base, base, constants):
    """Of a layer's seven matrices: q and o 64 × 64, k and v 32 × 64, gate, up and down 128 × 64."""
    model = load_base(replace(base, path=str(tiny_base)), CPU)
    item, vocabulary = model.dtype.itemsize, model.config.vocab_size
    bytes_ = 2 * constants + item * (2 * vocabulary * 64 + 5 * 64)  # embeddings, head, norms
    assert Shapes.of(model) == Shapes(bytes_, 0, 2, 64, 128, 64, 32, vocabulary, item)
    model = add_lora(model, Lora(2, targets=("q_proj",)), seed=0)
    assert parameter_counts(model)[0] == 2 * 2 * (64 + 64)
    assert Shapes.of(model, 512) == Shapes(bytes_, 512, 2, 64, 128, 64, 32, vocabulary, item)


@pytest.mark.parametrize(
    ("config", "query", "key"),
    [
        ({}, 128, 128),
        ({"head_dim": None, "num_key_value_heads": None}, 128, 128),
        ({"head_dim": 48}, 192, 192),
        ({"num_key_value_heads": 1}, 128, 32),
        ({"head_dim": 48, "num_key_value_heads": 2}, 192, 96),
    ],
)
def test_heads_that_a_configuration_leaves_out_are_as_wide_and_as_many_as_the_others(config, query, key):
    c = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 7, "num_attention_heads": 4, "vocab_size": 9}
    model = SimpleNamespace(config=SimpleNamespace(**c, **config), parameters=lambda: [], dtype=torch.float16)
    assert Shapes.of(model) == Shapes(0, 0, 3, 128, 7, query, key, 9, 2)


# ---- what is counted, by hand ----------------------------------------------------------------------------------------

SMALL = Shapes(1000, 10, layers=4, hidden=7, intermediate=11, query=13, key=5, vocabulary=101, item=2)


def test_a_layer_of_llama_2_7b_is_counted_by_its_published_shapes():
    weights = 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert LLAMA.layer_matrices == 2 * weights == 404_750_336
    assert LLAMA.kept_per_token == 2 * (3 * 4096 + 4096 + 4096 + 2 * 11008) == 84_992  # q, k, v; out; middle; gate, up
    assert LLAMA.cache_per_token == 2 * 32 * 2 * 4096 == 524_288  # the well-known half MiB a token


@pytest.mark.parametrize(
    ("answers", "keep", "hold", "average", "changed"),
    [
        (9, 1, 2, False, {}),
        (9, 1, 2, True, {"adapter": 10 * (4 + 4 + 2 + 2 + 4 + 4)}),
        (9, 1, 4, False, {"held matrices": 4 * 966, "logits or one layer's work": 14_400 + 13_000}),
        (
            9,
            4,
            2,
            False,
            {
                "kept activations": 4 * 13_000,
                "small tensors": (5600 + 52_000) // 50,
                "logits or one layer's work": 14_400 + 966,
            },
        ),
        (9, 0, 0, False, {"kept activations": 0, "held matrices": 0, "small tensors": 112}),
        (30, 1, 2, False, {"logits or one layer's work": (2 + 4 + 4 + 4) * 101 * 30}),
    ],
)
def test_every_term_of_training_is_as_counted_by_hand(answers, keep, hold, average, changed):
    assert SMALL.layer_matrices == 2 * 7 * (13 + 5 + 5 + 13 + 11 + 11 + 11) == 966
    assert SMALL.kept_per_token == 2 * (13 + 5 + 5 + 13 + 7 + 11 + 11) == 130
    plain = {
        "base": 1000,
        "held matrices": 2 * 966,
        "adapter": 10 * (4 + 4 + 2 + 2),
        "optimizer": 10 * (1 + 1),
        "layer inputs": 100 * 4 * 2 * 7,
        "kept activations": 100 * 130,
        "small tensors": (5600 + 13_000) // 50,
        "logits or one layer's work": 100 * 2 * (4 * 11 + 4 * 7) + 966 + 100 * 130,
    }
    assert SMALL.training_bytes(100, answers, keep, hold, average) == plain | changed


@pytest.mark.parametrize(
    ("pass_tokens", "cache", "vocabulary", "capture", "bytes_"),
    [
        (8, 0, 101, False, 308 + 10 * 101 * 2 + 30),  # a matrix of gate and up; logits of a quarter; the adapter's copy
        (8, 20, 101, False, 308 + 10 * 101 * 2 + 30 + 20 * 80),
        (5, 0, 101, False, 308 + 10 * 101 * 2 + 30),
        (8, 0, 50, False, 308 + 8 * 2 * (5 * 11 + 6 * 7) + 30),
        (8, 20, 101, True, 308 + 2020 + 30 + 1600 + (308 + 1552 + 8 * 2 * (7 + 13 + 13) + 80)),
    ],
)
def test_every_term_of_decoding_is_as_counted_by_hand(pass_tokens, cache, vocabulary, capture, bytes_):
    assert SMALL.cache_per_token == 2 * 4 * 5 * 2
    assert replace(SMALL, vocabulary=vocabulary).decoding_bytes(pass_tokens, cache, capture) == bytes_


def test_bytes_free_are_what_nobody_has_and_what_is_ours_less_a_tenth(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", {GPU: (100, 1000)}.get)
    monkeypatch.setattr(torch.cuda, "memory_reserved", {GPU: 51}.get)
    assert available_bytes(GPU) == 135  # of 151


@pytest.mark.parametrize(
    ("budget", "unused", "reserved", "allocated", "available"),
    [(6, 90, 10, 2, 4), (60, 8, 2, 1, 7), (60, 90, 10, 2, 58), (60, 8, 4, 4, 0.9 * 12 - 4)],  # GiB
)
def test_decoding_has_the_budget_less_what_is_allocated_or_what_is_free(
    monkeypatch, budget, unused, reserved, allocated, available
):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", {GPU: (unused * GIB, 0)}.get)
    monkeypatch.setattr(torch.cuda, "memory_reserved", {GPU: reserved * GIB}.get)
    monkeypatch.setattr(torch.cuda, "memory_allocated", {GPU: allocated * GIB}.get)
    for capture in (False, True):
        options = Eval(memory_budget_gib=budget)
        assert decoding(options, LLAMA, GPU, capture) == fit(options, LLAMA, int(available * GIB), capture)
    assert emptied
    assert decoding(Eval(), LLAMA, CPU, capture=True) == Decoding(1024, 16384, False)
    assert decoding(Eval(pass_tokens=77), LLAMA, CPU, capture=True) == Decoding(77, 16384, False)


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("available", [2.2, 3, 4.7, 6, 45, 60])  # GiB
def test_passes_are_the_largest_beside_which_the_cache_holds_ten_times_as_many_tokens(available, capture):
    def fits(pass_tokens: int, cache: int) -> bool:
        return LLAMA.decoding_bytes(pass_tokens, cache, capture) <= available * GIB

    found = fit(Eval(), LLAMA, int(available * GIB), capture)
    passes = max((n for n in range(512, 8193, 128) if fits(n, 10 * n)), default=512)
    assert (found.pass_tokens, found.capture) == (passes, capture)
    assert fits(passes, found.cache_tokens)
    assert found.cache_tokens == 81_920 or not fits(passes, found.cache_tokens + 1)
    given = fit(Eval(pass_tokens=600), LLAMA, int(available * GIB), capture)
    assert (given.pass_tokens, given.capture) == (600, capture)
    assert given.cache_tokens == 81_920 or not fits(600, given.cache_tokens + 1)


def test_the_figures_used_here_are_those_of_7bs_config():
    c = json.loads((ROOT / "configs" / "shapes" / "llama-2-7b" / "config.json").read_text())
    ours = LLAMA.layers, LLAMA.hidden, LLAMA.intermediate, LLAMA.vocabulary
    assert (c["num_hidden_layers"], c["hidden_size"], c["intermediate_size"], c["vocab_size"]) == ours


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("available", [3, 4, 8, 40])
def test_decoding_fits_what_there_is_and_uses_it(available, capture):
    sizes = fit(Eval(), LLAMA, available * GIB, capture)
    assert sizes.capture == capture
    assert LLAMA.decoding_bytes(sizes.pass_tokens, sizes.cache_tokens, capture) <= available * GIB
    assert sizes.cache_tokens >= LEAST_CACHE_TOKENS
    larger = fit(Eval(), LLAMA, (available + 1) * GIB, capture)
    assert larger.pass_tokens > sizes.pass_tokens or larger == fit(Eval(), LLAMA, 80 * GIB, capture)
    assert fit(Eval(pass_tokens=700), LLAMA, available * GIB, capture).pass_tokens == 700


def test_passes_are_not_captured_where_that_leaves_no_cache():
    least = LLAMA.decoding_bytes(LEAST_PASS_TOKENS, LEAST_CACHE_TOKENS)
    assert fit(Eval(), LLAMA, least, capture=True) == fit(Eval(), LLAMA, least)
    captured = LLAMA.decoding_bytes(LEAST_PASS_TOKENS, LEAST_CACHE_TOKENS, capture=True)
    assert not fit(Eval(), LLAMA, captured - 1, capture=True).capture
    assert fit(Eval(), LLAMA, captured, capture=True).capture


def test_too_little_for_decoding_is_an_error():
    with pytest.raises(UserError, match=r"decoding takes 1\.\d GiB beside the base, and 12 GiB leave 0\.9: raise eval"):
        fit(Eval(), LLAMA, int(0.9 * GIB))
    assert fit(Eval(), LLAMA, 2 * GIB).cache_tokens >= LEAST_CACHE_TOKENS
    assert decoding(Eval(memory_budget_gib=0.1), LLAMA, CPU, capture=False).cache_tokens > 0, "a CPU has no such budget"


@pytest.mark.parametrize("step", [STEP, 200.0])
@pytest.mark.parametrize("budget", [6.5, 8, 14, 24, 25.5, 30, 40, 60])
def test_an_evaluation_fits_between_two_steps(budget, step):
    """Beside what stays: base, held matrices, adapter, optimizer; or nothing is chosen."""
    evaluation = LLAMA.decoding_bytes(LEAST_PASS_TOKENS, LEAST_CACHE_TOKENS)
    choice = choose(Train(memory_budget_gib=budget), LLAMA, GPU, step, SHARE, 70 * GIB, evaluation)
    static = sum(choice.counted[name] for name in ("base", "held matrices", "adapter", "optimizer"))
    assert static + evaluation <= budget * GIB
    sizes = fit(Eval(memory_budget_gib=budget), LLAMA, int(budget * GIB) - static)
    assert sizes.cache_tokens >= LEAST_CACHE_TOKENS


def test_a_budget_that_does_not_hold_an_evaluation_is_refused_before_the_first_step():
    evaluation = LLAMA.decoding_bytes(LEAST_PASS_TOKENS, LEAST_CACHE_TOKENS)
    with pytest.raises(UserError, match=r"memory_budget_gib=4\.9, .* an evaluation between two steps takes 5\.\d GiB"):
        choose(Train(memory_budget_gib=4.9), LLAMA, GPU, STEP, SHARE, 70 * GIB, evaluation)


def brute_force(budget: float, pack: int, evaluation: int, free: int, average: bool = False) -> tuple[int, int]:
    """(kept, held) layers: as many kept as the budget allows, then as many held beside an evaluation."""
    answers = math.ceil(1.15 * SHARE * pack)

    def total(keep: int, hold: int) -> int:
        return sum(LLAMA.training_bytes(pack, answers, keep, hold, average).values())

    keep = max((n for n in range(33) if total(n, 0) <= budget * GIB), default=0)
    hold = max((n for n in range(33) if total(keep, n) <= min(budget * GIB, free - evaluation)), default=0)
    return keep, hold


@pytest.mark.parametrize("average", [0.0, 0.99])
@pytest.mark.parametrize("budget", [7, 9.3, 17, 23.7, 26, 28, 41])
@pytest.mark.parametrize("free_gib", [24, 80])
def test_kept_and_held_layers_are_the_most_that_fit(budget, free_gib, average):
    evaluation = LLAMA.decoding_bytes(LEAST_PASS_TOKENS, LEAST_CACHE_TOKENS)
    train = Train(memory_budget_gib=budget, average=average)
    budget = min(budget, free_gib)
    found = choose(train, LLAMA, GPU, STEP, SHARE, free_gib * GIB, evaluation)
    assert found.pack_tokens == 4608
    truth = brute_force(budget, 4608, evaluation, free_gib * GIB, average > 0)
    assert (found.keep_layers, found.hold_layers) == truth
    answers = math.ceil(1.15 * SHARE * 4608)
    assert found.counted == LLAMA.training_bytes(4608, answers, *truth, average > 0)


def test_packs_shrink_by_256_tokens_until_they_fit_and_no_further():
    found = choose(Train(memory_budget_gib=5), LLAMA, GPU, STEP, SHARE)

    def total(pack: int) -> int:
        return sum(LLAMA.training_bytes(pack, math.ceil(1.15 * SHARE * pack), 0, 0).values())

    assert total(found.pack_tokens) <= 5 * GIB < total(found.pack_tokens + 256)
    assert (4608 - found.pack_tokens) % 256 == 0
    exactly = total(4608) / GIB
    assert choose(Train(memory_budget_gib=exactly), LLAMA, GPU, STEP, SHARE).pack_tokens == 4608
    given = Train(memory_budget_gib=total(700) / GIB, pack_tokens=700)
    assert choose(given, LLAMA, GPU, STEP, SHARE).pack_tokens == 700


def test_the_choice_is_described_in_one_sentence():
    found = choose(Train(memory_budget_gib=8), LLAMA, GPU, STEP, SHARE)
    gib = ", ".join(f"{name} {n / 2**30:.2f}" for name, n in found.counted.items())
    assert found.description == (
        f"fused layers, {found.keep_layers} of 32 keep their activations, packs of 4608 tokens, about "
        f"{sum(found.counted.values()) / 2**30:.1f} GiB at the peak: {gib}"
    )
    assert "kept activations " in gib
    held = choose(Train(gradient_checkpointing=False), replace(LLAMA, layers=2), CPU, STEP, SHARE)
    assert held.description == (
        "fused layers, 2 of 2 keep their activations and 2 their dequantised matrices, packs of 1024 tokens"
    )


@pytest.mark.parametrize(("spare", "held"), [(0, 5), (-1, 0)])
def test_matrices_are_held_whatever_the_budget_up_to_a_gib(monkeypatch, spare, held):
    monkeypatch.setattr("common.model.memory.HELD_BYTES", 5 * LLAMA.layer_matrices + spare)
    few = replace(LLAMA, layers=5)
    assert choose(Train(), few, GPU, STEP, SHARE).hold_layers == held
    everything = sum(few.training_bytes(4608, math.ceil(1.15 * SHARE * 4608), 0, 5).values())
    assert choose(Train(memory_budget_gib=everything / GIB), few, GPU, STEP, SHARE).hold_layers == held
    assert choose(Train(memory_budget_gib=(everything - 1) / GIB), few, GPU, STEP, SHARE).hold_layers < 5


def test_an_evaluation_may_take_the_last_byte():
    least = choose(Train(memory_budget_gib=8, pack_tokens=512), LLAMA, GPU, STEP, SHARE, 70 * GIB)
    static = sum(least.counted[name] for name in ("base", "adapter", "optimizer"))
    for spare in (0, -1):
        evaluation = 8 * GIB - static - spare
        if spare:
            with pytest.raises(UserError, match=r"of which there are 8\.0: an evaluation .* takes 8\.0 GiB"):
                choose(Train(memory_budget_gib=8, pack_tokens=512), LLAMA, GPU, STEP, SHARE, 70 * GIB, evaluation)
        else:
            choose(Train(memory_budget_gib=8, pack_tokens=512), LLAMA, GPU, STEP, SHARE, 70 * GIB, evaluation)
