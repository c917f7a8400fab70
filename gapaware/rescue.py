"""A way back from a raised factor: the weights as they were before it did harm."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from gapaware.delegation import is_number, leaves
from gapaware.places import Groups, Place, places
from gapaware.room import check_room

# numbers in a parameter group that people and schedulers write; the others may be the optimizer's own, as
# the step size that Prodigy estimates and the sums of Schedule-Free
_GIVEN = {
    "lr",
    "initial_lr",
    "max_lr",
    "min_lr",
    "swa_lr",
    "weight_decay",
    "momentum",
    "base_momentum",
    "max_momentum",
}


class Rescue:
    """A copy of the weights and of what the wrapped optimizer remembers, both of one step.

    What it remembers is its state, the numbers that it writes into its parameter groups, and both of an
    optimizer that it has inside, as Lookahead has. The copy is not saved with the optimizer's state: a run
    that resumes keeps its weights of then instead. Running statistics in a model's buffers are not in it:
    once they have seen NaN they have it until they are reset.

    Args:
        allowed: whether to keep any.
        owed: whether there was one when the state was saved that was loaded.

    Example:
        >>> weights = torch.nn.Parameter(torch.zeros(1))
        >>> sgd = torch.optim.SGD([weights], lr=1.0)
        >>> rescue = Rescue()
        >>> rescue.keep(sgd, step=1)
        >>> _ = torch.nn.init.constant_(weights, float("nan"))
        >>> rescue.put_back(sgd), weights.item()
        (1, 0.0)
    """

    def __init__(self, allowed: bool = True, *, owed: bool = False) -> None:
        self._allowed = allowed
        self.owed = allowed and owed
        self._step = 0
        self._kept: dict[tuple[int, Place], tuple[Tensor, dict[str, Any]]] = {}
        self._numbers: list[list[dict[str, Any]]] = []

    @property
    def holds(self) -> bool:
        """Whether there is anything to go back to."""
        return bool(self._kept)

    def fresh(self, *, owed: bool = False) -> "Rescue":
        """One with the same setting and no copy."""
        return Rescue(self._allowed, owed=owed)

    @torch.no_grad()
    def keep(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Copy weights and what is remembered; of what is sharded this rank's part.

        Where there is no memory for that there is no copy, and the factor rises without one.

        Args:
            optimizer: the wrapped one.
            step: optimizer steps made so far.
        """
        self.forget()
        if not self._allowed:
            return
        try:
            check_room(_tensors(optimizer))
            weights = {id(p): p.detach().clone() for p in _parameters(optimizer)}
            self._kept = {
                (number, place): (weights[id(p)], _copied(own.state.get(p, {})))
                for number, own in enumerate(_remembering(optimizer))
                for place, p in _moving(own)
            }
            self._numbers = [_copied(_numbers(own.param_groups)) for own in _remembering(optimizer)]
        except (MemoryError, RuntimeError):
            # on a CPU an allocation that fails is no more than a RuntimeError
            self.forget()
            return
        self._step = step

    @torch.no_grad()
    def put_back(self, optimizer: torch.optim.Optimizer) -> int:
        """Make weights and memory what they were, and let go of the copy. Returns the step of it."""
        for number, own in enumerate(_remembering(optimizer)):
            for place, parameter in places(own.param_groups):
                weights, state = self._kept.get((number, place), (None, {}))
                if weights is None or weights.shape != parameter.shape:
                    continue
                parameter.copy_(weights)
                now = own.state.pop(parameter, None)  # the optimizer begins one by itself
                if state:
                    own.state[parameter] = _in_place(now, state)
        for own, kept in zip(_remembering(optimizer), self._numbers, strict=False):
            # a group that was added since keeps what it has
            for group, numbers in zip(own.param_groups, kept, strict=False):
                group.update(_in_place(group, numbers))
        self.forget()
        return self._step

    def forget(self) -> None:
        """Let go of the copy."""
        self._kept, self._numbers, self.owed = {}, [], False


def inner(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that one has in its attributes, as Lookahead has one.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> inner(sgd)
        []
        >>> sgd.another = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> len(inner(sgd))
        1
    """
    values = list(vars(optimizer).values())
    values += [item for value in values if isinstance(value, list | tuple) for item in value]
    return [value for value in values if isinstance(value, torch.optim.Optimizer)]


def _remembering(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """All that have a state: the optimizers at the bottom of the wrappers here, and those inside them."""
    found: list[torch.optim.Optimizer] = []
    waiting = leaves(optimizer)
    while waiting:
        one = waiting.pop(0)
        if one not in found:
            found.append(one)
            waiting += [leaf for held in inner(one) for leaf in leaves(held)]
    # some show the state of the one inside as theirs; it is copied once
    return [
        one
        for n, one in enumerate(found)
        if all(one.state is not other.state for other in found[:n])
    ]


def _moving(own: torch.optim.Optimizer) -> Iterator[tuple[Place, Tensor]]:
    """The parameters that it may move; a frozen backbone would double a model's memory for nothing."""
    for place, parameter in places(own.param_groups):
        if parameter.requires_grad or own.state.get(parameter):
            yield place, parameter


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Each once, though an optimizer and the one inside it have the same."""
    owners = _remembering(optimizer)
    return list({id(p): p for own in owners for _, p in _moving(own)}.values())


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What is copied, but for numbers and for state that is nested in something else."""
    yield from _parameters(optimizer)
    for own in _remembering(optimizer):
        for _, parameter in _moving(own):
            state = own.state.get(parameter, {}).values()
            yield from (value for value in state if isinstance(value, Tensor))


def _numbers(groups: Groups) -> list[dict[str, Any]]:
    """Of each group the numbers that the optimizer itself may have written."""
    return [
        {key: value for key, value in group.items() if is_number(value) and key not in _GIVEN}
        for group in groups
    ]


def _in_place(now: Any, before: dict[str, Any]) -> dict[str, Any]:
    """What was before, in the tensors that are there now: an optimizer may know them by other names."""
    if not isinstance(now, dict):
        return before
    for key, value in before.items():
        here = now.get(key)
        if not (isinstance(value, Tensor) and isinstance(here, Tensor)):
            continue
        if here.shape == value.shape and here.dtype == value.dtype:
            before[key] = here.copy_(value)
    return before


def _copied(state: Any) -> Any:
    # not `deepcopy` alone: of a view it copies all that is behind it
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else deepcopy(state)
