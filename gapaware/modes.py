"""What the modes are: a law, its target, and how far it may go."""

from dataclasses import dataclass

from gapaware.controller import Controller
from gapaware.law import DRIFT_TARGET, drift_law
from gapaware.retain_law import FIRST_PULL, RETAIN_TARGET, retain_law


@dataclass(frozen=True)
class Mode:
    """The defaults that go with a value of `mode`.

    Attributes:
        law: the built-in controller, None to observe only.
        target: what it steers to.
        max_scale: largest factor on the learning rate.
        max_push: strongest push along the recent steps.
        first_pull: towards the starting weights, before there is anything to decide on; 0 in a mode that
            keeps none.
    """

    law: Controller | None
    target: float
    max_scale: float = 1.0
    max_push: float = 0.0
    first_pull: float = 0.0


AUTO = "auto"
MODES = {
    "escape": Mode(drift_law, DRIFT_TARGET, max_scale=64.0, max_push=2.0),
    "retain": Mode(retain_law, RETAIN_TARGET, first_pull=FIRST_PULL),
    "observe": Mode(None, DRIFT_TARGET),
}
NAMES = (AUTO, *MODES)


def resolve(mode: str, *, anchored: bool) -> str:
    """What "auto" stands for: who names weights to go back to has a skill to lose.

    Example:
        >>> resolve("auto", anchored=True), resolve("auto", anchored=False)
        ('retain', 'escape')
    """
    if mode != AUTO:
        return mode
    return "retain" if anchored else "escape"
