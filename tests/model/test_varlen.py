"""Which fused attention a GPU has. What it computes is in test_attention.py; the kernels themselves, in test_gpu.py."""

from common.device import has_flash_attention, has_nf4_kernels
from common.model import varlen

import pytest
import torch

CASES = [
    ("cpu", torch.bfloat16, (9, 0), None),
    ("cpu", torch.float16, (9, 0), None),
    ("cuda", torch.float32, (9, 0), None),
    ("cuda", torch.float32, (7, 5), None),
    ("cuda", torch.bfloat16, (7, 5), None),
    ("cuda", torch.float16, (6, 0), "efficient"),
    ("cuda", torch.float16, (7, 5), "efficient"),
    ("cuda", torch.float16, (8, 0), "flash"),
    ("cuda", torch.bfloat16, (8, 6), "flash"),
]


@pytest.mark.parametrize(("device", "dtype", "capability", "expected"), CASES)
def test_kernels_are_flash_attention_from_ampere_on_and_in_fp16_also_on_older_gpus(
    monkeypatch, device, dtype, capability, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = varlen.kernels(torch.device(device), dtype)
    assert (
        found
        == {
            None: None,
            "flash": (varlen.flash_attention, varlen.flash_attention_backward),
            "efficient": (varlen._forward, varlen._backward),
        }[expected]
    )
    assert has_flash_attention(torch.device(device), dtype) == (expected == "flash")
    assert has_nf4_kernels(torch.device(device), dtype) == (expected == "flash")


def test_rows_are_in_the_sequence_that_starts_last_before_them():
    """Empty sequences have no rows; rows beyond the last belong to any."""
    sequence, place = varlen._places(torch.tensor([0, 2, 2, 5], dtype=torch.int32), 7)
    assert sequence[:5].tolist() == [0, 0, 2, 2, 2]
    assert place[:5].tolist() == [0, 1, 0, 1, 2]
    assert 0 <= sequence.min() <= sequence.max() <= 2


def test_query_heads_are_taken_apart_so_that_each_part_has_the_key_heads():
    q, k = torch.arange(6)[None, :, None].expand(3, 6, 4), torch.empty(9, 2, 4)
    parts = varlen._by_key_head(q, k)
    assert [part[0, :, 0].tolist() for part in parts] == [[0, 3], [1, 4], [2, 5]], "heads 0 to 2 share a key head"
    assert torch.equal(varlen._joined(parts), q)
    assert varlen._joined([q]) is q


@pytest.mark.parametrize("n", [1, 31, 32, 33])
def test_the_log_sum_exp_of_a_sequence_is_found_by_token_and_put_back_beyond_it_zero(monkeypatch, n):
    """Whole multiples of 32 rows too; two query heads share a key head."""
    starts = torch.tensor([0, 3, 3 + n], dtype=torch.int32)
    sequences = varlen.Sequences(starts, starts, max(3, n), max(3, n), True)
    rows = -(-max(3, n) // 32) * 32
    number = torch.arange(2.0 * rows).view(2, 1, rows)  # of each sequence's rows
    monkeypatch.setattr(varlen, "efficient_attention", lambda q, k, v, s: (q, number))
    q, k = torch.zeros(3 + n, 2, 8), torch.zeros(3 + n, 1, 8)
    _, lse = varlen._forward(q, k, k, sequences)
    assert lse.tolist() == [[0, 1, 2, *range(rows, rows + n)]] * 2
    taken = []

    def backward(d_out, q, k, v, out, lse, sequences):
        taken.append(lse)
        return q, k, v

    monkeypatch.setattr(varlen, "efficient_attention_backward", backward)
    varlen._backward(q, q, k, k, q, lse, sequences)
    for found in taken:
        assert found[0, 0].tolist() == [0, 1, 2, *[0] * (rows - 3)]
        assert found[1, 0].tolist() == [*range(rows, rows + n), *[0] * (rows - n)]
    assert len(taken) == 2
