"""The straight line from the weights that training began with to those that it ended with."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gapaware import arguments
from gapaware.distributed import Unsupported, is_dtensor, local

AnchorWeights = Mapping[str, Tensor] | nn.Module


def starting_weights(
    model: nn.Module, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Copy what training may change, to be an anchor later.

    Args:
        model: before training.
        device: where the copies go; "cpu" costs no memory of the GPU.
        dtype: of the copies, such as torch.bfloat16 for half the memory; by default the tensors' own,
            which complex ones always have.

    Raises:
        TypeError: `model` is no module, or dtype no floating-point one.
        ValueError: this machine has no such device.
        Unsupported: FSDP1, DeepSpeed ZeRO-3, or parameters on the meta device.

    Returns:
        The trainable parameters and the floating-point buffers, by their names in the state dict;
        tied ones once. Of DTensors the local shard, as a DTensor.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> _ = layer.bias.requires_grad_(False)
        >>> list(starting_weights(layer))
        ['weight']
    """
    why = "how to keep the starting weights"
    arguments.device("device", device, why=why)
    arguments.floating("dtype", dtype, why=why)
    return {
        names[0]: _present(names[0], tensor)
        .detach()
        .to(device, None if tensor.is_complex() else dtype, copy=True)
        for names, tensor in _tensors(arguments.module("model", model))
        if may_change(tensor)
    }


def between(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Start + share·(end − start), rounded once.

    Args:
        start: on any device; elements of `end` that equal it when rounded to its dtype stay.
        end: of the same shape; its device and dtype are the result's.
        share: 0 to 1; at 1 the result is `end`, bit for bit.

    Example:
        >>> between(torch.zeros(2), torch.tensor([1.0, 4.0]), 0.25)
        tensor([0.2500, 1.0000])
    """
    # no promotion is defined for float8
    one_byte = end.dtype.itemsize == 1
    wide = torch.float32 if one_byte else torch.promote_types(end.dtype, torch.float32)
    far = end.to(wide)
    near = start.to(end.device, wide)
    moved = torch.lerp(near, far, share)
    # also where both are infinite, as in masks
    return torch.where(end.to(start.dtype).to(wide) == near, far, moved).to(end.dtype)


@dataclass(frozen=True)
class Track:
    """A tensor of the model, and its two ends.

    Attributes:
        place: the model's own elements, written in place.
        start: of the anchor.
        end: the copy of what was trained.
        fresh: whether it stays as trained.
    """

    place: Tensor
    start: Tensor
    end: Tensor
    fresh: bool


class Line:
    """The straight line from an anchor to a trained model; leaving it by an exception goes to its end.

    Args:
        model, anchor, fresh, storage_device: as for `consolidate`.

    Attributes:
        has_fresh_start: whether the anchor has values for `fresh` tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        anchor: AnchorWeights,
        fresh: Sequence[str] = (),
        storage_device: torch.device | str | None = None,
    ) -> None:
        pairs = matched(model, anchor, fresh)
        self._model = model
        self.parameters = [p for p, _, _ in pairs]
        self.has_fresh_start = any(fresh for _, _, fresh in pairs)
        self._sharded = _fully_sharded(model)
        self._memory = [] if self._sharded else _memory(model)
        self._tracks = []
        for tensor, start, is_fresh in pairs:
            place, start = local(tensor.detach()), local(start.detach())
            if not torch.equal(between(start, place, 0.0), place):
                end = place.to(storage_device or place.device, copy=True)
                self._tracks.append(Track(place, start, end, is_fresh))

    def go(self, share: float, fresh: float = 1.0) -> None:
        """Put the model at a share of the way, and what is `fresh` at its own."""
        for module in self._sharded:
            module.reshard()  # else its next forward pass would use weights gathered before
        for track in self._tracks:
            at = fresh if track.fresh else share
            where = track.place.device
            track.place.copy_(
                track.end if at == 1 else between(track.start, track.end.to(where), at)
            )

    def check(self) -> None:
        """Refuse a model that no longer holds the tensors that `go` writes.

        Raises:
            ValueError: they were replaced, as `model.to(...)` does.
        """
        if not self._holds():
            raise ValueError(
                "evaluate moved or cast the model; do that before consolidate, or evaluate under "
                "torch.autocast"
            )

    def _holds(self) -> bool:
        for module in self._sharded:
            module.reshard()
        now = {_address(local(tensor.detach())) for _, tensor in _tensors(self._model)}
        return all(_address(track.place) in now for track in self._tracks)

    def __enter__(self) -> Line:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        self.go(1.0)
        if not self._holds():
            for module, name, tensor, data in self._memory:
                tensor.data = data
                setattr(module, name, tensor)


