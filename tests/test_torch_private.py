"""A torch whose private functions are gone or changed is named in one line, before anything is computed with it."""

from types import SimpleNamespace

from common import torch_private
from common.errors import UserError

import pytest
import torch

TWO = torch.zeros(2, 2)
ONE = torch_private.Sequences(TWO, TWO, 2, 2, True)
CALLS = {
    "ops.aten._flash_attention_forward": lambda: torch_private.flash_attention(TWO, TWO, TWO, ONE),
    "ops.aten._flash_attention_backward": lambda: torch_private.flash_attention_backward(*[TWO] * 6, ONE),
    "ops.aten._efficient_attention_forward": lambda: torch_private.efficient_attention(TWO, TWO, TWO, ONE),
    "ops.aten._efficient_attention_backward": lambda: torch_private.efficient_attention_backward(*[TWO] * 6, ONE),
    "_dynamo.maybe_mark_dynamic": lambda: torch_private.mark_dynamic(TWO),
    "distributed.distributed_c10d._get_default_store": torch_private.default_store,
}


@pytest.fixture(autouse=True)
def unchecked():
    torch_private._checked.cache_clear()
    yield
    torch_private._checked.cache_clear()


def operator(*arguments: tuple[str, bool]) -> SimpleNamespace:
    """An operator of these arguments, each with a default or without."""
    given = [SimpleNamespace(name=name, has_default_value=lambda has=has: has) for name, has in arguments]
    return SimpleNamespace(default=SimpleNamespace(_schema=SimpleNamespace(arguments=given)))


def put(monkeypatch, path: str, function: object) -> None:
    """Another function at torch's `path`; None: no function at all."""
    *owners, name = path.split(".")
    owner = torch
    for part in owners[:-1]:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, owners[-1], SimpleNamespace(**{name: function} if function else {}))


@pytest.mark.parametrize("path", CALLS)
def test_the_installed_torch_passes_every_check(path):
    """A CPU has no flash attention, and a single process no store: torch itself refuses, after the check."""
    if "mark" in path:
        CALLS[path]()
    else:
        with pytest.raises((NotImplementedError, ValueError), match=r"CPU|process group") as refusal:
            CALLS[path]()
        assert not isinstance(refusal.value, UserError)
    assert torch_private._checked.cache_info().currsize == 1


@pytest.mark.parametrize("path", CALLS)
def test_a_call_that_is_gone_is_named_with_torchs_version(monkeypatch, path):
    put(monkeypatch, path, None)
    with pytest.raises(
        UserError, match=rf"^torch {torch.__version__}: torch\.{path} is gone; install".replace("+", r"\+")
    ):
        CALLS[path]()


@pytest.mark.parametrize("path", CALLS)
def test_a_call_whose_signature_has_changed_is_named_with_torchs_version(monkeypatch, path):
    changed = operator(("query", False)) if "ops" in path else lambda tensor, dimension: None
    put(monkeypatch, path, changed)
    with pytest.raises(
        UserError, match=rf"^torch {torch.__version__}: .* takes other arguments: (query|tensor)".replace("+", r"\+")
    ):
        CALLS[path]()


@pytest.mark.parametrize(
    ("arguments", "fits"),
    [
        ([("a", False), ("b", False), ("c", True)], True),
        ([("a", False), ("b", False), ("c", True), ("new", True)], True),
        ([("a", False), ("b", False), ("c", True), ("new", False)], False),
        ([("b", False), ("a", False), ("c", True)], False),
        ([("a", False), ("new", True), ("b", False), ("c", True)], False),
        ([("a", False), ("b", False)], False),
        ([("a", False), ("c", True)], False),
    ],
)
def test_new_parameters_may_come_if_they_have_a_default_and_ours_stay(monkeypatch, arguments, fits):
    monkeypatch.setattr(torch, "ops", SimpleNamespace(name=operator(*arguments)))
    if fits:
        assert torch_private._checked("ops.name", "a b", "c") is torch.ops.name.default
    else:
        with pytest.raises(UserError, match="takes other arguments: "):
            torch_private._checked("ops.name", "a b", "c")


def test_a_marked_dimension_is_compiled_once_for_all_its_lengths():
    graphs = []
    torch._dynamo.reset()

    @torch.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    def doubled(x):
        return 2 * x

    for length in (3, 5, 8):
        x = torch.ones(length, 2)
        torch_private.mark_dynamic(x)
        assert doubled(x).shape == (length, 2)
    assert len(graphs) == 1


def test_the_default_store_is_the_one_that_the_ranks_share(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert torch_private.default_store().add("items", 2) == 2
        assert torch_private.default_store().add("items", 1) == 3
    finally:
        torch.distributed.destroy_process_group()
