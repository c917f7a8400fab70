"""The starting weights, kept so that training can be pulled back towards them.

θ ← θ + ρ (θ_0 − θ) after a step is weight decay to the start θ_0 instead of to zero (L2-SP, Li, Grandvalet
and Davoine, 2018), decoupled from the gradient as in AdamW. How strong the pull ρ is, is not decided here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gapaware import arguments
from gapaware.caution import caution
from gapaware.distributed import is_dtensor, local
from gapaware.lr import is_remote
from gapaware.places import (
    Groups,
    Place,
    from_state,
    places,
    scaled_places,
    to_state,
    without_gradient,
)
from gapaware.scaling import Scales


class Anchor:
    """Copies of the starting weights, and the pull towards them.

    Args:
        source: "init" for the weights at the first step, and of what is frozen then, when it is unfrozen;
            or a state dict by parameter name, in which what is missing is not pulled: a new head, which has
            no old skill.
        device: where to keep them, None for the parameters' own. From elsewhere they travel at each step.
        dtype: to keep them in, such as `torch.bfloat16`; None for the parameters' own, which complex ones
            always have. The pull is to what they are in it.

    Raises:
        TypeError: dtype is no floating-point one, or one of a single byte.
        ValueError: this machine has no such device.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> groups = [{"params": list(layer.parameters()), "lr": 0.1}]
        >>> anchor = Anchor("init")
        >>> anchor.start(groups)
        >>> _ = torch.nn.init.constant_(layer.weight, 5.0)
        >>> anchor.pull(groups, [Scales(pull=1.0)])
        >>> bool((layer.weight < 5).all())
        True
    """

    def __init__(
        self,
        source: str | Mapping[str, Tensor],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._source = source
        why = "how to keep the starting weights"
        self._device = arguments.device("anchor_device", device, why=why)
        self._dtype = arguments.floating("anchor_dtype", dtype, least_bytes=2, why=why)
        self.restart()

    def restart(self) -> None:
        """Forget the starting weights: those at the next step will be the start."""
        self._weights: dict[Place, Tensor] = {}
        self._waiting: set[Place] = set()  # what has not trained so far
        self._highest_lr: dict[int, float | Tensor] = {}
        self._groups = 0

    def check(self, groups: Groups) -> None:
        """Refuse a state dict that is not one of these parameters.

        Raises:
            TypeError: it has no tensor for one of them.
            ValueError: the parameters have no names, none is in it, a shape is another, a value is NaN or
                infinite, or too large for the dtype to keep it in.

        Warns:
            UserWarning: it seems to have one of them by another name.
        """
        # frozen ones too: they may be unfrozen, and a mistake then would cost the training until then
        given = [
            (_name(groups, place), self._given(groups, place, parameter))
            for place, parameter in places(groups)
            if _may_be_anchored(groups, place, parameter)
        ]
        for name, weights in given:
            if weights is not None and self._overflows(weights):
                raise ValueError(
                    f"anchor_dtype={self._dtype}: {name or 'a parameter'} has values that are too large "
                    "for it; pass torch.bfloat16, which takes as little memory"
                )
        if isinstance(self._source, str):
            return
        if lost := [name for name, weights in given if not _is_finite(weights)]:
            raise ValueError(
                f"anchor: {arguments.some(lost)} {'has' if len(lost) == 1 else 'have'} NaN or infinity, "
                "which the pull would carry into the model; pass the weights of a sound one"
            )
        if all(weights is None for _, weights in given):
            theirs = [name for group in groups for name in group.get("param_names", ())]
            found = (
                f"it has {arguments.some(list(self._source))}, the optimizer {arguments.some(theirs)}; if "
                "they differ by a prefix, take both from the model inside the wrapper (DDP: model.module, "
                "torch.compile: model._orig_mod), else pass a state dict of the same model"
                if theirs
                else "build that with model.named_parameters(), which gives it names"
            )
            raise ValueError(
                f"anchor: none of its names is a parameter of the wrapped optimizer; {found}"
            )
        for name, other in _renamed(groups, self._source):
            caution(
                f"anchor: it lacks {name!r} of the wrapped optimizer, which is not pulled, but has the "
                f"same weights by the name {other!r}; if these two are tied, set "
                f"anchor[{name!r}] = anchor[{other!r}]"
            )

    @torch.no_grad()
    def start(self, groups: Groups) -> None:
        """Take the starting weights of what trains for the first time; frozen, it was still there."""
        if len(groups) != self._groups:
            self._waiting |= {place for place, _ in places(groups) if place[0] >= self._groups}
            self._groups = len(groups)
        if not self._waiting:
            return
        begin = [(place, p) for place, p in _anchored(groups) if place in self._waiting]
        for place, parameter in begin:
            given = self._given(groups, place, parameter)
            if given is not None:
                self._weights[place] = self._kept(given.detach(), parameter)
        if begin:
            self._waiting -= {place for place, _ in begin}
            self._let_go(groups)

    @torch.no_grad()
    def pull(
        self,
        groups: Groups,
        by_group: Sequence[Scales],
        by_parameter: Mapping[int, Scales] | None = None,
    ) -> None:
        """Move each parameter the share ρ of its way back to the start.

        ρ is `Scales.pull` times the learning rate of the schedule over its peak, so that the pull weakens
        with the steps that it balances. As weight decay, it leaves alone what has no gradient in this step.

        Args:
            groups: of the wrapped optimizer.
            by_group: scales of each group.
            by_parameter: scales by `id(parameter)`, which then decide instead.
        """
        shares, idle = self.shares(groups), without_gradient(groups)
        alike: dict[Any, tuple[float | Tensor, list[Tensor], list[Tensor]]] = {}
        for place, parameter, scales in scaled_places(groups, by_group, by_parameter):
            number, pull = place[0], scales.pull
            weights, share = self._weights.get(place), shares[number]
            if weights is None or pull == 0.0 or not _is_anchored(groups, place, parameter):
                continue
            if id(parameter) in idle:
                continue
            here = local(parameter)
            # a tensor on a GPU cannot be told from another: its group stands for it
            rate = (pull, number) if isinstance(share, Tensor) else pull * share
            key = (rate, here.device, here.dtype)
            _, to, start = alike.setdefault(key, (pull * share, [], []))
            to.append(here)
            # towards the host such a copy would be read before it is there
            start.append(local(weights).to(here.device, here.dtype, non_blocking=here.is_cuda))
        for (_, device, dtype), (rho, to, start) in alike.items():
            if isinstance(rho, Tensor):
                # given as one weight it would be read on the host
                torch._foreach_lerp_(to, start, [rho.to(device, dtype)] * len(to))
            elif rho > 0:
                torch._foreach_lerp_(to, start, rho)

    def shares(self, groups: Groups) -> list[float | Tensor]:
        """The learning rate of each group over its peak; 0 where nothing is pulled."""
        return [
            self._share_of_peak(number, group) if group.get("anchor", True) else 0.0
            for number, group in enumerate(groups)
        ]

    def weights(self, groups: Groups) -> dict[int, Tensor]:
        """The starting weights by the `id` of the parameter that is pulled to them."""
        return {
            id(parameter): self._weights[place]
            for place, parameter in _anchored(groups)
            if place in self._weights
        }

    def _share_of_peak(self, number: int, group: dict[str, Any]) -> float | Tensor:
        lr, before = group["lr"], self._highest_lr.get(number, 0.0)
        if is_remote(lr):
            lr = lr.detach().double().reshape(())
            highest = self._highest_lr[number] = lr.clamp(min=before)
            return (lr / highest).nan_to_num()  # 0/0 before a warm-up has begun
        peak = self._highest_lr[number] = max(float(lr), float(before))
        return float(lr) / peak if peak > 0 else 0.0

    def _given(self, groups: Groups, place: Place, parameter: Tensor) -> Tensor | None:
        if isinstance(self._source, str):
            return parameter
        name = _name(groups, place)
        if name not in self._source:
            return None
        return arguments.weight(
            f"anchor[{name!r}]",
            self._source[name],
            parameter,
            instead="pass the state dict that this model was loaded from",
        )

    def _let_go(self, groups: Groups) -> None:
        """Refer to the copies instead of what they were made from, whose memory can then be freed.

        The names stay: those of parameters that are added later, and all of them for a new start.
        """
        if not isinstance(self._source, str):
            copies = {_name(groups, place): kept for place, kept in self._weights.items()}
            self._source = {name: copies.get(name, w) for name, w in self._source.items()}

    def _overflows(self, weights: Tensor) -> bool:
        """Whether finite weights would be infinite in the dtype to keep them in; of shards those here."""
        here = local(weights.detach())
        if self._dtype is None or here.is_complex() or here.is_meta:
            return False
        largest = torch.finfo(self._dtype).max
        wider = torch.finfo(here.dtype).max > largest
        return wider and bool(((here.abs() > largest) & here.isfinite()).any())

    def _kept(self, weights: Tensor, parameter: Tensor) -> Tensor:
        weights = _like(weights, parameter)
        own = self._dtype is None or parameter.is_complex()
        dtype = parameter.dtype if own else self._dtype
        if not own and torch.finfo(dtype).max < torch.finfo(weights.dtype).max:
            # what has become too large since `check` did not find it so: a pull to infinity ends a run
            weights = weights.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        return torch.empty_like(
            weights,
            device=parameter.device if self._device is None else self._device,
            dtype=dtype,
            requires_grad=False,
        ).copy_(weights)

    def state_dict(self) -> dict[str, Any]:
        """The starting weights and the peaks of the schedule, as tensors, numbers and strings."""
        return {
            "weights": to_state(self._weights),
            "highest_lr": {str(number): float(lr) for number, lr in self._highest_lr.items()},
            "groups": self._groups,
            "waiting": [list(place) for place in sorted(self._waiting)],
        }

    def load_state_dict(self, state: dict[str, Any], groups: Groups) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: a weight does not fit its parameter.
        """
        weights = {
            place: self._kept(saved.to(parameter.device), parameter)
            for place, parameter, saved in from_state(state["weights"], groups, "anchor")
        }
        peaks: dict[int, float | Tensor] = {
            int(number): float(lr) for number, lr in state["highest_lr"].items()
        }
        # states of gapaware 0.1.0 do not say, and one made before it was frozen has no start of it
        waiting = {(int(group), int(index)) for group, index in state.get("waiting", ())}
        waiting |= {place for place, p in places(groups) if not _is_anchored(groups, place, p)}
        self._weights, self._highest_lr, self._groups = weights, peaks, int(state["groups"])
        self._waiting = waiting - weights.keys()
        self._let_go(groups)


