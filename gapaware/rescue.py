"""A way back from a raised factor that ends in infinity: the weights as they were while it did well.

SGD's steps are as long as its gradients, so that a factor that is too large doubles them until they
overflow, in fewer steps than it takes to see it. Adam's and Muon's are bounded.
"""

from typing import Any

import torch
from torch import Tensor

from gapaware.delegation import leaves
from gapaware.distributed import alone
from gapaware.places import Place, places
from gapaware.room import check_room


class Rescue:
    """A copy of the weights and of what the wrapped optimizer remembers, both of one step.

    It is not saved with the optimizer's state: a resumed run has none until the next is kept. Running
    statistics in a model's buffers are not in it.

    Example:
        >>> weights = torch.nn.Parameter(torch.zeros(1))
        >>> sgd = torch.optim.SGD([weights], lr=1.0)
        >>> rescue = Rescue()
        >>> rescue.keep(sgd, step=1)
        >>> _ = torch.nn.init.constant_(weights, float("nan"))
        >>> rescue.put_back(sgd), weights.item()
        (1, 0.0)
    """

    def __init__(self) -> None:
        self._step = 0
        self._kept: dict[tuple[int, Place], tuple[Tensor, dict[str, Any]]] = {}

    @property
    def holds(self) -> bool:
        """Whether there is anything to go back to."""
        return bool(self._kept)

    @torch.no_grad()
    def keep(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Copy weights and state, where all of them are SGD's and no other process has to do alike.

        Where there is no memory for that there is no copy, and the factor rises without one.

        Args:
            optimizer: the wrapped one.
            step: optimizer steps made so far.
        """
        self.forget()
        if not alone() or not all(type(leaf) is torch.optim.SGD for leaf in leaves(optimizer)):
            return
        try:
            # the momentum takes as much again
            check_room(2 * [p for group in optimizer.param_groups for p in group["params"]])
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
                leaf.state.pop(parameter, None)  # the optimizer begins one by itself
                if state:
                    leaf.state[parameter] = state
        self.forget()
        return self._step

    def forget(self) -> None:
        """Let go of the copy."""
        self._kept = {}


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
