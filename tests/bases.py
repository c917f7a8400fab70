"""The optimizers that the tests wrap, each as a function of a model."""

import torch
from torch import nn

from gapaware import Composite


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


def vectors(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim != 2]


def two_groups(model: nn.Module) -> list[dict]:
    return [
        {"params": matrices(model), "weight_decay": 0.1},
        {"params": vectors(model), "weight_decay": 0.0},
    ]


BASES = {
    "adamw": lambda m: torch.optim.AdamW(two_groups(m), lr=3e-3),
    "adamw-fused": lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3, fused=True),
    "adamw-foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3, foreach=True),
    "adamw-loop": lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3, foreach=False),
    "adamw-tensor-lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(3e-3)),
    "adam-l2": lambda m: torch.optim.Adam(m.parameters(), lr=3e-3, weight_decay=0.1),
    "sgd-momentum": lambda m: torch.optim.SGD(two_groups(m), lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3),
    "muon": lambda m: torch.optim.Muon(matrices(m), lr=1e-2),
    "composite": lambda m: Composite(
        torch.optim.Muon(matrices(m), lr=1e-2), torch.optim.AdamW(vectors(m), lr=3e-3)
    ),
}
