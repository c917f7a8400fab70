"""The copies of the weights that are kept beside training, and what makes them worthless."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from gapaware.average import Average
from gapaware.distributed import alone
from gapaware.places import Groups, Place, places
from gapaware.push import Push
from gapaware.rescue import Rescue
from gapaware.scaling import Scales
from gapaware.written import Written


class Copies:
    """What follows the weights: a push, an average to evaluate at, a way back.

    None of them is worth anything once somebody else has written the weights, such as those of a best model
    that was loaded: they begin anew then.

    Args:
        average: whether there may be one.
        way_back: whether there may be one.

    Attributes:
        push: along the recent steps.
        average: of the last weights.
        rescue: the weights and the optimizer's memory from before a factor was raised.

    Example:
        >>> weights = torch.nn.Parameter(torch.zeros(1))
        >>> sgd = torch.optim.SGD([weights], lr=1.0)
        >>> copies = Copies()
        >>> copies.keep(sgd, step=1)
        >>> _ = torch.nn.init.ones_(weights)  # somebody loads a model
        >>> copies.notice(sgd.param_groups, step=7)
        >>> copies.rescue.holds, copies.rescue.owed  # to be kept again, with these weights
        (False, True)
    """

    def __init__(self, *, average: bool = True, way_back: bool = True) -> None:
        self.push, self.average, self.rescue = Push(), Average(average), Rescue(way_back)
        self._written = Written()
        # where nobody but `eval` has written
        self._ours: set[Place] = set()

    @property
    def hold(self) -> bool:
        """Whether there are any."""
        return self.push.holds or self.average.holds or self.rescue.holds

    def fresh(self) -> "Copies":
        """The same settings and no copy."""
        copies = Copies()
        copies.average, copies.rescue = self.average.fresh(), self.rescue.fresh()
        return copies

    # -- the way back ------------------------------------------------------------------------------

    def keep(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Make the weights and the memory of now what `put_back` goes back to; see `Rescue.keep`."""
        self.rescue.keep(optimizer, step)
        self.note(optimizer.param_groups)

    def put_back(self, optimizer: torch.optim.Optimizer) -> int:
        """Go back to what was kept, which is no step; returns the step that it is of."""
        step = self.rescue.put_back(optimizer)
        self._renew(places(optimizer.param_groups))
        self.note(optimizer.param_groups)
        return step

    # -- what others write -------------------------------------------------------------------------

    def note(self, groups: Groups) -> None:
        """What is written from now on is written by others."""
        if self.hold:
            self._written.note(groups)
        else:
            self._written.forget()

    def notice(self, groups: Groups, step: int) -> None:
        """Let go of copies of what somebody has written since.

        Several ranks have to do so together: one alone may swap weights for an evaluation.

        Args:
            groups: of the wrapped optimizer.
            step: optimizer steps made so far.
        """
        if written := self._by_others(groups, step, counts=True):
            # a way back goes to these; not where one of several processes may have seen it alone
            self.rescue = self.rescue.fresh(owed=self.rescue.holds and alone())
            self._renew(written)
            self.note(groups)

    def noticed(self, groups: Groups, step: int) -> "Copies":
        """What they would be after `notice`, to be saved or copied; nothing here changes."""
        written = self._by_others(groups, step, counts=False)
        if not written:
            return self
        copies = Copies()
        copies.push, copies.average = deepcopy(self.push), deepcopy(self.average)
        copies.rescue = self.rescue.fresh(owed=self.rescue.holds and alone())
        copies._renew(written)
        return copies

    def _by_others(self, groups: Groups, step: int, *, counts: bool) -> list[tuple[Place, Tensor]]:
        written = self._written.since(groups, step, counts=counts)
        if not (written and self.average.exchanged):
            return written
        loaded = {place for place, _ in self.average.loaded(groups)}
        return [
            (place, parameter)
            for place, parameter in written
            if place in loaded or not self.average.has_inside(place)
        ]

    def _renew(self, written: Iterable[tuple[Place, Tensor]]) -> None:
        """Begin anew with what follows the weights of these parameters, which no step has moved."""
        for place, parameter in written:
            self.push.renew(place, parameter)
            self.average.renew(place, parameter)

    # -- the average -------------------------------------------------------------------------------

    def eval(self, groups: Groups, step: int) -> None:
        """Put the average into the model, which is no step and nobody else's work.

        One rank alone may do so, so nothing else here changes: where others have written weights there is
        no average of them, and whether the rest begins anew is for `notice`.
        """
        for place, parameter in self._by_others(groups, step, counts=False):
            self.average.renew(place, parameter)
        unchanged = self._written.unchanged(groups)
        self.average.eval(groups)
        self._ours |= {place for place in unchanged if self.average.has_inside(place)}

    def train(self, groups: Groups) -> None:
        """Put the weights that are trained back, unless others were loaded in between."""
        loaded = self.average.train(groups)
        self._written.excuse(groups, self._ours - loaded)
        self._ours = set()

    def follow(
        self,
        groups: Groups,
        step: int,
        by_group: Sequence[Scales],
        by_parameter: Mapping[int, Scales] | None = None,
    ) -> None:
        """Take the weights after a step into the average, as `Average.follow` does.

        What others write after each step, such as a constraint, an average would not have: there is none.
        """
        if self._written.takes_part(step):
            by_group, by_parameter = [], None
        self.average.follow(groups, by_group, by_parameter)

    # -- saved beside what else GapAware knows -----------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The copies as tensors and numbers; of a way back only whether there was one."""
        return {
            "push": self.push.state_dict(),
            "push_waits": self.push.waits,
            "average": self.average.state_dict(),
            "kept": self.rescue.holds or self.rescue.owed,
            "written": self._written.state_dict(),
        }

    def restored(self, state: Mapping[str, Any], groups: Groups) -> "Copies":
        """The same settings and the copies that `state_dict` described.

        Who has written the weights since is not known: they may come from elsewhere. But somebody who has
        written after each step so far is taken to go on.

        Raises:
            ValueError: a weight does not fit its parameter.
        """
        copies = self.fresh()
        # states of gapaware 0.1.0 have none
        copies.push.load_state_dict(state.get("push", {}), groups)
        copies.push.waits = int(state.get("push_waits", 0))
        if state.get("average"):
            copies.average.load_state_dict(state["average"], groups)
        copies.rescue = self.rescue.fresh(owed=bool(state.get("kept", False)))
        copies._written.load_state_dict(state.get("written", (None, None)))
        return copies
