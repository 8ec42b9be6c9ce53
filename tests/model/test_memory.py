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
    Planned,
    Shapes,
    choose,
    decoding,
    fit,
    keep_to,
    limit_bytes,
    planned,
    usable_bytes,
)
from tests.conftest import ROOT

import pytest
import torch

GPU, CPU = torch.device("cuda"), torch.device("cpu")
LLAMA = Shapes(int(3.6 * GIB), 39_976_960, 32, 4096, 11008, 4096, 4096, 32000, 2)
STEP, SHARE = 4126.0, 0.07  # tokens of 64 questions, and how many of them are answers


def total(choice) -> float:
    return sum(choice.counted.values()) / GIB


EVALUATION = LLAMA.decoding_bytes(LEAST_PASS_TOKENS, LEAST_CACHE_TOKENS)


TRAIN = Train()


def chosen(gib: float | None, train: Train = TRAIN, shapes: Shapes = LLAMA, step: float = STEP, evaluation: int = 0):
    limit = None if gib is None else int(gib * GIB)
    return choose(train, shapes, GPU, step, SHARE, limit, evaluation)


def brute_force(gib: float, sizes: list[int], evaluation: int, average: float = 0.0) -> tuple[float, int, int, int]:
    """(time, pack, kept, held) of the fastest choice: of each size as many kept as fit, then as many held."""

    def total(pack: int, keep: int, hold: int) -> int:
        counted = LLAMA.training_bytes(pack, math.ceil(1.15 * SHARE * pack), keep, hold, average > 0)
        stays = sum(counted[name] for name in ("base", "held matrices", "adapter", "optimizer"))
        return max(sum(counted.values()), stays + evaluation)

    found = []
    for pack in sizes:
        keep = max((n for n in range(33) if total(pack, n, 0) <= gib * GIB), default=None)
        if keep is None:
            continue
        hold = max(n for n in range(33) if total(pack, keep, n) <= gib * GIB)
        packs = math.ceil(1.1 * STEP / pack)
        # of a layer's matrices all but down are computed again
        again = 1 - 4096 * 11008 / (4 * 4096 * 4096 + 3 * 4096 * 11008)
        time = STEP * (2 + again * (32 - keep) / 32) + packs * (240 + 170 * 2 * (32 - hold) / 32)
        found.append((time, -pack, keep, hold))
    return min(found)


SIZES = [4608, 2304, 1536, 1280, 1024, 768, 512]  # of 1, 2, 3, 4, 5, 6 to 8 and 9 packs a step


@pytest.mark.parametrize("average", [0.0, 0.99])
@pytest.mark.parametrize("evaluation", [0, EVALUATION, 4 * GIB])
@pytest.mark.parametrize("gib", [5.6, 6.5, 8, 9.3, 11, 14, 17, 24, 26, 41])
def test_the_fastest_of_what_fits_is_chosen(gib, evaluation, average):
    try:
        truth = brute_force(gib, SIZES, evaluation, average)
    except ValueError:  # nothing fits
        with pytest.raises(UserError, match="of which tensors can take"):
            chosen(gib, Train(average=average), evaluation=evaluation)
        return
    found = chosen(gib, Train(average=average), evaluation=evaluation)
    assert (-found.pack_tokens, found.keep_layers, found.hold_layers) == truth[1:]
    answers = math.ceil(1.15 * SHARE * found.pack_tokens)
    layers = found.keep_layers, found.hold_layers
    assert found.counted == LLAMA.training_bytes(found.pack_tokens, answers, *layers, average > 0)
    assert total(found) <= gib


def test_with_more_memory_a_step_never_takes_longer():
    times = [brute_force(gib, SIZES, EVALUATION)[0] for gib in (5.6, 6, 7, 8, 10, 12, 16, 24, 40)]
    assert times == sorted(times, reverse=True)
    assert times[0] > 1.3 * times[-1]
    assert chosen(60).hold_layers == 32


def test_too_little_memory_says_what_the_least_takes():
    says = (
        r"memory_budget_gib=auto, of which tensors can take 4\.0: packs of 512 tokens take about 4\.\d GiB with "
        r"everything recomputed, and an evaluation between two steps 5\.\d$"
    )
    with pytest.raises(UserError, match=says):
        chosen(4, evaluation=EVALUATION)
    with pytest.raises(UserError, match=r"memory_budget_gib=5\.5, .* packs of 4096 tokens take about"):
        chosen(5, Train(memory_budget_gib=5.5, pack_tokens=4096))
    assert chosen(7, Train(pack_tokens=4096)).pack_tokens == 4096


def test_an_evaluation_may_take_the_last_byte():
    least = chosen(8, Train(pack_tokens=512))
    static = sum(least.counted[name] for name in ("base", "adapter", "optimizer"))
    assert chosen(8, Train(pack_tokens=512), evaluation=8 * GIB - static).hold_layers == 0
    with pytest.raises(UserError, match=r"an evaluation between two steps 8\.0$"):
        chosen(8, Train(pack_tokens=512), evaluation=8 * GIB - static + 1)


