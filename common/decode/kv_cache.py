"""KV-cache blocks. A slot holds one token's keys and values of all layers; a block is one sequence's run of slots.

A block has the length that its sequence may reach, so attention needs its start alone and no table of pages.
"""

import bisect
from typing import NamedTuple


class Block(NamedTuple):
    start: int  # the first slot
    length: int  # slots


class BlockAllocator:
    """First-fit allocation of the `cache_tokens` slots of a KV cache."""

    def __init__(self, cache_tokens: int):
        self.gaps = [Block(0, cache_tokens)]  # ascending, never adjacent

    def allocate(self, *lengths: int) -> list[Block] | None:
        """A block of each length; None, and nothing is allocated, if one of them does not fit."""
        gaps, blocks = self.gaps.copy(), []
        for length in lengths:
            if (i := next((i for i, gap in enumerate(gaps) if gap.length >= length), None)) is None:
                return None
            start, size = gaps[i]
            gaps[i : i + 1] = [Block(start + length, size - length)] if size > length else []
            blocks.append(Block(start, length))
        self.gaps = gaps
        return blocks

    def free(self, block: Block) -> None:
        """Turns the block into a gap, one with the gaps that it touches."""
        i, (start, length) = bisect.bisect(self.gaps, block), block
        if i < len(self.gaps) and self.gaps[i].start == start + length:
            length += self.gaps.pop(i).length
        if i and sum(self.gaps[i - 1]) == start:
            i, before = i - 1, self.gaps.pop(i - 1)
            start, length = before.start, before.length + length
        self.gaps.insert(i, Block(start, length))
