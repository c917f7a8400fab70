"""From Gram matrices to factors on the hyperparameters: asks the controller, keeps what it answered."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from math import inf, log, sqrt
from typing import Any

import numpy as np

from gapaware.controller import Controller, Decision, Observation, action, as_decision, plain
from gapaware.retain_law import pull_at, retain_law
from gapaware.scaling import NEUTRAL, Scales
from gapaware.sighting import Sighting
from gapaware.spectrum import Array, Spectrum, spectrum
from gapaware.trend import RECENT
from gapaware.window import DECAY, UPDATE


@dataclass(frozen=True)
class Outcome:
    """What came of a sighting.

    Attributes:
        spectrum: of the whole model's window; None while there are too few updates.
        action: "raise", "hold" or "lower", of the row that changed most.
        why: the controller's reason for it.
        interval: steps to the next snapshot that the controller wants, or None.
        several: whether each row has a factor of its own.
        keep: whether the controller may want to come back to the weights of now.
        back: whether it wants to go back to those that it kept.
    """

    spectrum: Spectrum | None
    action: str
    why: str
    interval: int | None
    several: bool = False
    keep: bool = False
    back: bool = False


class ControllerFault(RuntimeError):
    """A controller raised or answered nonsense; what was observed is sound."""


class Steering:
    """The factors in force and the controller that moves them.

    Args:
        controller: None to observe only.
        low: smallest factor on the learning rate.
        high: largest factor.
        max_push: strongest push along the recent steps.
        start: first factors.
        target: what the built-in laws steer to.
        window: W.
        together: one factor for the whole model instead of one for each row.

    Attributes:
        restarts: of the window since there was last something to decide on; from the second on no factor is
            in force, see `restarted`.
    """

    def __init__(
        self,
        controller: Controller | None,
        *,
        low: float,
        high: float,
        max_push: float,
        start: Scales,
        target: float,
        window: int,
        together: bool,
    ) -> None:
        self._controller = controller
        self._low, self._high, self._max_push = low, high, max_push
        self._start = start
        self._target = target
        self._window = window
        self._together = together
        self.restart()

    def restart(self) -> None:
        """Go back to the first factor and an empty memory."""
        self._may_push = True
        self._survived = inf
        self._largest = 1.0
        self.restarts = 0
        self._losses: tuple[float, ...] = ()
        self._scales: dict[str, Scales] = {}
        self._memory: dict[str, Mapping[str, Any]] = {}
        self._undecided = self._start

    def release(self, *, keep_memory: bool, lost: bool = False, shared: bool = False) -> None:
        """Take every factor off, until the controller sets one again; a push for good.

        Args:
            keep_memory: of the controller, as far as the fault cannot come from it.
            lost: whether factors took weights to infinity: none above the root of the largest that the
                window has seen comes again. The one in force may be what a jump has left of it.
            shared: whether other ranks do the same now. They have to agree from here on, and the one that
                had the fault may remember, or push, something else: so all forget, and none pushes again.
        """
        if shared or any(scales.push for scales in self._scales.values()):
            # it takes memory: what went wrong may be the lack of it
            self._may_push = False
        if lost:
            largest = max(self._largest, *(scales.lr for scales in self._scales.values()), 1.0)
            self._survived = max(1.0, min(self._survived, largest) ** 0.5)
            self._may_push = False
        self._scales = {}
        if shared or not keep_memory:
            self._memory = {}
        self._undecided = NEUTRAL

    def regroup(self) -> None:
        """Take the smallest of the factors for all, where the rows are others from here on."""
        if self._scales:
            self._undecided = min(self._scales.values(), key=lambda scales: scales.lr)
        self._scales, self._memory = {}, {}

    def restarted(self, step: int) -> dict[str, Any] | None:
        """Note that the window began anew, as it does where other parameters train from now on.

        Where they train in turn it may do so again and again before there is anything to decide on, and a
        factor of before would stay for ever. So the second time in a row all factors come off, until the
        controller sets one again; it remembers what it did, which no fault of its own has spoilt. The pull
        of `retain_law` gives way as it would have, which takes no window.

        Args:
            step: optimizer steps made so far.

        Returns:
            What a record says of it; None where nothing has changed.
        """
        self.restarts += 1
        if self.restarts < 2:
            return None
        before = [*self._scales.values()] or [self._undecided]
        after = NEUTRAL
        if self._controller is retain_law:
            # one that a fault has taken off stays off
            pull = min(max(s.pull for s in before), pull_at(self._target, step))
            after = Scales(pull=pull)
        self._scales, self._undecided = {}, after
        if all(scales == after for scales in before):
            return None
        largest = max(scales.lr for scales in before)
        what = f"pull {after.pull:.2g} towards the start" if after.pull else "factors off"
        return {
            "scale": largest,
            "next_scale": after.lr,
            "decision": action(largest, after.lr),
            "why": f"other parameters train again before a window could tell, {what}",
            **({"pull": after.pull} if after.pull else {}),
        }

    @property
    def max_scale(self) -> float:
        """Largest factor on the learning rate that a decision may ask for now."""
        return max(self._low, min(self._high, self._survived))

    @property
    def max_push(self) -> float:
        """Strongest push that a decision may ask for now."""
        return self._max_push if self._may_push else 0.0

    def scales(self, row: str) -> Scales:
        """The factors on a row now."""
        name = "all" if self._together else row
        return self._scales.get(name, self._undecided)

    def decide(
        self,
        sighting: Sighting,
        *,
        lrs: Sequence[float],
        first_lrs: Sequence[float],
        interval: int,
        momentum_memory: int,
        loss: float | None,
        kept: bool = False,
    ) -> Outcome:
        """Compute the spectrum, ask the controller and keep its answer.

        Args:
            sighting: from the observer.
            lrs: learning rate of each row now, before scaling.
            first_lrs: where its schedule began, if that was before the first step seen; 0 otherwise.
            interval: steps between snapshots now.
            momentum_memory: see `momentum.memory_steps`.
            loss: mean since the snapshot before, or None.
            kept: whether there is a copy of the weights to go back to.

        Raises:
            ValueError: NaN or infinite updates.
            ControllerFault: the controller raised, or its answer makes no sense.
        """
        gram = sighting.gram.result().numpy()
        seen = (factor for during in sighting.conditions for factor in during.scales)
        self._largest = max(1.0, *seen, *(scales.lr for scales in self._scales.values()))
        earlier = self._losses
        now = _Now(
            lrs, first_lrs, interval, momentum_memory, loss, earlier, kept and self._together
        )
        whole = self._observation(sighting, gram, "all", list(range(len(sighting.names))), now)
        self._losses = ()
        if whole is None:
            # as many as a law looks at
            self._losses = earlier if loss is None else (*earlier, loss)[-RECENT:]
            return Outcome(None, "hold", "too few updates yet", None)
        self.restarts = 0
        if self._controller is None:
            return Outcome(whole.spectrum, "hold", "mode observe: nothing is scaled", None)
        observations: list[Observation | None] = [whole]
        if not self._together:
            observations = [
                self._observation(sighting, gram, name, [row], now)
                for row, name in enumerate(sighting.names)
            ]
        decided, largest, intervals, keep, back = {}, (-1.0, "hold", ""), [], False, False
        for observation in observations:
            if observation is None:
                continue
            name = observation.row
            before = self.scales(name)
            try:
                decision = as_decision(self._controller(observation))
            except Exception as error:
                raise ControllerFault(f"{type(error).__name__}: {error}") from error
            after = decision.scales(self._low, self.max_scale, self.max_push)
            decided[name] = (after, decision.memory)
            size = abs(log(max(after.lr, 1e-30) / max(before.lr, 1e-30)))
            largest = max(largest, (size, action(before.lr, after.lr), decision.why))
            keep, back = keep or decision.keep, back or decision.back
            if decision.interval is not None:
                intervals.append(int(decision.interval))
        # only now, so that an exception in one row leaves no row changed
        for name, (after, memory) in decided.items():
            self._scales[name], self._memory[name] = after, memory
        return Outcome(
            whole.spectrum,
            largest[1],
            largest[2],
            min(intervals, default=None),
            several=not self._together,
            keep=keep,
            back=back and now.kept,
        )

    def _observation(
        self, sighting: Sighting, gram: Array, name: str, rows: list[int], now: "_Now"
    ) -> Observation | None:
        chosen = gram[:, :, rows].sum(2)
        separable = all(sighting.separable[row] for row in rows)
        decay = chosen[DECAY, DECAY] if separable else None
        cross = chosen[UPDATE, DECAY] if separable else None
        lr = max(now.lrs[row] for row in rows)
        lrs = np.array([max(c.lrs[row] for row in rows) for c in sighting.conditions])
        peak = max(float(lrs.max()), max(now.first_lrs[row] for row in rows))
        factors = self.scales(name)
        weight_norm = float("inf")
        if sighting.squared_norms is not None:
            weight_norm = sqrt(sighting.squared_norms.result().numpy()[rows].sum())
        seen = spectrum(
            chosen[UPDATE, UPDATE],
            lr=lr * factors.lr,
            window=self._window,
            decay_gram=decay,
            decay_cross=cross,
        )
        if seen is None:
            return None
        return Observation(
            step=sighting.step,
            row=name,
            spectrum=seen,
            gram=chosen[UPDATE, UPDATE],
            decay_gram=decay,
            decay_cross=cross,
            lrs=lrs,
            scales=np.array([c.scales[rows[0]] for c in sighting.conditions]),
            spans=np.array([c.span for c in sighting.conditions], dtype=np.float64),
            lr=lr,
            peak_lr=peak,
            scale=factors.lr,
            pull=factors.pull,
            push=factors.push,
            interval=now.interval,
            min_scale=self._low,
            max_scale=self.max_scale,
            max_push=self.max_push,
            target=self._target,
            window=self._window,
            momentum_memory=now.momentum_memory,
            weight_norm=weight_norm,
            loss=now.loss,
            earlier_losses=now.earlier_losses,
            kept=now.kept,
            memory=self._memory.get(name, {}),
        )

    def state_dict(self) -> dict[str, Any]:
        """The factors in force and the controller's memory."""
        return {
            "scales": {name: list(astuple(scales)) for name, scales in self._scales.items()},
            "undecided": list(astuple(self._undecided)),
            "memory": {name: dict(memory) for name, memory in self._memory.items()},
            "may_push": self._may_push,
            "survived": self._survived,
            "largest": self._largest,
            "losses": list(self._losses),
            "restarts": self.restarts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; a factor out of today's bounds goes to the bound.

        Raises:
            ValueError: a factor is negative or not finite.
            Exception: the state is not made by `state_dict`.
        """
        may_push = bool(state.get("may_push", True))
        survived = float(state.get("survived", inf))  # until 0.1.0 there was none
        largest = float(state.get("largest", 1.0))
        if not (survived >= 1 and largest >= 1):
            raise ValueError(f"survived={survived}, largest={largest}: factors of at least 1")
        max_push = self._max_push if may_push else 0.0
        scales = {
            str(name): self._bounded(max_push, *saved) for name, saved in state["scales"].items()
        }
        memory = {str(name): plain(dict(held)) for name, held in state["memory"].items()}
        undecided = self._bounded(max_push, *state["undecided"])
        self._survived, self._largest = survived, largest
        self._losses = tuple(float(loss) for loss in state.get("losses", ()))[-RECENT:]
        self.restarts = int(state.get("restarts", 0))
        self._may_push, self._scales, self._memory, self._undecided = (
            may_push,
            scales,
            memory,
            undecided,
        )

    def _bounded(
        self,
        max_push: float,
        lr: float,
        weight_decay: float,
        pull: float = 0.0,
        momentum: float = 1.0,
        push: float = 0.0,
        average: bool = False,
    ) -> Scales:
        decision = Decision(
            lr,
            weight_decay_scale=weight_decay,
            pull=pull,
            momentum_scale=momentum,
            push=push,
            average=average,
        )
        return as_decision(decision).scales(self._low, self._high, max_push)


@dataclass(frozen=True)
class _Now:
    lrs: Sequence[float]
    first_lrs: Sequence[float]
    interval: int
    momentum_memory: int
    loss: float | None
    earlier_losses: tuple[float, ...]
    kept: bool
