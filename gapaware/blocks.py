"""What each block adds to the sketch of its row, in a few numbers, for the risk of forgetting.

A row may be a whole parameter group, and to sketch its blocks one by one would be a second read. But what
the accumulator of the row's sketch (see `sketch.py`) holds after a block, less what it held before, is the
block with its signs, and the places of the accumulator modulo `WIDTH` are the buckets of a short sketch
of it, with a relative error of a squared norm of about √(2/WIDTH). A block of at most `WIDTH` neighbours
is kept as it is. `WIDTH` is a prime, and not one that people choose for a layer, so the columns of a
matrix do not fall on the same bucket again and again.

The accumulator itself is only looked at: the long sketch has the same bits with and without.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 131_071
WIDTH = 251
# the accumulator as a matrix with a column for each bucket
DEPTH = -(-CHUNK // WIDTH)

# where in the row a stretch of one block ends, and the number of the block among those of the row
Stretch = tuple[int, int]
ONE_BLOCK: tuple[Stretch, ...] = ((sys.maxsize, 0),)


class Tally:
    """Follows the accumulator through the blocks of one row.

    Rounding errors are those of float32 sums in which neighbours have a part: about 1e-6 of their elements'
    size. A block of zeros comes out as zeros.

    Args:
        low: accumulator of float32, at least DEPTH·WIDTH long and zero.
        high: accumulator of float64, for pieces of float64.
        stretches: of the row, in order, without gaps from its beginning.

    Example:
        >>> low, high = torch.zeros(DEPTH * WIDTH), torch.zeros(DEPTH * WIDTH, dtype=torch.float64)
        >>> tally = Tally(low, high, [(2, 0), (5, 1)])
        >>> for begin, end in ((0, 2), (2, 5)):
        ...     tally.enter(begin, wide=False)
        ...     low[begin:end] += 1.0
        >>> _ = tally.leave()
        >>> tally.shares().view(2, WIDTH).sum(1)
        tensor([2., 3.], dtype=torch.float64)
    """

    def __init__(self, low: Tensor, high: Tensor, stretches: Sequence[Stretch]) -> None:
        self._low, self._high = low, high
        self._stretches = stretches
        self.begins = frozenset([0, *(end for end, _ in stretches)])
        # of each block the accumulator after it and before it, None for zeros; several times if parted
        self._found: list[list[tuple[Tensor, Tensor | None]]]
        self._found = [[] for _ in range(max(n for _, n in stretches) + 1)]
        self._number = 0
        self._window = (0, 0)  # rows of the accumulator that the block can reach
        self._touched = 0  # from here on they are zero
        self._before: Tensor | None = None
        self.wide = False
        self.end = 0

    def enter(self, place: int, wide: bool) -> None:
        """What is added from now on begins at a place of the row, and is float64 if `wide`."""
        left = (self._window, self.wide)
        after = self.leave()
        while self._number + 1 < len(self._stretches) and self._stretches[self._number][0] <= place:
            self._number += 1
        begin = self._stretches[self._number - 1][0] if self._number else 0
        self.end, self.wide = self._stretches[self._number][0], wide
        (chunk, first), (last_chunk, last) = divmod(begin, CHUNK), divmod(self.end - 1, CHUNK)
        self._window = (0, DEPTH) if chunk != last_chunk else (first // WIDTH, last // WIDTH + 1)
        self._before = after if left == (self._window, wide) else self._fold()

    def leave(self) -> Tensor | None:
        """Note what was added since `enter`."""
        if not self.end:
            return None
        if not self.wide:
            self._touched = max(self._touched, self._window[1])
        after = self._fold()
        if after is not None:
            self._found[self._stretches[self._number][1]].append((after, self._before))
        return after

    def flushed(self) -> None:
        """After `leave`: the float32 accumulator was added to the other one and is zero."""
        self._touched = 0
        self._before = self._fold()

    def shares(self) -> Tensor:
        """The short sketches of the blocks, one after another: float64, (blocks·WIDTH,)."""
        zero = self._low.new_zeros(WIDTH)
        once = [found[0] if found else (zero, None) for found in self._found]
        afters = torch.cat([after for after, _ in once])
        befores = torch.cat([zero if before is None else before for _, before in once])
        shares = (afters - befores).double()
        for share, found in zip(shares.view(-1, WIDTH), self._found, strict=True):
            for after, before in found[1:]:
                share += after if before is None else after - before
        return shares

    def _fold(self) -> Tensor | None:
        """The block's part of the accumulator, folded; None where it is known to be zero."""
        first, last = self._window
        # as a whole or not at all: of rows in another number the sum has other bits
        if not self.wide and first >= self._touched:
            return None
        total = self._high if self.wide else self._low
        return total.as_strided((last - first, WIDTH), (WIDTH, 1), first * WIDTH).sum(0)
