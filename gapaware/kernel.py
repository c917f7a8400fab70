"""The sketch on CUDA: one Triton kernel that reads all tensors, and one that folds the sums.

What they sketch are blocks: their long sketches add up to those of the rows, their short ones are folded
from the same sums.

Each program owns `BLOCK` places of the accumulator and walks through the parts of chunks that its work
list names (`worklist.py`), each thread with loads of `LANES` elements. Nothing is added atomically: every
sum has one owner and one order, so a snapshot has the same bits on every run. The host only launches; it
makes a work list when a tensor has moved, and copies it from pinned memory.

Rounding: as on the CPU, float32 for `CHUNKS_PER_FLUSH` parts at a time and float64 beyond; then the sum of
a layer is rounded to float32 once, and layers and places are added in float64. A bucket's error stays
below about 1e-6 of the largest bucket, and so does the difference from the CPU's, which adds in another
order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gapaware.blocks import CHUNK, WIDTH, Stretch
from gapaware.hashing import buckets, sign_table
from gapaware.sketch import CHUNKS_PER_FLUSH, _gather_order
from gapaware.transfer import send
from gapaware.worklist import BLOCK, LANES, Batch, Piece, batches

try:
    import triton  # type: ignore[import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    # the CPU build of torch comes without Triton, and doctest imports every file
    DTYPES: dict[torch.dtype, Any] = {}

    def _jit(function: Callable[..., None]) -> Any:
        return function

else:
    DTYPES = {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
    _jit = triton.jit

WARP = 32
# Loads that a thread has on their way at once, and registers enough for them that a multiprocessor of an
# H100 holds 8 programs: all 1028 of one large row run at once, with at least 32 KB on the way to each
# multiprocessor, where latency times bandwidth is 20 KB.
UNROLL = 4
REGISTERS = 64
# blocks that are in work at once, or as many as there are rows if that is more
MOST = 64
# values that a program folds at once, and buckets that it folds them into
TILE, WIDE = 4096, 64


class Fused:
    """Sketches of many rows in a number of launches that does not depend on the number of tensors.

    Args:
        dim: number of buckets.
        seed: of the sketch.
        device: a CUDA device; the CPU under Triton's interpreter.
    """

    def __init__(self, dim: int, seed: int, device: torch.device) -> None:
        self._dim, self._seed, self._device = dim, seed, device
        self._signs = send(torch.from_numpy(sign_bits(seed)), device)
        order = _gather_order(torch.from_numpy(buckets(dim, seed)), dim)
        self._order = send(order.to(torch.int32), device)
        order = _gather_order(torch.arange(CHUNK, device="cpu") % WIDTH, WIDTH)
        self._short_order = send(order.to(torch.int32), device)
        self._key: Hashable = None
        self._planned: tuple[list[int], dict[torch.dtype, list[Piece]]] | None = None
        self._work: list[_Launch] = []

    def __call__(
        self,
        rows: Sequence[Iterable[tuple[Tensor, int]]],
        resident: frozenset[int],
        key: Hashable,
        sketch: Callable[[Iterable[tuple[Tensor, int]], Sequence[Stretch]], tuple[Tensor, Tensor]],
        stretches: Sequence[Sequence[Stretch]],
    ) -> tuple[Tensor, Tensor]:
        """See `CountSketch.rows`.

        Args:
            rows: the pieces of each row.
            resident: addresses of the storages that outlive this call.
            key: of the pieces; None to look at them in any case.
            sketch: for pieces that the kernel does not take: temporary copies, which would all have to be
                kept until it has run, and other dtypes.
            stretches: of each row.

        Returns:
            float64, (rows, dim), and of all blocks (blocks·WIDTH,).
        """
        counts = [1 + max(number for _, number in ends) for ends in stretches]
        blocks = [0, *accumulate(counts)]  # the first of each row
        others: list[tuple[int, Tensor, Tensor]] = []
        if key is None or key != self._key:
            pieces: dict[torch.dtype, list[Piece]] = {dtype: [] for dtype in DTYPES}
            for row, given in enumerate(rows):
                left = _sort_out(blocks[row], stretches[row], given, resident, pieces)
                for first in left:
                    others.append((row, *sketch(chain((first,), left), stretches[row])))
            if (counts, pieces) != self._planned:
                self._plan(counts, pieces)
            self._key = None if others else key
        sketches = torch.zeros(len(rows), self._dim, dtype=torch.float64, device=self._device)
        shares = sketches.new_empty(blocks[-1], WIDTH)
        with torch.cuda.device_of(sketches):
            for work in self._work:
                self._launch(sketches, shares, work)
        for row, other, of_blocks in others:
            sketches[row] += other
            shares[blocks[row] : blocks[row + 1]] += of_blocks.view(-1, WIDTH)
        return sketches, shares.view(-1)

    def _plan(self, counts: list[int], pieces: dict[torch.dtype, list[Piece]]) -> None:
        kinds = [(dtype.itemsize, some) for dtype, some in pieces.items()]
        row_of = np.repeat(np.arange(len(counts)), counts)
        most = max(len(counts), MOST)
        self._planned, self._work = (counts, pieces), []
        for batch in batches(kinds, rows=len(row_of), most=most, dim=self._dim, seed=self._seed):
            rows = row_of[batch.first_row : batch.first_row + len(batch.rows)]
            tables = [
                tuple(self._table(t) for t in (one.items, one.segments, one.programs))
                for one in batch.work
            ]
            lengths = self._table(np.bincount(rows - rows[0]))
            self._work.append(
                _Launch(batch, tables, self._table(batch.rows), int(rows[0]), lengths)
            )

    def _table(self, values: np.ndarray) -> Tensor:
        return send(torch.from_numpy(values), self._device)

    def _launch(self, sketches: Tensor, shares: Tensor, work: _Launch) -> None:
        batch = work.batch
        partials = torch.empty(batch.partials, dtype=torch.float32, device=self._device)
        for (dtype, element), (items, segments, programs) in zip(
            DTYPES.items(), work.tables, strict=True
        ):
            if len(programs):
                _add_up[(len(programs),)](
                    items,
                    segments,
                    programs,
                    self._signs,
                    partials,
                    ELEMENT=element,
                    SIZE=dtype.itemsize,
                    CHUNK=CHUNK,
                    BLOCK=BLOCK,
                    LANES=LANES,
                    UNROLL=UNROLL,
                    FLUSH=CHUNKS_PER_FLUSH,
                    num_warps=BLOCK // LANES // WARP,
                    maxnreg=REGISTERS,
                )
        blocks = sketches.new_empty(len(batch.rows), self._dim)
        self._fold_into(partials, work.blocks, self._order, blocks)
        self._fold_into(partials, work.blocks, self._short_order, shares[batch.first_row :])
        rows = sketches.narrow(0, work.first_row, len(work.lengths))
        rows += torch.segment_reduce(blocks, "sum", lengths=work.lengths, axis=0)

    def _fold_into(self, partials: Tensor, blocks: Tensor, order: Tensor, into: Tensor) -> None:
        dim = into.shape[1]
        places = -(-CHUNK // dim)
        deep = min(triton.next_power_of_2(places), 256)
        wide = min(TILE // deep, WIDE)
        _fold[(len(blocks), triton.cdiv(dim, wide))](
            partials, blocks, order, into, dim, places, DEEP=deep, WIDE=wide
        )


class _Launch(NamedTuple):
    """A batch on the device.

    Attributes:
        batch: what is in it.
        tables: items, segments and programs of each dtype.
        blocks: the rows of the batch, each of which is a block.
        first_row: to which the first of them belongs.
        lengths: how many of them belong to that row and to each after it.
    """

    batch: Batch
    tables: list[tuple[Tensor, ...]]
    blocks: Tensor
    first_row: int
    lengths: Tensor


def sign_bits(seed: int) -> np.ndarray:
    """The signs of `LANES` neighbours of the sign table at each place, as bits; 1 is minus.

    A thread that loads `LANES` elements at once needs one byte for them, wherever its window begins.

    Returns:
        uint8, shape (LANES + 2·CHUNK + BLOCK,). Entry i is about the places i − LANES and following:
        blocks begin up to LANES − 1 places before a window and end up to BLOCK after it.

    Example:
        >>> bits = sign_bits(0)[LANES + 7]
        >>> [bool(bits >> lane & 1) for lane in range(LANES)] == list(sign_table(0)[7 : 7 + LANES] < 0)
        True
    """
    size = LANES + 2 * CHUNK + BLOCK
    minus = np.zeros(size + LANES, np.uint8)
    minus[LANES : LANES + 2 * CHUNK] = sign_table(seed) < 0
    bits = [minus[lane : lane + size] << lane for lane in range(LANES)]
    return np.asarray(np.bitwise_or.reduce(bits))


def _sort_out(
    first_block: int,
    stretches: Sequence[Stretch],
    given: Iterable[tuple[Tensor, int]],
    resident: frozenset[int],
    pieces: dict[torch.dtype, list[Piece]],
) -> Iterator[tuple[Tensor, int]]:
    """Note the pieces that the kernel can read where they are, and hand on the others."""
    ends = [end for end, _ in stretches]
    for flat, place in given:
        if not flat.numel():
            continue
        readable = flat.dtype in pieces and flat.is_contiguous()
        if readable and flat.untyped_storage().data_ptr() in resident:
            block = first_block + stretches[bisect_right(ends, place)][1]
            pieces[flat.dtype].append(Piece(block, flat.data_ptr(), flat.numel(), place))
        else:
            yield flat, place


# Compiled, or run by the interpreter: coverage sees neither.


@_jit
def _add_up(  # type: ignore[no-untyped-def]  # pragma: no cover
    items,
    segments,
    programs,
    signs,
    partials,
    ELEMENT: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    FLUSH: tl.constexpr,
):
    """Sum the parts of a layer over one block of places; see `worklist.Work` for the tables."""
    program = programs + 4 * tl.program_id(0)
    segment = segments + 7 * tl.load(program)
    start = tl.load(program + 1).to(tl.int32)
    column = tl.arange(0, BLOCK // LANES)[:, None] * LANES
    lane = tl.arange(0, LANES)[None, :]
    exact = tl.zeros([BLOCK // LANES, LANES], tl.float64)

    first = tl.load(segment)
    whole = tl.load(segment + 1)
    last = first + whole + tl.load(segment + 2)
    # the first and the last block of a chunk stick out of it
    inner = (start >= 0) & (start + BLOCK <= CHUNK)
    masked = first + tl.where(inner, whole // UNROLL * UNROLL, 0)
    for flush in range(first, masked, FLUSH):
        total = tl.zeros([BLOCK // LANES, LANES], tl.float32)
        for item in range(flush, tl.minimum(flush + FLUSH, masked), UNROLL):
            for i in tl.static_range(UNROLL):
                address, _, _, offset, flip = _item(items, item + i)
                block = address.to(tl.pointer_type(ELEMENT)) + start + (column + lane)
                x = tl.load(tl.multiple_of(block, [SIZE, LANES * SIZE]))
                total += _signed(x, signs + LANES + offset + start + column, flip, lane)
        exact += total.to(tl.float64)
    exact = _masked(
        exact, items, masked, last, signs, start, column, lane, ELEMENT, LANES, UNROLL, FLUSH
    )
    first = tl.load(program + 2)
    last = first + tl.load(program + 3)
    exact = _masked(
        exact, items, first, last, signs, start, column, lane, ELEMENT, LANES, UNROLL, FLUSH
    )
    place = start + column + lane
    here = (place >= tl.load(segment + 6)) & (place < tl.load(segment + 5))
    tl.store(partials + tl.load(segment + 4) + place, exact.to(tl.float32), mask=here)


@_jit
def _masked(  # type: ignore[no-untyped-def]  # pragma: no cover
    exact,
    items,
    first,
    last,
    signs,
    start,
    column,
    lane,
    ELEMENT: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    FLUSH: tl.constexpr,
):
    """Add what of some parts lies in a block."""
    place = start + column + lane
    for flush in range(first, last, FLUSH):
        total = tl.zeros(exact.shape, tl.float32)
        end = tl.minimum(flush + FLUSH, last)
        for item in range(flush, end, UNROLL):
            for i in tl.static_range(UNROLL):
                address, low, high, offset, flip = _item(items, tl.minimum(item + i, end - 1))
                inside = (place >= low) & (place < tl.where(item + i < end, high, low))
                data = address.to(tl.pointer_type(ELEMENT))
                x = tl.load(data + place, mask=inside, other=0.0)
                total += _signed(x, signs + LANES + offset + start + column, flip, lane)
        exact += total.to(tl.float64)
    return exact


@_jit
def _item(items, number):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Address of place 0, first place, place after the last, sign offset and flip of a part."""
    packed = tl.load(items + 2 * number + 1)
    low = (packed & 0x1FFFF).to(tl.int32)
    high = ((packed >> 17) & 0x1FFFF).to(tl.int32)
    offset = ((packed >> 34) & 0x1FFFF).to(tl.int32)
    return tl.load(items + 2 * number), low, high, offset, (packed >> 51).to(tl.int32)


