"""How far the weights have moved from where training began: forgetting seen live, without old data.

The risk is ‖θ − θ_0‖²/‖θ_0‖², the squared distance from the start relative to the start, as the mean over
the blocks: layers or tensors, neighbours of them together where a row has many (see `layout.py`). Their
short sketches (see `blocks.py`) are linear, so the difference of two tells it; what it says about
forgetting is measured in benchmarks/risk.py.

What began in mid-run, or lies elsewhere in its row since other parameters are trained, is left out: it is
first seen some steps later, and what began at zero, such as a new head, is then far from there for ever.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gapaware.layout import UNTOLD, BlockSignature
from gapaware.transfer import send


@dataclass(frozen=True)
class Start:
    """The short sketches of the blocks where training began.

    Attributes:
        blocks: what each block is, see `layout.Row.blocks`.
        widths: how many numbers there are of each.
        shares: the numbers, one block after another, (sum of widths,), in the precision in which they are
            kept: that of float32 adds about 1e-15 to a risk. Zeros where the start is not known.

    Example:
        >>> blocks, theta = (("group 0: 0", 1, 2, 0, "a7"),), torch.tensor([3.0, 4.0]).double()
        >>> start = Start(blocks, (2,), theta)
        >>> start.risk(theta + 0.5, counted=[True])
        tensor(0.0200, dtype=torch.float64)
    """

    blocks: tuple[BlockSignature, ...]
    widths: tuple[int, ...]
    shares: Tensor
    # kept, since they only change with what counts
    _known: dict[tuple[bool, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def followed(
        self, blocks: Sequence[BlockSignature], widths: Sequence[int], device: torch.device
    ) -> "Start":
        """The start of other blocks: those that were there before keep theirs, others have none."""
        before = send(self.shares, device).split(self.widths)
        known = dict(zip(self.blocks, before, strict=True))
        starts = []
        for block, width in zip(blocks, widths, strict=True):
            found = known.get(block, known.get((*block[:-1], UNTOLD)))
            starts.append(self.shares.new_zeros(width, device=device) if found is None else found)
        return Start(tuple(blocks), tuple(widths), torch.cat(starts))

    def told(self, blocks: tuple[BlockSignature, ...]) -> "Start":
        """The same of blocks that agree with those of it, and tell which parameters they are of."""
        return self if blocks == self.blocks else replace(self, blocks=blocks)

    def risk(self, now: Tensor, counted: Sequence[bool]) -> Tensor | None:
        """‖θ − θ_0‖²/‖θ_0‖² of each block that counts, and of these the mean.

        Args:
            now: short sketches of the same blocks, as `shares`, float64, on the device of the start.
            counted: for each block whether it counts: a new head has no old skill.

        Returns:
            A number in float64 on the same device, not finite where the start is not. A block that started
            at zero is left out as a new head is, and so is one that began in mid-run; NaN where there is no
            other. None where no block counts.
        """
        if not any(counted):
            return None
        moved = now - self._wide
        return (moved * moved) @ self._weights(tuple(counted))

    @cached_property
    def _wide(self) -> Tensor:
        return self.shares.double()

    def _weights(self, counted: tuple[bool, ...]) -> Tensor:
        """Of each number in the risk: 1/‖θ_0‖² of its block, by the number of blocks that have a part."""
        if counted not in self._known:
            size = torch.stack([part.square().sum() for part in self._wide.split(self.widths)])
            chosen = send(torch.tensor(counted, device="cpu"), size.device) & (size != 0)
            weights = torch.where(chosen, 1 / size, 0.0) / chosen.sum()
            self._known[counted] = torch.cat(
                [w.expand(width) for w, width in zip(weights, self.widths, strict=True)]
            )
        return self._known[counted]

    def to(self, device: torch.device) -> "Start":
        """The same on a device."""
        if device == self.shares.device:
            return self
        return Start(self.blocks, self.widths, send(self.shares, device))

    def state_dict(self) -> dict[str, Any]:
        """The start as lists and a tensor."""
        blocks = [list(block[:-1]) for block in self.blocks]
        members = [block[-1] for block in self.blocks]
        return {"blocks": blocks, "members": members, "shares": self.shares.clone()}

    @classmethod
    def from_state_dict(
        cls,
        state: dict[str, Any],
        widths: Callable[[Sequence[BlockSignature]], tuple[int, ...]],
        dtype: torch.dtype,
    ) -> "Start":
        """The start that `state_dict` described, of blocks of these widths, kept in `dtype`."""
        if "blocks" not in state:
            raise ValueError("it holds the start of rows, where this gapaware keeps that of blocks")
        # until 0.1.0 it did not say
        members = state.get("members", [UNTOLD] * len(state["blocks"]))
        blocks = tuple(
            (str(name), int(n), int(size), int(at), str(which))
            for (name, n, size, at), which in zip(state["blocks"], members, strict=True)
        )
        return cls(blocks, widths(blocks), state["shares"].to(dtype, copy=True))
