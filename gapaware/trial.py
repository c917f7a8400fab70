"""Whether a raised factor does good, from the loss since the weights were kept.

As in a trust region, whose step is all that happens between two copies of the weights: it is taken where
the loss has fallen, and otherwise undone and tried again with a smaller factor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from gapaware.trend import LIFT, Trend

# of the loss: what is lost, and what is gained beyond the first plateau, beside its noise
LOST, GAINED = 0.06, 0.015
# snapshots in which it may stand still at the largest factor, or for as long a way with a smaller one
STILL = 30
# a smaller factor is hardly one: neither worth another try, nor is what it did undone
SMALL = 5.0
# a guess by the loss alone goes this far, and on if nothing comes of it in so many snapshots
FAR, NEAR, AT_IT = 16.0, 15, (0.9, 1.5)


@dataclass(frozen=True)
class Trial:
    """What came of a raised factor so far.

    Attributes:
        kept: the trend of the loss when the weights were kept; None where they are not.
        age: snapshots since then.
        still: the sum of the factors in the last snapshots, in all of which the loss stood still.
        near: snapshots on the first plateau in which the factor was `FAR`.
        largest: factor since they were kept.

    Example:
        >>> begun = Trend()
        >>> for _ in range(20):
        ...     begun = begun.after(1.0)
        >>> trial, trend = Trial(kept=begun), begun
        >>> for _ in range(31):
        ...     trend = trend.after(1.0)
        ...     trial = trial.after(64.0, trend)
        >>> trial.idle(trend, max_scale=64.0), trial.spoilt(trend.after(2.0).after(2.0).after(2.0))
        (True, True)
    """

    kept: Trend | None = None
    age: int = 0
    still: float = 0.0
    near: int = 0
    largest: float = 1.0

    def after(self, scale: float, trend: Trend) -> "Trial":
        """The trial with one more snapshot at this factor."""
        age, largest = self.age + 1, max(self.largest, scale)
        if trend.unknown:
            return replace(self, age=age, largest=largest)
        low, high = AT_IT
        near = self.near + (trend.lifted and low * FAR <= scale < high * FAR)
        stands = scale > 1 and (trend.flat or trend.lifted)
        still = self.still + scale if stands else 0.0
        return replace(self, age=age, still=still, near=near, largest=largest)

    def begun(self, trend: Trend) -> "Trial":
        """The trial that begins where the weights are kept now; without a loss nothing is known of it."""
        return replace(self, kept=None if trend.unknown else trend, age=0, largest=1.0)

    def given_up(self, *, keeps: bool) -> "Trial":
        """The trial after a return to the weights that were kept, and are still if it `keeps` them."""
        kept = self.kept if keeps else None
        return replace(self, kept=kept, age=0, still=0.0, largest=1.0)

    @property
    def reach(self) -> float:
        """How far a guess by the loss alone may raise the factor."""
        return FAR if self.near <= NEAR else inf

    @property
    def early(self) -> bool:
        """Whether it began on the first plateau."""
        return self.kept is not None and not self.kept.left

    @property
    def _origin(self) -> Trend | None:
        """The trend to go back to; None where there is none, or no way from there worth undoing."""
        return self.kept if self.largest >= SMALL else None

    def spoilt(self, trend: Trend) -> bool:
        """Whether the loss is more than 6 % above what it was when the weights were kept."""
        return self._origin is not None and trend.since(self._origin) > LOST

    def gained(self, trend: Trend) -> bool:
        """Whether it is below that by 1.5 %, or 6 % on the first plateau."""
        if self.kept is None:
            return False
        return trend.since(self.kept) < -(GAINED if self.kept.left else LIFT)

    def idle(self, trend: Trend, max_scale: float, *, ends: bool = False) -> bool:
        """Whether nothing has come of it.

        Args:
            trend: of the loss now.
            max_scale: the largest factor there may be.
            ends: whether it is over anyway: an update has jumped and turned, or the factor is 1 again.
        """
        spent = ends or self.still > STILL * max_scale
        known = self._origin is not None and not trend.unknown
        return spent and known and not self.gained(trend)

    def to_memory(self) -> dict[str, Any]:
        """Numbers and lists, for `Decision.memory`."""
        kept = None if self.kept is None else self.kept.to_memory()
        return {**vars(self), "kept": kept}

    @classmethod
    def from_memory(cls, memory: Mapping[str, Any] | None) -> "Trial":
        """What `to_memory` gave, perhaps through a checkpoint; none yet from None."""
        if memory is None:
            return cls()
        kept = memory["kept"]
        return cls(**{**memory, "kept": None if kept is None else Trend.from_memory(kept)})