def pulled(before: Tensor, after: Tensor, start: Tensor, rates: Tensor) -> Tensor:
    """How far the pull moved weights between two moments, as if they had gone straight in between.

    Args:
        before: weights, or a linear sketch of them, (rows, dim).
        after: the same some steps later.
        start: what they were pulled to.
        rates: Σ ρ over these steps for each row, (rows,).

    Example:
        >>> pulled(torch.zeros(1, 1), torch.full((1, 1), 2.0), torch.zeros(1, 1), torch.tensor([0.1]))
        tensor([[-0.1000]])
    """
    return rates[:, None] * (start - (before + after) / 2)


def _anchored(groups: Groups) -> Iterator[tuple[Place, Tensor]]:
    """The trainable parameters of the groups that do not say `"anchor": False`."""
    for place, parameter in places(groups):
        if _is_anchored(groups, place, parameter):
            yield place, parameter


def _is_anchored(groups: Groups, place: Place, parameter: Tensor) -> bool:
    return parameter.requires_grad and bool(groups[place[0]].get("anchor", True))


def _may_be_anchored(groups: Groups, place: Place, parameter: Tensor) -> bool:
    """Whether it is, or would be if it were not frozen: quantized weights can only be frozen."""
    floating = parameter.is_floating_point() or parameter.is_complex()
    return floating and bool(groups[place[0]].get("anchor", True))


