"""What an optimizer that is made of other optimizers has to do to be a `torch.optim.Optimizer`."""

from typing import Any

import torch
from torch import Tensor


class Delegating(torch.optim.Optimizer):
    """An optimizer without parameters of its own.

    Schedulers, accelerate and GradScaler accept only instances of `torch.optim.Optimizer`, but its
    `__init__` would take the parameter groups over, and an alias of them goes stale when the wrapped
    optimizer loads a state. Subclasses define `wrapped`, `param_groups`, `state` and `defaults` as
    properties instead, and `_save` and `_load`, around which the hooks run here.
    """

    def __init__(self) -> None:
        # creates the hook dictionaries and nothing else
        torch.optim.Optimizer.__setstate__(self, {})

    @property
    def wrapped(self) -> list[torch.optim.Optimizer]:
        """The optimizers that do the work."""
        raise AttributeError("a subclass of Delegating defines wrapped")

    def leaves(self) -> list[torch.optim.Optimizer]:
        """The wrapped optimizers that are not themselves made of others."""
        return [leaf for optimizer in self.wrapped for leaf in leaves(optimizer)]

    def _save(self) -> dict[str, Any]:
        return super().state_dict()

    def _load(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def state_dict(self) -> dict[str, Any]:
        """The state in the layout of `torch.optim.Optimizer.state_dict`; hooks run around it."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self._save()
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; hooks run around it."""
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self._load(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        # a scheduler puts a bound `step` on the instance; a copy that kept it would step the original
        return {key: value for key, value in self.__dict__.items() if key != "step"}

    # GradScaler hands a fused optimizer the scale and the overflow flag as attributes and deletes them
    # after the step.

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return all(getattr(o, "_step_supports_amp_scaling", False) for o in self.wrapped)

    @property
    def grad_scale(self) -> Tensor:
        """What GradScaler multiplied the loss by, while it steps."""
        scale: Tensor = self.wrapped[0].grad_scale  # type: ignore[attr-defined]
        return scale

    @grad_scale.setter
    def grad_scale(self, value: Tensor) -> None:
        for optimizer in self.wrapped:
            optimizer.grad_scale = value  # type: ignore[attr-defined]

    @grad_scale.deleter
    def grad_scale(self) -> None:
        for optimizer in self.wrapped:
            del optimizer.grad_scale  # type: ignore[attr-defined]

    @property
    def found_inf(self) -> Tensor:
        """Whether GradScaler found an overflow, while it steps."""
        found: Tensor = self.wrapped[0].found_inf  # type: ignore[attr-defined]
        return found

    @found_inf.setter
    def found_inf(self, value: Tensor) -> None:
        for optimizer in self.wrapped:
            optimizer.found_inf = value  # type: ignore[attr-defined]

    @found_inf.deleter
    def found_inf(self) -> None:
        for optimizer in self.wrapped:
            del optimizer.found_inf  # type: ignore[attr-defined]


def leaves(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers at the bottom of a tree of wrappers, in the order of their groups."""
    return optimizer.leaves() if isinstance(optimizer, Delegating) else [optimizer]
