"""A pack computes for every question exactly what a row of its own would."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

from common.config import Base, Lora, Window
from common.data import plan, squad
from common.data.squad import Answer, Example
from common.data.trees import Branch, Tree, build_trees
from common.model import tree_mask
from common.model.adapter import add_lora
from common.model.load import load_base, load_tokenizer
from common.model.pack import Layout, PadSizes, build_pack
from common.model.tree_mask import by_tree, logits, pack_logits, visible
from tests.conftest import ROOT, same

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CPU = torch.device("cpu")


def trees_of(base, n: int, train: bool = True) -> tuple[list[Tree], object]:
    tokenizer = load_tokenizer(str(base))
    examples = squad.first_paragraphs(squad.read(str(ROOT / "demo" / "train.json"), "train").examples, n)
    return build_trees(examples, same(tokenizer), Window(), train=train).trees, tokenizer


def short_trees(base, paragraphs: int) -> tuple[list[Tree], object]:
    """Trees of three questions each, with answers of one word, two and a number."""
    tokenizer = load_tokenizer(str(base))
    examples = [
        Example(f"p{p}q{q}", "T", context, question, (Answer(answer, context.index(answer)),))
        for p in range(paragraphs)
        for context in [f"Canal {p}: the amber bridge over the granite canal is {p + 7} miles from the harbour."]
        for q, (question, answer) in enumerate(
            [
                ("What colour is the bridge?", "amber"),
                ("What is below it?", "granite canal"),
                ("How many miles away?", str(p + 7)),
            ]
        )
    ]
    return build_trees(examples, same(tokenizer), Window(), train=True).trees, tokenizer


def lora_model(base, quant: str = "none", dtype: str = "fp32", device: torch.device = CPU, dropout: float = 0.0):
    """A model whose adapter already does something: B is not zero."""
    lora = Lora(rank=4, dropout=dropout)
    model = add_lora(load_base(Base(str(base), quant=quant, dtype=dtype), device), lora, seed=0)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model


def gradient(model) -> Tensor:
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    return flat


def packed_loss(model, packs: list[list[Tree]]) -> Tensor:
    """Sum over the answer tokens; its gradient is left in the model."""
    total = torch.zeros(())
    for members in packs:
        batch = build_pack(members).to(model.device)
        out = pack_logits(model, batch, batch.target_index)
        loss = cross_entropy(out.float(), batch.target_ids, reduction="sum")
        loss.backward()
        total += loss.detach().cpu()
    return total


def rows_loss(model, trees: list[Tree]) -> Tensor:
    """The same by plain rows: one question each, plain causal attention, labels on the answer and EOS."""
    total = torch.zeros(())
    for tree in trees:
        for branch in tree.branches:
            prompt = tree.prefix_ids + branch.prompt_ids
            ids = torch.tensor([prompt + branch.answer_ids], device=model.device)
            with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
                out = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            loss = cross_entropy(out.float(), ids[0, len(prompt) :], reduction="sum")
            loss.backward()
            total += loss.detach().cpu()
    return total


@pytest.mark.parametrize(("base", "paragraphs"), [("tiny_base", 4), ("smollm2_base", 1)])
def test_branch_gradients_equal_those_of_separate_rows(base, paragraphs, request):
    folder = request.getfixturevalue(base)
    trees, _ = short_trees(folder, paragraphs)
    trees = [Tree(tree.prefix_ids, tree.branches[:2]) for tree in trees]
    model = lora_model(folder)
    loss_packed, packed = packed_loss(model, [trees]), gradient(model)
    loss_rows, rows = rows_loss(model, trees), gradient(model)
    assert rows.norm() > 0
    assert (packed - rows).norm() / rows.norm() <= 1e-5
    assert abs(loss_packed - loss_rows) / loss_rows <= 1e-5


def test_a_branch_does_not_change_when_another_branch_or_tree_does(tiny_base):
    trees, _ = short_trees(tiny_base, 2)
    model = lora_model(tiny_base).eval()
    batch = build_pack(trees)
    mine = batch.layout.branch == 2  # of the first tree
    before = pack_logits(model, batch, mine.nonzero()[:, 0])
    others = (batch.layout.branch > 0) & ~mine | (batch.layout.tree > 0)
    batch.input_ids[others] = (batch.input_ids[others] + 7) % 400 + 3
    assert torch.equal(before, pack_logits(model, batch, mine.nonzero()[:, 0]))
    batch.input_ids[0] += 1  # while the prefix does reach it
    assert not torch.equal(before, pack_logits(model, batch, mine.nonzero()[:, 0]))


def test_micro_batches_give_the_gradient_of_one_batch(tiny_base):
    trees, _ = short_trees(tiny_base, 6)
    model = lora_model(tiny_base)
    packed_loss(model, [trees])
    one = gradient(model)
    packs = plan.fill(trees, pack_tokens=200)
    assert len(packs) > 2
    packed_loss(model, packs)
    many = gradient(model)
    assert (one - many).norm() / one.norm() <= 1e-5


def test_split_trees_give_the_gradient_of_whole_ones(tiny_base):
    trees, _ = short_trees(tiny_base, 2)
    model = lora_model(tiny_base)
    packed_loss(model, [trees])
    whole = gradient(model)
    packed_loss(model, [plan.bounded(trees, max_questions=2)])
    split = gradient(model)
    assert (whole - split).norm() / whole.norm() <= 1e-5


@pytest.mark.parametrize("n", [2, 3])
def test_attending_tree_by_tree_equals_attending_under_the_whole_mask(tiny_base, monkeypatch, n):
    trees, _ = short_trees(tiny_base, n)
    model = lora_model(tiny_base).eval()
    batch = build_pack(trees)
    attend, queries = sdpa_attention_forward, []

    def noted(module, query, *args, **kwargs):
        queries.append((query.shape[2], kwargs["scaling"]))
        return attend(module, query, *args, **kwargs)

    monkeypatch.setattr(tree_mask, "sdpa_attention_forward", noted)
    by_trees = pack_logits(model, batch, batch.prompt_ends)
    sizes = [int((batch.layout.tree == t).sum()) for t in range(n)]
    assert queries == [(size, 0.25) for size in sizes] * 2, "a CPU attends tree by tree"  # heads of 16: 16 ** -0.5
    queries.clear()
    asked = []
    monkeypatch.setattr(tree_mask, "by_tree", lambda query, key: asked.append((query, key)))  # None: as on a GPU
    torch.testing.assert_close(by_trees, pack_logits(model, batch, batch.prompt_ends), rtol=1e-5, atol=1e-5)
    assert (asked, queries) == ([(batch.layout, batch.layout)], [(batch.n_tokens, 0.25)] * 2)


def test_a_pass_is_given_its_cache_its_places_and_on_a_cpu_its_trees(monkeypatch):
    passes = []

    class Model:
        dtype = torch.float32

        def __call__(self, **inputs):
            passes.append(inputs)
            return SimpleNamespace(logits=torch.zeros(1, 2, 5))

    batch, cache = build_pack(TWO), object()
    assert pack_logits(Model(), batch, batch.prompt_ends).shape == (2, 5)
    pack_logits(Model(), batch, batch.prompt_ends, cache)
    logits(Model(), batch.input_ids, batch.layout, batch.layout)
    assert [(p["past_key_values"], p["use_cache"]) for p in passes[:3]] == [(None, False), (cache, True), (None, False)]
    casts = []
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: casts.append((*args, more)) or nullcontext())
    there = batch.to(torch.device("meta"))  # stands for a GPU, which does all trees in one call
    pack_logits(Model(), there, there.prompt_ends)
    Model.dtype = torch.float16
    pack_logits(Model(), batch, batch.prompt_ends)
    assert casts == [("meta", torch.float32, {"enabled": False}), ("cpu", torch.float16, {"enabled": True})]
    assert [p["trees"] is None for p in passes] == [False, False, False, True, False]
    assert passes[0]["logits_to_keep"] is batch.prompt_ends
    assert passes[2]["logits_to_keep"] == 0
    assert passes[0]["input_ids"].tolist() == [TWO_IDS]
    assert passes[0]["position_ids"].tolist() == [batch.layout.position.tolist()]


def test_rows_with_padding_in_front_are_masked_as_elsewhere(tiny_base):
    model = lora_model(tiny_base).eval()
    bare = model(torch.tensor([[11, 12, 13]])).logits
    mask, places = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[0, 0, 0, 1, 2]])
    padded = model(torch.tensor([[7, 8, 11, 12, 13]]), attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(padded[:, 2:], bare, rtol=1e-5, atol=1e-5)


def test_an_adapter_computes_in_the_dtype_of_its_base(tiny_base):
    batch = build_pack(short_trees(tiny_base, 2)[0])
    exact, half = (
        pack_logits(lora_model(tiny_base, dtype=dtype).eval(), batch, batch.target_index) for dtype in ("fp32", "bf16")
    )
    assert (exact.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert (half.float() - exact).norm() / exact.norm() < 0.05


def test_logits_of_a_pack_in_two_passes_are_those_of_one(tiny_base):
    model = lora_model(tiny_base).eval()
    trees, _ = short_trees(tiny_base, 2)
    batch, some = build_pack(trees), len(trees[0].prefix_ids) + 5  # up to the middle of the second prefix
    first, rest = torch.arange(batch.n_tokens).split([some, batch.n_tokens - some])
    cache = DynamicCache()
    one = logits(model, batch.input_ids[first], batch.layout[first], batch.layout[first], cache=cache)
    two = logits(model, batch.input_ids[rest], batch.layout[rest], batch.layout, cache=cache)
    whole = pack_logits(model, batch, torch.arange(batch.n_tokens))
    torch.testing.assert_close(torch.cat([one, two]), whole, rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == batch.n_tokens
    kept = torch.tensor([1, 5])
    torch.testing.assert_close(pack_logits(model, batch, kept), whole[kept], rtol=1e-5, atol=1e-5)


def test_visibility_is_the_prefix_and_the_own_branch_up_to_oneself():
    tree_1 = Tree([10, 11], (Branch("a", [1, 2], [3, 9]), Branch("b", [4], [5, 9])))
    tree_2 = Tree([12], (Branch("c", [6], [7, 9]),))
    batch = build_pack([tree_1, tree_2])
    #                               prefixes         a        b     c
    assert batch.input_ids.tolist() == [10, 11, 12, 1, 2, 3, 4, 5, 6, 7]
    assert batch.layout.position.tolist() == [0, 1, 0, 2, 3, 4, 2, 3, 1, 2]
    rows = ["".join("x" if seen else "." for seen in row) for row in visible(batch.layout, batch.layout)[0, 0]]
    assert rows == [
        "x.........",
        "xx........",
        "..x.......",
        "xx.x......",
        "xx.xx.....",
        "xx.xxx....",
        "xx....x...",
        "xx....xx..",
        "..x.....x.",
        "..x.....xx",
    ]


def tokens(tree: int, prefix: int, *branches: tuple[int, int]) -> Tree:
    """A tree whose prefix has so many tokens, and whose branches so many of the prompt and of the answer."""

    def branch(b: int, n: int, m: int) -> Branch:
        first = 100 * tree + 10 * b
        return Branch(f"{tree}{b}", [first] * n, [first + k for k in range(1, m + 1)])

    return Tree([100 * tree + 90] * prefix, tuple(branch(b, n, m) for b, (n, m) in enumerate(branches)))


TWO = [tokens(1, 3, (2, 3), (1, 1)), tokens(2, 1, (3, 2))]
#          prefixes              10                 11   20
TWO_IDS = [190, 190, 190, 290, 100, 100, 101, 102, 110, 200, 200, 200, 201]


def lists(values: dict) -> dict:
    return {name: x.tolist() if isinstance(x, Tensor) else x for name, x in values.items()}


def test_a_pack_is_laid_out_like_this():
    batch = build_pack(TWO)
    assert batch.input_ids.tolist() == TWO_IDS
    assert lists(vars(batch.layout)) == {
        "tree": [0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1],
        "branch": [0, 0, 0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 3],
        "position": [0, 1, 2, 0, 3, 4, 5, 6, 3, 1, 2, 3, 4],
    }
    starts = [0, 3, 4, 8, 9, 13], [0, 3, 4], [4, 9, 13]
    assert lists(vars(batch.spans)) == {
        "own": starts[0],
        "prefix": starts[1],
        "branches": starts[2],
        "in_prefix": [True] * 4 + [False] * 9,
        "in_branch": [False] * 4 + [True] * 9,
        "longest": (4, 3, 5),
        "starts": starts,
    }
    assert batch.prompt_ends.tolist() == [5, 8, 11]
    assert batch.target_index.tolist() == [5, 6, 7, 8, 11, 12]
    assert batch.target_ids.tolist() == [101, 102, 103, 111, 201, 202]
    assert batch.target_share.tolist() == pytest.approx([1 / 3] * 3 + [1] + [1 / 2] * 2)
    assert batch.ids == ["10", "11", "20"]
    assert batch.n_tokens == 13
    assert batch.target_share.dtype == torch.float32
    whole = (batch.input_ids, *vars(batch.layout).values(), batch.prompt_ends, batch.target_index, batch.target_ids)
    assert {x.dtype for x in whole} == {torch.int64}


def test_a_pack_to_decode_has_nothing_to_learn():
    batch = build_pack([tokens(1, 2, (2, 0), (1, 0))])
    assert batch.input_ids.tolist() == [190, 190, 100, 100, 110]
    assert batch.prompt_ends.tolist() == [3, 4]
    assert [x.tolist() for x in (batch.target_index, batch.target_ids, batch.target_share)] == [[], [], []]
    assert {x.dtype for x in (batch.target_index, batch.target_ids)} == {torch.int64}


def test_a_pack_keeps_each_branch_by_its_tree_and_number():
    batch = build_pack(TWO)
    some = batch.layout[torch.tensor([3, 8])]
    assert lists(vars(some)) == {"tree": [1, 0], "branch": [0, 2], "position": [0, 3]}
    assert lists(vars(some.next())) == {"tree": [1, 0], "branch": [0, 2], "position": [1, 4]}
    both = some.then(some.next())
    assert lists(vars(both)) == {"tree": [1, 0, 1, 0], "branch": [0, 2, 0, 2], "position": [0, 3, 1, 4]}


def test_a_pack_moves_to_a_device_whole():
    batch = build_pack(TWO)
    moved = batch.to(torch.device("meta"))
    assert {x.device.type for x in moved.tensors()} == {"meta"}
    assert moved.shape == batch.shape
    assert (moved.ids, moved.n_tokens, moved.spans.starts) == (batch.ids, 13, batch.spans.starts)
    same = batch.to(CPU)
    assert [x.tolist() for x in same.tensors()] == [x.tolist() for x in batch.tensors()]
    # ids; ends and targets; layout; spans
    sizes = [(13,), (3,), (6,), (6,), (6,), (13,), (13,), (13,), (6,), (3,), (3,), (13,), (13,)]
    assert batch.shape == (*sizes, (4, 3, 5))


# ---- padding -------------------------------------------------------------------------------------------------------

PADS = PadSizes(tokens=(8, 16, 32), trees=3, spans=7, answers=9, longest=(6, 4, 9))  # TWO has 13, 2, 5, 6, (4, 3, 5)


def test_no_token_attends_to_padding_and_it_has_no_loss():
    batch = build_pack(TWO)
    padded = PADS.pad(batch)
    assert padded.input_ids.tolist() == [*TWO_IDS, 0, 0, 0]
    for name, more in (("tree", -1), ("branch", 0), ("position", 0)):
        before = getattr(batch.layout, name)
        assert getattr(padded.layout, name).tolist() == [*before.tolist(), more, more, more]
    assert lists(vars(padded.spans)) == {
        "own": [0, 3, 4, 8, 9, 13, 13, 13],
        "prefix": [0, 3, 4, 4],
        "branches": [4, 9, 13, 13],
        "in_prefix": [True] * 4 + [False] * 12,
        "in_branch": [False] * 4 + [True] * 9 + [False] * 3,
        "longest": (6, 4, 9),
        "starts": batch.spans.starts,
    }
    assert padded.prompt_ends.tolist() == []
    assert padded.target_index.tolist() == [5, 6, 7, 8, 11, 12, 0, 0, 0]
    assert padded.target_ids.tolist() == [101, 102, 103, 111, 201, 202, -100, -100, -100]
    assert padded.target_share.tolist() == [*batch.target_share.tolist(), 0, 0, 0]
    assert (padded.ids, padded.n_tokens) == (batch.ids, 13)
    assert [x.dtype for x in padded.tensors()] == [x.dtype for x in batch.tensors()]
    assert not visible(padded.layout, padded.layout)[0, 0, :13, 13:].any()


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": (8,), "fits": {"tokens": (8, 13)}},
        {"tokens": (12,), "fits": {"tokens": (13,)}},
        {"trees": 1, "fits": {"trees": 2}},
        {"spans": 4, "fits": {"spans": 5}},
        {"answers": 5, "fits": {"answers": 6}},
        {"longest": (3, 4, 9), "fits": {"longest": (4, 4, 9)}},
        {"longest": (6, 2, 9), "fits": {"longest": (6, 3, 9)}},
        {"longest": (6, 4, 4), "fits": {"longest": (6, 4, 5)}},
    ],
)
def test_what_does_not_fit_is_not_padded(change):
    fits = change.pop("fits")
    assert replace(PADS, **change).pad(build_pack(TWO)) is None
    assert replace(PADS, **fits).pad(build_pack(TWO)) is not None


def test_a_pack_is_padded_to_the_least_size_that_holds_it_or_the_one_asked_for():
    batch = build_pack(TWO)
    for sizes, size, length in (
        ((8, 16, 32), None, 16),
        ((8, 13, 16), None, 13),
        ((8, 16, 32), 32, 32),
        ((8,), 13, 13),
        ((8,), 21, 21),
    ):
        assert len(replace(PADS, tokens=sizes).pad(batch, size).input_ids) == length
    assert PADS.pad(batch, 12) is None


def test_trees_that_fit_no_pack_together_are_shared_out():
    trees = [tokens(i, 3, (2, 1)) for i in range(5)]  # 5 tokens each
    pads = PadSizes(tokens=(8, 16), trees=3, spans=7, answers=9, longest=(6, 4, 9))
    packs = pads.packs(trees)
    assert [p.ids for p in packs] == [["00", "20", "40"], ["10", "30"]]
    assert [len(p.input_ids) for p in packs] == [16, 16]
    assert [p.ids for p in pads.packs(trees[:3])] == [["00", "10", "20"]]
    (whole,) = pads.packs([tokens(0, 5, (2, 1))])  # its prefix is too long
    assert (len(whole.input_ids), whole.prompt_ends.tolist()) == (7, [6])


def test_pad_sizes_hold_their_packs_and_some_more():
    packs = [
        build_pack([tokens(1, 300, (40, 9), (5, 80)), tokens(2, 20, (8, 3))]),
        build_pack([tokens(3, 100, (30, 40))]),
    ]
    # tokens 300 + 48 + 84 + 20 + 10 = 462 and 169; answers 92 and 40; longest 300, 300, 132 and 100, 100, 69
    assert PadSizes.of(packs, 600) == PadSizes(
        tokens=(256, 512, 640),
        trees=8,  # 2 x 1.15, in eights
        spans=8,
        answers=128,  # 105.8, in sixty-fours
        longest=(384, 384, 192),  # 345, 345, 151.8
    )
    assert PadSizes.of(packs[1:], 100).tokens == (128, 256)
    for prefix, longest in ((1113, 1280), (1114, 1344)):  # 1279.95 and 1281.1
        assert PadSizes.of([build_pack([tokens(1, prefix, (1, 1))])], 64).longest == (longest, longest, 64)
    for prefix, branches, longest in (
        (100, [(300, 1), (5, 80)], (384, 128, 448)),
        (100, [(9, 1)] * 9, (128, 128, 128)),
    ):
        assert (
            PadSizes.of([build_pack([tokens(1, prefix, *branches)])], 64).longest == longest
        )  # of 345, 115, 441.6; 115, 115, 93
    few = PadSizes.of([build_pack([tokens(i, 1, (1, 2)) for i in range(6)])], 64)
    assert (few.trees, few.spans) == (8, 16)  # 6.9 and 13.8
    many = build_pack([tokens(i, 1, *[(1, 2)] * 5) for i in range(7)])
    assert (PadSizes.of([many], 64).trees, PadSizes.of([many], 64).spans) == (16, 56)  # 8.05 and 48.3


def test_there_are_at_most_twelve_padded_numbers_of_tokens():
    def packs(sizes):
        return [build_pack([tokens(1, size - 1, (1, 1))]) for size in sizes]

    twelve = [128 * i for i in range(1, 13)]
    assert PadSizes.of(packs(twelve), 1).tokens == tuple(twelve)
    assert PadSizes.of(packs(twelve), 1537).tokens == (256, 512, 768, 1024, 1280, 1536, 1792)
    assert PadSizes.of(packs([1, 128, 129, 255]), 250).tokens == (128, 256)


def test_loss_is_on_the_answer_and_eos_and_nothing_else(tiny_base):
    trees, tokenizer = short_trees(tiny_base, 3)
    batch = build_pack(trees)
    answers = [branch.answer_ids for tree in trees for branch in tree.branches]
    assert batch.target_ids.tolist() == [token for answer in answers for token in answer]
    assert [share.sum().item() for share in batch.target_share.split([len(a) for a in answers])] == (
        pytest.approx([1] * len(answers))
    )
    assert all(answer[-1] == tokenizer.eos_token_id for answer in answers)
    assert tokenizer.pad_token_id not in batch.target_ids
    assert tokenizer.pad_token_id not in batch.input_ids
    # each target is predicted at the token before it
    inner = [i for i in range(1, len(batch.target_ids)) if batch.target_index[i] == batch.target_index[i - 1] + 1]
    assert all(batch.input_ids[batch.target_index[i]] == batch.target_ids[i - 1] for i in inner)


def test_scattered_keys_of_a_tree_are_all_found():
    key = Layout(torch.tensor([0, 0, 1, 1, 0, 1]), torch.zeros(6).long(), torch.tensor([0, 1, 0, 1, 2, 2]))
    query = key[torch.tensor([4, 5])]
    (first, first_keys), (second, second_keys) = by_tree(query, key)
    assert (first.tolist(), second.tolist()) == ([0], [1])
    assert first_keys.tolist() == [0, 1, 4]
    assert second_keys.tolist() == [2, 3, 5]


def test_logits_need_a_tree_mask_for_every_query(tiny_base):
    model = lora_model(tiny_base).eval()
    batch = build_pack(short_trees(tiny_base, 1)[0])
    one = batch.layout[batch.prompt_ends]
    out = logits(model, batch.input_ids[batch.prompt_ends], one, one)  # each sees only itself here
    assert out.shape == (len(batch.ids), model.config.vocab_size)
    assert out.isfinite().all()
