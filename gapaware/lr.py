"""Reading the learning rate of a parameter group, which may be a tensor on a GPU."""

from typing import Any, TypeGuard

from torch import Tensor


def is_remote(value: Any) -> TypeGuard[Tensor]:
    """Whether to read a learning rate would make the host wait for a GPU.

    Example:
        >>> import torch
        >>> is_remote(1e-3), is_remote(torch.tensor(1e-3))
        (False, False)
    """
    return isinstance(value, Tensor) and value.is_cuda


def first_lr(group: dict[str, Any]) -> float:
    """The learning rate that torch's schedulers say they began with.

    Args:
        group: of `param_groups`.

    Returns:
        `initial_lr`; 0 where there is none, or where the host cannot read it without waiting.

    Example:
        >>> first_lr({"lr": 1e-4, "initial_lr": 1e-3}), first_lr({"lr": 1e-4})
        (0.001, 0.0)
    """
    value = group.get("initial_lr", 0.0)
    return 0.0 if is_remote(value) else float(value)
