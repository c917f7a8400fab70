"""Sparse parity: the product of three of forty signs, fresh examples at every step.

No single input is correlated with the answer, so that for long nothing seems to happen while the
network's weights on the right inputs grow (Barak et al., arXiv 2207.08799).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.bases import MuonAdamW
from benchmarks.tasks import Task, Training

BITS = 40
CHOSEN = 3
HIDDEN = 128
BATCH_SIZE = 64
HELD_OUT = 1000


def examples(
    n: int, chosen: torch.Tensor, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs (n, BITS) of ±1 and the product (n,) of the chosen ones.

    >>> signs, answers = examples(5, torch.tensor([0, 3]), torch.Generator())
    >>> bool((signs[:, 0] * signs[:, 3] == answers).all())
    True
    """
    signs = torch.randint(2, (n, BITS), generator=draw).float() * 2 - 1
    return signs, signs[:, chosen].prod(1)


def parity(seed: int) -> Training:
    """A two-layer ReLU network with a logistic loss."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(BITS, generator=draw)[:CHOSEN]
    held_out, answers = examples(HELD_OUT, chosen, draw)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(BITS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def loss() -> torch.Tensor:
        signs, products = examples(BATCH_SIZE, chosen, draw)
        return F.softplus(-model(signs)[:, 0] * products).mean()

    def evaluate(_: bool) -> tuple[float, float]:
        margins = model(held_out)[:, 0] * answers
        return F.softplus(-margins).mean().item(), (margins > 0).float().mean().item()

    return Training(model, loss, evaluate)


ADAMW = Task(
    name="parity",
    setup=parity,
    lr=3e-4,
    budget=10_000,
    target=0.95,
    base_kwargs={"weight_decay": 1e-2},
)
SGD = replace(
    ADAMW,
    name="parity-sgd",
    lr=1e-2,
    base=torch.optim.SGD,
    base_kwargs={"momentum": 0.9, "weight_decay": 1e-4},
)
MUON = replace(ADAMW, name="parity-muon", base=MuonAdamW)
