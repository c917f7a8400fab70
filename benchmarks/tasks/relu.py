"""Saddle to saddle: a two-layer ReLU network on orthogonal inputs from a small initialization.

The loss falls in jumps, one new neuron waking at each; between them it stands still. With small
initialization gradient flow interpolates with a norm within a constant of the smallest possible
(arXiv 2605.27097; Dana et al., arXiv 2502.16977), which a faster run must not spoil.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.tasks import BuildOptimizer, Result, thin


def smallest_squared_norm(targets: torch.Tensor) -> float:
    """Smallest ||a||^2 + ||W||^2 of an interpolator of `targets` (n,) on orthonormal inputs.

    One neuron per sign suffices, and a neuron that outputs y costs 2 ||y||.
    """
    return 2 * float(targets.clamp(min=0).norm() + targets.clamp(max=0).norm())


@dataclass(frozen=True)
class ReluTask:
    """Steps until the training loss first falls below `target`; full batch, no decay."""

    name: str = "relu-orthogonal"
    points: int = 16
    neurons: int = 32
    scale: float = 1e-3
    lr: float = 0.15
    budget: int = 20_000
    target: float | None = 1e-3
    base: type[torch.optim.Optimizer] = torch.optim.SGD
    base_kwargs: dict[str, Any] = field(default_factory=dict)

    def run(
        self,
        build_optimizer: BuildOptimizer,
        *,
        seed: int,
        lr: float | None = None,
        budget: int | None = None,
    ) -> Result:
        """Train on the whole batch and stop at the target."""
        lr, budget = lr or self.lr, budget or self.budget
        torch.manual_seed(seed)
        targets = torch.randn(self.points)
        # The inputs are the unit vectors, so that the hidden layer's weights are its activations.
        hidden = torch.nn.Parameter(self.scale * torch.randn(self.points, self.neurons))
        output = torch.nn.Parameter(self.scale * torch.randn(self.neurons))
        optimizer = build_optimizer([hidden, output], lr, **self.base_kwargs)

        curve: list[tuple[int, float, float | None]] = []
        reached = None
        started = time.perf_counter()
        for step in range(budget):
            optimizer.zero_grad()
            loss = 0.5 * (hidden.relu() @ output - targets).square().mean()
            curve.append((step, loss.item(), None))
            if self.target is not None and curve[-1][1] < self.target:
                reached = step
                break
            loss.backward()
            optimizer.step()
        squared_norm = (hidden.square().sum() + output.square().sum()).item()
        return Result(
            task=self.name,
            seed=seed,
            lr=lr,
            steps=curve[-1][0],
            steps_to_target=reached,
            final_loss=curve[-1][1],
            final_accuracy=None,
            seconds=time.perf_counter() - started,
            curve=thin(curve),
            extras={"norm_over_smallest": squared_norm / smallest_squared_norm(targets)},
        )


RELU = ReluTask()
