"""How much of the motion outlives the optimizer's own momentum.

Two updates that lie further apart than the momentum remembers share a direction only if the loss surface
keeps pushing that way. Measured with AdamW: cosines of 0.9 on a grokking plateau, 0.15 where the learning
rate of a language model is ten times too small, 0.04 where it is tuned, 0 where it bounces.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gapaware.momentum import TIME_CONSTANTS
from gapaware.spectrum import Array


class Drift(NamedTuple):
    """Cosines of distant updates: their mean, their deviation as the doubt about it, their number."""

    mean: float
    doubt: float
    pairs: int

    @property
    def certain(self) -> float:
        """What is left of the mean with one deviation less."""
        return self.mean - self.doubt


def per_learning_rate(gram: Array, distances: Array) -> Array:
    """The Gram matrix of updates divided by the learning rate that they were made with.

    A schedule, and the factors that are put on it, then no longer look like a change of the spectrum.

    Args:
        gram: inner products of updates, (n, n).
        distances: Σ lr × factor over the steps of each update, (n,), positive.

    Returns:
        (n, n), in units in which the newest update keeps its length.
    """
    weight = distances[-1] / distances
    return np.asarray(gram * np.outer(weight, weight))


def drift(gram: Array, spans: Array, memory: int, soonest: float = 1.0) -> Drift | None:
    """Mean and deviation of the cosines of updates that begin `memory` steps apart or more.

    Args:
        gram: inner products of updates, the oldest first, (n, n), none of them zero.
        spans: optimizer steps in each, (n,).
        memory: optimizer steps after which momentum has forgotten.
        soonest: share of the memory that is enough where no two updates are `memory` apart. Of their
            cosines counts what is beyond the likeness that momentum alone makes.

    Returns:
        None if no two updates are that far apart.

    Example:
        >>> drift(np.ones((4, 4)), np.full(4, 5.0), memory=10)
        Drift(mean=1.0, doubt=0.0, pairs=3)
    """
    length = np.sqrt(np.diag(gram))
    start = np.cumsum(spans) - spans
    lags = start[None, :] - start[:, None]
    apart = _far(lags, memory, soonest)
    if not apart.any():
        return None
    cosines = _beyond_momentum((gram / np.outer(length, length))[apart], lags[apart], memory)
    return Drift(float(cosines.mean()), float(cosines.std()), len(cosines))


class Newest(NamedTuple):
    """The newest update against the older ones of its window.

    Attributes:
        growth: its length over their median length.
        persistence: mean cosine with those that begin at least the momentum's memory earlier.
        alignment: cosine with the sum of all older ones.
    """

    growth: float
    persistence: float
    alignment: float


def newest(gram: Array, spans: Array, memory: int, soonest: float = 1.0) -> Newest:
    """Compare the newest update with the older ones: does it lengthen, and does it turn?

    Args:
        gram: inner products of updates, the oldest first, (n, n) with n >= 2, none of them zero.
        spans: optimizer steps in each, (n,).
        memory: optimizer steps after which momentum has forgotten.
        soonest: see `drift`; the oldest begins at least that long before the newest.

    Example:
        >>> newest(np.array([[1.0, 0.0], [0.0, 4.0]]), np.array([5.0, 5.0]), memory=5)
        Newest(growth=2.0, persistence=0.0, alignment=0.0)
    """
    length = np.sqrt(np.diag(gram))
    start = np.cumsum(spans) - spans
    lags = start[-1] - start
    far = _far(lags, memory, soonest)
    cosines = _beyond_momentum((gram[-1] / (length[-1] * length))[far], lags[far], memory)
    so_far = np.sqrt(max(gram[:-1, :-1].sum(), np.finfo(float).tiny))
    return Newest(
        growth=float(length[-1] / np.median(length[:-1])),
        persistence=float(cosines.mean()),
        alignment=float(gram[-1, :-1].sum() / (length[-1] * so_far)),
    )


def _far(lags: Array, memory: int, soonest: float) -> NDArray[np.bool_]:
    """Which lags are beyond the momentum's memory or, while none is, beyond a share of it."""
    return np.asarray(lags >= (memory if lags.max() >= memory else soonest * memory))


def _beyond_momentum(cosines: Array, lags: Array, memory: int) -> Array:
    """Cosines less what momentum makes of noise within its memory: 1 stays 1, -1 too, noise is near 0.2.

    Updates that lie k steps apart share β^k of their noise, a little more where they are several steps
    long; as much of it as is left after the whole memory, e^-1.5, passes for forgotten.
    """
    left = np.exp(-TIME_CONSTANTS)
    noise = np.maximum((np.exp(-TIME_CONSTANTS * lags / memory) - left) / (1 - left), 0)
    return np.asarray(np.maximum((cosines - noise) / (1 - noise), -1.0))
