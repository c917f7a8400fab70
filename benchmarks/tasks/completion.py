"""Matrix completion by a deep linear network: singular values are learnt one after the other.

A product of three matrices is fitted to some entries of a matrix of low rank, by gradient descent from a
small initialization. Near 0 the gradient is of the second order in the weights, so that the loss stands
still before each singular value appears, from the largest to the smallest (Saxe et al., arXiv 1312.6120),
and what is found is nearly of the lowest rank, so that the other entries come out right as well (Gunasekar
et al., arXiv 1705.09280; in deep products Arora et al., arXiv 1905.13655).
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.tasks import Task, Training

SIZE = 32
SINGULAR_VALUES = (4.0, 2.0, 1.0)
FACTORS = 3
SEEN = 0.5  # of the entries
SCALE = 0.01  # of the initial weights' entries


class Product(nn.Module):
    """A matrix as a product of square ones."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.ParameterList(SCALE * torch.randn(SIZE, SIZE) for _ in range(FACTORS))

    def forward(self) -> torch.Tensor:
        """The product (SIZE, SIZE)."""
        return torch.linalg.multi_dot(list(self.factors))


def low_rank(draw: torch.Generator) -> torch.Tensor:
    """A matrix (SIZE, SIZE) with random singular vectors, whose squared entries are 1 in the mean.

    >>> int(torch.linalg.matrix_rank(low_rank(torch.Generator())))
    3
    """
    values = torch.tensor(SINGULAR_VALUES)
    left, right = (
        torch.linalg.qr(torch.randn(SIZE, len(values), generator=draw))[0] for _ in range(2)
    )
    return (left * values) @ right.T * SIZE / values.norm()


def completion(seed: int) -> Training:
    """All entries that are seen at every step; the others are held out."""
    draw = torch.Generator().manual_seed(seed)
    matrix = low_rank(draw)
    order = torch.randperm(SIZE * SIZE, generator=draw)
    cut = int(SEEN * len(order))
    torch.manual_seed(seed)
    model = Product()

    def error(entries: torch.Tensor) -> torch.Tensor:
        return (model() - matrix).flatten()[entries].square().mean()

    return Training(model, lambda: error(order[:cut]), lambda _: (error(order[cut:]).item(), None))


# SGD alone, seeds 0 to 2: 3330, 2640, 2900 steps at this lr, 120 to 150 at 32 times, diverges at 64 times
SGD = Task(
    name="completion-sgd",
    setup=completion,
    lr=5e-2,
    budget=20_000,
    target=0.02,
    target_is_loss=True,
    base=torch.optim.SGD,
    base_kwargs={"momentum": 0.9},
)
