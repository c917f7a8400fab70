"""scikit-learn's 8 x 8 digits: 0-4 and then 5-9, or upright and then turned by a quarter."""

from __future__ import annotations

import functools

import numpy as np
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn

from benchmarks.forgetting_tasks import NEW, OLD, Domains, Examples, ForgettingTask, TwoHeads

WIDTH = 64


def trunk() -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """1797 images (n, 8, 8) in [0, 1] and their digits."""
    data = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32), torch.tensor(data.target)


def thirds(size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random 60, 20 and 20 % of range(size): to train on, to choose by, to report."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    train, validation, test = np.split(order.numpy(), [int(0.6 * size), int(0.8 * size)])
    return torch.tensor(train), torch.tensor(validation), torch.tensor(test)


def split_domains(seed: int) -> Domains:
    """0-4 is old, 5-9 new."""
    images, labels = digits()
    old = Examples(images[labels < 5].flatten(1), labels[labels < 5], OLD)
    new = Examples(images[labels >= 5].flatten(1), labels[labels >= 5] - 5, NEW)
    train, validation, test = thirds(len(old), seed)
    new_train, new_validation, new_test = thirds(len(new), seed)
    return Domains(
        old[train],
        old[torch.cat([validation, test])],
        new[new_train],
        new[new_validation],
        new[new_test],
    )


def rotated_domains(seed: int) -> Domains:
    """Upright is old, turned by 90 degrees new; no image is trained on in one and tested in the other."""
    images, labels = digits()
    old = Examples(images.flatten(1), labels)
    new = Examples(images.rot90(1, (1, 2)).flatten(1), labels)
    train, validation, test = thirds(len(labels), seed)
    return Domains(
        old[train], old[torch.cat([validation, test])], new[train], new[validation], new[test]
    )


SPLIT = ForgettingTask(
    name="split-digits",
    build=lambda: TwoHeads(trunk(), WIDTH, 5, 5),
    domains=split_domains,
    classes=5,
    steps=400,
    batch_size=32,
    lr=1e-3,
    muon_lr=2e-2,
    old_steps=600,
    old_lr=3e-3,
    two_heads=True,
    fresh=("heads.1.",),
)
ROTATED = ForgettingTask(
    name="rotated-digits",
    build=lambda: nn.Sequential(trunk(), nn.Linear(WIDTH, 10)),
    domains=rotated_domains,
    classes=10,
    steps=600,
    batch_size=32,
    lr=1e-3,
    muon_lr=2e-2,
    good={"adamw": 3.0, "muon": 1.0},
    old_steps=1000,
    old_lr=3e-3,
)
