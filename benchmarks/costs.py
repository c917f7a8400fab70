"""What GapAware costs in time: measurements, each of them a row of plain values."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpt2 import LR, RIVALS_OF_ADAMW, WRAPPED, Trainee
from benchmarks.timing import interleaved, seconds
from gapaware import Decision, GapAware
from gapaware.momentum import FIRST_MEMORIES, memory_steps

Row = dict[str, Any]

WINDOW = 10
# what takes a copy of the weights, at its strongest
EXTRAS = {
    "pushing": Decision(1.0, "as on a plateau", push=2.0),
    "averaging": Decision(1.0, "as where the weights wander", average=True),
}


def step_with_gapaware(
    trainee: Trainee, base: str, interval: int | str, budget: float, *, extra: str | None = None
) -> Row:
    """Training steps with GapAware around an optimizer, against steps of that very optimizer alone.

    Model and state are the same ones, so that nothing else differs.

    Args:
        trainee: what is trained.
        base: a name in `gpt2.WRAPPED`.
        interval: of GapAware; "auto" is the default, which is timed at rest, as in most of a long run.
        budget: seconds to spend.
        extra: a name in `EXTRAS`, of what is done to the weights at each step.
    """
    deciding = {"controller": lambda _: EXTRAS[extra]} if extra else {}
    optimizer = wrapped(trainee, base, interval, **deciding)
    if extra == "averaging":
        optimizer.train()  # somebody evaluates
    trainee.step(optimizer.base)
    pass_the_start(optimizer, trainee.parameters)
    fill(optimizer, trainee.parameters)
    if interval == "auto" and not extra:
        settle_down(optimizer, trainee.parameters)
    trainee.step(optimizer)
    inside, begun = optimizer.seconds, optimizer.history[-1]["step"]
    repeats = optimizer.interval
    rounds = interleaved(
        lambda: trainee.step(optimizer.base),
        lambda: trainee.step(optimizer),
        trainee.device,
        repeats=repeats,
        budget=budget,
    )
    refuse_faults(optimizer)
    steps = len(rounds) * repeats
    during = [record for record in optimizer.history if record["step"] > begun]
    refuse_another_push(during, EXTRAS[extra].push if extra else 0.0)
    return {
        "measure": "step",
        "base": base,
        "method": f"gapaware-{extra}" if extra else "gapaware",
        "interval": interval if interval != "auto" else steps / len(during),
        "defaults": interval == "auto",
        "rounds": rounds,
        "step_seconds": median(alone for alone, _ in rounds) / repeats,
        "inside_seconds": (optimizer.seconds - inside) / steps,
    }


def step_with_rival(trainee: Trainee, name: str, budget: float) -> Row:
    """Training steps with a rival around AdamW, or in its place, against steps of AdamW alone."""
    alone = torch.optim.AdamW(trainee.parameters, lr=LR)
    rival = RIVALS_OF_ADAMW[name](trainee.model)
    for optimizer in (alone, rival):
        trainee.step(optimizer)
    rounds = interleaved(
        lambda: trainee.step(alone),
        lambda: trainee.step(rival),
        trainee.device,
        repeats=2,
        budget=budget,
    )
    return {
        "measure": "step",
        "base": "AdamW",
        "method": name,
        "rounds": rounds,
        "step_seconds": median(first for first, _ in rounds) / 2,
    }


def snapshot_of_model(trainee: Trainee, base: str, budget: float) -> Row:
    """A snapshot of a model's parameters against one read of them."""
    optimizer = wrapped(trainee, base, interval=1)
    return {"base": base, **snapshot(optimizer, trainee.parameters, budget)}


