"""Tells weights that others have written from those that training has moved: a best model loaded, say."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from gapaware.distributed import is_dtensor, local
from gapaware.places import Groups, Place, places

SAMPLED = 8  # parameters, of each no more than 7 values along a dimension
CASTS = (torch.float16, torch.bfloat16)


class Written:
    """Tells which parameters hold other values than at a moment, although training has not moved them.

    Weights that were swapped out and back since, as an average is for an evaluation, or cast and back, are
    not written: a few values of a few parameters tell. Somebody who writes after each step takes part in
    training: a largest norm, a clamp, weights that are perturbed and restored.

    What changes values behind the back of autograd, as `parameter.data.copy_` does, is not seen. Of shards
    (DTensors) no values are taken: swapped out and back they count as written. A copy of this knows of
    nothing.

    Example:
        >>> groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
        >>> written = Written()
        >>> written.note(groups)
        >>> _ = torch.nn.init.ones_(groups[0]["params"][0])
        >>> [place for place, _ in written.since(groups, step=7)]
        [(0, 0)]
        >>> written.note(groups)
        >>> _ = torch.nn.init.zeros_(groups[0]["params"][0])
        >>> written.since(groups, step=8)
        []
    """

    def __init__(self) -> None:
        self._stamps: dict[Place, tuple[int, ...]] = {}
        self._samples: dict[Place, Tensor] = {}
        # the last two steps before which there was a write
        self._before: int | None = None
        self._last: int | None = None

    @torch.no_grad()
    def note(self, groups: Groups) -> None:
        """From this moment on."""
        self._stamps = {place: _stamp(parameter) for place, parameter in places(groups)}
        self._samples = {place: _sample(parameter).clone() for place, parameter in _sampled(groups)}

    def forget(self) -> None:
        """Until the next moment that is noted nothing counts as written."""
        self._stamps, self._samples = {}, {}

    def unchanged(self, groups: Groups) -> set[Place]:
        """The parameters that nobody has touched since, not even to write what was there."""
        return {
            place
            for place, parameter in (places(groups) if self._stamps else ())
            if self._stamps.get(place) == _stamp(parameter)
        }

    def excuse(self, groups: Groups, whose: Collection[Place]) -> None:
        """Let parameters count as unchanged that hold the same values again."""
        for place, parameter in places(groups):
            if place in whose and place in self._stamps:
                self._stamps[place] = _stamp(parameter)

    @torch.no_grad()
    def since(
        self, groups: Groups, step: int, *, counts: bool = True
    ) -> list[tuple[Place, Tensor]]:
        """The parameters that were written; none where no moment is known.

        Waits for the device where there are any.

        Args:
            groups: of the wrapped optimizer.
            step: optimizer steps made so far.
            counts: whether this goes into what `takes_part` knows.
        """
        if not self._stamps and self._last == step - 1 and counts:
            # in a run that has resumed: who has taken part so far, goes on
            self._before, self._last = self._last, step
        found = {
            place: parameter
            for place, parameter in (places(groups) if self._stamps else ())
            if self._stamps.get(place, ()) not in ((), _stamp(parameter))
        }
        if not found:
            return []
        known = [place for place in self._samples if place in found]
        if known and all(_is_back(_sample(found[place]), self._samples[place]) for place in known):
            return []
        before, last = (self._before if step == self._last else self._last), step
        if counts:
            self._before, self._last = before, last
        return [] if before == step - 1 else list(found.items())

    def takes_part(self, step: int) -> bool:
        """Whether there was a write before this step, and before the one before it."""
        return self._last == step and self._before == step - 1

    def state_dict(self) -> list[int | None]:
        """What tells somebody who takes part: the last two steps before which there was a write."""
        return [self._before, self._last]

    def load_state_dict(self, state: Sequence[Any]) -> None:
        """Restore what `state_dict` returned."""
        self._before, self._last = (None if step is None else int(step) for step in state)

    def __getstate__(self) -> dict[str, Any]:
        # the parameters of a copy count anew
        return {**vars(self), "_stamps": {}, "_samples": {}}


def _stamp(parameter: Tensor) -> tuple[int, ...]:
    here = local(parameter.detach())
    # others may have no storage of their own
    where = here.data_ptr() if type(here) is Tensor else 0
    return parameter._version, here._version, where


def _sampled(groups: Groups) -> list[tuple[Place, Tensor]]:
    """Some of the parameters that train; of shards none, since ranks might see different things."""
    trained = [(place, p) for place, p in places(groups) if p.requires_grad and not is_dtensor(p)]
    return trained[:: -(-len(trained) // SAMPLED)] if trained else []


def _sample(parameter: Tensor) -> Tensor:
    """A few of its values, a view."""
    here = parameter.detach()
    return here[tuple(slice(None, None, max(1, size // 4)) for size in here.shape)]


def _is_back(now: Tensor, before: Tensor) -> bool:
    """Whether values are what they were, be it rounded to another dtype in between."""
    if now.shape != before.shape or now.device != before.device:
        return False
    dtypes = (now.dtype, *(() if now.is_complex() else CASTS))
    return any(torch.equal(now, before.to(dtype).to(now.dtype)) for dtype in dtypes)
