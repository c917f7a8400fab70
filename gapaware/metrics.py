"""Means of what a person logs between two snapshots, taken without waiting for a device."""

from math import isfinite
from typing import Any

import torch
from torch import Tensor

from gapaware.transfer import Transfer

# NaN in a loss once is a batch without labels, or a step that a gradient scaler leaves out
SERIOUS = 3


class Means:
    """Running means by name; tensors are added up where they are.

    A mean with NaN or infinity in it is NaN or infinite, for all to see.

    Example:
        >>> means = Means()
        >>> means.add("loss", torch.tensor(1.0))
        >>> means.add("loss", 2.0)
        >>> arrived(means.take()), arrived(means.take())
        ({'loss': 1.5}, {})
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float | Tensor, int]] = {}
        # of the last values, how many in a row were not finite
        self._lost: dict[str, int] = {}

    def add(self, name: str, value: float | Tensor) -> None:
        """Count one more value, a number or a tensor of one element.

        Raises:
            TypeError, ValueError: it is neither.
        """
        if isinstance(value, Tensor):
            if value.numel() != 1:
                shape = tuple(value.shape)
                raise ValueError(
                    f"log({name}=tensor of shape {shape}): pass one, such as its mean()"
                )
            if value.is_complex():
                raise TypeError(f"log({name}={value!r:.60}): pass a real number, such as its abs()")
            # a copy, since losses are changed in place; float32, since some devices know no float64
            value = value.detach().reshape(()).to(torch.float32, copy=True)
        else:
            try:
                if isinstance(value, str | bytes | bool):  # which float would take
                    raise TypeError(f"{type(value).__name__}, no number")
                value = float(value)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"log({name}={value!r}): pass a number or a tensor of one element"
                ) from error
        if _known(value):
            self._lost[name] = 0 if isfinite(value) else self._lost.get(name, 0) + 1
        if name in self._sums:
            total, count = self._sums[name]
            if isinstance(total, Tensor) and isinstance(value, Tensor):
                total = total.to(value.device)
            self._sums[name] = (total + value, count + 1)
        else:
            self._sums[name] = (value, 1)

    @property
    def most(self) -> int:
        """How many values there are of the name that has most."""
        return max((count for _, count in self._sums.values()), default=0)

    def overflows(self, name: str) -> bool:
        """Whether the last three values are NaN or infinite, as far as that is known without waiting."""
        return self._lost.get(name, 0) >= SERIOUS

    def mean(self, name: str) -> float | Tensor | None:
        """The mean so far, where its values are; None where there are none."""
        if name not in self._sums:
            return None
        total, count = self._sums[name]
        return total / count

    def take(self) -> dict[str, float | Transfer]:
        """The means so far, perhaps on their way to the host; counting starts anew."""
        sums, self._sums = self._sums, {}
        return {
            name: Transfer(total / count) if isinstance(total, Tensor) else total / count
            for name, (total, count) in sums.items()
        }

    def state_dict(self) -> dict[str, list[Any]]:
        """Sum and count by name; waits for the sums that are still on a device.

        A sum that is a tensor stays one: as a number it would be rounded otherwise from here on. Where the
        last values were not finite their number follows.
        """
        state: dict[str, list[Any]] = {
            name: [total.to("cpu", copy=True) if isinstance(total, Tensor) else total, count]
            for name, (total, count) in self._sums.items()
        }
        for name, lost in self._lost.items():
            if lost:
                state[name] = [*state.get(name, [0.0, 0]), lost]
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Means":
        """The means that `state_dict` described; a bare number, as until 0.1.0, is one value."""
        means = cls()
        for name, held in state.items():
            total, count, *lost = held if isinstance(held, list | tuple) else (held, 1)
            if lost:
                means._lost[str(name)] = int(lost[0])
            if lost and int(count) == 0:
                continue
            if int(count) < 1:
                raise ValueError(f"{name}: the mean of {count} values")
            total = total.reshape(()).clone() if isinstance(total, Tensor) else float(total)
            means._sums[str(name)] = (total, int(count))
        return means


def _known(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) or value.device.type == "cpu"


def arrived(metrics: dict[str, float | Transfer]) -> dict[str, float]:
    """Logged values as numbers; waits for those that are still on a device.

    Example:
        >>> arrived({"loss": Transfer(torch.tensor(0.5)), "accuracy": 0.9})
        {'loss': 0.5, 'accuracy': 0.9}
    """
    return {
        name: float(value.result()) if isinstance(value, Transfer) else value
        for name, value in metrics.items()
    }
