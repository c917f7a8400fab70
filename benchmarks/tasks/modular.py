"""Grokking: a small network learns a binary operation modulo a prime from half of its table.

Full batch, AdamW at lr 1e-3 with weight decay 1.0: training accuracy is perfect after some
hundred steps, validation accuracy waits for thousands. The long plateau is the task.
(Power et al., arXiv 2201.02177; the MLP form follows Gromov, arXiv 2301.02679.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.bases import MuonAdamW
from benchmarks.tasks import Task, Training
from benchmarks.tasks.transformer import Transformer

Operation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class PairMLP(nn.Module):
    """Both operands embedded by one table and concatenated, one hidden layer, a class each."""

    def __init__(self, modulus: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(modulus, 64)
        self.hidden = nn.Linear(2 * 64, 128)
        self.output = nn.Linear(128, modulus)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        """Logits (n, modulus) of pairs of residues (n, 2)."""
        logits: torch.Tensor = self.output(F.relu(self.hidden(self.embedding(pairs).flatten(1))))
        return logits


class PairTransformer(nn.Module):
    """Two layers over both operands; the answer is read at the second."""

    def __init__(self, modulus: int) -> None:
        super().__init__()
        self.transformer = Transformer(modulus, 2, width=48, layers=2, heads=4)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        """Logits (n, modulus) of pairs of residues (n, 2)."""
        logits: torch.Tensor = self.transformer(pairs)[:, -1]
        return logits


def table(operation: Operation, modulus: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of residues (n, 2) and their answers (n,).

    >>> pairs, answers = table(torch.add, 3)
    >>> pairs[-1].tolist(), answers[-1].item()
    ([2, 2], 1)
    """
    pairs = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
    return pairs, operation(pairs[:, 0], pairs[:, 1]) % modulus


def modular(
    seed: int,
    *,
    operation: Operation,
    modulus: int = 41,
    train_fraction: float = 0.5,
    batch_size: int | None = None,
    network: Callable[[int], nn.Module] = PairMLP,
) -> Training:
    """Split the table, and train on the whole of its first part, or on random batches of it."""
    pairs, answers = table(operation, modulus)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    cut = int(train_fraction * len(pairs))
    train, held_out = order[:cut], order[cut:]
    train_pairs, train_answers = pairs[train], answers[train]
    held_out_pairs, held_out_answers = pairs[held_out], answers[held_out]
    torch.manual_seed(seed)
    model = network(modulus)
    draw = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        if batch_size is None:
            return F.cross_entropy(model(train_pairs), train_answers)
        batch = torch.randint(cut, (batch_size,), generator=draw)
        return F.cross_entropy(model(train_pairs[batch]), train_answers[batch])

    def evaluate(_: bool) -> tuple[float, float]:
        logits = model(held_out_pairs)
        accuracy = (logits.argmax(1) == held_out_answers).float().mean().item()
        return F.cross_entropy(logits, held_out_answers).item(), accuracy

    return Training(model, loss, evaluate)


def squares(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """x² + y²."""
    return a * a + b * b


def mixed_powers(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """x² + y."""
    return a * a + b


def cubes(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """x³ + y."""
    return a * a * a + b


def divided(a: torch.Tensor, b: torch.Tensor, *, modulus: int) -> torch.Tensor:
    """Quotient x / y, and 0 where y is 0.

    >>> divided(torch.tensor([3]), torch.tensor([2]), modulus=5).item()
    4
    """
    inverse = torch.tensor([0] + [pow(i, -1, modulus) for i in range(1, modulus)])
    return a * inverse[b] % modulus


def quadratic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """x² + xy + y²."""
    return a * a + a * b + b * b


ADD = Task(
    name="modular-add",
    setup=partial(modular, operation=torch.add),
    lr=1e-3,
    budget=20_000,
    target=0.95,
    base_kwargs={"weight_decay": 1.0},
)
MULTIPLY = replace(ADD, name="modular-multiply", setup=partial(modular, operation=torch.mul))
HELD_OUT = replace(ADD, budget=10_000)
SQUARES = replace(HELD_OUT, name="modular-squares", setup=partial(modular, operation=squares))
MIXED = replace(
    HELD_OUT,
    name="modular-mixed-59",
    setup=partial(modular, operation=mixed_powers, modulus=59, batch_size=512),
)
LARGE = replace(
    HELD_OUT,
    name="modular-add-97",
    setup=partial(modular, operation=torch.add, modulus=97, train_fraction=0.4, batch_size=512),
)
SUBTRACT = replace(
    HELD_OUT,
    name="modular-subtract-71",
    setup=partial(modular, operation=torch.sub, modulus=71, batch_size=512),
)
CUBES = replace(
    HELD_OUT,
    name="modular-cubes-53",
    setup=partial(modular, operation=cubes, modulus=53, train_fraction=0.6),
)
DIVIDE = replace(
    HELD_OUT,
    name="modular-divide-61",
    setup=partial(modular, operation=partial(divided, modulus=61), modulus=61, batch_size=512),
)
QUADRATIC = replace(
    HELD_OUT,
    name="modular-quadratic-43",
    setup=partial(modular, operation=quadratic, modulus=43, train_fraction=0.6),
)
TRANSFORMER = replace(
    HELD_OUT,
    name="modular-add-transformer",
    setup=partial(modular, operation=torch.add, batch_size=256, network=PairTransformer),
    budget=5_000,
)
MUON = replace(HELD_OUT, name="modular-add-muon", lr=1e-2, base=MuonAdamW)
TRANSFORMER_MUON = replace(
    TRANSFORMER, lr=5e-4, name="modular-add-transformer-muon", base=MuonAdamW
)
