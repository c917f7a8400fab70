"""A single direction at the best learning rate: the third Hermite polynomial of one projection.

The answer is He₃(⟨u, x⟩) for a hidden direction u and normal x, and is uncorrelated with every polynomial
of lower degree (information exponent 3; Ben Arous et al., arXiv 2003.10409). SGD from a random start is
therefore long about the equator before it finds u, even at the largest learning rate that does not
diverge.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.tasks import Task, Training

DIMENSIONS = 200
HIDDEN = 32
BATCH_SIZE = 256
HELD_OUT = 2000


def hermite(z: torch.Tensor) -> torch.Tensor:
    """He₃ with a variance of 1 under the normal distribution.

    >>> hermite(torch.tensor([-(3.0**0.5), 3.0**0.5])).abs().tolist()
    [0.0, 0.0]
    """
    return z * (z.square() - 3) / 6**0.5


def examples(
    n: int, direction: torch.Tensor, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal inputs (n, DIMENSIONS) and what is to be answered (n,)."""
    inputs = torch.randn(n, DIMENSIONS, generator=draw)
    return inputs, hermite(inputs @ direction)


def single_index(seed: int) -> Training:
    """A two-layer ReLU network, fresh examples at every step, squared error."""
    draw = torch.Generator().manual_seed(seed)
    direction = F.normalize(torch.randn(DIMENSIONS, generator=draw), dim=0)
    held_out = examples(HELD_OUT, direction, draw)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(DIMENSIONS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def error(data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inputs, answers = data
        return F.mse_loss(model(inputs)[:, 0], answers)

    return Training(
        model,
        lambda: error(examples(BATCH_SIZE, direction, draw)),
        lambda _: (error(held_out).item(), None),
    )


# The lr is the best of a sweep. SGD alone, seeds 0 to 2: 1200, 1160, 780 steps at this lr; 8240, 7120,
# none (in 10,000) at 1/4, 2860, 2780, 2380 at 1/2; diverges at once at 2, 4, 8, 16 and 64 times it. Seeds
# 3 to 9 at this lr: 800, 480, 880, 580, 920, 1180, 1000
SGD = Task(
    name="single-index-sgd",
    setup=single_index,
    lr=0.4,
    budget=4_000,
    target=0.5,
    target_is_loss=True,
    check_every=20,
    base=torch.optim.SGD,
)
