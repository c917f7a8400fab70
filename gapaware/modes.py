"""What the modes are: a law, its target, and the factors that it may use."""

from dataclasses import dataclass

from gapaware.controller import Controller
from gapaware.law import ADIABATIC_TARGET, DRIFT_TARGET, adiabatic_law, drift_law


@dataclass(frozen=True)
class Mode:
    """The defaults that go with a value of `mode`.

    Attributes:
        law: the built-in controller, None to observe only.
        target: what it steers to.
        first_scale: factor on the learning rate before there is anything to decide on.
        min_scale: smallest factor.
        max_scale: largest factor.
        every_step: whether interval="auto" means every step, or the optimizer's own time scale.
    """

    law: Controller | None
    target: float
    first_scale: float = 1.0
    min_scale: float = 1.0
    max_scale: float = 1.0
    every_step: bool = False


MODES = {
    "auto": Mode(drift_law, DRIFT_TARGET, max_scale=64.0),
    "escape": Mode(drift_law, DRIFT_TARGET, max_scale=64.0),
    "retain": Mode(
        adiabatic_law, ADIABATIC_TARGET, first_scale=0.02, min_scale=0.02, every_step=True
    ),
    "observe": Mode(None, DRIFT_TARGET),
}
