"""A soft committee machine learns from one of its own kind, and its units are long all alike.

Answers are the sum of three hidden units of a fixed network (Saad & Solla, Phys. Rev. Lett. 74, 4337,
1995). Every unit of a student of the same form soon finds what the teacher's have in common. Then the
error stands at this symmetric saddle until each unit finds one of the teacher's for itself.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.tasks import Task, Training

INPUTS = 64
UNITS = 3
SCALE = 1e-3  # of the student's initial weights' entries
BATCH_SIZE = 16
HELD_OUT = 2000


class Committee(nn.Module):
    """The sum of erf(⟨wᵢ, x⟩ / √2) over its units; the second layer is fixed."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Answers (n,) to inputs (n, INPUTS)."""
        return torch.erf(inputs @ self.weights.T / 2**0.5).sum(1)


def orthonormal(draw: torch.Generator) -> torch.Tensor:
    """The teacher's weights (UNITS, INPUTS).

    >>> rows = orthonormal(torch.Generator())
    >>> torch.allclose(rows @ rows.T, torch.eye(UNITS), atol=1e-5)
    True
    """
    columns: torch.Tensor = torch.linalg.qr(torch.randn(INPUTS, UNITS, generator=draw))[0]
    return columns.T.contiguous()


def committee(seed: int) -> Training:
    """Fresh normal inputs at every step, squared error."""
    draw = torch.Generator().manual_seed(seed)
    teacher = Committee(orthonormal(draw)).requires_grad_(False)
    held_out = torch.randn(HELD_OUT, INPUTS, generator=draw)
    torch.manual_seed(seed)
    model = Committee(SCALE * torch.randn(UNITS, INPUTS))

    def error(inputs: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(model(inputs), teacher(inputs))

    return Training(
        model,
        lambda: error(torch.randn(BATCH_SIZE, INPUTS, generator=draw)),
        lambda _: (error(held_out).item(), None),
    )


# SGD alone, seeds 0 to 2: 9900, 8440, 7700 steps at this lr; 2440, 1900, 1960 at 4 times it, 560, 780, 680
# at 16 times; seeds 0 and 1: none within 20,000 at 1/4, 32 and 64 times
SGD = Task(
    name="committee-sgd",
    setup=committee,
    lr=1e-2,
    budget=25_000,
    target=0.01,
    target_is_loss=True,
    check_every=20,
    base=torch.optim.SGD,
)
