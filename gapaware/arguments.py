"""Checks of what a person passes: an error names the argument, its value and the way out."""

from collections.abc import Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn


def integer(name: str, value: Any, *, low: int, high: int | None = None, why: str) -> int:
    """Return `value` if it is an integer in [low, high].

    Raises:
        TypeError: it is no integer.
        ValueError: it is out of bounds.

    Example:
        >>> integer("window", 1, low=3, why="a gap needs at least 3 updates")
        Traceback (most recent call last):
        ValueError: window=1: a gap needs at least 3 updates; pass window >= 3
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r}: {why}; pass an integer >= {low}")
    number = int(value)
    if number < low:
        raise ValueError(f"{name}={value}: {why}; pass {name} >= {low}")
    if high is not None and number > high:
        raise ValueError(f"{name}={value}: {why}; pass {name} <= {high}")
    return number


def boolean(name: str, value: Any, *, why: str) -> bool:
    """Return `value` if it is True or False.

    Raises:
        TypeError: it is neither.

    Example:
        >>> boolean("average", 10, why="whether eval() may average")
        Traceback (most recent call last):
        TypeError: average=10: whether eval() may average; pass True or False
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: {why}; pass True or False")
    return value


def number(name: str, value: Any, *, why: str) -> float:
    """Return `value` if it is a number.

    Raises:
        TypeError: it is none.

    Example:
        >>> number("start_loss", "a", why="the loss from which the gain counts")
        Traceback (most recent call last):
        TypeError: start_loss='a': the loss from which the gain counts; pass a number
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}: {why}; pass a number")
    return float(value)


def positive(
    name: str, value: Any, *, low: float = 0.0, high: float = float("inf"), why: str
) -> float:
    """Return `value` if it is a positive finite number in [low, high].

    Raises:
        TypeError: it is no number.
        ValueError: it is out of bounds.

    Example:
        >>> positive("max_scale", 0.5, low=1.0, why="the largest factor on the learning rate")
        Traceback (most recent call last):
        ValueError: max_scale=0.5: the largest factor on the learning rate; pass 1.0 <= max_scale < inf
    """
    found = number(name, value, why=why)
    if not (0.0 < found < float("inf") and low <= found <= high):
        below = "<" if high == float("inf") else "<="
        above = "<" if low == 0.0 else "<="
        lower = "0" if low == 0.0 else f"{low}"
        raise ValueError(f"{name}={value}: {why}; pass {lower} {above} {name} {below} {high}")
    return found


def not_negative(name: str, value: Any, *, why: str) -> float:
    """Return `value` if it is a finite number of 0 or more.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of bounds.

    Example:
        >>> not_negative("max_push", -1, why="the strongest push along the recent steps")
        Traceback (most recent call last):
        ValueError: max_push=-1: the strongest push along the recent steps; pass 0 <= max_push < inf
    """
    found = number(name, value, why=why)
    if not 0.0 <= found < float("inf"):
        raise ValueError(f"{name}={value}: {why}; pass 0 <= {name} < inf")
    return found


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        ValueError: it is not.

    Example:
        >>> choice("mode", "fast", ("auto", "escape"))
        Traceback (most recent call last):
        ValueError: mode='fast': unknown; choose one of 'auto', 'escape'
    """
    if value not in choices:
        raise ValueError(
            f"{name}={value!r}: unknown; choose one of {', '.join(map(repr, choices))}"
        )
    return str(value)


def device(name: str, value: Any, *, why: str) -> Any:
    """Return `value` if it is a device that this machine has, or None.

    Raises:
        ValueError: it is not, or keeps nothing.

    Example:
        >>> device("storage_device", "gpu", why="where the trained weights lie")
        Traceback (most recent call last):
        ValueError: storage_device='gpu': where the trained weights lie; pass a device that this machine ...
    """
    try:
        if value is not None and torch.empty(0, device=value).is_meta:
            raise ValueError("the meta device keeps nothing")
    # as many kinds as there are devices that can be missing
    except Exception as error:
        raise ValueError(
            f"{name}={value!r}: {why}; pass a device that this machine has, such as 'cpu'"
        ) from error
    return value


def floating(name: str, value: Any, *, least_bytes: int = 1, why: str) -> Any:
    """Return `value` if it is a floating-point dtype of so many bytes, or None.

    Raises:
        TypeError: it is neither.

    Example:
        >>> floating("anchor_dtype", torch.int8, why="how to keep weights")
        Traceback (most recent call last):
        TypeError: anchor_dtype=torch.int8: how to keep weights; pass a floating-point torch.dtype
    """
    if value is None:
        return value
    if isinstance(value, torch.dtype) and value.is_floating_point:
        if value.itemsize >= least_bytes:
            return value
        why = f"{why}, in {least_bytes} bytes each or more"
    raise TypeError(f"{name}={value!r}: {why}; pass a floating-point torch.dtype")


def module(name: str, value: Any) -> nn.Module:
    """Return `value` if it is a module.

    Raises:
        TypeError: it is not.

    Example:
        >>> module("model", iter(nn.Linear(1, 1).parameters()))
        Traceback (most recent call last):
        TypeError: model=generator: not a torch.nn.Module; pass the model itself
    """
    if not isinstance(value, nn.Module):
        raise TypeError(
            f"{name}={type(value).__name__}: not a torch.nn.Module; pass the model itself"
        )
    return value


def state_dict(name: str, value: Any) -> Mapping[str, Any]:
    """Return `value` if it is a state dict, and that of a module.

    Raises:
        TypeError: it is neither.

    Example:
        >>> state_dict("anchor", True)
        Traceback (most recent call last):
        TypeError: anchor=bool: no weights by name; pass a state dict or a module
    """
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name}={type(value).__name__}: no weights by name; pass a state dict or a module"
        )
    return value


def names(name: str, value: Any) -> Any:
    """Return `value` if it is a sequence or set of strings.

    Raises:
        TypeError: it is not, or is one string.

    Example:
        >>> names("fresh", "classifier.")
        Traceback (most recent call last):
        TypeError: fresh='classifier.': pass a sequence of names, such as fresh=['classifier.']
    """
    found = isinstance(value, Sequence | Set) and not isinstance(value, str)
    if not found or not all(isinstance(item, str) for item in value):
        such = value if isinstance(value, str) else "classifier."
        raise TypeError(f"{name}={value!r}: pass a sequence of names, such as {name}=[{such!r}]")
    return value


def weight(name: str, value: Any, like: Tensor, *, instead: str) -> Tensor:
    """Return `value`, which is one of a state dict, if it has the shape of `like` and may have its values.

    Raises:
        TypeError: it is no tensor, or one of integers where `like` is not.
        ValueError: its shape is another, or it is on the meta device.

    Example:
        >>> weight("anchor['bias']", torch.ones(3), torch.ones(2), instead="pass another")
        Traceback (most recent call last):
        ValueError: anchor['bias'] has the shape (3,), the model's (2,); pass another
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: pass a tensor")
    if value.shape != like.shape:
        raise ValueError(
            f"{name} has the shape {tuple(value.shape)}, the model's {tuple(like.shape)}; {instead}"
        )
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device, which keeps nothing; {instead}")
    rounded = not value.is_floating_point() and not value.is_complex()
    if rounded and (like.is_floating_point() or like.is_complex()):
        raise TypeError(f"{name} is a tensor of {value.dtype}, no floating-point one; {instead}")
    return value


def some(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are, for a message.

    Example:
        >>> some(["a", "b", "c", "d", "e"])
        "'a', 'b', 'c' and 2 more"
    """
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if names[3:] else "")
