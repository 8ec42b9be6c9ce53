"""How a weight of 4 bits lies in memory (NF4 or FP4, as bitsandbytes packs it)."""

from dataclasses import dataclass

from torch import Tensor

FEW = 16  # tokens: up to as many, products read the 4-bit numbers themselves
NESTED = 256  # absmaxes in a row that share one of their own, where they are quantised


@dataclass(frozen=True)
class NF4Weight:
    """Numbers of 4 bits, as bitsandbytes packs them: two in a byte, and an absmax for each `blocksize` in a row."""

    numbers: Tensor  # uint8
    levels: Tensor  # [16] fp32
    kind: str  # nf4 or fp4
    blocksize: int
    absmax: Tensor  # a block each: fp32, or uint8 where they are quantised themselves
    absmax2: Tensor | None = None  # then one for each NESTED of these: fp32, as the two that follow
    levels2: Tensor | None = None  # [256]
    offset: Tensor | None = None  # what was taken from the 256 before
