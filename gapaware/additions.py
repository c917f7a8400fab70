"""What goes where: a vector given in pieces as additions to the accumulator of its sketch.

On the CPU an addition of a few thousand numbers takes less time than to find out where they belong, so all
that can be kept between snapshots is.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gapaware.blocks import CHUNK
from gapaware.hashing import chunk_flips, chunk_offsets

# elements of a tensor that is not worth an addition of its own
SMALL = 16_384


class Target(NamedTuple):
    """Where a part of a chunk is added.

    Attributes:
        total: view of the sums there.
        signs: of its elements.
        flip: sign of the chunk.
        chunk: its number.
        place: of the first element, in the vector.
        end: after the last one, in the sums.
        wide: whether the sums are float64.
    """

    total: Tensor
    signs: Tensor
    flip: float
    chunk: int
    place: int
    end: int
    wide: bool


class Addition(NamedTuple):
    """Neighbours that are added together, and where.

    Attributes:
        parts: flat tensors of one dtype, one after another in the vector.
        target: for all of them.
    """

    parts: tuple[Tensor, ...]
    target: Target

    def values(self) -> Tensor:
        """What is added; several parts are copied together, since one addition costs more than they do."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)


class Additions:
    """The additions to the sums of a sketch on one device, made once where that is possible.

    Args:
        signs: see `hashing.sign_table`.
        low: float32 sums.
        high: float64 sums.
        seed: of the sketch.

    Example:
        >>> from gapaware.hashing import sign_table
        >>> low = torch.zeros(CHUNK)
        >>> additions = Additions(torch.from_numpy(sign_table(0)), low, low.double(), seed=0)
        >>> x = torch.ones(10)
        >>> for addition in additions.of([(x[:4], 0), (x[4:], 4)], begins=()):
        ...     addition.values().numel(), addition.target.place
        (10, 0)
    """

    def __init__(self, signs: Tensor, low: Tensor, high: Tensor, seed: int) -> None:
        self._signs, self._low, self._high, self._seed = signs, low, high, seed
        self._offsets: list[int] = []
        self._flips: list[float] = []
        # by place, length and whether they are float64
        self._targets: dict[tuple[int, int, bool], Target] = {}
        self._kept: dict[int, list[Addition]] = {}

    def of(
        self,
        pieces: Iterable[tuple[Tensor, int]],
        begins: Collection[int],
        row: int | None = None,
        resident: Collection[int] = (),
    ) -> Iterable[Addition]:
        """Cut pieces where chunks begin, and put small neighbours together.

        Args:
            pieces: pairs (flat real tensor, place of its first element in the vector).
            begins: places before and after which parts are not put together.
            row: number of the vector, whose additions are those of the last time until `forget`; None to
                make them in any case.
            resident: addresses (`data_ptr`) of the storages that outlive the snapshot. What lies elsewhere
                is a copy, and to keep them all could take as much memory as the model.

        Returns:
            The additions, in the order of the pieces, new ones made when they are asked for.
        """
        if row is None:
            return self._made(pieces, begins)
        if row in self._kept:
            return self._kept[row]
        return self._noted(row, self._made(pieces, begins), resident)

    def forget(self) -> None:
        """Let go of all tensors."""
        self._kept.clear()

    def _made(
        self, pieces: Iterable[tuple[Tensor, int]], begins: Collection[int]
    ) -> Iterator[Addition]:
        run: list[Tensor] = []
        first = end = 0
        for flat, place in pieces:
            for part in _split(flat, CHUNK - place % CHUNK):
                size = part.numel()
                fits = place == end and size <= SMALL and place % CHUNK and place not in begins
                if run and not (fits and part.dtype == run[0].dtype):
                    yield self._addition(run, first, end)
                    run = []
                if not run:
                    first = place
                run.append(part)
                place = end = place + size
                if size > SMALL:
                    yield self._addition(run, first, end)
                    run = []
        if run:
            yield self._addition(run, first, end)

    def _noted(
        self, row: int, made: Iterable[Addition], resident: Collection[int]
    ) -> Iterator[Addition]:
        """Hand on additions, and in the end keep them if every part lies in a storage that stays."""
        noted: list[Addition] = []
        stay = True
        for addition in made:
            stay = stay and all(_storage(part) in resident for part in addition.parts)
            if stay:
                noted.append(addition)
            else:
                noted.clear()
            yield addition
        if stay:
            self._kept[row] = noted

    def _addition(self, run: list[Tensor], first: int, end: int) -> Addition:
        # float64 parameters would lose what they are there for in a float32 sum
        wide = run[0].dtype == torch.float64
        key = (first, end - first, wide)
        if key not in self._targets:
            self._targets[key] = self._target(*key)
        return Addition(tuple(run), self._targets[key])

    def _target(self, place: int, length: int, wide: bool) -> Target:
        chunk, start = divmod(place, CHUNK)
        if chunk >= len(self._offsets):
            more = np.arange(len(self._offsets), 2 * chunk + 64)
            self._offsets += chunk_offsets(more, self._seed).tolist()
            self._flips += chunk_flips(more, self._seed).tolist()
        return Target(
            (self._high if wide else self._low).narrow(0, start, length),
            self._signs.narrow(0, self._offsets[chunk] + start, length),
            self._flips[chunk],
            chunk,
            place,
            start + length,
            wide,
        )


def _split(flat: Tensor, first: int) -> Sequence[Tensor]:
    """Cut a piece where chunks begin: after `first` elements, and after each CHUNK from there."""
    rest = flat.numel() - first
    if rest <= 0:
        return (flat,) if flat.numel() else ()
    whole, left = divmod(rest, CHUNK)
    return flat.split_with_sizes([first, *[CHUNK] * whole, *([left] if left else [])])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
