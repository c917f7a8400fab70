"""The sketch on the CPU as one compiled loop, where Numba is installed.

The accumulator of `sketch.py` and all signs are together more than a core's second cache holds beside what
it reads. Here tile after tile of it stays there while everything that belongs to it is added. Every sum has
the order that it has in `sketch.py`, so a sketch has the same bits in either way, and on any number of
threads.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from gapaware.blocks import CHUNK, DEPTH, WIDTH, Stretch
from gapaware.hashing import buckets, sign_table
from gapaware.openmp import on_threads
from gapaware.worklist import Piece, parts

Integers = npt.NDArray[np.int64]

# rows of a tile, the accumulator being a matrix of 251 columns. A large tile reads long stretches,
# which are fetched ahead: of 88 rows as fast as `sum` reads, where 16 take a third longer. Small ones are
# for many threads, each of which waits in the end for one tile of another
LEAST_ROWS, MOST_ROWS = 16, 88
TILES_PER_THREAD = 3
DTYPES = (torch.float32, torch.bfloat16)
# numbers that are worth a thread of their own
LARGE = 2**16

_ADD_UP = types.void(types.voidptr)


@dataclass(frozen=True)
class Plan:
    """What a row adds up.

    Attributes:
        items: (n, 2), as `worklist.Work` has them, in the row's order.
        flushed: (n,), whether the float32 sums are added to the float64 ones before this part.
        block: (n,), number of the part's block.
        blocks: how many there are.
        low_precision: whether the numbers are bfloat16.
        size: how many numbers.
        reach: place after the last one in the accumulator.
    """

    items: Integers
    flushed: npt.NDArray[np.bool_]
    block: Integers
    blocks: int
    low_precision: bool
    size: int
    reach: int

    @cached_property
    def tables(self) -> tuple[int, ...]:
        """Addresses of the arrays."""
        return tuple(table.ctypes.data for table in (self.items, self.flushed, self.block))


def plan(
    pieces: Iterable[tuple[Tensor, int]],
    stretches: Sequence[Stretch],
    resident: Collection[int],
    chunks_per_flush: int,
    seed: int,
) -> Plan | None:
    """The plan of a row; None where it has to be sketched in another way.

    Args:
        pieces: pairs (flat tensor, place of its first element in the row), in order.
        stretches: of the row.
        resident: addresses of the storages that outlive the snapshot: others are gone when the loop runs.
        chunks_per_flush: in one float32 sum.
        seed: of the sketch.
    """
    found: list[Piece] = []
    dtype: torch.dtype | None = None
    for flat, place in pieces:
        if not flat.numel():
            continue
        dtype = dtype or flat.dtype
        readable = flat.dtype == dtype in DTYPES and flat.is_contiguous()
        if not readable or flat.untyped_storage().data_ptr() not in resident:
            return None
        found.append(Piece(0, flat.data_ptr(), flat.numel(), place))
    if dtype is None:
        return None
    cut = parts(dtype.itemsize, found, seed)
    ends, numbers = np.array(stretches, np.int64).T
    begin = cut.chunk * CHUNK + cut.low
    nth_chunk = np.cumsum(np.diff(cut.chunk, prepend=cut.chunk[0]) != 0)
    flushed = np.diff(nth_chunk // chunks_per_flush, prepend=0) != 0
    return Plan(
        items=np.stack((cut.address, cut.packed), axis=1),
        flushed=flushed,
        block=numbers[np.searchsorted(ends, begin, side="right")],
        blocks=1 + int(numbers.max()),
        low_precision=dtype == torch.bfloat16,
        size=int((cut.high - cut.low).sum()),
        reach=int(cut.high.max()),
    )


class Loop:
    """Adds up rows.

    Args:
        dim: number of buckets.
        seed: of the sketch.

    Example:
        >>> x = torch.ones(CHUNK + 1)
        >>> row = plan([(x, 0)], [(len(x), 0)], {x.untyped_storage().data_ptr()}, 64, seed=0)
        >>> sketch, shares = Loop(dim=64, seed=0)(row)
        >>> sketch.shape, shares.shape
        (torch.Size([64]), torch.Size([251]))
    """

    def __init__(self, dim: int, seed: int) -> None:
        self._dim = dim
        # the bit that stands for it in a byte: a fourth of what floats would take from the caches
        self._minus = (sign_table(seed) < 0).astype(np.uint8) << 7
        self._bucket = buckets(dim, seed).astype(np.uint32)
        self._sums = np.empty((DEPTH + MOST_ROWS) * WIDTH)
        self._tables = [table.ctypes.data for table in (self._minus, self._bucket, self._sums)]
        self._entry = _add_up.ctypes

    def __call__(self, row: Plan) -> tuple[Tensor, Tensor]:
        """The sketch of a row, float64, (dim,), and the short ones of its blocks, (blocks·WIDTH,)."""
        threads = min(1 + row.size // LARGE, torch.get_num_threads())
        rows = min(max(-(-DEPTH // (threads * TILES_PER_THREAD)), LEAST_ROWS), MOST_ROWS)
        tiles = -(-row.reach // (rows * WIDTH))
        sketch = torch.zeros(self._dim, dtype=torch.float64, device="cpu")
        shares = torch.zeros(row.blocks * WIDTH, dtype=torch.float64, device="cpu")
        by_tile = torch.empty(tiles * row.blocks * WIDTH, dtype=torch.float64, device="cpu")
        results = [found.data_ptr() for found in (sketch, shares, by_tile)]
        numbers = [0, 0, tiles, rows * WIDTH, row.reach, row.blocks, row.low_precision]
        argument = np.array([*numbers, len(row.items), *row.tables, *self._tables, *results])
        on_threads(
            self._entry,
            argument.ctypes.data,
            threads=min(threads, tiles),
            kept=(argument, self, row, sketch, shares, by_tile),
        )
        return sketch, shares


def _with(compiler: Callable[..., Any], **options: Any) -> Callable[[Any], Any]:
    """Compile, and keep what comes out where that can be written."""

    def compiled(function: Any) -> Any:
        try:
            return compiler(cache=True, **options)(function)
        except (RuntimeError, OSError):  # no place for it
            return compiler(**options)(function)

    return compiled


@intrinsic  # type: ignore[untyped-decorator]
def _at(context: Any, address: Any) -> Any:
    """An integer as an address."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _next(context: Any, address: Any) -> Any:
    """Add one to what is at an address, and return what was there before: no two threads get the same."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = ir.Constant(ir.IntType(64), 1)
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        # what the others wrote before they added theirs can be read after it
        return builder.atomic_rmw("add", pointer, one, "acq_rel")

    return types.int64(types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _signed(context: Any, word: Any, minus: Any, flip: Any) -> Any:
    """Bits of float32 or bfloat16 as float32, turned round if the highest bits of the others differ."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(32)
        bits, minus, flip = arguments
        if signature.args[0] == types.uint16:  # the upper half of a float32
            bits = builder.shl(builder.zext(bits, wide), ir.Constant(wide, 16))
        bit = builder.shl(builder.zext(builder.xor(minus, flip), wide), ir.Constant(wide, 24))
        return builder.bitcast(builder.xor(bits, bit), ir.FloatType())

    return types.float32(word, types.uint8, types.uint8), build