def test_without_a_budget_checkpointing_decides():
    assert chosen(None, Train(gradient_checkpointing=True)).keep_layers == 0
    assert chosen(None, Train(gradient_checkpointing=False)).keep_layers == 32


@pytest.mark.parametrize(("step", "pack"), [(4126, 4608), (8000, 8192), (10_000, 5632), (300, 512)])
def test_a_step_is_one_pack_or_a_few_equal_ones(step, pack):
    assert chosen(None, step=step).pack_tokens == pack
    assert chosen(80, step=step).pack_tokens == pack


def test_a_cpu_has_small_packs_and_no_budget():
    assert choose(Train(fused=True), LLAMA, CPU, STEP, SHARE, 1).pack_tokens <= 1024


def test_logits_count_where_they_are_more_than_a_layers_work():
    kind = "logits or one layer's work"
    few, many = (LLAMA.training_bytes(4096, answers, 32, 0)[kind] for answers in (100, 10_000))
    assert few == LLAMA.training_bytes(4096, 0, 32, 0)[kind]
    assert many == 14 * 32000 * 10_000


def test_matrices_of_a_small_model_are_held():
    small = Shapes(10**8, 4_884_480, 30, 576, 1536, 576, 192, 49152, 2)
    assert choose(Train(), small, GPU, STEP, SHARE).hold_layers == 30
    assert choose(Train(), LLAMA, GPU, STEP, SHARE).hold_layers == 0


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
    model.peft_config["default"].lora_dropout = 0.1
    assert Shapes.of(model, 512) == Shapes(bytes_, 512, 2, 64, 128, 64, 32, vocabulary, item, dropout=True)


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
    found = SMALL.training_bytes(100, answers, keep, hold, average)
    assert found == plain | changed
    assert all(type(n) is int for n in found.values())


