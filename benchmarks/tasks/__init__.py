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

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

Curve = list[tuple[int, float, float | None]]


class BuildOptimizer(Protocol):
    """Makes the optimizer under test from what a user would pass to the base optimizer."""

    def __call__(
        self, params: Iterable[tuple[str, nn.Parameter]], lr: float, **base_kwargs: Any
    ) -> torch.optim.Optimizer:
        """Build it."""
        ...


@dataclass(frozen=True)
class Result:
    """What one run of one task came to.

    `steps_to_target` is None when the target was not reached within the budget (censored); `steps` is
    smaller than the budget then only if the run diverged: two evaluations in a row that are not finite.
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
    cpu_seconds: float
    curve: tuple[tuple[int, float, float | None], ...] = ()
    extras: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Training:
    """What a task makes from a seed.

    Attributes:
        model: freshly initialized.
        loss: the training loss on the next batch.
        evaluate: held-out loss and accuracy (None where there is none); told whether the run ends here,
            so that the last evaluation may be the more exact one.
        extras: what only this task measures, at the end.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    evaluate: Callable[[bool], tuple[float, float | None]]
    extras: Callable[[], dict[str, float]] = dict


@dataclass(frozen=True)
class Task:
    """A benchmark task: immutable settings and one way to run them.

    Attributes:
        name: how results call it.
        setup: makes model and data from a seed.
        lr: what its user chose: small on the tasks with a plateau, tuned on those without.
        budget: steps after which a run ends.
        target: what ends the run and the count in `Result.steps_to_target`: a held-out accuracy, or a
            held-out loss with `target_is_loss`. None where only the end of the run is compared.
        check_every: steps between evaluations.
        base: the optimizer class that the task is meant for.
        base_kwargs: what it gets beside the parameters and the lr.
        schedule: makes the learning rate's scheduler from optimizer and budget; constant when None.
        clip: largest norm of the gradient, if any.
        tuned_on: whether defaults were chosen on it.
    """

    name: str
    setup: Callable[[int], Training]
    lr: float
    budget: int
    target: float | None = None
    target_is_loss: bool = False
    check_every: int = 10
    base: type[torch.optim.Optimizer] = torch.optim.AdamW
    base_kwargs: dict[str, Any] = field(default_factory=dict)
    schedule: Callable[[torch.optim.Optimizer, int], LRScheduler] | None = None
    clip: float | None = None
    tuned_on: bool = False

    def reached(self, loss: float, accuracy: float | None) -> bool:
        """Whether the target is met."""
        if self.target is None:
            return False
        if self.target_is_loss:
            return loss <= self.target
        return accuracy is not None and accuracy >= self.target

    def run(
        self,
        build_optimizer: BuildOptimizer,
        *,
        seed: int,
        lr: float | None = None,
        budget: int | None = None,
    ) -> Result:
        """Train once and stop at the target; `lr` and `budget` default to the task's own."""
        lr, budget = lr or self.lr, budget or self.budget
        training = self.setup(seed)
        optimizer = build_optimizer(training.model.named_parameters(), lr, **self.base_kwargs)
        scheduler = self.schedule(optimizer, budget) if self.schedule else None
        report = getattr(optimizer, "report", None)

        curve: Curve = []
        reached = None
        started, started_cpu = time.perf_counter(), time.process_time()
        for step in range(1, budget + 1):
            optimizer.zero_grad()
            loss = training.loss()
            loss.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(training.model.parameters(), self.clip)
            if report is not None:
                report(loss)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if step % self.check_every == 0 or step == budget:
                with evaluating(optimizer):
                    curve.append((step, *training.evaluate(step == budget)))
                if self.reached(*curve[-1][1:]):
                    reached = step
                    break
                # once may be less than what a method that goes back needs
                if len(curve) > 1 and not any(math.isfinite(loss) for _, loss, _ in curve[-2:]):
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
            cpu_seconds=time.process_time() - started_cpu,
            curve=thin(curve),
            extras=training.extras(),
        )


@contextmanager
def evaluating(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let an optimizer that trains at another point than it is judged at change between them."""
    switches = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    if switches:
        optimizer.eval()
    with torch.no_grad():
        yield
    if switches:
        optimizer.train()


def thin(curve: Sequence[Any], keep: int = 60) -> tuple[Any, ...]:
    """At most `keep` evenly spaced points of a curve, the last one always among them."""
    stride = max(1, -(-len(curve) // keep))
    return tuple(curve[(len(curve) - 1) % stride :: stride])
