"""Triton's kernels find and follow the same edges as plain PyTorch; in Triton's interpreter, which needs no GPU."""

import os

from common.decode import spans_rows
from common.decode.spans import Quotes, automaton_of
from tests.decode.test_spans import EOS, vocabulary_of

import pytest
import torch

pytestmark = pytest.mark.triton


def test_the_kernels_find_and_follow_the_edges_that_rows_have():
    """Of rows with few edges, with more than a step of them, with equal logits, and with no edge that is open."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "run these by `make test-kernels`"
    from common.decode import spans_kernels

    tokens = vocabulary_of()
    automata = [automaton_of(tokens, context) for context in ("a", "ab é ba", "aab .1 京 " * 90, "a" * 700)]
    assert automata[2].edges.shape[1] > 2 * spans_kernels.BLOCK.value
    quotes, draw = Quotes([*automata, *automata, automata[2]], torch.tensor([EOS])), torch.Generator().manual_seed(0)
    quotes.state[4:8] &= torch.rand(quotes.state[4:8].shape, generator=draw) < 0.5
    quotes.state[8] = False
    mine = quotes.edges, quotes.edge_start, quotes.edge_count
    for kinds in (4, 10**6):  # of logits
        state = quotes.state
        for _ in range(3):
            logits = torch.randint(kinds, (9, len(tokens.bytes)), generator=draw).float()
            score, least, greatest = spans_rows.best(logits, *mine, state)
            found = spans_kernels.best(logits, *mine, state)
            some = greatest >= 0
            assert torch.equal(found[0], score)
            assert torch.equal(found[1][some], least[some].int())
            assert torch.equal(found[2], greatest.int())
            assert found[1][8] == spans_kernels.NONE.value
            chosen = torch.where(some, least, EOS)
            following = spans_rows.advance(*mine, state, chosen)
            assert torch.equal(spans_kernels.advance(*mine, state, chosen), following)
            assert following.any()
            state = following
