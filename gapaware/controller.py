"""The contract between what is observed and what is done about it.

A controller is any callable that takes an `Observation` and returns a `Decision`, or just the factor on the
learning rate as a number:

    def half_when_restless(observation):
        return 0.5 if observation.spectrum.adiabaticity > 10 else 1.0

    GapAware(base, controller=half_when_restless)

It is called once a snapshot and row, as soon as there is a spectrum, on the host. What it wants to
remember it puts into `Decision.memory`, which comes back in the next `Observation.memory` and is saved
with the optimizer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from numbers import Integral, Real
from typing import Any

import numpy as np

from gapaware.scaling import Scales
from gapaware.spectrum import Array, Spectrum

ACTIONS = ("raise", "hold", "lower")


@dataclass(frozen=True)
class Observation:
    """What a controller knows at a snapshot.

    Updates are the parameter changes between snapshots, less what a pull moved; all sequences over them are
    the oldest first and of the same length n <= W + 1.

    Attributes:
        step: optimizer steps made when the snapshot was taken.
        row: "all", or the name of a parameter group or block.
        spectrum: of this row's window.
        gram: inner products of the updates, (n, n).
        decay_gram: inner products of their weight-decay parts, (n, n); None where these are unknown.
        decay_cross: inner products of updates (rows) and decay parts (columns), (n, n), or None.
        lrs: mean learning rate that the schedule gave during each update, before scaling.
        scales: factor that was on it during each update.
        spans: optimizer steps in each update.
        lr: learning rate that the schedule gives now, before scaling; of several groups, the largest.
        peak_lr: largest of `lrs`; or, where training was under way before the first step that was seen, the
            `initial_lr` that torch's schedulers note down, if that is larger.
        scale: factor that is on it now.
        pull: share of the way back to the starting weights that follows each step now.
        push: times the average of the recent steps that follows each step now.
        interval: steps between snapshots now.
        min_scale: smallest factor that the user allows.
        max_scale: largest factor that the user allows.
        max_push: strongest push that the user allows.
        target: what the built-in laws steer to: a drift, in mode "retain" how fast the pull may give way.
        window: W.
        momentum_memory: optimizer steps after which its momentum has forgotten a gradient.
        weight_norm: ‖θ‖ of this row's parameters at the snapshot; infinite where it is not known.
        loss: mean of the losses that were logged since the snapshot before, or None: see `GapAware.log`.
        earlier_losses: such means of up to a dozen snapshots before, where there were too few updates to
            decide anything: the oldest first.
        kept: whether there is a copy of the weights to go back to; never where rows decide apart.
        memory: `Decision.memory` of the last call, {} at first.
    """

    step: int
    row: str
    spectrum: Spectrum
    gram: Array
    decay_gram: Array | None
    decay_cross: Array | None
    lrs: Array
    scales: Array
    spans: Array
    lr: float
    peak_lr: float
    scale: float
    pull: float
    push: float
    interval: int
    min_scale: float
    max_scale: float
    max_push: float
    target: float
    window: int
    momentum_memory: int
    weight_norm: float
    loss: float | None
    earlier_losses: tuple[float, ...]
    kept: bool
    memory: Mapping[str, Any]


@dataclass(frozen=True)
class Decision:
    """What a controller wants from the next step on.

    Attributes:
        scale: factor on the learning rate; kept within [min_scale, max_scale].
        why: the reason, in a few words, for the history.
        weight_decay_scale: factor on the weight decay, on top of `scale`.
        pull: share of the way back to the starting weights that follows each step, in [0, 1]; needs an
            anchor to pull to.
        momentum_scale: factor on the steps that the momentum of Adam or AdamW remembers, 1/(1 − β₁).
        push: times the average of the recent steps that follows each step; kept within [0, max_push]. While
            it is not 0 it takes a copy of the weights. A drift is then (1 + push) times as fast, and what
            bounces is not.
        average: whether `GapAware.eval` puts the average of the last weights into the model. From its first
            call on that takes a copy of them; training never sees it.
        keep: whether to copy the weights and the optimizer's state now, to go back there if a factor above
            1 ends in NaN or infinity, or where the controller says so. The copy before goes.
        back: whether to go back to that copy now, with this decision's factors.
        interval: steps to the next snapshot, used with interval="auto"; None to leave it.
        memory: numbers, strings and lists of them, given back at the next call.
    """

    scale: float
    why: str = ""
    weight_decay_scale: float = 1.0
    pull: float = 0.0
    momentum_scale: float = 1.0
    push: float = 0.0
    average: bool = False
    keep: bool = False
    back: bool = False
    interval: int | None = None
    memory: Mapping[str, Any] = field(default_factory=dict)

    def scales(self, low: float, high: float, max_push: float) -> Scales:
        """The factors for the optimizer: the one on the learning rate within [low, high], and the push."""
        scale = min(max(float(self.scale), low), high)
        return Scales(
            scale,
            weight_decay=float(self.weight_decay_scale),
            pull=float(self.pull),
            momentum=float(self.momentum_scale),
            push=min(float(self.push), max_push),
            average=bool(self.average),
        )


Controller = Callable[[Observation], Decision | float]


def as_decision(answer: Any) -> Decision:
    """Check what a controller returned.

    Raises:
        TypeError: it is neither a `Decision` nor a number.
        ValueError: a factor is negative or not finite, or that on momentum or the interval not positive.

    Example:
        >>> as_decision(2.0).scale
        2.0
        >>> as_decision(float("nan"))
        Traceback (most recent call last):
        ValueError: controller returned scale=nan: a factor has to be finite and not negative
    """
    if isinstance(answer, Real) and not isinstance(answer, bool):
        answer = Decision(float(answer), why="the controller's number")
    if not isinstance(answer, Decision):
        raise TypeError(
            f"controller returned {answer!r}: return a gapaware.Decision or the factor as a number"
        )
    for name in ("scale", "weight_decay_scale", "momentum_scale", "push"):
        factor = getattr(answer, name)
        if not isfinite(factor) or factor < 0:
            raise ValueError(
                f"controller returned {name}={factor}: a factor has to be finite and not negative"
            )
    if answer.momentum_scale == 0:
        raise ValueError("controller returned momentum_scale=0.0: return a factor above 0")
    if not 0 <= answer.pull <= 1:
        raise ValueError(f"controller returned pull={answer.pull}: return a share within [0, 1]")
    interval = answer.interval
    if interval is not None and (not isinstance(interval, Integral) or interval < 1):
        raise ValueError(f"controller returned interval={interval!r}: return an integer >= 1")
    return replace(answer, memory={str(k): plain(v) for k, v in answer.memory.items()})


def plain(value: Any) -> Any:
    """A copy of a memory in Python's own numbers, strings, lists and dicts, as checkpoints need it.

    `torch.load(weights_only=True)` would refuse a NumPy number, after the run that saved it has ended.

    Raises:
        TypeError: something else is in it.

    Example:
        >>> import numpy as np
        >>> plain({"best": np.float64(0.5), "seen": (1, np.arange(2))})
        {'best': 0.5, 'seen': [1, [0, 1]]}
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    raise TypeError(
        f"controller returned {type(value).__name__} in its memory: keep numbers, strings, lists and "
        "dicts there, so that a checkpoint can hold it"
    )


def action(before: float, after: float) -> str:
    """Name a change of scale: "raise", "hold" or "lower"."""
    if after > before:
        return "raise"
    return "lower" if after < before else "hold"
