"""A staircase: products of signs are learnt one after the other, each with two factors more.

A two-layer network learns x₁ at once. Then its loss stands still, for no other input is correlated with
what remains, until x₁ has helped it to x₁x₂x₃, and that to x₁x₂x₃x₄x₅ (Abbe et al., arXiv 2202.08658; the
more factors are new, the longer it takes: arXiv 2302.11055).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.tasks import Task, Training

BITS = 30
DEGREES = (1, 3, 5)
HIDDEN = 128
BATCH_SIZE = 64
HELD_OUT = 1000


def examples(n: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs (n, BITS) of ±1 and x₁ + x₁x₂x₃ + x₁x₂x₃x₄x₅ (n,).

    >>> signs, sums = examples(100, torch.Generator())
    >>> sorted(set(sums.tolist()))
    [-3.0, -1.0, 1.0, 3.0]
    """
    signs = torch.randint(2, (n, BITS), generator=draw).float() * 2 - 1
    products = signs.cumprod(1)
    return signs, products[:, [degree - 1 for degree in DEGREES]].sum(1)


def staircase(seed: int) -> Training:
    """A two-layer ReLU network, fresh examples at every step, squared error."""
    draw = torch.Generator().manual_seed(seed)
    held_out = examples(HELD_OUT, draw)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(BITS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def error(data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        signs, sums = data
        return F.mse_loss(model(signs)[:, 0], sums)

    return Training(
        model,
        lambda: error(examples(BATCH_SIZE, draw)),
        lambda _: (error(held_out).item(), None),
    )


# SGD alone, seeds 0 to 2: 3980, 5360, 4000 steps at this lr, 200, 320, 240 at 16 times, diverges at 32
SGD = Task(
    name="staircase-sgd",
    setup=staircase,
    lr=1e-2,
    budget=20_000,
    target=0.25,
    target_is_loss=True,
    check_every=20,
    base=torch.optim.SGD,
)
