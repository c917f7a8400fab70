"""No plateau: a denoising autoencoder of MNIST, AdamW, a short warm-up, then one constant lr.

A third of the pixels is put out, and the network is to draw the whole digit (Vincent et al., ICML 2008)
through a bottleneck. The 5000 digits are those of `mnist`, 1000 of them held out, each with a mask that
stays the same over a run. The warm-up takes 5 % of the budget.

AdamW's held-out loss, mean of seeds 0 to 2: 0.1548 at lr 5e-4, 0.1360 at 1e-3, 0.1241 at 2e-3, 0.1177 at
4e-3, 0.1179 at 8e-3, 0.1247 at 1.6e-2, 0.1447 at 3.2e-2, 0.2588 at 6.4e-2, 0.2635 at 1.28e-1, 0.55 at
2.56e-1; of seeds 3 to 5: 0.1222 at 2e-3, 0.1158 at 4e-3, 0.1159 at 8e-3.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.tasks import Task, Training
from benchmarks.tasks.mnist import split

TRAIN = 4000
PIXELS = 784
HIDDEN, BOTTLENECK = 128, 24
BATCH_SIZE = 64
PUT_OUT = 1 / 3
WARMUP = 0.05  # share of the budget


def masked(images: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Images with random pixels at 0.

    >>> left = masked(torch.ones(100, 784), torch.Generator()).mean().item()
    >>> 0.65 < left < 0.68
    True
    """
    return images * (torch.rand(images.shape, generator=draw) >= PUT_OUT)


def denoising(seed: int) -> Training:
    """Random batches, other masks at every step, cross-entropy per pixel."""
    train, _, whole, _ = split(seed, TRAIN)
    draw = torch.Generator().manual_seed(seed)
    broken = masked(whole, draw)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(PIXELS, HIDDEN),
        nn.GELU(),
        nn.Linear(HIDDEN, BOTTLENECK),
        nn.Linear(BOTTLENECK, HIDDEN),
        nn.GELU(),
        nn.Linear(HIDDEN, PIXELS),
    )

    def loss() -> torch.Tensor:
        batch = train[torch.randint(TRAIN, (BATCH_SIZE,), generator=draw)]
        return F.binary_cross_entropy_with_logits(model(masked(batch, draw)), batch)

    def evaluate(_: bool) -> tuple[float, None]:
        return F.binary_cross_entropy_with_logits(model(broken), whole).item(), None

    return Training(model, loss, evaluate)


def warmup_then_constant(optimizer: torch.optim.Optimizer, budget: int) -> LambdaLR:
    """In a line up to the lr within WARMUP of the budget, and there it stays."""
    warmup = math.ceil(WARMUP * budget)
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))


ADAMW = Task(
    name="mnist-denoising",
    setup=denoising,
    lr=4e-3,
    budget=1500,
    check_every=150,
    base_kwargs={"weight_decay": 1e-2},
    schedule=warmup_then_constant,
)
