"""Which program of the CUDA kernel adds up what: the work of one snapshot as integer tables.

A row's elements lie in chunks of `CHUNK`, and every chunk is added to the same `CHUNK` places (see
`sketch.py`). A *part* is what one piece has in one chunk. The parts of a row are dealt out to a few
*layers*, each with partial sums of its own for all places, so that enough programs have something to do; a
program owns `BLOCK` neighbouring places of one layer and adds up the parts there, always in the same order.

Part and layer are chosen so that loads are aligned. `CHUNK` is odd, so the first element of a tensor
meets another place modulo `LANES` in every chunk: parts that agree in it share a layer, whose blocks begin
that much to the left. All of it follows from sizes, places and addresses modulo 16. torch's allocator
aligns more than that, so a snapshot has the same bits wherever it puts the parameters.

The loop on the CPU (`compiled.py`) takes the parts of a row from here, too, and needs no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gapaware.blocks import CHUNK
from gapaware.hashing import chunk_flips, chunk_offsets

Integers = npt.NDArray[np.int64]

# elements in one load of a thread: 16 bytes of float32
LANES = 4
# places of one program, one load for each of its threads
BLOCK = 512
# a shorter part is listed only for the programs that it concerns: the others would take longer to skip it
LONG = 16 * BLOCK


class Piece(NamedTuple):
    """A contiguous stretch of a row in memory.

    Attributes:
        row: number of the row.
        address: of the first element, in bytes.
        length: number of elements.
        place: of the first element in the row.
    """

    row: int
    address: int
    length: int
    place: int


@dataclass(frozen=True)
class Work:
    """What the programs of one launch do, for pieces of one dtype.

    Attributes:
        items: (n, 2): the address at which place 0 of the chunk would be; what `pack` makes of the rest.
        segments: (n, 7), one for each layer: first item; number of whole chunks, whose loads are aligned,
            and of other long parts after them, which all its programs add up; where its programs begin, at
            its first place or a little before; where place 0 would be in the partial sums; the place after
            its last; its first place.
        programs: (n, 4): segment; first place; first item and number of short parts.
    """

    items: Integers
    segments: Integers
    programs: Integers


@dataclass(frozen=True)
class Batch:
    """Rows that are sketched together.

    Attributes:
        first_row: the rows are `first_row` ... `first_row` + len(rows) - 1.
        work: for each dtype, in the order in which they were given.
        rows: (n, 4): where place 0 of a row's first layer would be in the partial sums; how many layers
            there are; the place after the last in each; the first place.
        partials: number of partial sums.
    """

    first_row: int
    work: tuple[Work, ...]
    rows: Integers
    partials: int


def batches(
    kinds: Sequence[tuple[int, Sequence[Piece]]], *, rows: int, most: int, dim: int, seed: int
) -> list[Batch]:
    """Divide the work of a snapshot.

    The partial sums of a batch take at most `LANES`·CHUNK floats (2 MB) and as many bytes as the sketches
    of `most` rows have, so the number of batches is bounded: about 1 + CHUNK/(2·dim) for each `most` rows,
    5 at the default.

    Args:
        kinds: for each dtype, bytes of an element and the pieces.
        rows: number of rows.
        most: number of rows in a batch.
        dim: number of buckets of a sketch.
        seed: of the sketch.

    Returns:
        Batches that together have all rows.

    Example:
        >>> whole, = batches([(4, [Piece(0, 4096, 1000, 0)])], rows=1, most=1, dim=64, seed=0)
        >>> whole.rows
        array([[   0,    1, 1000,    0]])
        >>> len(whole.work[0].programs)
        2
    """
    cut = [parts(size, pieces, seed) for size, pieces in kinds]
    reach, first = np.zeros(rows, np.int64), np.full(rows, CHUNK)
    count = np.zeros((len(cut), rows), np.int64)
    for kind, part in enumerate(cut):
        np.maximum.at(reach, part.row, part.high)
        np.minimum.at(first, part.row, part.low)
        np.add.at(count[kind], part.row, part.high - part.low)
    first = np.minimum(first, reach)
    width = reach - first
    budget = LANES * CHUNK + min(rows, most) * dim * 2
    layers = _layers(count, width, budget)
    size = width * layers.sum(0)
    batch_of = _batch_numbers(size, budget, most)
    result = []
    for batch in range(int(batch_of[-1]) + 1 if rows else 0):
        inside = np.flatnonzero(batch_of == batch)
        begin = np.zeros(rows, np.int64)
        begin[inside] = np.cumsum(size[inside]) - size[inside] - first[inside]
        work = []
        for kind, part in enumerate(cut):
            before = begin + width * layers[:kind].sum(0)
            chosen = part.of_rows(batch_of == batch)
            here = layers[kind] * (batch_of == batch)
            work.append(_work(chosen, here, before, first, reach))
        table = np.stack((begin, layers.sum(0), reach, first), axis=1)[inside]
        result.append(Batch(int(inside[0]), tuple(work), table, int(size[inside].sum())))
    return result


def pack(low: Integers, high: Integers, offset: Integers, flip: Integers) -> Integers:
    """A part's first place, the place after its last, its sign offset and flip (0 or 1) in one integer.

    Example:
        >>> f"{pack(*(np.array([n]) for n in (2, 3, 4, 1)))[0]:x}"
        '8001000060002'
    """
    return np.asarray(low | high << 17 | offset << 34 | flip << 51)


@dataclass(frozen=True)
class Parts:
    """What the pieces have in each chunk: columns of the same length, ordered by row and place.

    Attributes:
        row: of the piece.
        chunk: number of the chunk.
        address: at which place 0 of the chunk would be, in bytes.
        low: first place in the chunk.
        high: the place after the last.
        residue: modulo `LANES`, where in the piece place 0 of the chunk would be.
        whole: whether it is all of the chunk, and aligned.
        packed: see `pack`.
    """

    row: Integers
    chunk: Integers
    address: Integers
    low: Integers
    high: Integers
    residue: Integers
    whole: npt.NDArray[np.bool_]
    packed: Integers

    def of_rows(self, chosen: npt.NDArray[np.bool_]) -> "Parts":
        """Those of the rows that are True."""
        keep = chosen[self.row]
        return Parts(*(column[keep] for column in self.__dict__.values()))


def parts(itemsize: int, pieces: Sequence[Piece], seed: int) -> Parts:
    """Cut pieces where chunks begin.

    Args:
        itemsize: bytes of an element.
        pieces: in any order.
        seed: of the sketch.

    Example:
        >>> parts(4, [Piece(0, 4096, 1000, 0), Piece(0, 8192, CHUNK, 1000)], seed=0).high.tolist()
        [1000, 131071, 1000]
    """
    table = np.array([piece for piece in pieces if piece.length], np.int64).reshape(-1, 4)
    row, address, length, place = table[np.lexsort((table[:, 3], table[:, 0]))].T
    first = place // CHUNK
    number = (place + length - 1) // CHUNK - first + 1
    index, nth = _repeat(number)
    chunk = first[index] + nth
    shift = chunk * CHUNK - place[index]
    low = np.maximum(-shift, 0)
    high = np.minimum(length[index] - shift, CHUNK)
    flip = (chunk_flips(chunk, seed) < 0).astype(np.int64)
    aligned = address % (LANES * itemsize) == 0
    return Parts(
        row=row[index],
        chunk=chunk,
        address=address[index] + shift * itemsize,
        low=low,
        high=high,
        residue=shift % LANES,
        whole=(high - low == CHUNK) & aligned[index],
        packed=pack(low, high, chunk_offsets(chunk, seed), flip),
    )


def _layers(count: Integers, width: Integers, budget: int) -> Integers:
    """Layers of each kind and row: one, and more for large rows as far as there is room.

    Args:
        count: elements of each kind and row, (kinds, rows).
        width: places of each row.
        budget: partial sums.
    """
    layers = np.minimum(count, 1)
    spare = budget - int((layers.sum(0) * width).sum())
    if spare > 0:
        share = spare * (count / max(int(count.sum()), 1)) / np.maximum(width, 1)
        # fewer chunks are not worth a layer that has to be added to the others
        wanted = count // np.maximum(4 * width, 1)
        layers += np.minimum(np.minimum(share.astype(np.int64), wanted), LANES - 1) * layers
    return np.asarray(layers)


def _batch_numbers(size: Integers, budget: int, most: int) -> Integers:
    """Put neighbouring rows together until a batch is full."""
    numbers, batch, filled, first = np.zeros(len(size), np.int64), 0, 0, 0
    for row, floats in enumerate(size.tolist()):
        if (filled and filled + floats > budget) or row - first == most:
            batch, filled, first = batch + 1, 0, row
        numbers[row] = batch
        filled += floats
    return numbers


def _work(
    part: Parts, layers: Integers, begin: Integers, first_place: Integers, reach: Integers
) -> Work:
    """Tables for the parts of one dtype.

    Args:
        part: all parts.
        layers: number of layers of each row.
        begin: where place 0 of the first of them would be in the partial sums.
        first_place: of each row.
        reach: the place after its last.
    """
    if not len(part.row):
        return Work(*(np.zeros((0, width), np.int64) for width in (2, 7, 4)))
    layer = part.residue * layers[part.row] // LANES
    group, first, segment = np.unique(
        part.row * LANES + layer, return_index=True, return_inverse=True
    )
    # a row may have more layers than residues that occur: all are written, some with zeros
    row, layer = _repeat(layers)
    start = first_place[row] // LANES * LANES
    at = np.searchsorted(row * LANES + layer, group)
    start[at] -= part.residue[first]
    segment = at[segment]
    blocks = -(-(reach[row] - start) // BLOCK)
    first_program = np.cumsum(blocks) - blocks

    # chunks whose loads are not aligned with the segment's blocks are no better than parts of chunks
    whole = part.whole & (part.residue == -start[segment])
    long = np.flatnonzero(part.high - part.low >= LONG)
    long = long[np.lexsort((~whole[long], segment[long]))]
    long_items = np.bincount(segment[long], minlength=len(row))
    whole_items = np.bincount(segment[whole], minlength=len(row))

    short = np.flatnonzero(part.high - part.low < LONG)
    first_block = (part.low[short] - start[segment[short]]) // BLOCK
    last_block = (part.high[short] - 1 - start[segment[short]]) // BLOCK
    index, nth = _repeat(last_block - first_block + 1)
    program = first_program[segment[short]][index] + first_block[index] + nth
    short = short[index[np.argsort(program, kind="stable")]]
    short_items = np.bincount(program, minlength=int(blocks.sum()))

    items = np.concatenate((long, short))
    owner, nth_block = _repeat(blocks)
    segments = (
        np.cumsum(long_items) - long_items,
        whole_items,
        long_items - whole_items,
        start,
        begin[row] + layer * (reach - first_place)[row],
        reach[row],
        first_place[row],
    )
    programs = (
        owner,
        start[owner] + nth_block * BLOCK,
        len(long) + np.cumsum(short_items) - short_items,
        short_items,
    )
    return Work(
        items=np.stack((part.address[items], part.packed[items]), axis=1),
        segments=np.stack(segments, axis=1),
        programs=np.stack(programs, axis=1),
    )


def _repeat(number: Integers) -> tuple[Integers, Integers]:
    """For each of number[i] copies of i: i, and which copy it is."""
    index = np.repeat(np.arange(len(number)), number)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(number) - number, number)