def snapshot_of_tensors(
    numbers: int, tensors: int, device: torch.device, budget: float, **arguments: Any
) -> Row:
    """A snapshot of equal float32 tensors against one read of them.

    Args:
        numbers: in all tensors together, about.
        tensors: how many.
        device: where they are.
        budget: seconds to spend.
        arguments: for GapAware.
    """
    torch.manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.randn(numbers // tensors // 64, 64, device=device))
        for _ in range(tensors)
    ]
    optimizer = GapAware(torch.optim.SGD(parameters, lr=LR), interval=1, **arguments)
    return {**arguments, **snapshot(optimizer, parameters, budget, arguments.get("window", WINDOW))}


@torch.no_grad()
def snapshot(
    optimizer: GapAware, parameters: Sequence[Tensor], budget: float, window: int = WINDOW
) -> Row:
    """Time whole steps of GapAware in which the wrapped optimizer has no gradients, so nothing to do.

    Against `sum` over the same tensors, and on CUDA against half a copy of as many bytes besides.
    """
    fill(optimizer, parameters, window + 3)
    device = parameters[0].device
    rounds = interleaved(
        lambda: [parameter.sum() for parameter in parameters],
        optimizer.step,
        device,
        repeats=2,
        budget=budget,
        before=lambda: nudge(parameters),
    )
    refuse_faults(optimizer)
    row = {
        "measure": "snapshot",
        "numbers": sum(parameter.numel() for parameter in parameters),
        "tensors": len(parameters),
        "rounds": rounds,
        "snapshot_seconds": median(taken for _, taken in rounds) / 2,
    }
    if device.type == "cuda":
        source = torch.zeros(sum(p.nbytes for p in parameters), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copies = [seconds(lambda: target.copy_(source), device) for _ in range(20)]
        row["half_copy_seconds"] = median(copies) / 2
    return row


def fill(optimizer: GapAware, parameters: Sequence[Tensor], snapshots: int = WINDOW + 3) -> None:
    """Let GapAware see snapshots of parameters that move, without training them."""
    optimizer.zero_grad()
    for _ in range(snapshots * optimizer.interval):
        nudge(parameters)
        optimizer.step()


def pass_the_start(optimizer: GapAware, parameters: Sequence[Tensor]) -> None:
    """Make the first steps, in which snapshots are closer together than in the rest of a run."""
    optimizer.zero_grad()
    for _ in range((FIRST_MEMORIES + 1) * memory_steps(optimizer.param_groups)):
        nudge(parameters)
        optimizer.step()


def settle_down(optimizer: GapAware, parameters: Sequence[Tensor]) -> None:
    """Let GapAware see so little for so long that its snapshots are further apart."""
    usual = optimizer.interval
    for _ in range(10 * WINDOW * usual):
        nudge(parameters)
        optimizer.step()
        if optimizer.interval > usual:
            return
    raise RuntimeError(f"not a measurement: snapshots stay {usual} steps apart")


@torch.no_grad()
def nudge(parameters: Sequence[Tensor]) -> None:
    """Move every parameter a little, as a step would."""
    torch._foreach_mul_(list(parameters), [1 + random.gauss(0, 1e-4) for _ in parameters])


def wrapped(trainee: Trainee, base: str, interval: int | str, **arguments: Any) -> GapAware:
    """GapAware around an optimizer of a model."""
    with warnings.catch_warnings():
        # at interval=1 nothing is ever raised on AdamW; what a snapshot costs is the same
        warnings.filterwarnings("ignore", message="interval=1 .*the window is shorter")
        return WRAPPED[base](trainee.model, interval=interval, **arguments)


def refuse_another_push(records: Sequence[Row], wanted: float) -> None:
    """Raise where the weights were pushed, or were not, against what is measured."""
    if any(record.get("push", 0.0) != wanted for record in records):
        raise RuntimeError(f"not a measurement: {'no' if wanted else 'a'} push during it")


def refuse_faults(optimizer: GapAware) -> None:
    """Raise where GapAware met a fault, since it may have done nothing from then on."""
    for record in optimizer.history:
        if record["decision"] == "fault":
            raise RuntimeError(f"not a measurement: {record['why']}")
