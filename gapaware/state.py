"""What GapAware knows, saved beside the wrapped optimizer's state and restored as a whole or not at all."""

from copy import copy
from typing import Any

from torch import Tensor

from gapaware import arguments
from gapaware.anchor import Anchor
from gapaware.caution import caution
from gapaware.copies import Copies
from gapaware.delegation import all_or_nothing
from gapaware.history import History
from gapaware.metrics import Means, arrived
from gapaware.observer import Observer
from gapaware.scaling import Given, as_given
from gapaware.sighting import Sighting
from gapaware.steering import Outcome, Steering
from gapaware.transfer import Transfer
from gapaware.wrapper import Wrapper

STATE_VERSION = 1


class Resumable(Wrapper):
    """The part of `GapAware` that saves and restores; the attributes here are all that is saved.

    A state is built aside first and put in place at once, so that a damaged one changes nothing.

    Attributes:
        history: records of the snapshots.
        seconds: time spent beside the steps of `base`.
    """

    history: History
    seconds: float
    _steps: int
    _fresh: bool  # the first snapshot is still to be taken
    _midway: bool  # `base` had made steps before the first one here
    _interval: int
    _interval_is_auto: bool
    _first_interval: int
    _next_snapshot: int
    _observer: Observer
    _steering: Steering
    _anchor: Anchor | None
    _copies: Copies
    # on its way to the host, with what was logged before it was taken
    _pending: tuple[Sighting, dict[str, float | Transfer]] | None
    _metrics: Means
    # the groups without factors, during a step; None outside
    _given: Given | None
    # a return that waits for the other ranks
    _returning: Outcome | None
    # a state that was restored alone and outlasts a load without one
    _entrusted: dict[str, Any] | None

    def starting_weights(self) -> dict[str, Tensor]:
        """What mode="retain" pulls to, by parameter group and place, as in `state_dict()["gapaware"]`.

        Before the first step these are the weights now: tensors of the right kind for a distributed
        checkpoint to be loaded into.
        """
        if self._anchor is None:
            return {}
        anchor = copy(self._anchor)
        if self._fresh:
            anchor.restart()
            anchor.start(self.base.param_groups)
        weights: dict[str, Tensor] = anchor.state_dict()["weights"]
        return weights

    def load_own_state(self, own: dict[str, Any]) -> None:
        """Restore `state_dict()["gapaware"]` alone, for checkpoints that keep it apart.

        It outlasts a `load_state_dict` without it that comes before the next step, whichever of the two
        a checkpoint restores first. See `gapaware.checkpoint.OwnState`.

        Raises:
            ValueError: the state cannot be read; nothing was changed.
        """
        me = self._me
        me.__dict__.update(me._restored(own))
        me._entrusted = own

    def _save(self) -> dict[str, Any]:
        pending = None
        if self._pending is not None:
            sighting, metrics = self._pending
            pending = sighting.state_dict()
            pending["metrics"] = arrived(metrics)
        # a job that is told to end may save in the middle of a step
        with as_given(self._given or []):
            theirs = self.base.state_dict()
        copies = self._copies
        if self._given is None:
            # or a run that resumes from here would take what others have written for a step of its own
            copies = copies.noticed(self.base.param_groups, self._steps)
        return {
            **theirs,
            "gapaware": {
                "version": STATE_VERSION,
                "steps": self._steps,
                "midway": self._midway,
                "interval": self._interval,
                "next_snapshot": self._next_snapshot,
                "seconds": self.seconds,
                "observer": self._observer.state_dict(),
                "steering": self._steering.state_dict(),
                "anchor": None if self._anchor is None else self._anchor.state_dict(),
                **copies.state_dict(),
                "history": self.history.state_dict(),
                "metrics": self._metrics.state_dict(),
                "pending": pending,
            },
        }

    def _load(self, state_dict: dict[str, Any]) -> None:
        if self._me is not self:
            self._me._load(state_dict)
            return
        theirs = {key: value for key, value in state_dict.items() if key != "gapaware"}
        ours = state_dict.get("gapaware", self._entrusted)
        restored = None if ours is None else self._restored(ours)
        anchored = [group.get("anchor") for group in self.base.param_groups]
        with all_or_nothing(self.base):
            self.base.load_state_dict(theirs)
        for group, ours_alone in zip(self.base.param_groups, anchored, strict=True):
            if ours_alone is not None:  # plain checkpoints know nothing of it
                group.setdefault("anchor", ours_alone)
        self.history.close()
        if restored is None:
            self._restart()
        else:
            self.__dict__.update(restored)

    def _restart(self) -> None:
        """Forget everything but the settings."""
        self._observer.restart()
        self._steering.restart()
        if self._anchor is not None:
            self._anchor.restart()
        self._copies = self._copies.fresh()
        self._pending, self._metrics, self._returning = None, Means(), None
        if self._interval_is_auto:
            self._interval = self._first_interval
        self._steps, self._next_snapshot, self._fresh = 0, self._interval, True
        # another run, whose steps begin at 0; a log of this one is left whole
        self.history = self.history.fresh()

    def _restored(self, ours: dict[str, Any]) -> dict[str, Any]:
        """The attributes that a saved state describes."""
        try:
            version = ours["version"]
            if version > STATE_VERSION:
                raise ValueError(f"version {version}, this gapaware reads up to {STATE_VERSION}")
            counts = {
                name: arguments.integer(name, ours[name], low=low, why="a number of steps")
                for name, low in (("steps", 0), ("interval", 1), ("next_snapshot", 0))
            }
            settings = self._observer.settings
            observer = Observer(**settings, replicas=self._observer.replicas)
            steering = copy(self._steering)
            history = copy(self.history)
            pending, anchor = None, copy(self._anchor)
            if anchor is not None and ours.get("anchor") is not None:
                anchor.load_state_dict(ours["anchor"], self.base.param_groups)
            copies = self._copies.restored(ours, self.base.param_groups)
            steering.load_state_dict(ours["steering"])
            history.load_state_dict(ours["history"])
            same_settings = ours["observer"]["settings"] == settings
            if same_settings:
                observer.load_state_dict(ours["observer"])
                if ours["pending"] is not None:
                    metrics = _numbers(ours["pending"]["metrics"])
                    pending = (Sighting.from_state_dict(ours["pending"]), metrics)
                groups = len(self.base.param_groups)
                if not all(0 <= group < groups for group in observer.row_groups):
                    raise ValueError(f"rows of parameter groups {observer.row_groups}, of {groups}")
            else:
                kept = "factors are kept"
                if ours["observer"]["settings"].get("granularity") != settings["granularity"]:
                    steering.regroup()
                    kept = "the smallest of the factors is kept for all rows"
                caution(
                    f"the state was saved with {ours['observer']['settings']}, this GapAware has "
                    f"{settings}: {kept}, the window starts empty"
                )
            return {
                "_observer": observer,
                "_steering": steering,
                "_anchor": anchor,
                "_copies": copies,
                "history": history,
                "_metrics": Means.from_state_dict(ours["metrics"]),
                "_pending": pending,
                "_returning": None,
                "_steps": counts["steps"],
                "_fresh": counts["steps"] == 0 or not same_settings,
                # states of gapaware 0.1.0 do not say
                "_midway": bool(ours.get("midway", False)),
                "_interval": counts["interval"] if self._interval_is_auto else self._interval,
                "_next_snapshot": counts["next_snapshot"],
                "seconds": float(ours["seconds"]),
            }
        # int(inf), a Gram matrix of text: damaged states raise as many kinds as there are
        except Exception as error:
            raise ValueError(
                f"state_dict['gapaware'] cannot be read ({type(error).__name__}: {error}); nothing was "
                "changed. Remove the key 'gapaware' to load the wrapped optimizer's state alone"
            ) from error


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in metrics.items()}
