"""What was seen in a snapshot, and under what conditions the updates in its window were made."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapaware.transfer import Transfer


@dataclass(frozen=True)
class Conditions:
    """Under what an update was made.

    Attributes:
        mean_lrs: lr of each row before scaling, (rows,), perhaps on its way to the host.
        scales: factor on it.
        span: optimizer steps.
    """

    mean_lrs: Transfer
    scales: tuple[float, ...]
    span: int

    @cached_property
    def lrs(self) -> tuple[float, ...]:
        """Mean lr of each row before scaling."""
        return tuple(self.mean_lrs.result().tolist())

    def as_list(self) -> list[Any]:
        """Plain lists and numbers, for a state dict."""
        return [list(self.lrs), list(self.scales), self.span]

    @classmethod
    def from_list(cls, values: list[Any]) -> "Conditions":
        """The conditions that `as_list` described."""
        lrs, scales, span = values
        mean_lrs = Transfer(column([float(lr) for lr in lrs]))
        return cls(mean_lrs, tuple(map(float, scales)), int(span))


@dataclass(frozen=True)
class Said:
    """What ranks that share a sketch said beside it, added up over them, perhaps on its way to the host.

    Attributes:
        sums: (5,), of their mean losses since the snapshot before, and the number of ranks that have logged
            one, that hold no copy of the weights, that will not go back to it, and that had a fault.

    Example:
        >>> first, second = Said.of(1.0, kept=True), Said.of(None, kept=True, back=True)
        >>> both = Said(Transfer(first + second))
        >>> both.loss, both.kept, both.back, both.fault
        (1.0, True, False, False)
    """

    sums: Transfer

    @staticmethod
    def of(
        loss: float | Tensor | None = None,
        *,
        kept: bool = False,
        back: bool = False,
        fault: bool = False,
    ) -> Tensor:
        """What one rank says, float64, where its loss is."""
        loss = loss.double() if isinstance(loss, Tensor) else loss
        return column([0.0 if loss is None else loss, loss is not None, not kept, not back, fault])

    @property
    def loss(self) -> float | None:
        """Mean of the ranks that have logged one."""
        total, ranks = self.sums.result()[:2].tolist()
        return total / ranks if ranks else None

    @property
    def kept(self) -> bool:
        """Whether every rank has a copy of the weights."""
        return not self.sums.result()[2].item()

    @property
    def back(self) -> bool:
        """Whether every rank is about to go back to it."""
        return not self.sums.result()[3].item()

    @property
    def fault(self) -> bool:
        """Whether a rank had a fault, so that the sketch is none."""
        return bool(self.sums.result()[4].item())


@dataclass(frozen=True)
class Sighting:
    """A snapshot, with its Gram matrices still on their way to the host.

    Attributes:
        step: optimizer steps made when it was taken.
        names: of the rows.
        groups: parameter group of each row.
        gram: inner products, (2, 2, rows, n, n) as in `Window.gram`.
        conditions: of the n updates, the oldest first.
        separable: for each row, whether its weight decay is known.
        squared_norms: ‖θ‖² of each row when it was taken, (rows,); None where a state did not have them.
        risk: of forgetting, a number as in `Start.risk`; None where the start is not known.
        said: by the ranks that share the sketch; None where there are none.
    """

    step: int
    names: tuple[str, ...]
    groups: tuple[int, ...]
    gram: Transfer
    conditions: tuple[Conditions, ...]
    separable: tuple[bool, ...]
    squared_norms: Transfer | None = None
    risk: Transfer | None = None
    said: Said | None = None

    def state_dict(self) -> dict[str, Any]:
        """The sighting as tensors, numbers and lists; waits for the Gram matrices."""
        norms = self.squared_norms
        return {
            "step": self.step,
            "names": list(self.names),
            "groups": list(self.groups),
            "gram": self.gram.result().clone(),
            "conditions": [condition.as_list() for condition in self.conditions],
            "separable": list(self.separable),
            "squared_norms": None if norms is None else norms.result().tolist(),
            "risk": None if self.risk is None else float(self.risk.result()),
            "loss": None if self.said is None else self.said.loss,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Sighting":
        """The sighting that `state_dict` described."""
        rows, updates = len(state["names"]), len(state["conditions"])
        if not (
            len(state["groups"]) == len(state["separable"]) == rows
            and state["gram"].shape == (2, 2, rows, updates, updates)
        ):
            raise ValueError("the parts of a sighting do not fit together")
        # until 0.1.0 there was none of them
        risk, norms, loss = state.get("risk"), state.get("squared_norms"), state.get("loss")
        if norms is not None and len(norms) != rows:
            raise ValueError("the parts of a sighting do not fit together")
        return cls(
            step=int(state["step"]),
            names=tuple(map(str, state["names"])),
            groups=tuple(map(int, state["groups"])),
            gram=Transfer(state["gram"].to("cpu", torch.float64)),
            conditions=tuple(map(Conditions.from_list, state["conditions"])),
            separable=tuple(map(bool, state["separable"])),
            squared_norms=None if norms is None else Transfer(column(list(map(float, norms)))),
            risk=None if risk is None else Transfer(column([float(risk)])[0]),
            # copies of weights are not saved
            said=None if loss is None else Said(Transfer(Said.of(float(loss)))),
        )


def column(values: Sequence[float | Tensor]) -> Tensor:
    """Numbers as a float64 tensor, on the device of those that are tensors; on the host if none is."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return torch.from_numpy(np.array(values, dtype=np.float64))
    like = tensors[0]
    return torch.stack(
        [v.to(like) if isinstance(v, Tensor) else torch.full_like(like, v) for v in values]
    )
