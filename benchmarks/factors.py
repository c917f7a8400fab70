"""Rivals that multiply the base's learning rate by a factor that changes in time, as GapAware does.

The factor is put on within a step and taken off after it, so that it goes together with any scheduler.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.methods import Base, Occasion, Point
from benchmarks.tasks import BuildOptimizer
from gapaware.momentum import interval_for, memory_steps

BOUND = 64.0  # of GreedyLR's factor, as of GapAware's


def dressed(base: Base, dress: Callable[[torch.optim.Optimizer], None]) -> BuildOptimizer:
    """The base optimizer with something attached to it."""

    def build(params: Any, lr: float, **base_kwargs: Any) -> torch.optim.Optimizer:
        optimizer = base(params, lr=lr, **base_kwargs)  # type: ignore[call-arg]
        dress(optimizer)
        return optimizer

    return build


def multiply_lr(optimizer: torch.optim.Optimizer, factor: Callable[[], float]) -> None:
    """Scale the learning rate within each step, whatever a scheduler does to it between them.

    Args:
        optimizer: gets hooks before and after its step.
        factor: asked once a step.
    """
    given: list[float] = []

    def scale(*_: Any) -> None:
        given[:] = [group["lr"] for group in optimizer.param_groups]
        now = factor()
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * now

    def restore(*_: Any) -> None:
        for group, lr in zip(optimizer.param_groups, given, strict=True):
            group["lr"] = lr

    optimizer.register_step_pre_hook(scale)
    optimizer.register_step_post_hook(restore)


class Bumps:
    """Factors drawn from given ones, each kept for a while: their distribution without their timing.

    Args:
        scales: what is drawn from, with replacement.
        hold: steps for which a factor is kept.
        seed: of the draws.

    Raises:
        ValueError: there is nothing to draw from.
    """

    def __init__(self, scales: Sequence[float], hold: int, seed: int) -> None:
        if not scales:
            raise ValueError(
                "scales=(): nothing to draw from; run GapAware on the task and seed first"
            )
        self.scales = tuple(scales)
        self.hold = hold
        self.steps = 0
        self.factor = 1.0
        self.draw = random.Random(seed)

    def __call__(self) -> float:
        """The factor on the next step."""
        if self.steps % self.hold == 0:
            self.factor = self.draw.choice(self.scales)
        self.steps += 1
        return self.factor


def random_bumps(base: Base, point: Point, occasion: Occasion) -> BuildOptimizer:
    """The factors of GapAware's own run, in random order; the sweep is over how long each is kept.

    The point counts GapAware's intervals between snapshots, so that 1 changes as often as GapAware may.
    """

    def dress(optimizer: torch.optim.Optimizer) -> None:
        interval = interval_for(memory_steps(optimizer.param_groups))
        hold = int(point) * interval  # type: ignore[arg-type]
        multiply_lr(optimizer, Bumps(occasion.scales, hold, occasion.seed))

    return dressed(base, dress)


def _unit() -> torch.optim.Optimizer:
    """Something for a scheduler to act on, whose learning rate is then a factor."""
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def reduce_on_plateau(base: Base, _: Point, __: Occasion) -> BuildOptimizer:
    """ReduceLROnPlateau of torch, at its defaults, an epoch being 20 steps; the sweep is over the lr."""

    def dress(optimizer: torch.optim.Optimizer) -> None:
        unit, losses = _unit(), []
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(unit)

        def report(loss: torch.Tensor) -> None:
            losses.append(float(loss.detach()))
            if len(losses) == 20:
                scheduler.step(sum(losses) / len(losses))
                losses.clear()

        optimizer.report = report  # type: ignore[attr-defined]
        multiply_lr(optimizer, lambda: unit.param_groups[0]["lr"])

    return dressed(base, dress)


def greedy_lr(base: Base, point: Point, _: Occasion) -> BuildOptimizer:
    """GreedyLR (arXiv 2512.14527) on the smoothed loss, between 1/64 and 64 times the lr."""
    from transformers.optimization import GreedyLR  # slow to import, and only this rival needs it

    def dress(optimizer: torch.optim.Optimizer) -> None:
        unit = _unit()
        scheduler = GreedyLR(
            unit,
            patience=int(point),  # type: ignore[arg-type]
            smooth=True,
            min_lr=1 / BOUND,
            max_lr=BOUND,
        )
        optimizer.report = lambda loss: scheduler.step(float(loss.detach()))  # type: ignore[attr-defined]
        multiply_lr(optimizer, lambda: unit.param_groups[0]["lr"])

    return dressed(base, dress)
