"""A pack computes for every question exactly what a row of its own would."""

from common import plan, squad
from common.config import Base, Lora, Window
from common.model import add_lora, load_base, load_tokenizer
from common.packing import Layout, by_tree, logits, pack, pack_logits, visible
from common.prompt import Branch, Tree, build_trees
from tests.conftest import ROOT

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

CPU = torch.device("cpu")


def trees_of(base, n: int, train: bool = True) -> tuple[list[Tree], object]:
    tokenizer = load_tokenizer(str(base))
    examples = squad.first_paragraphs(squad.read(str(ROOT / "demo" / "train.json"), "train").examples, n)
    return build_trees(examples, tokenizer, Window(), train=train).trees, tokenizer


def lora_model(base, quant: str = "none", dtype: str = "fp32", device: torch.device = CPU):
    """A model whose adapter already does something: B is not zero."""
    model = add_lora(load_base(Base(str(base), quant=quant, dtype=dtype), device), Lora(rank=4), seed=0)
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
        batch = pack(members).to(model.device)
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
    trees, _ = trees_of(folder, paragraphs)
    trees = [Tree(tree.prefix_ids, tree.branches[:2]) for tree in trees]
    model = lora_model(folder)
    loss_packed, packed = packed_loss(model, [trees]), gradient(model)
    loss_rows, rows = rows_loss(model, trees), gradient(model)
    assert rows.norm() > 0
    assert (packed - rows).norm() / rows.norm() <= 1e-5
    assert abs(loss_packed - loss_rows) / loss_rows <= 1e-5


def test_a_branch_does_not_change_when_another_branch_or_tree_does(tiny_base):
    trees, _ = trees_of(tiny_base, 2)
    model = lora_model(tiny_base).eval()
    batch = pack(trees)
    mine = batch.layout.branch == 2  # of the first tree
    before = pack_logits(model, batch, mine.nonzero()[:, 0])
    others = (batch.layout.branch > 0) & ~mine | (batch.layout.tree > 0)
    batch.input_ids[others] = (batch.input_ids[others] + 7) % 400 + 3
    assert torch.equal(before, pack_logits(model, batch, mine.nonzero()[:, 0]))
    batch.input_ids[0] += 1  # while the prefix does reach it
    assert not torch.equal(before, pack_logits(model, batch, mine.nonzero()[:, 0]))


def test_micro_batches_give_the_gradient_of_one_batch(tiny_base):
    trees, _ = trees_of(tiny_base, 6)
    model = lora_model(tiny_base)
    packed_loss(model, [trees])
    one = gradient(model)
    packs = plan.fill(trees, pack_tokens=700)
    assert len(packs) > 2
    packed_loss(model, packs)
    many = gradient(model)
    assert (one - many).norm() / one.norm() <= 1e-5


def test_split_trees_give_the_gradient_of_whole_ones(tiny_base):
    trees, _ = trees_of(tiny_base, 2)
    model = lora_model(tiny_base)
    packed_loss(model, [trees])
    whole = gradient(model)
    packed_loss(model, [plan.bounded(trees, max_questions=2)])
    split = gradient(model)
    assert (whole - split).norm() / whole.norm() <= 1e-5


def test_attending_tree_by_tree_equals_attending_under_the_whole_mask(tiny_base, monkeypatch):
    trees, _ = trees_of(tiny_base, 3)
    model = lora_model(tiny_base).eval()
    batch = pack(trees)
    by_trees = pack_logits(model, batch, batch.prompt_ends)
    monkeypatch.setattr("common.packing.by_tree", lambda query, key: None)  # what a GPU does
    torch.testing.assert_close(by_trees, pack_logits(model, batch, batch.prompt_ends), rtol=1e-5, atol=1e-5)


def test_visibility_is_the_prefix_and_the_own_branch_up_to_oneself():
    tree_1 = Tree([10, 11], (Branch("a", [1, 2], [3, 9]), Branch("b", [4], [5, 9])))
    tree_2 = Tree([12], (Branch("c", [6], [7, 9]),))
    batch = pack([tree_1, tree_2])
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


def test_loss_is_on_the_answer_and_eos_and_nothing_else(tiny_base):
    trees, tokenizer = trees_of(tiny_base, 3)
    batch = pack(trees)
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
    batch = pack(trees_of(tiny_base, 1)[0])
    one = batch.layout[batch.prompt_ends]
    out = logits(model, batch.input_ids[batch.prompt_ends], one, one)  # each sees only itself here
    assert out.shape == (len(batch.ids), model.config.vocab_size)
    assert out.isfinite().all()
