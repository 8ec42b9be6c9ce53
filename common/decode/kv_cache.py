"""Which parts of the KV cache are free: first fit."""


class BlockAllocator:
    """Stretches of `size` tokens, given out and taken back: first fit."""

    def __init__(self, size: int):
        self.free = [(0, size)]  # start, length; rising, never touching

    def take(self, length: int) -> int | None:
        """Where a stretch begins; None where no gap is that long."""
        for i, (start, gap) in enumerate(self.free):
            if gap >= length:
                self.free[i : i + 1] = [(start + length, gap - length)] if gap > length else []
                return start
        return None

    def give_back(self, start: int, length: int) -> None:
        merged: list[tuple[int, int]] = []
        for a, n in sorted([*self.free, (start, length)]):
            if merged and sum(merged[-1]) == a:
                merged[-1] = merged[-1][0], merged[-1][1] + n
            else:
                merged.append((a, n))
        self.free = merged
