"""The built-in control laws: what a snapshot means for the learning rate.

`drift_law`, for the modes "auto" and "escape", raises the learning rate while the motion is persistent
and the spectrum quiet. `retain_law`, for "retain", pulls towards the starting weights, ever more slowly.
What was tried on the way to them is in benchmarks/LOG.md.
"""

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
STRONG = 0.3
SETBACK = 0.5
RECOVERY = 1.003

# retain_law
RETAIN_TARGET = 0.25
FIRST_PULL = 0.2


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

    Where a drift above 0.3 has led f > 1 into noise, c − s < 0, the motion was a descent that f has made
    unstable: f halves and stays below that ceiling, which rises by 0.3 % a step.
    """
    warms_up = bool(observation.lrs[-1] > 1.0001 * observation.lrs[0])
    highest = max(float(observation.memory.get("highest_lr", 0.0)), float(observation.lrs[-1]))
    memory = {**observation.memory, "highest_lr": highest}

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
    # a warm-up has its peak before it
    peak = highest if warms_up else max(highest, observation.peak_lr)
    if observation.lrs[-1] < ANNEALED * peak:
        return decide(1.0, f"{figures}: the schedule cools down, hold")
    factor, why = _by_drift(seen, observation.target, float(observation.spans[-1]))
    if factor > 1 and warms_up:
        factor, why = 1.0, "the schedule warms up, hold"
    elif factor > 1 and a > QUIET:
        factor, why = 1.0, "drift, but the spectrum turns, hold"
    ceiling, strongest = _ceiling(observation, seen)
    if strongest == 0.0 < float(observation.memory.get("strongest_drift", 0.0)):
        why = "drift lost in noise, back to half"
    memory |= {"ceiling": ceiling, "strongest_drift": strongest}
    return decide(min(factor, ceiling / observation.scale), f"{figures}: {why}")


def _ceiling(observation: Observation, seen: Drift) -> tuple[float, float]:
    """Largest factor for now, and the strongest drift under a factor since the last setback."""
    scale = observation.scale
    ceiling = float(observation.memory.get("ceiling", observation.max_scale))
    strongest = float(observation.memory.get("strongest_drift", 0.0))
    if scale > 1:
        strongest = max(strongest, seen.mean)
        if seen.mean < seen.doubt and strongest > STRONG:
            return max(1.0, SETBACK * scale), 0.0
    recovered = ceiling * RECOVERY ** float(observation.spans[-1])
    return min(recovered, observation.max_scale), strongest


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


def retain_law(observation: Observation) -> Decision:
    """Let the pull ρ towards the starting weights give way adiabatically; leave the learning rate alone.

    The weights follow the equilibrium between gradient and pull at the rate ρ, so that the equilibrium may
    move only at a rate that is small against it. With |dρ/dt| = 𝒜*·ρ², rate of change over gap squared as
    in the adiabatic parameter 𝒜, the pull after t steps is

        ρ = 1 / (1/ρ_0 + 𝒜*·t)

    whatever the learning rate and the length of the run.
    """
    pull = 1 / (1 / FIRST_PULL + observation.target * observation.step)
    return Decision(1.0, f"pull {pull:.2g} towards the start", pull=pull)
