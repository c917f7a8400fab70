"""What every benchmark task has in common: a frozen description, one `run`, one `Result`.

A task is ordinary user code (model, loss, optimizer, scheduler, loop) that knows nothing about
`gapaware`. The caller decides what is measured by passing `build_optimizer`::

    def wrapped(params, lr, **kwargs):
        return GapAware(torch.optim.AdamW(params, lr=lr, **kwargs))

    result = modular.ADD.run(wrapped, seed=0)

Everything random in a run (data split, initialization, batches) follows from `seed` alone, so
two methods with the same seed see the same data in the same order and can be compared in pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch


class BuildOptimizer(Protocol):
    """Makes the optimizer under test from what a user would pass to the base optimizer."""

    def __call__(
        self, params: Iterable[torch.nn.Parameter], lr: float, **base_kwargs: Any
    ) -> torch.optim.Optimizer:
        """Build it."""
        ...


@dataclass(frozen=True)
class Result:
    """What one run of one task came to.

    `steps_to_target` is None when the target was not reached within the budget (censored).
    `curve` holds (step, held-out loss, held-out accuracy or None) at a few evenly spaced steps.
    `extras` holds what only one task measures, e.g. the norm of an interpolator.
    """

    task: str
    seed: int
    lr: float
    steps: int
    steps_to_target: int | None
    final_loss: float
    final_accuracy: float | None
    seconds: float
    curve: tuple[tuple[int, float, float | None], ...] = ()
    extras: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        return asdict(self)


class Task(Protocol):
    """A benchmark task: immutable settings and one way to run them.

    `base` and `base_kwargs` name the optimizer that the task is meant for; `base_kwargs` is what
    `run` hands to `build_optimizer` beside the parameters and the lr.
    `target` is the value that ends the count in `Result.steps_to_target`; None where only the
    end of the run is compared.
    """

    @property
    def name(self) -> str:
        """How results call the task."""
        ...

    @property
    def base(self) -> type[torch.optim.Optimizer]:
        """The optimizer class that the task is meant for."""
        ...

    @property
    def base_kwargs(self) -> dict[str, Any]:
        """What `run` passes to it beside the parameters and the lr."""
        ...

    @property
    def lr(self) -> float:
        """The tuned learning rate."""
        ...

    @property
    def budget(self) -> int:
        """Steps after which a run ends."""
        ...

    @property
    def target(self) -> float | None:
        """What ends the count of steps, if anything."""
        ...

    def run(
        self,
        build_optimizer: BuildOptimizer,
        *,
        seed: int,
        lr: float | None = None,
        budget: int | None = None,
    ) -> Result:
        """Train once; `lr` and `budget` default to the task's own."""
        ...


def thin(
    curve: list[tuple[int, float, float | None]], keep: int = 60
) -> tuple[tuple[int, float, float | None], ...]:
    """At most `keep` evenly spaced points of a curve, the last one always among them."""
    stride = max(1, -(-len(curve) // keep))
    return tuple(curve[(len(curve) - 1) % stride :: stride])
