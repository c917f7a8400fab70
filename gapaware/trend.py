"""Whether the loss falls, rises or stands still, as far as its noise allows to tell.

The updates do not show a plateau on which mini-batch noise hides the drift; the loss does. All thresholds
are in units of its own standard error, or relative to its mean.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import hypot, inf, nan, sqrt
from statistics import fmean
from typing import Any

import numpy as np

# flat: the last half of the run has changed the loss by less than this, relative, with its error
FLAT = 0.015
# still on the plateau where the run began: above it by less than this
LIFT = 0.06
# close to where the run began: little to lose
CLOSE = 0.15
NEWEST = 3
# falling fast: by more than this since the last snapshot, relative
PLUNGE = 0.1
# doing well: below by more than this in a dozen losses, or by its share in fewer
FINE = 0.25
# rising: by more than this, relative, beside what its error says
RISE = 0.02
ERRORS = 2.0
# since the weights were kept: errors, and losses from which noise is known
SURE, KNOWN = 3.0, 5
# of the absolute value, in standard deviations
MEDIAN = 0.6745
RECENT = 12
MEANS = 64
FEWEST = 12
LISTS = ("recent", "means", "earlier")


@dataclass(frozen=True)
class Trend:
    """The losses of a run: the last few, and means of equally long stretches of all of it.

    Attributes:
        recent: the last losses, at most 12.
        means: of stretches of `width` losses, at most 64: when they get more, neighbours are joined.
        width: losses in a stretch.
        total: of the losses after the last whole stretch.
        count: their number.
        earlier: losses before the first of them, at most 12: of a run that has hardly begun.

    Example:
        >>> trend = Trend()
        >>> for step in range(100):
        ...     trend = trend.after(1.0 / (1 + step))
        >>> trend.falls, trend.rises, trend.flat, trend.unmoved
        (True, False, False, False)
    """

    recent: tuple[float, ...] = ()
    means: tuple[float, ...] = ()
    width: int = 1
    total: float = 0.0
    count: int = 0
    earlier: tuple[float, ...] = ()

    def after(self, loss: float) -> "Trend":
        """The trend with one more loss."""
        recent = (*self.recent, loss)[-RECENT:]
        means, width, total, count = self.means, self.width, self.total + loss, self.count + 1
        if count >= width:
            means, total, count = (*means, total / count), 0.0, 0
        if len(means) > MEANS:
            # an odd number: the last one begins the first of the longer stretches
            total, count = means[-1] * width, width
            means = tuple((a + b) / 2 for a, b in zip(means[:-1:2], means[1::2], strict=True))
            width *= 2
        return Trend(recent, means, width, total, count, self.earlier)

    def recalling(self, losses: Iterable[float]) -> "Trend":
        """The trend with losses that the law was not asked about; a run's first ones are no plateau."""
        if self.recent:
            return replace(self, recent=(*self.recent, *losses)[-RECENT:])
        return replace(self, earlier=tuple(losses)[-RECENT:])

    @property
    def unknown(self) -> bool:
        """Whether nobody logs a loss."""
        return not self.recent

    @property
    def _noise(self) -> float:
        """Standard deviation of a loss, from a median, since it may have jumped; 0: not known."""
        if len(self.recent) < KNOWN:
            return 0.0
        return float(np.median(np.abs(np.diff(self.recent, 2)))) / (MEDIAN * sqrt(6))

    @property
    def falls(self) -> bool:
        """Whether the second half of the recent losses is below the first by more than its error."""
        change, error = self._recently()
        # a false alarm only holds a factor, a miss takes it away
        return change < -error

    @property
    def plunges(self) -> bool:
        """Whether the newest loss is below the one before by more than 10 % and twice the error."""
        if len(self.recent) < FEWEST:
            return False
        before, newest = self.recent[-2:]
        # from second differences, in which a smooth fall is no noise
        error = sqrt(np.square(np.diff(self.recent, 2)).mean() / 3)
        return before - newest > max(PLUNGE * abs(before), ERRORS * error)

    @property
    def level(self) -> float:
        """Mean of the newest losses, which there have to be."""
        return fmean(self.recent[-NEWEST:])

    def since(self, before: "Trend") -> float:
        """Relative change of the newest losses since an earlier trend; less its error, or 0."""
        if len(self.recent) < KNOWN or not before.recent:
            return 0.0
        level = before.level
        change = self.level - level
        error = SURE * hypot(self._noise, before._noise or self._noise) / sqrt(NEWEST)
        size = abs(level) or 1.0
        return (max(0.0, change - error) + min(0.0, change + error)) / size

    @property
    def fine(self) -> bool:
        """Whether the loss falls by a quarter in a dozen, or at that pace: training does well as it is."""
        dozen = (*self.earlier, *self.recent)[-RECENT:]
        few = min(NEWEST, len(dozen) // 2)
        if few < 2:
            return False
        share = (len(dozen) - few) / (RECENT - NEWEST)
        before = fmean(dozen[:few])
        return fmean(dozen[-few:]) < before - FINE * share * abs(before)

    @property
    def rises(self) -> bool:
        """Whether it is above the first by more than twice its error and 2 %."""
        change, error = self._recently()
        return change > max(ERRORS * error, RISE)

    @property
    def flat(self) -> bool:
        """Whether the last half of the run has left the loss where it was, as is known to 1.5 %."""
        if len(self.means) < FEWEST:
            return False
        change, error = _change(self.means[len(self.means) // 2 :])
        return abs(change) + ERRORS * error < FLAT

    @property
    def left(self) -> bool:
        """Whether the newest losses are more than 6 % below where the run began."""
        return self._so_far() < -LIFT

    @property
    def unmoved(self) -> bool:
        """Whether the loss is where the run began, as is known to 1.5 %: nothing has been gained yet."""
        change, error = self._since_the_start()
        return abs(change) + error < FLAT

    @property
    def close(self) -> bool:
        """Whether the newest losses are within 15 % of where the run began: little to lose."""
        return abs(self._so_far()) < CLOSE

    @property
    def behind(self) -> bool:
        """Whether the newest losses are more than 15 % below where the run began: the plateau is left."""
        return self._so_far() < -CLOSE

    @property
    def lifted(self) -> bool:
        """Whether it is there or up to 6 % above: nothing to lose."""
        change, error = self._since_the_start()
        return change - error > -FLAT and change + error < LIFT

    def _so_far(self) -> float:
        """Relative change from the first losses to the newest; NaN where there are none."""
        if not self.means or self.means[0] == 0:
            return nan
        return (self.level - self.means[0]) / abs(self.means[0])

    def _since_the_start(self) -> tuple[float, float]:
        """Relative change from the first half of the run to the newest losses, and its error."""
        if len(self.recent) < RECENT:
            return inf, inf
        before, after = np.array_split(self.means, 2)
        level, newest = float(np.median(before)), self.recent[RECENT // 2 :]
        size = abs(level) or 1.0
        if level < self.means[0] - LIFT * abs(self.means[0]):
            return inf, inf  # it left soon, and what is seen since is another plateau
        if np.median(after) < level - FLAT * size:
            return inf, inf  # it had left, and came back
        error = ERRORS * _deviation(self.recent) / sqrt(len(newest))
        return (fmean(newest) - level) / size, error / size

    def _recently(self) -> tuple[float, float]:
        return _change(self.recent) if len(self.recent) == RECENT else (0.0, 0.0)

    def to_memory(self) -> dict[str, Any]:
        """Numbers and lists, for `Decision.memory`."""
        # `asdict` would copy number by number, at every snapshot
        return {**vars(self), **{name: list(getattr(self, name)) for name in LISTS}}

    @classmethod
    def from_memory(cls, memory: Mapping[str, Any] | None) -> "Trend":
        """What `to_memory` gave, perhaps through a checkpoint; an empty trend from None."""
        if memory is None:
            return cls()
        lists: dict[str, Any] = {name: tuple(memory.get(name, ())) for name in LISTS}
        return cls(**{**memory, **lists})


def _change(losses: tuple[float, ...]) -> tuple[float, float]:
    """Relative change from the first half to the second, and its error from neighbours' differences."""
    values = np.asarray(losses)
    half = len(values) // 2
    before, after = values[:half], values[half:]
    error = _deviation(losses) * sqrt(1 / len(before) + 1 / len(after))
    size = abs(values.mean()) or 1.0
    return float((after.mean() - before.mean()) / size), float(error / size)


def _deviation(losses: tuple[float, ...]) -> float:
    """Standard deviation of the noise, from the differences of neighbours."""
    return sqrt(np.square(np.diff(losses)).mean() / 2)
