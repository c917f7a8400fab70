"""The built-in control laws: what a snapshot means for the learning rate.

`drift_law`, for the modes "auto" and "escape", raises the learning rate while the motion is persistent
and the spectrum quiet. `adiabatic_law`, for "retain", starts gently and lets the learning rate grow
only as long as the spectrum does not turn. What was tried on the way to them is in benchmarks/LOG.md.
"""

import math

import numpy as np

from gapaware.controller import Decision, Observation
from gapaware.drift import Drift, drift, per_learning_rate
from gapaware.spectrum import adiabaticity

# drift_law
DRIFT_TARGET = 0.06
QUIET = 3.0
GAIN = 0.02
GROWTH = 1.03
SHRINKAGE = 0.98
LEAST_DRIFT = 0.2
ANNEALED = 0.5

# adiabatic_law
ADIABATIC_TARGET = 0.1
KAPPA = 0.1
STEEPEST_RISE, STEEPEST_FALL = 1.2, 0.5


def drift_law(observation: Observation) -> Decision:
    """Grow where motion drifts and the spectrum is quiet, shrink where it bounces, else hold.

    With the drift c ± s of the window (see `gapaware.drift`), its adiabaticity a per learning rate, the
    target c*, and n steps in an update, the factor f becomes

        f · min(((c − s)/c*)^(n·gain), growth^n)  where c − s > c* and a <= 3
        f · max(c/c*, 1/5)^(n·gain)               where c < c*
        f · shrinkage^n at most                   where c − s < 0: drift that may be noise
        f                                         otherwise

    and stays f until the window is full, and once the schedule has come down below half of its peak (it
    cools down on purpose). It does not grow while the schedule warms up (it goes slowly on purpose).
    """
    highest = max(float(observation.memory.get("highest_lr", 0.0)), float(observation.lrs[-1]))
    memory = {"highest_lr": highest}

    def decide(factor: float, why: str) -> Decision:
        return Decision(observation.scale * factor, why, memory=memory)

    distances = observation.lrs * observation.scales * observation.spans
    moved = (np.diag(observation.gram) > 0) & (distances > 0)
    if moved.sum() < observation.window + 1:
        return decide(1.0, "the window is filling")
    gram = per_learning_rate(observation.gram, distances)
    seen = drift(gram[1:, 1:], observation.spans[1:], observation.momentum_memory)
    if seen is None:
        return decide(
            1.0, f"the window is shorter than momentum's {observation.momentum_memory} steps"
        )
    a = adiabaticity(gram)
    figures = f"drift {seen.mean:.2f} ± {seen.doubt:.2f}, a per lr {a:.2g}"
    if observation.lrs[-1] < ANNEALED * highest:
        return decide(1.0, f"{figures}: the schedule cools down, hold")
    factor, why = _by_drift(seen, observation.target, float(observation.spans[-1]))
    if factor > 1 and observation.lrs[-1] > 1.0001 * observation.lrs[0]:
        factor, why = 1.0, "the schedule warms up, hold"
    elif factor > 1 and a > QUIET:
        factor, why = 1.0, "drift, but the spectrum turns, hold"
    return decide(factor, f"{figures}: {why}")


def _by_drift(seen: Drift, target: float, span: float) -> tuple[float, str]:
    certain = seen.mean - seen.doubt
    if certain > target:
        return min((certain / target) ** (GAIN * span), GROWTH**span), "steady drift, grow"
    factor, why = 1.0, "drift near its target, hold"
    if seen.mean < target:
        factor = max(seen.mean / target, LEAST_DRIFT) ** (GAIN * span)
        why = "little drift, shrink"
    if certain < 0:
        factor, why = min(factor, SHRINKAGE**span), "drift not above noise, shrink"
    return factor, why


def adiabatic_law(observation: Observation) -> Decision:
    """Steer the adiabaticity a to its target a*: f ← f · clip((a*/a)^κ, ½, 1.2).

    From a small first factor, the learning rate grows while the updates keep pointing the same way, and
    gives way when they turn.
    """
    a = observation.spectrum.adiabaticity
    factor = math.inf if a == 0 else (observation.target / a) ** KAPPA
    factor = min(max(factor, STEEPEST_FALL), STEEPEST_RISE)
    why = f"a = {a:.2g}, target {observation.target:g}: x{factor:.2f}"
    return Decision(observation.scale * factor, why)
