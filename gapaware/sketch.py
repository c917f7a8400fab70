"""A linear random projection of the parameters, read once and never copied.

An update's sketch is the difference of two sketches of the parameters, so the projection has to be
linear, the same at every snapshot, rank and device, and needs no memory that grows with the model.

`CountSketch` gives element i one sign and one bucket of `dim` (Charikar, Chen and Farach-Colton,
2002). Inner products of sketches are unbiased estimates of inner products of what was sketched,
with variance at most about 2/dim · ‖x‖²‖y‖². To read at memory speed the elements are taken in chunks:

* chunk c is multiplied by a window, starting at an offset hashed from c, of one table of random
  signs and added to an accumulator of `CHUNK` floats. Signs of one element in two chunks are then
  independent, which one sign per row or per column would not be: such a sketch fails on low-rank and on
  constant updates;
* `CHUNK` is prime, so the columns or rows of a matrix do not fall on the same place again and again;
* the accumulator is folded into `dim` buckets by a random permutation.

Accumulation is in float32 for 64 chunks at a time and in float64 beyond, so a bucket's rounding
error stays below about 1e-6 of its value, whatever the size of the model.
"""

from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice, tee
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gapaware.additions import Additions
from gapaware.blocks import CHUNK, DEPTH, ONE_BLOCK, WIDTH, Stretch, Tally
from gapaware.caution import caution
from gapaware.hashing import buckets, sign_table
from gapaware.transfer import send

if TYPE_CHECKING:
    from types import ModuleType

    from gapaware.compiled import Loop, Plan
    from gapaware.kernel import Fused

CHUNKS_PER_FLUSH = 64
# additions made ready at a time: few enough, since those of small tensors are copies of up to a chunk
BATCH = 32


@lru_cache(maxsize=8)
def _host_tables(dim: int, seed: int) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(sign_table(seed)), torch.from_numpy(buckets(dim, seed))


class _Workspace(NamedTuple):
    """What a sketch needs on a device.

    Attributes:
        bucket: see `buckets`; on a GPU `_gather_order` of it.
        low: float32 sums, (DEPTH·WIDTH,), zero between sketches.
        high: float64 sums, as many, zero between sketches.
        additions: to them.
    """

    bucket: Tensor
    low: Tensor
    high: Tensor
    additions: Additions


