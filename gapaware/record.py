"""One record of the history: what was seen at a snapshot, what was decided and why."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from gapaware.scaling import Scales
from gapaware.sighting import Sighting
from gapaware.steering import Outcome


def record(
    sighting: Sighting,
    outcome: Outcome,
    after: Sequence[Scales],
    metrics: Mapping[str, float],
    clock: Mapping[str, float],
    back_to: int | None = None,
) -> dict[str, Any]:
    """Describe a snapshot in plain values.

    Args:
        sighting: the snapshot.
        outcome: what came of it.
        after: factors on each row from now on.
        metrics: what was logged since the snapshot before; "loss" gets a place of its own.
        clock: times and the interval.
        back_to: the step whose weights are in the model again, where they have gone back.

    Returns:
        With the keys step, lr and lr_scaled (a value for each parameter group that trains, before and
        after scaling), scale (the factor during the update), next_scale (the one decided on),
        weight_decay_scale, regime, decision, why and spectrum; risk (of forgetting) where the start is
        known; pull, push, average and momentum_scale (those decided on) where there are any; scales by row
        when there are several factors; loss and metrics where they were logged; back_to where there is
        one; and those of `clock`.
    """
    during = sighting.conditions[-1]
    by_group: dict[int, tuple[float, float]] = {}
    for group, lr, scale in zip(sighting.groups, during.lrs, during.scales, strict=True):
        by_group.setdefault(group, (lr, scale))
    seen = outcome.spectrum
    described: dict[str, Any] = {
        "step": sighting.step,
        **clock,
        "lr": [lr for lr, _ in by_group.values()],
        "lr_scaled": [lr * scale for lr, scale in by_group.values()],
        "scale": during.scales[0],
        "next_scale": after[0].lr,
        "weight_decay_scale": after[0].weight_decay,
        "regime": seen.regime if seen else "undetermined",
        "decision": outcome.action,
        "why": outcome.why,
        "spectrum": seen.as_record() if seen else None,
    }
    risk = None if sighting.risk is None else float(sighting.risk.result())
    if risk is not None and isfinite(risk):
        described["risk"] = risk
    for name in ("pull", "push", "average"):
        if getattr(after[0], name):
            described[name] = getattr(after[0], name)
    if after[0].momentum != 1.0:
        described["momentum_scale"] = after[0].momentum
    if outcome.several:
        described["scales"] = dict(zip(sighting.names, during.scales, strict=True))
    if "loss" in metrics:
        described["loss"] = metrics["loss"]
    others = {name: value for name, value in metrics.items() if name != "loss"}
    if others:
        described["metrics"] = others
    if back_to is not None:
        described["back_to"] = back_to
    return described


def fault_record(step: int, interval: int, why: str, back_to: int | None = None) -> dict[str, Any]:
    """Describe a fault after which the factors were taken off."""
    described: dict[str, Any] = {
        "step": step,
        "interval": interval,
        "scale": 1.0,
        "regime": "undetermined",
        "decision": "fault",
        "why": why,
        "spectrum": None,
    }
    if back_to is not None:
        described["back_to"] = back_to
    return described
