"""The last updates as sketches, and their Gram matrix, kept up to date at O(W·dim) a snapshot.

W + 1 updates are kept although a spectrum needs W: the Gram matrix of W + 1 updates holds the Gram
matrix of this window, that of the one before and the inner products between them, so ΔG and the stability
coefficients need no second look at the updates.

The part of an update that is weight decay is −ρ times the parameters before it, which are the parameters
now less all updates since: its inner products follow from those of the updates and of the parameters now.
What moves parameters beside the updates, as a pull to the starting weights, is small against them here.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gapaware.transfer import send

UPDATE, DECAY = 0, 1


class Window:
    """A ring of the last `size` + 1 updates and of the rate of weight decay in each.

    Args:
        size: W, the number of updates in one spectrum.
        rows: number of rows of a sketch.
        dim: length of one row.
        device: where the sketches are.
        dtype: of the updates in the ring; inner products are float64.

    Example:
        >>> window = Window(size=3, rows=1, dim=2, device=torch.device("cpu"))
        >>> theta = torch.zeros(1, 2, dtype=torch.float64)
        >>> for step in (1.0, 2.0, 3.0):
        ...     update = torch.tensor([[step, 0.0]], dtype=torch.float64)
        ...     theta = theta + update
        ...     window.push(update, theta, rates=torch.zeros(1, dtype=torch.float64))
        >>> window.gram()[UPDATE, UPDATE, 0]
        tensor([[1., 2., 3.],
                [2., 4., 6.],
                [3., 6., 9.]], dtype=torch.float64)
    """

    def __init__(
        self,
        size: int,
        rows: int,
        dim: int,
        device: torch.device,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.capacity = size + 1
        self.pushed = 0
        self._ring = torch.zeros(self.capacity, rows, dim, dtype=dtype, device=device)
        self._rates = torch.zeros(self.capacity, rows, dtype=torch.float64, device=device)
        # of the updates, and in the last row and column of the parameters now
        self._gram = torch.zeros(
            rows, self.capacity + 1, self.capacity + 1, dtype=torch.float64, device=device
        )
        # of the updates and the parameters now: each update, and minus the parameters before it
        ones = self._gram.new_ones(self.capacity, self.capacity)
        before = torch.cat((ones.triu(), -ones[:, :1]), dim=1)
        eye = torch.eye(*before.shape, dtype=before.dtype, device=before.device)
        self._sums = torch.stack((eye, before))

    def __len__(self) -> int:
        return min(self.pushed, self.capacity)

    @property
    def shape(self) -> tuple[int, ...]:
        """(size + 1, rows, dim): the ring, the sketch."""
        return tuple(self._ring.shape)

    def push(self, update: Tensor, theta: Tensor, rates: Tensor) -> None:
        """Add the newest update and forget the oldest.

        Args:
            update: sketch of θ_t − θ_{t−1}, shape (rows, dim), float64.
            theta: sketch of θ_t, same shape.
            rates: weight decay is −ρ·θ_{t−1} of the update: ρ of each row, (rows,), float64.
        """
        slot = self.pushed % self.capacity
        self._ring[slot] = update
        self._rates[slot] = rates
        # what changes in the Gram matrix; with the newest update as the ring has it
        newest = torch.stack((self._ring[slot].to(theta), theta), dim=1)
        products = newest @ self._ring.to(theta).permute(1, 2, 0)
        self._gram[:, slot, :-1] = self._gram[:, :-1, slot] = products[:, 0]
        self._gram[:, -1, :-1] = self._gram[:, :-1, -1] = products[:, 1]
        self._gram[:, -1, -1] = torch.linalg.vecdot(theta, theta)
        self.pushed += 1

    def gram(self) -> Tensor:
        """Inner products of the updates in the ring, the oldest first.

        Returns:
            float64, shape (2, 2, rows, n, n) with n = len(window) <= W + 1: the first two axes choose
            between UPDATE and DECAY for the two sides. A new tensor.
        """
        n = len(self)
        oldest = (self.pushed - n) % self.capacity
        order = _order(oldest, n, self.capacity, self._gram.device)
        known = self._gram.index_select(1, order).index_select(2, order)
        # updates and decay parts as sums of the n updates and the parameters now, (2, rows, n, n + 1)
        updates, before = self._sums[:, self.capacity - n :, self.capacity - n :]
        decays = self._rates.index_select(0, order[:-1]).mT[..., None] * before
        parts = torch.stack((updates.expand_as(decays), decays))
        return (parts @ known)[:, None] @ parts.mT

    def squared_norms(self) -> Tensor:
        """‖θ‖² of each row, as of the last push: float64, (rows,), a new tensor."""
        return self._gram[:, -1, -1].clone()

    def to(self, device: torch.device) -> None:
        """Move the window to another device."""
        self._ring, self._gram = send(self._ring, device), send(self._gram, device)
        self._rates, self._sums = send(self._rates, device), send(self._sums, device)

    def state_dict(self) -> dict[str, Any]:
        """The window as tensors and numbers."""
        return {
            "pushed": self.pushed,
            "ring": self._ring.clone(),
            "rates": self._rates.clone(),
            "gram": self._gram.clone(),
        }

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Any], theta: Tensor, dtype: torch.dtype = torch.float64
    ) -> "Window":
        """The window that `state_dict` described.

        Args:
            state: from `state_dict`.
            theta: the last one pushed; the window goes to its device.
            dtype: of the updates in the ring.
        """
        ring = state["ring"]
        decay_parts = "rates" not in state  # until 0.1.0 the ring had them
        size, rows, dim = ring.shape[1:] if decay_parts else ring.shape
        window = cls(size - 1, rows, dim, theta.device, dtype)
        window.pushed = int(state["pushed"])
        if window.pushed < 0:
            raise ValueError(f"{window.pushed} updates in a window")
        if decay_parts:
            window._replay(ring.to(theta), theta)
            return window
        for name in ("rates", "gram"):
            if state[name].shape != getattr(window, f"_{name}").shape:  # copy_ would broadcast
                raise ValueError(f"{name} of a window of shape {tuple(state[name].shape)}")
            getattr(window, f"_{name}").copy_(state[name])
        window._ring.copy_(ring)
        return window

    def _replay(self, ring: Tensor, theta: Tensor) -> None:
        """Push what a ring of updates and their decay parts holds, (2, size + 1, rows, dim)."""
        updates, decays = ring
        n, end, place = len(self), self.pushed, theta - updates.sum(0)
        for self.pushed in range(end - n, end):
            update, decay = (part[self.pushed % self.capacity] for part in (updates, decays))
            rates = -(decay * place).sum(-1) / place.square().sum(-1).clamp(min=1e-300)
            place = place + update
            self.push(update, theta, rates)


@lru_cache(maxsize=256)
def _order(oldest: int, n: int, capacity: int, device: torch.device) -> Tensor:
    """Where the Gram matrix of a ring has n updates, the oldest first, and then the parameters."""
    slots = torch.arange(oldest, oldest + n, device=device) % capacity
    return torch.cat((slots, slots.new_full((1,), capacity)))
