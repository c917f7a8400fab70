"""No plateau: a small convolutional network on Fashion-MNIST, SGD with momentum, one cycle of the lr.

`OneCycleLR` is used as it comes: while the lr goes up, momentum goes down from 0.95 to 0.85, and up again
with the lr's fall (Smith & Topin, arXiv 1708.07120). The images are the 10,000 of the test set, of
Debian's package `dataset-fashion-mnist` (Xiao et al., arXiv 1708.07747).

SGD's held-out loss, mean of seeds 0 to 3: 0.401 at lr 0.025, 0.394 at 0.05, 0.393 at 0.1; of seeds 0 and
1: 0.442 at 0.00625, 0.404 at 0.025, 0.396 at 0.05, 0.398 at 0.1, 0.411 at 0.2, 0.430 at 0.4, 2.307 at 1.6.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.forgetting_tasks.fashion import fashion
from benchmarks.tasks import Task, Training

TRAIN = 8000
BATCH_SIZE = 64


def data(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """TRAIN images (n, 1, 28, 28) of mean 0 and spread 1, their labels (n,), then the other 2000."""
    clothes = fashion("t10k")
    images, labels = clothes.inputs, clothes.targets
    images = (images - 0.286) / 0.353
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAIN], order[TRAIN:]
    return images[train], labels[train], images[test], labels[test]


def clothes(seed: int) -> Training:
    """Random batches, two convolutions with batch normalization, the mean over places."""
    train, train_labels, test, test_labels = data(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 49, 10),
    )
    draw = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        batch = torch.randint(TRAIN, (BATCH_SIZE,), generator=draw)
        return F.cross_entropy(model.train()(train[batch]), train_labels[batch])

    def evaluate(_: bool) -> tuple[float, float]:
        logits = model.eval()(test)
        accuracy = (logits.argmax(1) == test_labels).float().mean().item()
        return F.cross_entropy(logits, test_labels).item(), accuracy

    return Training(model, loss, evaluate)


def one_cycle(optimizer: torch.optim.Optimizer, budget: int) -> OneCycleLR:
    """Up to the optimizer's lr and down, momentum the other way, all other settings PyTorch's."""
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=budget + 1,
    )


SGD = Task(
    name="fashion-cnn-sgd",
    setup=clothes,
    lr=0.1,
    budget=600,
    check_every=100,
    base=torch.optim.SGD,
    base_kwargs={"momentum": 0.9, "weight_decay": 5e-4},
    schedule=one_cycle,
)
