"""Fine-tuning with scores along the way, and scores along a walk back to the start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.forgetting_tasks import Examples, ForgettingTask, Point, State, copy_of

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def score_steps(steps: int, points: int) -> list[int]:
    """Steps at which a run is scored: about evenly spaced in the logarithm, the last always.

    >>> score_steps(100, 6)
    [1, 3, 6, 16, 40, 100]
    """
    return sorted({max(1, round(steps ** (i / (points - 1)))) for i in range(points)})


def linear_decay(
    optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The Trainer's default schedule: from the full learning rate in a line to zero."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))


def finetune(
    task: ForgettingTask,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    seed: int,
    *,
    steps: int | None = None,
    loss: Callable[[nn.Module, Examples], Tensor] | None = None,
    around_step: Callable[[Callable[[], object], float], None] | None = None,
    measure: Callable[[float], Point] | None = None,
) -> list[Point]:
    """Train `model` in place on the new domain and score it at step 0 and now and then.

    Args:
        task: what is learned.
        model: as `task.pretrain` made it.
        optimizer: of its parameters.
        seed: of the batches and of dropout.
        steps: the task's own number when None.
        loss: of model and batch; the task's own when None.
        around_step: called instead of the optimizer's step, with the step and the batch's loss.
        measure: scores at a step; of the model itself when None.
    """
    steps = steps or task.steps
    loss = loss or task.loss
    measure = measure or (lambda at: task.measure(model, at, seed))
    scheduler = linear_decay(optimizer, steps)
    scored = set(score_steps(steps, task.points))
    points = [measure(0)]
    torch.manual_seed(seed)
    model.train()
    for step, batch in zip(range(1, steps + 1), task.batches(seed), strict=False):
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if around_step:
            around_step(optimizer.step, value.item())
        else:
            optimizer.step()
        scheduler.step()
        if step in scored:
            points.append(measure(step))
    return points


def straight_line(
    start: State, end: State, fresh: Sequence[str] = (), shares: Iterable[float] = SHARES
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Weights start + c (end − start) for each share c; those that start with `fresh` stay at the end."""
    for share in shares:
        yield (
            share,
            {
                name: value
                if name.startswith(tuple(fresh)) or not value.is_floating_point()
                else torch.lerp(start[name], value, share)
                for name, value in end.items()
            },
        )


def walk(
    task: ForgettingTask,
    model: nn.Module,
    places: Iterable[tuple[float, State]],
    seed: int,
) -> list[Point]:
    """Scores of `model` with each of the states; its own weights are put back at the end."""
    own = copy_of(model)
    points = []
    for at, state in places:
        model.load_state_dict(state)
        points.append(task.measure(model, at, seed))
    model.load_state_dict(own)
    return points
