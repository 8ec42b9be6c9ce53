"""What only a GPU can show (`make test-gpu`): bf16 and fp16, NF4's own kernels, memory. Fails where there is none."""

import json

import bench_latency
import eval_loop
import train_loop
from common import meter
from common.config import Base
from common.decode import predict, stop_ids
from common.errors import UserError
from common.model import load_base, load_tokenizer
from tests.conftest import ROOT
from tests.test_decode import LIMIT, demo_trees, generated
from tests.test_model import four_bit_bytes, train_a_little
from tests.test_packing import gradient, lora_model, packed_loss, rows_loss, trees_of
from tests.test_train_loop import interrupt_at_evaluation, metrics

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn.functional import cosine_similarity

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def gpu():
    assert torch.cuda.is_available(), "make test-gpu needs a CUDA GPU"
    AcceleratorState._reset_state(True)  # one precision a process, and the tests try several
    yield
    torch.cuda.empty_cache()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return cosine_similarity(a.double(), b.double(), dim=0).item()


def test_packed_gradients_in_bf16_are_those_of_rows(smollm2_base):
    trees, _ = trees_of(smollm2_base, 8)
    gradients, losses = {}, {}
    for dtype in ("bf16", "fp32"):
        model = lora_model(smollm2_base, "nf4", dtype, GPU)
        losses[dtype, "packed"], gradients[dtype, "packed"] = packed_loss(model, [trees]), gradient(model)
        losses[dtype, "rows"], gradients[dtype, "rows"] = rows_loss(model, trees), gradient(model)
    truth = gradients["fp32", "rows"]
    off = {way: ((gradients["bf16", way] - truth).norm() / truth.norm()).item() for way in ("packed", "rows")}
    print(f"losses {losses}; bf16 is off by {off}")
    assert cosine(gradients["bf16", "packed"], gradients["bf16", "rows"]) >= 0.999
    assert cosine(gradients["fp32", "packed"], truth) >= 0.999999
    assert losses["bf16", "packed"].item() == pytest.approx(losses["bf16", "rows"].item(), rel=0.005)
    assert losses["fp32", "packed"].item() == pytest.approx(losses["fp32", "rows"].item(), rel=1e-4)
    assert off["packed"] <= 1.1 * off["rows"], "packing adds to what bf16 itself costs"


def test_training_leaves_the_nf4_bytes_as_they_were(smollm2_base):
    trees, _ = trees_of(smollm2_base, 4)
    model = lora_model(smollm2_base, "nf4", "bf16", GPU)
    before = four_bit_bytes(model)
    assert len(before) == 30 * 7
    first, last = train_a_little(model, trees)
    assert last < first
    assert all(torch.equal(a, b) for a, b in zip(before, four_bit_bytes(model), strict=True))


def test_checkpointing_changes_no_gradient_and_takes_less_memory(smollm2_base):
    trees, _ = trees_of(smollm2_base, 8)
    model = lora_model(smollm2_base, "nf4", "bf16", GPU).train()
    found, peak = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        meter.reset_peaks(GPU)
        packed_loss(model, [trees])
        found.append(gradient(model))
        peak.append(meter.peaks(GPU)["allocated_bytes"])
    assert cosine(*found) >= 0.99999
    assert peak[1] < peak[0]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_an_interrupted_run_goes_on_with_the_same_steps_in_the_same_order(tiny_config, tmp_path, monkeypatch, dtype):
    arguments = [str(tiny_config), f"base.dtype={dtype}"]
    train_loop.main([*arguments, f"runs={tmp_path / 'whole'}"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at_evaluation(patch, 3)
        train_loop.main([*arguments, f"runs={tmp_path / 'cut'}"])
    train_loop.main([*arguments, f"runs={tmp_path / 'cut'}"])
    whole, cut = (metrics(next((tmp_path / name).iterdir())) for name in ("whole", "cut"))
    assert len(whole) == len(cut)
    for ours, theirs in zip(cut, whole, strict=True):
        exact = ("step", "questions", "tokens", "lr", "n")
        assert {key: ours.get(key) for key in exact} == {key: theirs.get(key) for key in exact}
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_greedy_answers_are_those_of_generate(smollm2_base, quant):
    model = load_base(Base(str(smollm2_base), quant=quant, dtype="fp32"), GPU)
    tokenizer = load_tokenizer(str(smollm2_base))
    trees, stops = demo_trees(tokenizer, 12), stop_ids(tokenizer)
    answers = predict(model, tokenizer, trees, stops, LIMIT, progress=None)
    for tree in trees:
        for branch in tree.branches:
            assert answers[branch.id].token_ids == generated(model, tokenizer, tree, branch, stops)
    assert len({tuple(answer.token_ids) for answer in answers.values()}) > 30


def test_the_whole_path_runs_and_measures_memory(tiny_config, capsys):
    train_loop.main([str(tiny_config), "base.dtype=auto"])
    eval_loop.main([str(tiny_config), "base.dtype=auto"])
    bench_latency.main([str(tiny_config), "base.dtype=auto"])
    train, evaluation, bench = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{")
    assert evaluation["em"] == train["em"]
    for result in (train, evaluation, bench):
        assert 0 < result["peak"]["allocated_bytes"] <= result["peak"]["reserved_bytes"]
    assert bench["nvml_peak"]["device_bytes"] >= bench["peak"]["reserved_bytes"]


def test_out_of_memory_names_the_knob_and_the_run_goes_on_with_room(tiny_config, smollm2_base, tmp_path):
    arguments = [
        str(tiny_config), f"base.path={smollm2_base}", "base.dtype=bf16", f"data.train={ROOT / 'demo' / 'train.json'}",
        "train.questions_per_step=64", "train.pack_tokens=8192", "train.max_steps=1",
    ]  # fmt: skip
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 2**30
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(GPU).total_memory)
    try:
        with pytest.raises(UserError, match=r"out of GPU memory; lower train\.pack_tokens \(now 8192\), or set train"):
            train_loop.main(arguments)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    train_loop.main(arguments)
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "record.json").exists()
