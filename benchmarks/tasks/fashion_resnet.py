"""No plateau: a small residual network on Fashion-MNIST, SGD with Nesterov momentum, the lr in steps.

The lr falls to a tenth at 60 and at 85 % of the budget, much as with He et al. (arXiv 1512.03385), of whose
networks this is a very small one. The 10,000 images of the test set (of Debian's package
`dataset-fashion-mnist`) are halved to 14 x 14; 3000 are held out. There is no warm-up.

SGD's held-out loss, mean of seeds 0 to 2: 0.478 at lr 0.00625, 0.441 at 0.0125, 0.428 at 0.025, 0.4163 at
0.05, 0.4164 at 0.1, 0.418 at 0.2, 0.421 at 0.4, 0.430 at 0.8, 0.494 at 1.6, 1.806 at 3.2; of seeds 3 to 5:
0.415 at 0.025, 0.419 at 0.05, 0.419 at 0.1.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import MultiStepLR

from benchmarks.forgetting_tasks.fashion import fashion
from benchmarks.tasks import Task, Training

TRAIN = 7000
CHANNELS = (8, 16)
BATCH_SIZE = 64
MILESTONES = (0.6, 0.85)  # shares of the budget


class Block(nn.Module):
    """Two convolutions around which the images may pass."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """What comes in and what the convolutions add to it."""
        return F.relu(images + self.inside(images))


def network() -> nn.Module:
    """A block at 7 x 7, another at 4 x 4, the mean over places."""
    few, many = CHANNELS
    return nn.Sequential(
        nn.Conv2d(1, few, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(few),
        nn.ReLU(),
        Block(few),
        nn.Conv2d(few, many, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(many),
        nn.ReLU(),
        Block(many),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(many, 10),
    )


def clothes(seed: int) -> Training:
    """Random batches; others are held out for every seed."""
    examples = fashion("t10k")
    images, labels = (F.avg_pool2d(examples.inputs, 2) - 0.286) / 0.323, examples.targets
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAIN], order[TRAIN:]
    torch.manual_seed(seed)
    model = network()
    draw = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        batch = train[torch.randint(TRAIN, (BATCH_SIZE,), generator=draw)]
        return F.cross_entropy(model.train()(images[batch]), labels[batch])

    def evaluate(_: bool) -> tuple[float, float]:
        logits = model.eval()(images[test])
        accuracy = (logits.argmax(1) == labels[test]).float().mean().item()
        return F.cross_entropy(logits, labels[test]).item(), accuracy

    return Training(model, loss, evaluate)


def in_steps(optimizer: torch.optim.Optimizer, budget: int) -> MultiStepLR:
    """A tenth of the lr after each of MILESTONES."""
    return MultiStepLR(optimizer, [round(share * budget) for share in MILESTONES], gamma=0.1)


SGD = Task(
    name="fashion-resnet-sgd",
    setup=clothes,
    lr=0.05,
    budget=1000,
    check_every=100,
    base=torch.optim.SGD,
    base_kwargs={"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    schedule=in_steps,
)