def matched(
    model: nn.Module, anchor: AnchorWeights, fresh: Sequence[str] = ()
) -> list[tuple[Tensor, Tensor, bool]]:
    """Pair the tensors of a model with those of an anchor.

    Returns:
        Triples (the model's own tensor, the anchor's, whether it is `fresh`), tied tensors once.

    Raises:
        TypeError, ValueError, Unsupported: as `consolidate`.
    """
    arguments.names("fresh", fresh)
    arguments.module("model", model)
    start = arguments.state_dict("anchor", anchor)
    unknown, pairs, missing = set(fresh), [], []
    for names, tensor in _tensors(model):
        mine = {prefix for prefix in fresh if any(name.startswith(prefix) for name in names)}
        unknown -= mine
        found = next((name for name in names if name in start), None)
        if found is not None:
            pairs.append((tensor, _fitting(found, tensor, start[found]), bool(mine)))
        elif not mine and may_change(tensor):
            missing.append(names[0])
    if unknown:
        raise ValueError(f"fresh={sorted(unknown)}: no parameter or buffer of the model starts so")
    if pairs and all(is_fresh for *_, is_fresh in pairs) and not missing:
        raise ValueError(
            f"fresh={sorted(fresh)}: everything that the anchor has, so that nothing would go back; name "
            "only what had no meaning at the start"
        )
    if missing:
        raise ValueError(
            f"anchor: it lacks {arguments.some(missing)} of the model and has "
            f"{arguments.some(list(start))}; if the names differ by a prefix, pass the model inside the "
            "wrapper (DDP: model.module, torch.compile: model._orig_mod); if they were still frozen at "
            "starting_weights(model), which copies what trains, pass the pretrained state dict; and name "
            "in `fresh` what had no start"
        )
    if not pairs:
        raise ValueError(
            f"anchor: it has {arguments.some(list(start)) or 'nothing'}, none of it a weight of the model, "
            "whose parameters are frozen; take starting_weights(model) while they train, or pass the "
            "pretrained state dict"
        )
    return pairs


def _tensors(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """The floating-point and complex tensors in a state dict, each with all its names."""
    # what `get_extra_state` makes anew for each state dict is no weight
    own = {id(tensor) for tensor in chain(model.parameters(), model.buffers())}
    named: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in own and (tensor.is_floating_point() or tensor.is_complex()):
            named.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(named.values())


def may_change(tensor: Tensor) -> bool:
    """Whether training may: it is a parameter that trains, or a buffer that is not of integers.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> [name for name, tensor in norm.state_dict(keep_vars=True).items() if not may_change(tensor)]
        ['num_batches_tracked']
    """
    if isinstance(tensor, nn.Parameter):
        return tensor.requires_grad
    return tensor.is_floating_point() or tensor.is_complex()


def _memory(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """All parameters and buffers: module, name in it, tensor, and the memory that it has now."""
    return [
        (module, name, tensor, tensor.data)
        for module in model.modules()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    ]


def _address(tensor: Tensor) -> tuple[torch.device, int, torch.dtype]:
    return tensor.device, tensor.data_ptr(), tensor.dtype


def _present(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor that has its elements here."""
    if tensor.is_meta or hasattr(tensor, "ds_id") or getattr(tensor, "_fsdp_flattened", False):
        raise Unsupported(
            f"model: the elements of {name} are not in its tensor (meta device, DeepSpeed ZeRO-3 or "
            "FSDP1); gather the model first, or shard it with torch.distributed.fsdp.fully_shard"
        )
    return tensor


def _fitting(name: str, tensor: Tensor, given: Any) -> Tensor:
    _present(name, tensor)
    start = arguments.weight(
        f"anchor[{name!r}]",
        given,
        tensor,
        instead="pass the weights that this model started from, or name it in `fresh` and leave it out",
    )
    if may_change(tensor) and _address(local(tensor.detach())) == _address(local(start.detach())):
        raise ValueError(
            f"anchor[{name!r}] is the model's own memory, not a copy, so that training changes it too; "
            "before training take anchor = gapaware.starting_weights(model)"
        )
    alike = is_dtensor(tensor) == is_dtensor(start)
    if alike and is_dtensor(tensor) and is_dtensor(start):
        alike = (tensor.device_mesh, tensor.placements) == (start.device_mesh, start.placements)
    if not alike:
        raise Unsupported(
            f"anchor[{name!r}] is not sharded as the model's; take the anchor after sharding and "
            "before training: gapaware.starting_weights(model)"
        )
    return start


def _fully_sharded(model: nn.Module) -> list[Any]:
    # where nobody has imported the module there are none
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [module for module in model.modules() if kind and isinstance(module, kind)]
