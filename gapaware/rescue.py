"""A way back from a raised factor: the weights as they were before it did harm."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from gapaware.delegation import leaves
from gapaware.places import Place, places
from gapaware.room import check_room


class Rescue:
    """A copy of the weights and of what the wrapped optimizer remembers, both of one step.

    It is not saved with the optimizer's state: a run that resumes keeps its weights of then instead.
    Running statistics in a model's buffers are not in it.

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

    @property
    def holds(self) -> bool:
        """Whether there is anything to go back to."""
        return bool(self._kept)

    def fresh(self, *, owed: bool = False) -> "Rescue":
        """One with the same setting and no copy."""
        return Rescue(self._allowed, owed=owed)

    @torch.no_grad()
    def keep(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Copy weights and state; of those that are sharded what this rank has.

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
            self._kept = {
                (number, place): (
                    parameter.detach().clone(),
                    _copied(leaf.state.get(parameter, {})),
                )
                for number, leaf in enumerate(leaves(optimizer))
                for place, parameter in places(leaf.param_groups)
            }
        except (MemoryError, torch.OutOfMemoryError):
            return
        self._step = step

    @torch.no_grad()
    def put_back(self, optimizer: torch.optim.Optimizer) -> int:
        """Make weights and state what they were, and let go of the copy. Returns the step of it."""
        for number, leaf in enumerate(leaves(optimizer)):
            for place, parameter in places(leaf.param_groups):
                weights, state = self._kept.get((number, place), (None, {}))
                if weights is None or weights.shape != parameter.shape:
                    continue
                parameter.copy_(weights)
                now = leaf.state.pop(parameter, None)  # the optimizer begins one by itself
                if state:
                    leaf.state[parameter] = _in_place(now, state)
        self.forget()
        return self._step

    def forget(self) -> None:
        """Let go of the copy."""
        self._kept, self.owed = {}, False


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What is copied, but for state that is nested in something else."""
    for leaf in leaves(optimizer):
        for _, parameter in places(leaf.param_groups):
            yield parameter
            state = leaf.state.get(parameter, {}).values()
            yield from (value for value in state if isinstance(value, Tensor))


def _in_place(now: Any, before: dict[str, Any]) -> dict[str, Any]:
    """The state as it was, in the tensors that it has now: an optimizer may know them by other names."""
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
