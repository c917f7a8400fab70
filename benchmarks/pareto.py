"""What was forgotten at the same new score: curves, their lower envelope, and how they compare.

A curve is a list of rows [at, validation loss, validation accuracy, test loss, test accuracy, old loss,
old accuracy] in order: steps of a run, or shares of a walk back to the start. Where a curve passes a
target is read from its validation loss; in between, all figures are interpolated in a line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from scipy.stats import ttest_1samp

AT, VALIDATION, TEST, OLD, OLD_ACCURACY = 0, 1, 3, 5, 6
SHARES = (0.5, 0.8, 0.9, 0.95)
LEAST = 0.01  # smallest forgetting in a ratio, as a share of the default learning rate's

Place = Sequence[float]
Curve = Sequence[Place]
Forgetting = Mapping[object, float | None]


@dataclass(frozen=True)
class Scale:
    """Of one task and seed: where it starts and the best new loss that the base's sweep reached.

    Attributes:
        start: validation loss before, at most that of guessing: unlearning confidence is no gain.
        best: least validation loss in any run of the base alone.
        old: old loss before.
        old_accuracy: old accuracy before.
    """

    start: float
    best: float
    old: float
    old_accuracy: float

    @classmethod
    def of(cls, curves: Sequence[Curve], chance: float) -> Scale:
        """From the trajectories of the base's sweep.

        They all start at the same place, unless there was an earlier stage: then where most is known of
        what came before.
        """
        first = min((curve[0] for curve in curves), key=lambda place: place[OLD])
        best = min(place[VALIDATION] for curve in curves for place in curve)
        return cls(min(first[VALIDATION], chance), best, first[OLD], first[OLD_ACCURACY])

    def target(self, share: float) -> float:
        """The loss at a share of the best gain."""
        return self.start - share * (self.start - self.best)


def at_target(curve: Curve, target: float) -> Place | None:
    """Of the places where the curve is at or below the target, the one with the least old loss.

    >>> curve = [[0, 4.0, 0, 4.0, 0, 1.0, 0], [10, 2.0, 0, 2.0, 0, 3.0, 0]]
    >>> at_target(curve, 3.0)
    [5.0, 3.0, 0.0, 3.0, 0.0, 2.0, 0.0]
    >>> at_target(curve, 1.0) is None
    True
    """
    reached = [place for place in curve if place[VALIDATION] <= target]
    for one, other in pairwise(curve):
        before, after = one[VALIDATION] - target, other[VALIDATION] - target
        if before * after < 0:
            way = before / (before - after)
            reached.append([a + way * (b - a) for a, b in zip(one, other, strict=True)])
    return min(reached, key=lambda place: place[OLD], default=None)


def envelope(curves: Iterable[Curve], target: float) -> Place | None:
    """The best of several curves at a target: the lower envelope of a sweep."""
    places = [place for curve in curves if (place := at_target(curve, target)) is not None]
    return min(places, key=lambda place: place[OLD], default=None)


def area(curves: Sequence[Curve], scale: Scale) -> float | None:
    """Mean forgetting over gains of 50, 55, ..., 95 %; None where a gain is not reached."""
    places = [envelope(curves, scale.target(share / 100)) for share in range(50, 96, 5)]
    if any(place is None for place in places):
        return None
    return fmean(place[OLD] - scale.old for place in places if place is not None)


def mean(values: Iterable[float | None]) -> float | None:
    """The mean, None when one is missing or there are none."""
    kept = list(values)
    present = [value for value in kept if value is not None]
    return fmean(present) if present and len(present) == len(kept) else None


def log_ratios(ours: Forgetting, theirs: Forgetting, default: Forgetting) -> list[float] | None:
    """Logarithms of ours / theirs, pair by pair (task and seed); None where ours misses a target.

    Forgetting below `LEAST` of the default learning rate's (which may be below zero) counts as that.
    Pairs where theirs misses the target, or the default does, are left out; that may leave none.
    """
    ratios = []
    for key, other in theirs.items():
        usual = default.get(key)
        if other is None or usual is None or key not in ours:
            continue
        mine = ours[key]
        if mine is None:
            return None
        least = LEAST * max(usual, 1e-9)
        ratios.append(math.log(max(mine, least) / max(other, least)))
    return ratios


def reduction(ratios: Sequence[float] | None) -> float | None:
    """Geometric mean of 1 - ours / theirs.

    >>> round(reduction([math.log(0.5), math.log(0.125)]), 3)
    0.75
    """
    return 1 - math.exp(fmean(ratios)) if ratios else None


def p_less(ratios: Sequence[float] | None) -> float | None:
    """One-sided paired t-test that ours forgets less; None with fewer than three pairs."""
    if ratios is None or len(ratios) < 3 or not any(ratios):
        return None
    return float(ttest_1samp(ratios, 0.0, alternative="less").pvalue)
