"""Saddle to saddle: a two-layer ReLU network on orthogonal inputs from a small initialization.

The loss falls in jumps, one new neuron waking at each; between them it stands still. With small
initialization gradient flow interpolates with a norm within a constant of the smallest possible
(arXiv 2605.27097; Dana et al., arXiv 2502.16977), which a faster run must not spoil.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks.tasks import Task, Training

POINTS = 16
NEURONS = 32
SCALE = 1e-3


def smallest_squared_norm(targets: torch.Tensor) -> float:
    """Smallest ||a||^2 + ||W||^2 of an interpolator of `targets` (n,) on orthonormal inputs.

    One neuron per sign suffices, and a neuron that outputs y costs 2 ||y||.
    """
    return 2 * float(targets.clamp(min=0).norm() + targets.clamp(max=0).norm())


def relu(seed: int, *, points: int = POINTS, neurons: int = NEURONS) -> Training:
    """Random targets; the whole batch is both training and held-out data."""
    torch.manual_seed(seed)
    targets = torch.randn(points)
    # The inputs are the unit vectors, so that the hidden layer's weights are its activations.
    hidden = nn.Parameter(SCALE * torch.randn(points, neurons))
    output = nn.Parameter(SCALE * torch.randn(neurons))
    model = nn.ParameterDict({"hidden": hidden, "output": output})

    def loss() -> torch.Tensor:
        return 0.5 * (hidden.relu() @ output - targets).square().mean()

    def norm() -> dict[str, float]:
        squared = (hidden.square().sum() + output.square().sum()).item()
        return {"norm_over_smallest": squared / smallest_squared_norm(targets)}

    return Training(model, loss, lambda _: (loss().item(), None), norm)


RELU = Task(
    name="relu-orthogonal",
    setup=relu,
    lr=0.15,
    budget=2_000,
    target=1e-3,
    target_is_loss=True,
    check_every=1,
    base=torch.optim.SGD,
)
ADAMW = replace(
    RELU,
    name="relu-orthogonal-adamw",
    lr=1e-3,
    base=torch.optim.AdamW,
    base_kwargs={"weight_decay": 0.0},
)
# twice the points at twice the lr: the loss is their mean
WIDE = replace(
    RELU, name="relu-orthogonal-wide", setup=partial(relu, points=32, neurons=128), lr=0.3
)
