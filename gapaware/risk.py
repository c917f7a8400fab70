"""How far the weights have moved from where training began: forgetting seen live, without old data.

The risk is ‖θ − θ_0‖²/‖θ_0‖², the squared distance from the start relative to the start, as the mean over
the rows that are sketched: parameter groups or blocks. A sketch is linear, so the difference of two tells
it; what it says about forgetting is measured in benchmarks/risk.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gapaware.transfer import send

Signature = tuple[str, int, int]  # of a row, see `layout.Row.signature`


@dataclass(frozen=True)
class Start:
    """The sketch of the parameters where training began.

    Attributes:
        rows: what each row is a sketch of.
        sketch: (rows, dim), in the precision in which it is kept: that of float32 adds about 1e-15 to a
            risk.

    Example:
        >>> row, theta = ("group 0", 1, 2), torch.tensor([[3.0, 4.0]], dtype=torch.float64)
        >>> start = Start((row,), theta)
        >>> start.risk(theta + 0.5, counted=[True])
        tensor(0.0200, dtype=torch.float64)
    """

    rows: tuple[Signature, ...]
    sketch: Tensor

    def followed(self, rows: Sequence[Signature], now: Tensor) -> "Start":
        """The start of other rows: those that were there before keep theirs, all others begin here."""
        known: dict[Signature, Tensor] = {}
        if self.rows:
            # exact sketches are as long as the longest row, and zero beyond their own
            width = now.shape[1] - self.sketch.shape[1]
            before = torch.nn.functional.pad(send(self.sketch, now.device), (0, width))
            known = dict(zip(self.rows, before, strict=True))
        begun = [
            known.get(row, here.to(self.sketch.dtype)) for row, here in zip(rows, now, strict=True)
        ]
        return Start(tuple(rows), torch.stack(begun))

    def risk(self, now: Tensor, counted: Sequence[bool]) -> Tensor | None:
        """‖θ − θ_0‖²/‖θ_0‖² of each row that counts, and of these the mean.

        Args:
            now: sketches of the same rows, (rows, dim), float64, on the device of the start.
            counted: for each row whether it counts: a new head has no old skill.

        Returns:
            A number in float64 on the same device, not finite where the start is not. A row that started
            at zero is left out as a new head is; NaN where there is no other. None where no row counts.
        """
        start = self.sketch.to(now)
        moved, size = (now - start).square().sum(1), start.square().sum(1)
        shares = torch.stack((torch.where(size == 0, 0.0, moved / size), (size != 0).to(size)))
        if not all(counted):
            # row by row, since indices in a list would have the host wait for the device
            chosen = [shares[:, row] for row, counts in enumerate(counted) if counts]
            if not chosen:
                return None
            shares = torch.stack(chosen, 1)
        sums = shares.sum(1)
        return sums[0] / sums[1]

    def to(self, device: torch.device) -> "Start":
        """The same on another device."""
        return Start(self.rows, send(self.sketch, device))

    def state_dict(self) -> dict[str, Any]:
        """The start as lists and a tensor."""
        return {"rows": [list(row) for row in self.rows], "sketch": self.sketch.clone()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], dtype: torch.dtype) -> "Start":
        """The start that `state_dict` described, kept in `dtype`."""
        rows = tuple((str(name), int(count), int(size)) for name, count, size in state["rows"])
        return cls(rows, state["sketch"].to(dtype, copy=True))

    def fits(self, sketch_dim: int | None) -> bool:
        """Whether the parts fit together; `sketch_dim` as for `Observer`."""
        dim = sketch_dim or max((size for *_, size in self.rows), default=0)
        return self.sketch.shape == (len(self.rows), dim) or not self.rows
