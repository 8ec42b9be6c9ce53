"""LoRA's dropout from a counter-based generator: the same key gives the same mask again, so no mask is stored.

A pack has a key of (seed, step, rank, number of the pack). From it follows a key for each layer and each group of
linears (`llama.GROUPS`), and from that the mask of the group's input [T, K]. So q, k and v share a mask, and gate and
up do, where PEFT's modules have one for each linear. Backward passes and CUDA graphs compute masks from keys as forward
passes do. Counter-based generators: https://doi.org/10.1145/2063384.2063405
"""

import hashlib

from common.model.compiled import compiled
from common.model.llama import GROUPS

import torch
from torch import Tensor

WORDS = 4  # of a group's key, of which two are used: `torch.compile` copies what is not aligned to 16 bytes


def pack_key(seed: int, step: int, rank: int, number: int) -> Tensor:
    """Key [2] int32 of a rank's pack `number` in a step, on the host."""
    digest = hashlib.sha256(f"{seed} {step} {rank} {number}".encode()).digest()
    return torch.frombuffer(bytearray(digest[:8]), dtype=torch.int32)


@compiled
def group_keys(key: Tensor, layers: int) -> Tensor:
    """Keys [layers, groups, WORDS] int32 of a pack's masks, given the pack's `key` [2]."""
    n = layers * len(GROUPS) * WORDS
    return _random(torch.arange(n, dtype=torch.int32, device=key.device), key).view(layers, len(GROUPS), WORDS)


def drop(x: Tensor, key: Tensor, rate: float) -> Tensor:
    """x [T, K] with a share `rate` of its numbers zero and the others divided by 1 - rate; `key` [WORDS] of a group.

    An element's mask depends on the key, its row and its column alone. All elements have different counters, up to 2^31
    of them.
    """
    # outside of compiled code, where torch 2.13 takes the threshold of an earlier call with another rate
    return _drop(x, key, min(round(rate * 2**32), 2**32 - 1) - 2**31, 1 / (1 - rate))


@compiled
def _drop(x: Tensor, key: Tensor, least: int, scale: float) -> Tensor:
    """x [T, K] times `scale` where an element's random bits are `least` or more, else 0."""
    rows, columns = (torch.arange(n, dtype=torch.int32, device=x.device) for n in x.shape)
    kept = _random(rows[:, None] * x.shape[1] + columns, key) >= least
    return torch.where(kept, x * scale, 0)


def _random(counter: Tensor, key: Tensor) -> Tensor:
    """32 random bits, as int32, for each `counter` int32: different ones have different bits, under any key.

    The key comes first, so that `torch.compile` takes no product of counters for an index, which would not wrap.
    """
    return _mixed(_mixed(counter ^ key[0]) ^ key[1])


def _mixed(x: Tensor) -> Tensor:
    """lowbias32 of x (https://nullprogram.com/blog/2018/07/31/). int32 products wrap; masks make shifts logical."""
    x = (x ^ x >> 16 & 0xFFFF) * 0x7FEB352D
    x = (x ^ x >> 15 & 0x1FFFF) * (0x846CA68B - 2**32)
    return x ^ x >> 16 & 0xFFFF
