"""No plateau: is a tumour malignant? Thirty numbers about each, a small MLP, AdamW, one cycle of the lr.

The data come with scikit-learn (Wolberg et al., Breast Cancer Wisconsin, UCI 1995). There are so few that
with a larger lr than the best they are learnt by heart. AdamW's test loss, mean of seeds 0-7: 0.459 at lr
1.25e-4, 0.222 at 2.5e-4, 0.102 at 5e-4, 0.084 at 1e-3, 0.104 at 2e-3, 0.143 at 4e-3, 0.184 at 8e-3, 0.230
at 1.6e-2.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer  # type: ignore[import-untyped]
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.tasks import Task, Training

TRAIN = 300
HIDDEN = 32
BATCH_SIZE = 32


def data(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """TRAIN tumours (n, 30) in units of their own spread, 1 for the benign (n,), then the others."""
    tumours = load_breast_cancer()
    features = torch.tensor(tumours.data, dtype=torch.float32)
    labels = torch.tensor(tumours.target, dtype=torch.float32)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAIN], order[TRAIN:]
    features = (features - features[train].mean(0)) / features[train].std(0)
    return features[train], labels[train], features[test], labels[test]


def tumours(seed: int) -> Training:
    """Random batches, two hidden layers of ReLU."""
    train, train_labels, test, test_labels = data(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(30, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)
    )
    draw = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        batch = torch.randint(TRAIN, (BATCH_SIZE,), generator=draw)
        return F.binary_cross_entropy_with_logits(model(train[batch])[:, 0], train_labels[batch])

    def evaluate(_: bool) -> tuple[float, float]:
        logits = model(test)[:, 0]
        accuracy = ((logits > 0) == (test_labels > 0.5)).float().mean().item()
        return F.binary_cross_entropy_with_logits(logits, test_labels).item(), accuracy

    return Training(model, loss, evaluate)


def one_cycle(optimizer: torch.optim.Optimizer, budget: int) -> OneCycleLR:
    """Up to the optimizer's lr and down; momentum stays as it is."""
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=budget + 1,
        cycle_momentum=False,
    )


ADAMW = Task(
    name="breast-cancer",
    setup=tumours,
    lr=1e-3,
    budget=400,
    check_every=20,
    base_kwargs={"weight_decay": 1e-2},
    schedule=one_cycle,
)
