"""The law of mode="retain": a pull towards the starting weights that gives way ever more slowly.

What was tried on the way to it is in benchmarks/LOG.md.
"""

from dataclasses import replace

from gapaware.controller import Decision, Observation
from gapaware.law import DRIFT_TARGET, drift_law

RETAIN_TARGET = 0.25
FIRST_PULL = 0.2


def retain_law(observation: Observation) -> Decision:
    """Let the pull ρ towards the starting weights give way adiabatically.

    The weights follow the equilibrium between gradient and pull at the rate ρ, so that the equilibrium may
    move only at a rate that is small against it. With |dρ/dt| = 𝒜*·ρ², rate of change over gap squared as
    in the adiabatic parameter 𝒜, the pull after t steps is

        ρ = 1 / (1/ρ_0 + 𝒜*·t)

    whatever the learning rate and the length of the run. The learning rate is left alone, unless the user
    allows a `max_scale` above 1: then `drift_law` raises it where the gradient pushes steadily against the
    pull, which it sees in the updates of the wrapped optimizer alone, and chooses when to look again. The
    first pull lasts until there is a spectrum, which is sooner then.
    """
    pull = pull_at(observation.target, observation.step)
    why = f"pull {pull:.2g} towards the start"
    if observation.max_scale <= 1:
        return Decision(1.0, why, pull=pull)
    growth = drift_law(replace(observation, target=DRIFT_TARGET))
    return replace(growth, why=f"{why}; {growth.why}", pull=pull)


def pull_at(target: float, step: int) -> float:
    """The pull ρ after this many optimizer steps, which takes no window to know."""
    return 1 / (1 / FIRST_PULL + target * step)
