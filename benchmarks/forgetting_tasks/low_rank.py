"""Low-rank adapters: everything pretrained is frozen, each linear or convolution weight gets + B A."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """W ↦ W + B A, with B zero at first (Hu et al. 2021, arXiv 2106.09685; α/r = 1)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        rank = min(rank, rows, columns)
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.down = nn.Parameter(torch.randn(rank, columns) / columns**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, in the shape of the weight."""
        return weight + (self.up @ self.down).view_as(weight)


def adapt(model: nn.Module, rank: int, fresh: tuple[str, ...]) -> nn.Module:
    """Freeze `model` and add adapters, in place; what starts with `fresh` trains as it is."""
    weights = []
    for name, module in model.named_modules():
        if f"{name}.".startswith(fresh) and fresh:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        if isinstance(module, nn.Linear | nn.Conv2d):
            weights.append(module)
    for module in weights:
        parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))
    return model
