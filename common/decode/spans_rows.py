"""What `common.decode.spans_kernels` computes on a GPU, row by row: for CPUs."""

import torch
from torch import Tensor


def best(logits: Tensor, edges: Tensor, start: Tensor, count: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As of `spans_kernels.best`, but for the least token of a row without an edge: any that is none."""
    found = []
    for row, (a, n) in enumerate(zip(start.tolist(), count.tolist(), strict=True)):
        source, token, _ = edges[:, a : a + n]
        token = token[state[row][source]]
        scores = logits[row][token]
        score = scores.amax() if len(scores) else logits.new_tensor(-torch.inf)
        token = token[scores == score]
        found.append(
            (score, *((token.amin(), token.amax()) if len(token) else token.new_tensor([logits.shape[1], -1])))
        )
    score, least, greatest = (torch.stack(x) for x in zip(*found, strict=True))
    return score, least, greatest


def advance(edges: Tensor, start: Tensor, count: Tensor, state: Tensor, token: Tensor) -> Tensor:
    """As of `spans_kernels.advance`."""
    after = torch.zeros_like(state)
    for row, (a, n) in enumerate(zip(start.tolist(), count.tolist(), strict=True)):
        source, tokens, target = edges[:, a : a + n]
        after[row][target[state[row][source] & (tokens == token[row])]] = True
    return after
