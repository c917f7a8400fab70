"""The exact counterpart of the sketch, for small models."""

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from gapaware.blocks import ONE_BLOCK, Stretch


class Identity:
    """What `CountSketch` is an estimate of: the vector itself, in float64.

    Args:
        dim: length of the result; shorter vectors are filled up with zeros.

    Example:
        >>> Identity(dim=4)([(torch.tensor([1.0, 2.0]), 1)])
        tensor([0., 1., 2., 0.], dtype=torch.float64)
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim

    @torch.no_grad()
    def __call__(
        self, pieces: Iterable[tuple[Tensor, int]], device: torch.device | None = None
    ) -> Tensor:
        """Lay out the pieces as one float64 vector of shape (dim,)."""
        if device is None:
            pieces = list(pieces)
            device = pieces[0][0].device if pieces else torch.device("cpu")
        whole = torch.zeros(self.dim, dtype=torch.float64, device=device)
        for flat, place in pieces:
            whole.narrow(0, place, flat.numel()).copy_(flat)
        return whole

    def rows(
        self,
        rows: Sequence[Iterable[tuple[Tensor, int]]],
        device: torch.device,
        *,
        stretches: Sequence[Sequence[Stretch]] = (),
        resident: frozenset[int] = frozenset(),
        key: Hashable = None,
    ) -> tuple[Tensor, Tensor]:
        """See `CountSketch.rows`; of a block there is what it is made of."""
        whole = torch.stack([self(pieces, device) for pieces in rows])
        shares = [whole.new_empty(0)]
        for row, ends in zip(whole, stretches or [ONE_BLOCK] * len(rows), strict=True):
            begins = [0, *(end for end, _ in ends[:-1])]
            parts = [(block, row[a:b]) for a, (b, block) in zip(begins, ends, strict=True)]
            shares += [part for _, part in sorted(parts, key=lambda part: part[0])]
        return whole, torch.cat(shares)
