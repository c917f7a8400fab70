"""Extrapolation: a push along what the recent steps have in common, which a larger learning rate is not.

θ ← θ + λ·m after a step, with m the exponential average of the steps so far: directions in which the
weights bounce cancel in m, those in which they drift add up. How strong the push λ is, is not decided here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gapaware.distributed import local
from gapaware.lr import is_remote
from gapaware.momentum import TIME_CONSTANTS, memory_steps
from gapaware.places import Groups, Place, from_state, scaled_places, to_state, without_gradient
from gapaware.room import check_room
from gapaware.scaling import Scales

LEAST_MEMORY = 3  # steps; a shorter average is the step itself
# until a rank has met the others once more, and they have looked at what it said then
SNAPSHOTS = 2


class Push:
    """The average of the steps of each parameter that is pushed, and the push along it.

    It is kept as weights s that lag behind, θ − s = β/(1 − β)·m, one copy of the parameters, and only while
    there is a push. β is such that m remembers for as long as the wrapped optimizer's momentum does.

    Replicas must not part, and one of them may have no memory for the copy, or a controller that raised. So
    several ranks move nothing by it until their snapshots have shown that none of them had a fault.

    Attributes:
        waits: for so many more of those snapshots.

    Example:
        >>> weights = torch.nn.Parameter(torch.zeros(1))
        >>> group = {"params": [weights], "momentum": 0.9}
        >>> push = Push()
        >>> push([group], [Scales(push=1.0)])
        >>> with torch.no_grad():
        ...     _ = weights.add_(1.0)
        >>> push([group], [Scales(push=1.0)])
        >>> round(weights.item(), 3)
        1.1
    """

    def __init__(self) -> None:
        self._behind: dict[Place, Tensor] = {}
        self.waits = 0

    @property
    def holds(self) -> bool:
        """Whether there is a copy of any weights."""
        return bool(self._behind)

    @torch.no_grad()
    def renew(self, place: Place, parameter: Tensor) -> None:
        """Begin with m = 0 again where somebody has written the weights: that was no step."""
        # in place: no memory that a rank might lack, so nothing that ranks have to agree on
        behind = self._behind.get(place)
        if behind is not None and behind.shape == parameter.shape:
            behind.copy_(parameter)

    @torch.no_grad()
    def __call__(
        self,
        groups: Groups,
        by_group: Sequence[Scales],
        by_parameter: Mapping[int, Scales] | None = None,
        *,
        shared: Callable[[], bool] | None = None,
    ) -> None:
        """Move each parameter by λ·m. At the first push m is 0, and without one it is forgotten.

        Nor does anything move that has no gradient in this step, as with any optimizer, or whose learning
        rate is 0, as far as the host knows it.

        Args:
            groups: of the wrapped optimizer, after its step.
            by_group: scales of each group.
            by_parameter: scales by `id(parameter)`, which then decide instead.
            shared: tells whether other ranks train the model, too, and push alike.

        Raises:
            MemoryError: a copy of the weights might be what training lacks later on.
            RuntimeError: there is no memory for one.
        """
        before, self._behind = self._behind, {}
        chosen_by = by_group if by_parameter is None else by_parameter.values()
        if not any(scales.push for scales in chosen_by):
            self.waits = 0
            return
        rate = TIME_CONSTANTS / max(LEAST_MEMORY, memory_steps(groups))
        alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        begin, idle = [], without_gradient(groups)
        for place, parameter, chosen in scaled_places(groups, by_group, by_parameter):
            lr = groups[place[0]].get("lr")
            stopped = lr is not None and not is_remote(lr) and float(lr) == 0.0
            if chosen.push == 0.0 or stopped or not parameter.requires_grad:
                continue
            behind = before.get(place)
            if behind is None or behind.shape != parameter.shape:
                begin.append((place, parameter))
                continue
            self._behind[place] = behind = behind.to(parameter.device, parameter.dtype)
            if id(parameter) in idle:
                continue
            here, lagging = local(parameter), local(behind)
            moved, along = alike.setdefault((chosen.push, here.device, here.dtype), ([], []))
            moved.append(here)
            along.append(lagging)
        if begin:
            self._begin(begin)
            self.waits = SNAPSHOTS if shared is not None and shared() else 0
        if self.waits:
            for moved, along in alike.values():
                torch._foreach_copy_(along, moved)
            return
        for (push, _, _), (to, behind_them) in alike.items():
            # m = rate·(θ − s), and what s lags behind afterwards is (1 − rate)/rate·m
            torch._foreach_lerp_(to, behind_them, -push * rate)
            torch._foreach_lerp_(behind_them, to, rate * (1 + push) / (1 + push * rate))

    def _begin(self, parameters: Sequence[tuple[Place, Tensor]]) -> None:
        try:
            check_room([parameter for _, parameter in parameters])
            self._behind |= {place: parameter.detach().clone() for place, parameter in parameters}
        except (MemoryError, RuntimeError):
            self._behind = {}
            raise

    def seen(self) -> None:
        """Count a snapshot that shows no fault of any rank."""
        self.waits = max(0, self.waits - 1)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights behind, by parameter group and place."""
        return to_state(self._behind)

    def load_state_dict(self, state: Mapping[str, Tensor], groups: Groups) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: a weight does not fit its parameter.
        """
        # one that was frozen since is let go at the next push
        self._behind = {
            place: saved.to(parameter.device, parameter.dtype, copy=True)
            for place, parameter, saved in from_state(state, groups, "push")
        }