@_jit
def _signed(x, signs, flip, lane):  # type: ignore[no-untyped-def]  # pragma: no cover
    """±x as float32: bit `lane` of the byte at `signs`, turned round by `flip`, is its sign bit."""
    bit = ((tl.load(signs).to(tl.int32) ^ -flip) << (31 - lane)) & -2147483648
    return (x.to(tl.float32).to(tl.int32, bitcast=True) ^ bit).to(tl.float32, bitcast=True)


@_jit
def _fold(  # type: ignore[no-untyped-def]  # pragma: no cover
    partials, rows, order, sketches, dim, places, DEEP: tl.constexpr, WIDE: tl.constexpr
):
    """Add up the layers and the places of each bucket of one row."""
    row = tl.program_id(0)
    begin = tl.load(rows + 4 * row)
    layers = tl.load(rows + 4 * row + 1)
    reach = tl.load(rows + 4 * row + 2)
    least = tl.load(rows + 4 * row + 3)
    bucket = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros([DEEP, WIDE], tl.float64)
    for first in range(0, places, DEEP):
        nth = first + tl.arange(0, DEEP)[:, None]
        known = (nth < places) & (bucket[None, :] < dim)
        place = tl.load(order + nth * dim + bucket[None, :], mask=known, other=reach)
        for layer in range(layers):
            at = partials + begin + layer * (reach - least) + place
            here = (place >= least) & (place < reach)
            total += tl.load(at, mask=here, other=0.0).to(tl.float64)
    tl.store(sketches + row.to(tl.int64) * dim + bucket, tl.sum(total, axis=0), mask=bucket < dim)
