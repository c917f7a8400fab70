"""The built-in control law: steer the scale-free adiabaticity a to a target a*.

    f ← clip(f · clip((a*/a)^κ, ½, 1.2), f_min, f_max)

A small a means that the last updates point the same way and keep doing so: the optimizer is creeping along
a plateau and may go faster. A large a means that they turn.
"""

from gapaware.controller import Decision, Observation

KAPPA = 0.1
GROWTH, RETREAT = 1.2, 0.5


def adiabatic_law(observation: Observation) -> Decision:
    """One step of the law.

    Example:
        >>> import gapaware.law
    """
    seen = observation.spectrum
    if seen is None:
        return Decision(observation.scale, "too few updates yet", memory=observation.memory)
    factor = (observation.target / max(seen.adiabaticity, 1e-12)) ** KAPPA
    factor = min(max(factor, RETREAT), GROWTH)
    scale = observation.scale * factor
    why = f"a = {seen.adiabaticity:.2g}, target {observation.target:g}: x{factor:.2f}"
    return Decision(scale, why, memory=observation.memory)
