"""What an optimizer that is made of other optimizers has to do to be a `torch.optim.Optimizer`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from numbers import Real
from typing import Any

import torch
from torch import Tensor

# as in torch.optim.Optimizer, a copy has no hooks: they are closures over the original
_NOT_COPIED = (
    "step",  # bound to the original by a scheduler
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


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
        raise NotImplementedError("a subclass of Delegating defines _save")

    def _load(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError("a subclass of Delegating defines _load")

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Name the step for the profiler and run this optimizer's own hooks around it.

        The hooks that are registered for all optimizers run in the steps of the wrapped ones: run here
        too, one that changes gradients would change them twice.
        """

        @wraps(func)
        def wrapper(self: "Delegating", *args: Any, **kwargs: Any) -> Any:
            with torch.autograd.profiler.record_function(
                f"Optimizer.step#{type(self).__name__}.step"
            ):
                given: tuple[Any, ...] = (self, *args)
                for before in self._optimizer_step_pre_hooks.values():
                    replaced = before(self, given, kwargs)
                    if replaced is None:
                        continue
                    if not (isinstance(replaced, tuple) and len(replaced) == 2):
                        raise RuntimeError(
                            f"{func} must return None or a tuple of (new_args, new_kwargs), "
                            f"but got {replaced}."
                        )
                    given, kwargs = replaced
                result = func(*given, **kwargs)
                for after in self._optimizer_step_post_hooks.values():
                    after(self, given, kwargs)
                return result

        return wrapper

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
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"state_dict={state_dict!r:.60}: pass what state_dict() returned")
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self._load(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _NOT_COPIED}

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


@contextmanager
def all_or_nothing(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Load a state into an optimizer; what cannot be loaded is a ValueError and changes nothing.

    Args:
        optimizer: with its leaves, what is put back. torch's loading replaces the containers of state
            and groups, so keeping the old ones is enough.

    Raises:
        ValueError: the load raised, or left a group without a learning rate.
    """
    before = [
        (leaf, dict(leaf.__dict__), [(group, dict(group)) for group in leaf.param_groups])
        for leaf in leaves(optimizer)
    ]
    try:
        yield
        for number, group in enumerate(optimizer.param_groups):
            if not is_number(group.get("lr")):
                raise ValueError(f"its parameter group {number} has lr={group.get('lr')!r:.60}")
        for value in optimizer.state.values():
            if not isinstance(value, dict):
                raise ValueError(f"the state of a parameter is {value!r:.60}, no dict")
    except Exception as error:
        for leaf, attributes, groups in before:
            leaf.__dict__.clear()
            leaf.__dict__.update(attributes)
            for group, values in groups:
                group.clear()
                group.update(values)
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"state_dict cannot be loaded into {type(optimizer).__name__} "
            f"({type(error).__name__}: {error}); nothing was changed"
        ) from error


def is_number(value: Any) -> bool:
    """Whether a value is a real number, or a tensor with one, as learning rates and losses are."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real) and not isinstance(value, bool)
