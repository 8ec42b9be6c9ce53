"""The layout of a 4-bit weight (NF4 or FP4) in memory, as bitsandbytes packs it. QLoRA: https://arxiv.org/abs/2305.14314"""

from typing import NamedTuple

from torch import Tensor

MATMUL_TOKENS = 16  # products of up to as many tokens read the 4-bit weights: one tile of a tensor core has 16 rows
ABSMAX_BLOCK = 256  # quantised absmaxes that share a scale and an offset (double quantisation)


class NF4Weight(NamedTuple):
    """Weights in row-major order, w = code[4-bit number] * absmax[block], with B blocks of `blocksize` weights.

    Under double quantisation the absmax of block b is code2[absmax[b]] * absmax2[b // 256] + offset[b // 256].
    """

    packed: Tensor  # uint8: two numbers per byte, high nibble first
    code: Tensor  # [16] fp32
    quant_type: str  # nf4 or fp4
    blocksize: int
    absmax: Tensor  # [B] fp32; uint8 under double quantisation
    absmax2: Tensor | None = None  # [B / 256] fp32
    code2: Tensor | None = None  # [256] fp32
    offset: Tensor | None = None  # [B / 256] fp32
