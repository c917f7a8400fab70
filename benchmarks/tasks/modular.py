"""Grokking: a small MLP learns a binary operation modulo a prime from half of its table.

Full batch, AdamW at lr 1e-3 with weight decay 1.0: training accuracy is perfect after some
hundred steps, validation accuracy waits for thousands. The long plateau is the task.
(Power et al., arXiv 2201.02177; the MLP form follows Gromov, arXiv 2301.02679.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.tasks import BuildOptimizer, Result, thin

Operation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class PairMLP(nn.Module):
    """Both operands embedded by one table and concatenated, one hidden layer, a class each."""

    def __init__(self, modulus: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(modulus, width)
        self.hidden = nn.Linear(2 * width, hidden)
        self.output = nn.Linear(hidden, modulus)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        """Logits (n, modulus) of pairs of residues (n, 2)."""
        logits: torch.Tensor = self.output(F.relu(self.hidden(self.embedding(pairs).flatten(1))))
        return logits


@dataclass(frozen=True)
class ModularTask:
    """Steps until validation accuracy first reaches `target`, checked every `check_every` steps."""

    name: str
    operation: Operation
    modulus: int = 41
    train_fraction: float = 0.5
    width: int = 64
    hidden: int = 128
    lr: float = 1e-3
    budget: int = 20_000
    target: float | None = 0.95
    check_every: int = 10
    base: type[torch.optim.Optimizer] = torch.optim.AdamW
    base_kwargs: dict[str, Any] = field(default_factory=lambda: {"weight_decay": 1.0})

    def data(self, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Train pairs, train answers, validation pairs, validation answers."""
        p = self.modulus
        pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
        answers = self.operation(pairs[:, 0], pairs[:, 1]) % p
        order = torch.randperm(p * p, generator=torch.Generator().manual_seed(seed))
        cut = int(self.train_fraction * p * p)
        train, held_out = order[:cut], order[cut:]
        return pairs[train], answers[train], pairs[held_out], answers[held_out]

    def run(
        self,
        build_optimizer: BuildOptimizer,
        *,
        seed: int,
        lr: float | None = None,
        budget: int | None = None,
    ) -> Result:
        """Train on the full batch and stop at the target."""
        lr, budget = lr or self.lr, budget or self.budget
        train_pairs, train_answers, held_out_pairs, held_out_answers = self.data(seed)
        torch.manual_seed(seed)
        model = PairMLP(self.modulus, self.width, self.hidden)
        optimizer = build_optimizer(model.parameters(), lr, **self.base_kwargs)

        curve: list[tuple[int, float, float | None]] = []
        reached = None
        started = time.perf_counter()
        for step in range(1, budget + 1):
            optimizer.zero_grad()
            F.cross_entropy(model(train_pairs), train_answers).backward()
            optimizer.step()
            if step % self.check_every == 0 or step == budget:
                with torch.no_grad():
                    logits = model(held_out_pairs)
                accuracy = (logits.argmax(1) == held_out_answers).float().mean().item()
                loss = F.cross_entropy(logits, held_out_answers).item()
                curve.append((step, loss, accuracy))
                if self.target is not None and accuracy >= self.target:
                    reached = step
                    break
        return Result(
            task=self.name,
            seed=seed,
            lr=lr,
            steps=curve[-1][0],
            steps_to_target=reached,
            final_loss=curve[-1][1],
            final_accuracy=curve[-1][2],
            seconds=time.perf_counter() - started,
            curve=thin(curve),
        )


ADD = ModularTask("modular-add", lambda a, b: a + b)
MULTIPLY = ModularTask("modular-multiply", lambda a, b: a * b)