@pytest.mark.parametrize(("hidden", "intermediate", "query"), [(7, 11, 13), (7, 17, 13), (19, 17, 13)])
def test_dropout_adds_a_groups_largest_input_to_a_layers_work(hidden, intermediate, query):
    plain = replace(SMALL, hidden=hidden, intermediate=intermediate, query=query)
    found = replace(plain, dropout=True).training_bytes(100, 9, 1, 2)
    expected = plain.training_bytes(100, 9, 1, 2)
    expected["logits or one layer's work"] += 100 * 2 * max(hidden, intermediate, query)
    assert found == expected
    assert all(type(n) is int for n in found.values())
    assert replace(plain, dropout=True).decoding_bytes(8, 20, True) == plain.decoding_bytes(8, 20, True)


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


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is made up, by GiB; what was done to it."""

    def made(free: float, reserved: float = 0, allocated: float = 0, share: float = 1.0) -> list:
        done: list = []
        for name, value in {
            "mem_get_info": (int(free * GIB), 100 * GIB),
            "memory_reserved": int(reserved * GIB),
            "memory_allocated": int(allocated * GIB),
            "get_per_process_memory_fraction": share,
        }.items():
            monkeypatch.setattr(torch.cuda, name, {GPU: value}.get)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
        monkeypatch.setattr(
            torch.cuda, "set_per_process_memory_fraction", lambda share, device: done.append(share) or {GPU: 0}[device]
        )
        return done

    return made


@pytest.mark.parametrize(
    ("budget", "free", "reserved", "share", "limit"),
    [
        ("auto", 7, 4, 1.0, 7 + 4 - 0.22 - 0.13),  # what nobody has and what is ours, less the margin
        (8.0, 70, 4, 1.0, 8 - 0.82),  # of the process, CUDA itself included
        (80.0, 7, 4, 1.0, 7 + 4 - 0.22 - 0.13),
        ("auto", 3, 4, 0.08, 8),  # what is in force stays
        (6.0, 3, 4, 0.08, 6 - 0.82),
    ],
)
def test_the_allocator_may_take_what_is_free_or_the_budget(gpu, budget, free, reserved, share, limit):
    done = gpu(free, reserved, share=share)
    assert limit_bytes(budget, GPU) == pytest.approx(limit * GIB, abs=2)
    assert done == ["emptied"]


def test_the_allocator_is_kept_to_its_limit(gpu):
    done = gpu(7)
    for limit in (8 * GIB, 200 * GIB, -1):
        keep_to(limit, GPU)
    assert done == [0.08, 1.0, 0.0]


def test_tensors_can_take_the_limit_less_gaps_and_a_margin(gpu):
    gpu(7, reserved=5, allocated=4.5)
    assert usable_bytes(10 * GIB, GPU) == pytest.approx((9.7 - 0.5) * GIB, abs=2)


@pytest.mark.parametrize(
    ("budget", "free", "reserved", "allocated", "available"),
    [(6.0, 90, 3, 2, 0.97 * 5.18 - 3), (60.0, 8, 2, 1, 0.97 * 9.65 - 2), ("auto", 8, 2, 2, 0.97 * 9.65 - 2)],  # GiB
)
def test_decoding_has_the_limit_less_what_is_reserved(gpu, budget, free, reserved, allocated, available):
    gpu(free, reserved, allocated)
    for capture in (False, True):
        options = Eval(memory_budget_gib=budget)
        found = decoding(options, LLAMA, GPU, capture)
        assert found.cache_tokens == pytest.approx(
            fit(options, LLAMA, int(available * GIB), capture).cache_tokens, abs=1
        )
    assert decoding(Eval(), LLAMA, CPU, capture=True) == Decoding(1024, 16384, False)
    assert decoding(Eval(pass_tokens=77), LLAMA, CPU, capture=True) == Decoding(77, 16384, False)


def test_half_the_size_is_not_captured_and_ends_at_the_least():
    assert Decoding(2048, 9000, True).half() == Decoding(1024, 4500, False)
    assert Decoding(512, 1600, True).half() == Decoding(256, 1536, False)
    assert Decoding(128, 1536, True).half() == Decoding(128, 1536, False)
    assert Decoding(128, 1536).half() == Decoding(128, 1536)
    assert Decoding(128, 700).half() == Decoding(128, 700)


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
    with pytest.raises(UserError, match=r"decoding takes 1\.\d GiB beside the base, and the GPU has 0\.9: free it$"):
        fit(Eval(memory_budget_gib="auto"), LLAMA, int(0.9 * GIB))
    assert fit(Eval(), LLAMA, 2 * GIB).cache_tokens >= LEAST_CACHE_TOKENS
    assert decoding(Eval(memory_budget_gib=0.1), LLAMA, CPU, capture=False).cache_tokens > 0, "a CPU has no such budget"


def test_what_is_planned_is_what_stays_and_a_step_or_an_evaluation(gpu):
    gpu(9, reserved=5, allocated=4.75)
    choice = chosen(9, evaluation=EVALUATION)
    found = planned(choice, Eval(memory_budget_gib="auto"), LLAMA, 9 * GIB, GPU, capture=False)
    stay = ("base", "held matrices", "adapter", "optimizer")
    assert found.stays == {
        "CUDA and its kernels": pytest.approx(0.82 * GIB, abs=2),
        **{name: choice.counted[name] for name in stay},
        "gaps": GIB // 4,
    }
    assert found.step == {name: n for name, n in choice.counted.items() if name not in stay}
    sizes = fit(Eval(), LLAMA, 9 * GIB - sum(choice.counted[name] for name in stay))
    assert found.evaluation == LLAMA.decoding_bytes(*sizes) > EVALUATION
    stays = sum(found.stays.values())
    assert found.peak == max(stays + sum(found.step.values()), stays + found.evaluation)
    assert found.margin == int(0.13 * GIB)
    captured = planned(choice, Eval(memory_budget_gib="auto"), LLAMA, 9 * GIB, GPU, capture=True)
    sizes = fit(Eval(), LLAMA, 9 * GIB - sum(choice.counted[name] for name in stay), capture=True)
    assert captured.evaluation == LLAMA.decoding_bytes(*sizes)
    assert sizes.capture
    limit = int(0.97 * min(9 + 5 - 0.35, 12 - 0.82) * GIB) - GIB // 4
    without = planned(chosen(None), Eval(), LLAMA, None, GPU, capture=False)
    stays = sum(chosen(None).counted[name] for name in stay)
    assert without.evaluation == pytest.approx(LLAMA.decoding_bytes(*fit(Eval(), LLAMA, limit - stays)), rel=1e-3)
    assert without.margin == 0


def test_the_plan_is_a_table_of_totals_and_their_parts():
    found = Planned({"base": 3 * GIB, "held matrices": 0, "gaps": GIB // 2}, {"layer inputs": GIB}, GIB // 4, GIB // 8)
    assert found.table() == (
        "GPU memory as planned, in GiB\n"
        "         stays   3.50  base 3.00 + gaps 0.50\n"
        "        a step   4.50  stays 3.50 + layer inputs 1.00\n"
        " an evaluation   3.75  stays 3.50 + KV cache and passes 0.25\n"
        "     left free   0.12"
    )
    assert "left free" not in found._replace(margin=0).table()


def test_the_choice_is_described_in_one_sentence():
    found = chosen(14)
    assert found.description == (
        f"fused layers, {found.keep_layers} of 32 keep their activations and {found.hold_layers} their dequantised "
        f"matrices, packs of {found.pack_tokens} tokens"
    )
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
    sized = Train(pack_tokens=4608)
    assert choose(sized, few, GPU, STEP, SHARE, everything).hold_layers == held
    assert choose(sized, few, GPU, STEP, SHARE, everything - 1).hold_layers < 5
