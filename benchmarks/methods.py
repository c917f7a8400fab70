"""What is compared: each method makes an optimizer from a task's base optimizer class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.tasks import BuildOptimizer
from gapaware import GapAware

Method = Callable[[type[torch.optim.Optimizer]], BuildOptimizer]


def base_alone(base: type[torch.optim.Optimizer]) -> BuildOptimizer:
    """The optimizer of the task, as its users would build it."""

    def build(params: Any, lr: float, **base_kwargs: Any) -> torch.optim.Optimizer:
        return base(params, lr=lr, **base_kwargs)  # type: ignore[call-arg]

    return build


def gapaware(base: type[torch.optim.Optimizer]) -> BuildOptimizer:
    """GapAware around it, at default settings."""

    def build(params: Any, lr: float, **base_kwargs: Any) -> torch.optim.Optimizer:
        return GapAware(base(params, lr=lr, **base_kwargs))  # type: ignore[call-arg]

    return build


METHODS: dict[str, Method] = {"base": base_alone, "gapaware": gapaware}
