"""The last updates as sketches, and their Gram matrix, kept up to date at O(W·dim) a snapshot.

W + 1 updates are kept although a spectrum needs W: the Gram matrix of W + 1 updates holds the Gram
matrix of this window, that of the one before and the inner products between them, so ΔG and the stability
coefficients need no second look at the updates.
"""

from typing import Any

import torch
from torch import Tensor

from gapaware.transfer import send

UPDATE, DECAY = 0, 1


class Window:
    """A ring of the last `size` + 1 updates and of the part of each that is weight decay.

    Args:
        size: W, the number of updates in one spectrum.
        rows: number of rows of a sketch.
        dim: length of one row.
        device: where the sketches are.

    Example:
        >>> window = Window(size=3, rows=1, dim=2, device=torch.device("cpu"))
        >>> for step in (1.0, 2.0, 3.0):
        ...     update = torch.tensor([[step, 0.0]], dtype=torch.float64)
        ...     window.push(update, decay=torch.zeros_like(update))
        >>> window.gram()[UPDATE, UPDATE, 0]
        tensor([[1., 2., 3.],
                [2., 4., 6.],
                [3., 6., 9.]], dtype=torch.float64)
    """

    def __init__(self, size: int, rows: int, dim: int, device: torch.device) -> None:
        self.capacity = size + 1
        self.pushed = 0
        self._ring = torch.zeros(2, self.capacity, rows, dim, dtype=torch.float64, device=device)
        self._gram = torch.zeros(
            2, 2, rows, self.capacity, self.capacity, dtype=torch.float64, device=device
        )

    def __len__(self) -> int:
        return min(self.pushed, self.capacity)

    @property
    def shape(self) -> tuple[int, ...]:
        """(2, size + 1, rows, dim): updates and decay parts, the ring, the sketch."""
        return tuple(self._ring.shape)

    def push(self, update: Tensor, decay: Tensor) -> None:
        """Add the newest update and forget the oldest.

        Args:
            update: sketch of θ_t − θ_{t−1}, shape (rows, dim), float64.
            decay: sketch of the part of it that is weight decay, same shape.
        """
        slot = self.pushed % self.capacity
        newest = torch.stack((update, decay))
        self._ring[:, slot] = newest
        # one product of the ring with the newest pair is all that changes in the Gram matrix
        products = torch.einsum("kwrd,lrd->klrw", self._ring, newest)
        self._gram[..., slot] = products
        self._gram[..., slot, :] = products.transpose(0, 1)
        self.pushed += 1

    def gram(self) -> Tensor:
        """Inner products of the updates in the ring, the oldest first.

        Returns:
            float64, shape (2, 2, rows, n, n) with n = len(window) <= W + 1: the first two axes choose
            between UPDATE and DECAY for the two sides. A new tensor.
        """
        if self.pushed <= self.capacity:
            return self._gram[..., : self.pushed, : self.pushed].clone()
        oldest = self.pushed % self.capacity
        return self._gram.roll((-oldest, -oldest), dims=(-2, -1))

    def to(self, device: torch.device) -> None:
        """Move the window to another device."""
        self._ring, self._gram = send(self._ring, device), send(self._gram, device)

    def state_dict(self) -> dict[str, Any]:
        """The window as tensors and numbers."""
        return {"pushed": self.pushed, "ring": self._ring.clone(), "gram": self._gram.clone()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> "Window":
        """The window that `state_dict` described, on `device`."""
        ring = state["ring"]
        if ring.ndim != 4 or ring.shape[0] != 2:
            raise ValueError(f"a window's ring of shape {tuple(ring.shape)}")
        window = cls(ring.shape[1] - 1, ring.shape[2], ring.shape[3], device)
        window.pushed = int(state["pushed"])
        if window.pushed < 0 or state["gram"].shape != window._gram.shape:  # copy_ would broadcast
            raise ValueError(f"{window.pushed} updates, Gram matrix {tuple(state['gram'].shape)}")
        window._ring.copy_(ring)
        window._gram.copy_(state["gram"])
        return window