# Compiled: coverage does not see it.


@_with(numba.njit)
def _leave(low, before, share):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Give a block the change of the folded sums since `before`, which is what they are now then."""
    for column in range(WIDTH):
        share[column] -= before[column]
        before[column] = 0
    for row in range(len(low) // WIDTH):
        for column in range(WIDTH):
            before[column] += low[row * WIDTH + column]
    for column in range(WIDTH):
        share[column] += before[column]


@_with(numba.njit)
def _add_part(low, words, minus, flip):  # type: ignore[no-untyped-def]  # pragma: no cover
    for i in range(len(words)):
        low[i] += _signed(words[i], minus[i], flip)


@_with(numba.njit)
def _fold(sums, bucket, sketch):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Add sums to their buckets."""
    for place in range(len(sums)):
        sketch[bucket[place]] += sums[place]


@_with(numba.cfunc, sig=_ADD_UP)
def _add_up(argument):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Add all parts to the sums of tile after tile, until there is none left; who ends last, folds."""
    numbers = numba.carray(argument, 17, np.int64)
    tiles, size, reach, blocks, low_precision, parts = numbers[2:8]
    items = numba.carray(_at(numbers[8]), (parts, 2), np.int64)
    flushed = numba.carray(_at(numbers[9]), parts, np.bool_)
    block = numba.carray(_at(numbers[10]), parts, np.int64)
    minus = numba.carray(_at(numbers[11]), 2 * CHUNK, np.uint8)
    bucket = numba.carray(_at(numbers[12]), CHUNK, np.uint32)
    sums = numba.carray(_at(numbers[13]), tiles * size, np.float64)
    sketch = numba.carray(_at(numbers[14]), CHUNK, np.float64)
    shares = numba.carray(_at(numbers[15]), blocks * WIDTH, np.float64)
    by_tile = numba.carray(_at(numbers[16]), (tiles, blocks * WIDTH), np.float64)
    low = np.empty(size, np.float32)
    before = np.empty(WIDTH)
    while True:
        tile = _next(numbers.ctypes.data)
        if tile >= tiles:
            break
        base = tile * size
        high = sums[base : base + size]
        share = by_tile[tile].reshape(blocks, WIDTH)
        high[:] = 0
        share[:] = 0
        low[:] = 0
        before[:] = 0
        entered = -1  # the block that something was added for since `before`
        for n in range(parts):
            if flushed[n]:
                if entered >= 0:
                    _leave(low, before, share[entered])
                    entered = -1
                for i in range(size):
                    high[i] += low[i]
                low[:] = 0
                before[:] = 0
            address, packed = items[n]
            begin = max(packed & 0x1FFFF, base)
            end = min(packed >> 17 & 0x1FFFF, base + size)
            if begin >= end:
                continue
            if entered != block[n]:
                if entered >= 0:
                    _leave(low, before, share[entered])
                entered = block[n]
            into = low[begin - base : end - base]
            sign = minus[(packed >> 34 & 0x1FFFF) + begin :]
            flip = np.uint8((packed >> 51) << 7)
            if low_precision:
                halves = numba.carray(_at(address + 2 * begin), end - begin, np.uint16)
                _add_part(into, halves, sign, flip)
            else:
                words = numba.carray(_at(address + 4 * begin), end - begin, np.uint32)
                _add_part(into, words, sign, flip)
        if entered >= 0:
            _leave(low, before, share[entered])
        for i in range(size):
            high[i] += low[i]
        if _next(numbers.ctypes.data + 8) == tiles - 1:
            _fold(sums[:reach], bucket, sketch)
            for one in by_tile:
                for i in range(len(one)):
                    shares[i] += one[i]