class CountSketch:
    """A linear map R^P → R^dim for any P, defined by `dim` and `seed` alone.

    Args:
        dim: number of buckets, at most CHUNK. The relative error of a squared norm is about √(2/dim).
        seed: of the hash. Sketches compare only with sketches of the same `dim` and `seed`.

    Example:
        >>> sketch = CountSketch(dim=4096, seed=0)
        >>> x = torch.ones(50_000)
        >>> norm = sketch([(x, 0)]).norm().item()
        >>> abs(norm / x.norm().item() - 1) < 0.05
        True
    """

    def __init__(self, dim: int, seed: int) -> None:
        self.dim = dim
        self.seed = seed
        self._workspaces: dict[torch.device, _Workspace] = {}
        self._fused: dict[torch.device, Fused] = {}
        self._loop: Loop | None = None
        # of each row, None where the loop cannot take it
        self._plans: dict[int | None, Plan | None] = {}
        self._key: Hashable = None

    def __call__(
        self, pieces: Iterable[tuple[Tensor, int]], device: torch.device | None = None
    ) -> Tensor:
        """Sketch a vector that is given in pieces.

        Args:
            pieces: pairs (flat real tensor, place of its first element in the whole vector).
                Pieces that are missing count as zeros, so sketches of shards add up.
            device: where to work; the device of the first piece when None.

        Returns:
            float64, shape (dim,), on `device`.
        """
        if device is None:
            pieces = list(pieces)
            device = pieces[0][0].device if pieces else torch.device("cpu")
        return self._add_up(pieces, device, ONE_BLOCK)[0]

    @torch.no_grad()
    def _add_up(
        self,
        pieces: Iterable[tuple[Tensor, int]],
        device: torch.device,
        stretches: Sequence[Stretch],
        row: int | None = None,
        resident: frozenset[int] = frozenset(),
    ) -> tuple[Tensor, Tensor]:
        """The sketch, and the short ones of its blocks."""
        # taken away until the end: after an exception there would be remainders in the sums
        workspace = self._workspaces.pop(device, None) or self._new_workspace(device)
        low, high = workspace.low, workspace.high
        reach, depth, before = 0, 0, -1
        tally = Tally(low, high, stretches)
        additions = iter(workspace.additions.of(pieces, tally.begins, row, resident))
        # several at a time, since an addition sweeps what makes the next one out of the cache
        while batch := list(islice(additions, BATCH)):
            for addition in batch:
                total, signs, flip, chunk, place, end, wide = addition.target
                if place >= tally.end or tally.wide != wide:
                    tally.enter(place, wide)
                if chunk != before:  # parts of one chunk go to different places
                    if depth == CHUNKS_PER_FLUSH:
                        tally.leave()
                        high.narrow(0, 0, reach).add_(low.narrow(0, 0, reach))
                        low.narrow(0, 0, reach).zero_()
                        tally.flushed()
                        depth = 0
                    before, depth = chunk, depth + 1
                total.addcmul_(addition.values(), signs, value=flip)
                reach = max(reach, end)
        tally.leave()
        total = high.narrow(0, 0, reach)
        total.add_(low.narrow(0, 0, reach))
        folded = self._fold(high, workspace.bucket, reach)
        total.zero_()
        low.narrow(0, 0, reach).zero_()
        self._workspaces[device] = workspace
        return folded, tally.shares()

    def rows(
        self,
        rows: Sequence[Iterable[tuple[Tensor, int]]],
        device: torch.device,
        *,
        stretches: Sequence[Sequence[Stretch]] = (),
        resident: frozenset[int] = frozenset(),
        key: Hashable = None,
    ) -> tuple[Tensor, Tensor]:
        """Sketch several vectors: on CUDA in one kernel, on the CPU in a compiled loop if Numba is there.

        Args:
            rows: the pieces of each vector, as `__call__` takes them.
            device: where they are.
            stretches: where in each row which of its blocks lie, no piece in two of them; when left out
                each row is one block.
            resident: addresses (`data_ptr`) of the storages that outlive this call. Kernel and loop read
                pieces in them; others are sketched one by one, and asked for at each call.
            key: when it equals the last call's, so do the stretches and where the pieces are, and those in
                resident storages are not asked for.

        Returns:
            Sketches, float64, (len(rows), dim), and one after another the short ones of the blocks of all
            rows (see `blocks.py`), float64, (blocks·WIDTH,), both on `device`. On CUDA the rounding errors
            are others than on the CPU, about 1e-6 of a value, and the bits the same at every call (see
            `kernel.py`).

        Example:
            >>> x = torch.ones(3)
            >>> sketches, shares = CountSketch(dim=64, seed=0).rows(
            ...     [[(x[:1], 0), (x[1:], 1)], [(x, 0)]], x.device, stretches=[[(1, 0), (3, 1)], [(3, 0)]]
            ... )
            >>> sketches.shape, shares.view(3, -1).square().sum(1).tolist()
            (torch.Size([2, 64]), [1.0, 2.0, 3.0])
        """
        stretches = stretches or [ONE_BLOCK] * len(rows)
        if key is None or key != self._key:
            # on every device, since what has moved may have left one
            for workspace in self._workspaces.values():
                workspace.additions.forget()
            self._plans.clear()
            self._key = key
        if not _has_kernel(device):
            # for small rows alone it is not worth its import
            worth_it = device.type == "cpu" and any(ends[-1][0] > CHUNK for ends in stretches)
            loop = _compiled() if worth_it else None
            numbers = [None] * len(rows) if key is None else range(len(rows))
            given = zip(rows, stretches, numbers, strict=True)
            found = [self._row(loop, p, device, ends, row, resident) for p, ends, row in given]
            if len(found) == 1:
                return found[0][0][None], found[0][1]
            sketches, shares = zip(*found, strict=True)
            return torch.stack(sketches), torch.cat(shares)
        if device not in self._fused:
            from gapaware.kernel import Fused  # imports Triton, which takes a while

            self._fused[device] = Fused(self.dim, self.seed, device)
        return self._fused[device](
            rows,
            resident,
            key,
            lambda pieces, stretches: self._add_up(pieces, device, stretches),
            stretches,
        )

    def _row(
        self,
        compiled: "ModuleType | None",
        pieces: Iterable[tuple[Tensor, int]],
        device: torch.device,
        stretches: Sequence[Stretch],
        row: int | None,
        resident: frozenset[int],
    ) -> tuple[Tensor, Tensor]:
        """A row's sketch without the kernel; it has the same bits with and without the compiled loop."""
        if compiled is None:
            return self._add_up(pieces, device, stretches, row, resident)
        if row is None or row not in self._plans:
            pieces, again = tee(pieces)
            self._plans[row] = compiled.plan(
                again, stretches, resident, CHUNKS_PER_FLUSH, self.seed
            )
        plan = self._plans[row]
        if plan is None:
            return self._add_up(pieces, device, stretches, row, resident)
        self._loop = self._loop or compiled.Loop(self.dim, self.seed)
        return self._loop(plan)

    def _fold(self, total: Tensor, bucket: Tensor, reach: int) -> Tensor:
        if total.device.type == "cpu":
            folded = total.new_zeros(self.dim)
            return folded.scatter_add_(0, bucket.narrow(0, 0, reach), total.narrow(0, 0, reach))
        # scatter_add_ on a GPU adds in any order; gathering gives the same bits on every run
        return total.index_select(0, bucket).view(-1, self.dim).sum(0)

    def _new_workspace(self, device: torch.device) -> _Workspace:
        signs, bucket = _host_tables(self.dim, self.seed)
        if device.type != "cpu":
            bucket = _gather_order(bucket, self.dim)
        low = torch.zeros(DEPTH * WIDTH, dtype=torch.float32, device=device)
        high = torch.zeros(DEPTH * WIDTH, dtype=torch.float64, device=device)
        additions = Additions(send(signs, device), low, high, self.seed)
        return _Workspace(send(bucket, device), low, high, additions)

    def __getstate__(self) -> dict[str, int]:
        return {"dim": self.dim, "seed": self.seed}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["dim"], state["seed"])  # type: ignore[misc]


@lru_cache
def _compiled() -> "ModuleType | None":
    """The loop for the CPU, where Numba is installed and works."""
    if find_spec("numba") is None:
        return None
    try:
        from gapaware import compiled  # imports Numba, which takes a while
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        caution(f"Numba does not work here, so snapshots are slower: {why}")
        return None
    return compiled


@lru_cache
def _has_kernel(device: torch.device) -> bool:
    """Whether Triton compiles for a device."""
    if device.type != "cuda" or torch.version.hip or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _gather_order(bucket: Tensor, dim: int) -> Tensor:
    """Places sorted so that row r of a (rows, dim) view holds the r-th place of every bucket.

    Places that do not exist point at element CHUNK, which is always zero.
    """
    rows = -(-CHUNK // dim)
    # the default device may be another one
    order = torch.full((rows * dim,), CHUNK, dtype=torch.int64, device="cpu")
    by_bucket = torch.argsort(bucket, stable=True)
    sorted_bucket = bucket[by_bucket]
    first = torch.searchsorted(sorted_bucket, torch.arange(dim, device="cpu"))
    nth = torch.arange(CHUNK, device="cpu") - first[sorted_bucket]
    order[nth * dim + sorted_bucket] = by_bucket
    return order
