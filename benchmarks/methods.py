"""What is compared: each method makes an optimizer from a task's base optimizer class.

A method is a name, the points of its sweep and a function of such a point. The base alone is swept over
the very factors that GapAware may put on the learning rate, GapAware runs at its defaults, and every
rival (see `benchmarks.rivals`) has a sweep of the same size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.tasks import BuildOptimizer
from gapaware import GapAware

Base = type[torch.optim.Optimizer]
Point = float | tuple[float, float] | None
SWEEP = 7
WHOLE_RUN = 10_000  # records; GapAware's default keeps the last 1000 only
LR_FACTORS: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True)
class Occasion:
    """What a method may know of the run beside its base optimizer.

    Attributes:
        seed: of the run.
        scales: the factors of GapAware in its run of the same task and seed, evenly spaced in time.
    """

    seed: int = 0
    scales: tuple[float, ...] = ()


@dataclass(frozen=True)
class Method:
    """A way to make an optimizer, with the sweep that finds its best setting.

    Attributes:
        name: in results and tables.
        swept: what the points are; empty for a method at its defaults.
        points: of the sweep.
        make: builds an optimizer around, or in place of, a base.
        lr_swept: whether the points are factors on the task's learning rate.
        replays: whether it needs the factors of GapAware's own run.
    """

    name: str
    swept: str
    points: tuple[Point, ...]
    make: Callable[[Base, Point, Occasion], BuildOptimizer]
    lr_swept: bool = False
    replays: bool = False


def base_alone(base: Base, _: Point = None, __: Occasion | None = None) -> BuildOptimizer:
    """The optimizer of the task, as its users would build it."""

    def build(params: Any, lr: float, **base_kwargs: Any) -> torch.optim.Optimizer:
        return base(params, lr=lr, **base_kwargs)  # type: ignore[call-arg]

    return build


def gapaware(base: Base, _: Point = None, __: Occasion | None = None) -> BuildOptimizer:
    """GapAware around it, at default settings, with the loss logged at each step."""
    build_unlogged = gapaware_without_loss(base)

    def build(params: Any, lr: float, **base_kwargs: Any) -> torch.optim.Optimizer:
        optimizer: Any = build_unlogged(params, lr, **base_kwargs)
        optimizer.report = lambda loss: optimizer.log(loss=loss)
        return optimizer  # type: ignore[no-any-return]

    return build


def gapaware_without_loss(
    base: Base, _: Point = None, __: Occasion | None = None
) -> BuildOptimizer:
    """The same with nothing but `step()`: all that it goes by are the updates."""

    def build(params: Any, lr: float, **base_kwargs: Any) -> torch.optim.Optimizer:
        return GapAware(base(params, lr=lr, **base_kwargs), history_size=WHOLE_RUN)  # type: ignore[call-arg]

    return build


BASE = Method("base", "lr", LR_FACTORS, base_alone, lr_swept=True)
GAPAWARE = Method("gapaware", "", (None,), gapaware)
NO_LOSS = Method("gapaware-no-loss", "", (None,), gapaware_without_loss)
