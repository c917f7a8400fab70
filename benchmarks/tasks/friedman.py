"""No plateau: Friedman's function of ten numbers, of which five matter, a small MLP, AdamW, cosine to 0.

The function is the first of Friedman's (Multivariate Adaptive Regression Splines, Annals of Statistics
19(1), 1991), with his noise: what is held out is measured without it, in units of the function's own
variance. There is no warm-up.

AdamW's held-out loss, mean of seeds 0 to 2: 0.192 at lr 2.5e-4, 0.0909 at 5e-4, 0.0302 at 1e-3, 0.0063 at
2e-3, 0.0053 at 4e-3, 0.0058 at 8e-3, 0.0078 at 1.6e-2, 0.0156 at 3.2e-2, 0.0227 at 6.4e-2, 0.0182 at
1.28e-1, 0.0085 at 2.56e-1; of seeds 3 to 7: 0.0061 at 2e-3, 0.0052 at 4e-3, 0.0061 at 8e-3.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.tasks import Task, Training

INPUTS = 10
MEAN, SPREAD = 14.4, 4.9  # of the function, over the unit cube
NOISE = 1.0  # before the division by SPREAD
TRAIN, HELD_OUT = 2000, 8000
HIDDEN = 64
BATCH_SIZE = 64


def friedman(points: torch.Tensor) -> torch.Tensor:
    """The function of points (n, INPUTS) between 0 and 1, less its mean, in units of its spread (n,).

    >>> values = friedman(torch.rand(20_000, 10, generator=torch.Generator()))
    >>> bool(values.mean().abs() < 0.05), 0.95 < values.std().item() < 1.05
    (True, True)
    """
    a, b, c, d, e = points[:, :5].unbind(1)
    values = 10 * torch.sin(torch.pi * a * b) + 20 * (c - 0.5).square() + 10 * d + 5 * e
    return (values - MEAN) / SPREAD


def regression(seed: int) -> Training:
    """Random batches of TRAIN noisy points, two hidden layers of GELU, squared error."""
    draw = torch.Generator().manual_seed(seed)
    train, held_out = torch.rand(TRAIN + HELD_OUT, INPUTS, generator=draw).split((TRAIN, HELD_OUT))
    noisy = friedman(train) + NOISE / SPREAD * torch.randn(TRAIN, generator=draw)
    answers = friedman(held_out)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(INPUTS, HIDDEN),
        nn.GELU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.GELU(),
        nn.Linear(HIDDEN, 1),
    )

    def loss() -> torch.Tensor:
        batch = torch.randint(TRAIN, (BATCH_SIZE,), generator=draw)
        return F.mse_loss(model(2 * train[batch] - 1)[:, 0], noisy[batch])

    def evaluate(_: bool) -> tuple[float, None]:
        return F.mse_loss(model(2 * held_out - 1)[:, 0], answers).item(), None

    return Training(model, loss, evaluate)


ADAMW = Task(
    name="friedman",
    setup=regression,
    lr=4e-3,
    budget=1500,
    check_every=100,
    base_kwargs={"weight_decay": 1e-2},
    schedule=CosineAnnealingLR,
)
