"""The average of the recent weights, to evaluate at: what a large learning rate makes noisy, it smooths.

θ̄ ← θ̄ + (θ − θ̄)/10 after each step, beside training, which never sees it (Polyak and Juditsky, 1992). As
with Schedule-Free, `eval()` puts θ̄ into the model and `train()` puts θ back. Where there is an average, is
not decided here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gapaware.caution import caution
from gapaware.distributed import is_dtensor
from gapaware.places import Groups, Place, from_state, places, scaled_places, to_state
from gapaware.room import check_room
from gapaware.scaling import Scales
from gapaware.written import Written

STEPS = 10


class Average:
    """The average of the weights of each parameter, kept from the first `eval` or `train` on.

    One copy of the parameters, in float32 at least, and only while an average is asked for. Where any that
    trains is in shards (a DTensor) there is none: their ranks would have to agree on it.

    Args:
        allowed: whether there may be any.

    Attributes:
        evaluating: whether `eval` was called, and `train` not yet.

    Example:
        >>> weights = torch.nn.Parameter(torch.zeros(1))
        >>> groups = [{"params": [weights]}]
        >>> average = Average()
        >>> _ = average.train(groups)
        >>> for _ in range(2):
        ...     with torch.no_grad():
        ...         _ = weights.add_(1.0)
        ...     average.follow(groups, [Scales(average=True)])
        >>> average.eval(groups)
        >>> round(weights.item(), 3)
        1.1
        >>> _ = average.train(groups)
        >>> weights.item()
        2.0
    """

    def __init__(self, allowed: bool = True) -> None:
        self._allowed = allowed
        self._wanted = False
        self.evaluating = False
        # the averages, and at the places inside, where the model has these, the weights that are trained
        self._other: dict[Place, Tensor] = {}
        self._inside: set[Place] = set()
        # what others write while the model has the averages
        self._written = Written()

    @property
    def holds(self) -> bool:
        """Whether there is a copy of any weights."""
        return bool(self._other)

    @property
    def exchanged(self) -> bool:
        """Whether the model has the average now, and the copy the weights that are trained."""
        return bool(self._inside)

    def loaded(self, groups: Groups) -> list[tuple[Place, Tensor]]:
        """The parameters that somebody has written while the model had their average."""
        written = self._written.since(groups, 0, counts=False) if self._inside else []
        return [(place, parameter) for place, parameter in written if place in self._inside]

    def has_inside(self, place: Place) -> bool:
        """Whether the model has the average of a parameter now."""
        return place in self._inside

    @torch.no_grad()
    def renew(self, place: Place, parameter: Tensor) -> None:
        """Begin anew where somebody has written other weights, which are then what is trained."""
        other = self._other.get(place)
        if other is not None and other.shape == parameter.shape:
            self._inside.discard(place)
            other.copy_(parameter)

    @torch.no_grad()
    def follow(
        self,
        groups: Groups,
        by_group: Sequence[Scales],
        by_parameter: Mapping[int, Scales] | None = None,
    ) -> None:
        """Take the weights after a step into the average; it begins with them where there was none.

        Without memory for it there is a warning, and no average from then on.

        Args:
            groups: of the wrapped optimizer.
            by_group: scales of each group.
            by_parameter: scales by `id(parameter)`, which then decide instead.
        """
        before, self._other, self._inside = self._other, {}, set()
        chosen_by = by_group if by_parameter is None else by_parameter.values()
        if not (self._wanted and any(scales.average for scales in chosen_by)):
            return
        if any(
            parameter.requires_grad and is_dtensor(parameter) for _, parameter in places(groups)
        ):
            return
        alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        begin: list[tuple[Place, Tensor]] = []
        for place, parameter, chosen in scaled_places(groups, by_group, by_parameter):
            if not (chosen.average and parameter.requires_grad):
                continue
            mean = before.get(place)
            if mean is None or mean.shape != parameter.shape or mean.device != parameter.device:
                begin.append((place, parameter))
                continue
            self._other[place] = mean
            if mean.dtype != parameter.dtype:
                # one at a time, so that there is no whole copy in float32
                mean.lerp_(parameter.detach().to(mean.dtype), 1 / STEPS)
                continue
            means, weights = alike.setdefault((mean.device, mean.dtype), ([], []))
            means.append(mean)
            weights.append(parameter.detach())
        for means, weights in alike.values():
            torch._foreach_lerp_(means, weights, 1 / STEPS)
        self._begin(begin)

    def _begin(self, parameters: Sequence[tuple[Place, Tensor]]) -> None:
        try:
            check_room([parameter for _, parameter in parameters], least_itemsize=4)
            for place, parameter in parameters:
                self._other[place] = _copy(parameter)
        except (MemoryError, RuntimeError) as error:
            self._allowed, self._wanted, self._other = False, False, {}
            caution(
                f"GapAware keeps no average of the weights ({error}): eval() leaves them as they are, and "
                "training goes on"
            )

    @torch.inference_mode(False)
    @torch.no_grad()
    def eval(self, groups: Groups) -> None:
        """Put the average into the model."""
        self._wanted, self.evaluating = self._allowed, True
        self._take_in(groups)
        for place, parameter, other in self._elsewhere(groups, inside=True):
            self._other[place] = _copy(parameter)
            self._inside.add(place)
            parameter.copy_(other)
        if self._inside:
            self._written.note(groups)

    @torch.inference_mode(False)
    @torch.no_grad()
    def train(self, groups: Groups) -> set[Place]:
        """Put the weights that are trained back, unless others were loaded in between; returns where."""
        self._wanted = self._allowed
        loaded = self._take_in(groups)
        for place, parameter, other in self._elsewhere(groups, inside=False):
            mean = _copy(parameter)
            parameter.copy_(other)
            self._inside.discard(place)
            self._other[place] = mean
        self.evaluating = False
        self._written.forget()
        return loaded

    def _take_in(self, groups: Groups) -> set[Place]:
        loaded = self.loaded(groups)
        for place, parameter in loaded:
            self.renew(place, parameter)
        return {place for place, _ in loaded}

    def _elsewhere(self, groups: Groups, *, inside: bool) -> Iterator[tuple[Place, Tensor, Tensor]]:
        """What is left to exchange: cut off anywhere, an exchange can be gone on with or taken back."""
        for place, parameter in places(groups):
            other = self._other.get(place)
            if other is None or other.shape != parameter.shape:
                continue
            if (place in self._inside) != inside:
                yield place, parameter, other

    def fresh(self) -> "Average":
        """One that has seen nothing yet, for the same user."""
        new = Average(self._allowed)
        new._wanted = self._wanted
        return new

    def state_dict(self) -> dict[str, Any]:
        """The average, or where the model has it the weights that are trained, by group and place."""
        kept = self._other
        if self.evaluating:
            kept = {place: trained for place, trained in kept.items() if place in self._inside}
        return {
            "weights": to_state(kept),
            "evaluating": self.evaluating,
            "wanted": self._wanted,
        }

    def load_state_dict(self, state: Mapping[str, Any], groups: Groups) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: a weight does not fit its parameter.
        """
        self._other = {
            place: _copy(saved.to(parameter.device))
            for place, parameter, saved in from_state(state["weights"], groups, "average")
        }
        self.evaluating = bool(state["evaluating"])
        self._inside = set(self._other) if self.evaluating else set()
        self._wanted = self._allowed and bool(state["wanted"])


def _copy(weights: Tensor) -> Tensor:
    """In float32 at least: a tenth of a difference is lost in bfloat16."""
    return weights.detach().to(torch.promote_types(weights.dtype, torch.float32), copy=True)
