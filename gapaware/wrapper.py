"""An optimizer around one other, which has the parameters, their groups and their state."""

from typing import Any

import torch

from gapaware.delegation import Delegating


class Wrapper(Delegating):
    """The part of the `torch.optim.Optimizer` interface that the wrapped optimizer answers.

    Attributes:
        base: the wrapped optimizer.
    """

    base: torch.optim.Optimizer

    @property
    def _me(self) -> Any:
        """The object that steps; Lightning and Fabric hold it in one of a class of theirs and ours."""
        held = vars(self).get("_optimizer")
        return held if isinstance(held, Wrapper) else self

    @property
    def wrapped(self) -> list[torch.optim.Optimizer]:
        """The wrapped optimizer, in a list."""
        return [self.base]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the wrapped optimizer."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The state of the wrapped optimizer."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the wrapped optimizer."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; the window starts anew at the next snapshot."""
        self.base.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        # what other optimizers add to the interface, such as schedule-free's train() and eval()
        if name.startswith("_") or "base" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)