def _name(groups: Groups, place: Place) -> str:
    """The name of a parameter, "" where it has none."""
    names = groups[place[0]].get("param_names")
    return "" if names is None else names[place[1]]


@torch.no_grad()
def _renamed(groups: Groups, source: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of parameters that a state dict has by another name, as of tied weights, and that name.

    Those of equal values, as before training. Vectors may be equal by chance: zeros or ones.
    """
    named = {_name(groups, place) for place, _ in places(groups)}
    spare = {name: weights for name, weights in source.items() if name not in named}
    for place, parameter in places(groups):
        name = _name(groups, place)
        if name in source or parameter.ndim < 2 or not _may_be_anchored(groups, place, parameter):
            continue
        # all of them, also after one was found: ranks that share weights in shards meet in each
        for other in [other for other, weights in spare.items() if _is_equal(weights, parameter)]:
            yield name, other


def _is_equal(weights: Any, parameter: Tensor) -> bool:
    """Whether weights of a state dict are those of the parameter, rounded to its dtype."""
    if not isinstance(weights, Tensor) or weights.is_meta or weights.shape != parameter.shape:
        return False
    here, there = local(parameter), local(_like(weights, parameter))
    return here.numel() > 0 and torch.equal(there.to(here.dtype), here.to(there.device))


def _is_finite(weights: Tensor | None) -> bool:
    """Whether all of them are, of shards those here."""
    if weights is None:
        return True
    here = local(weights.detach())
    # what has a single byte knows no `isfinite`
    return bool(torch.isfinite(here.float() if here.itemsize == 1 else here).all())


def _like(weights: Tensor, parameter: Tensor) -> Tensor:
    """Whole weights as a DTensor where their parameter is one."""
    if not is_dtensor(parameter) or is_dtensor(weights):
        return weights
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        weights.to(parameter.device), parameter.device_mesh, parameter.placements
    )
