"""Sharded parameters: where their local elements lie in the whole ones, and the one small all-reduce.

A sketch is linear. Each rank sketches the elements that it holds, at the places they have in the whole
parameter, and the sum over the ranks is the sketch of the whole model: no parameter is gathered, and every
rank computes with the same bits. Of a parameter that several ranks hold alike only one copy counts.

Ranks that hold whole copies of everything, as under DistributedDataParallel, have nothing to say to one
another: the same parameters give the same sketch.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from gapaware.delegation import leaves

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

LARGEST_PIECE = 1 << 20


class Unsupported(RuntimeError):
    """Something that GapAware cannot observe correctly; raised to the user, never only noted."""


@dataclass(frozen=True)
class Sharing:
    """The ranks over which parameters are sharded.

    Attributes:
        ranks: their global ranks, sorted; empty where every rank holds everything.
        device_type: of the meshes, where their process groups work.
        mesh: a one-dimensional mesh of exactly these ranks, if one of the parameters has it.
        all_told: whether no other rank can have replicas of the same shards: these are all there are, or
            those that a person named. Else replicas would part by losses of their own.
    """

    ranks: tuple[int, ...] = ()
    device_type: str = "cpu"
    mesh: "DeviceMesh | None" = None
    all_told: bool = True

    def home(self, device: torch.device) -> torch.device:
        """Where sketches are added up: `device`, unless the process groups do not work there."""
        if not self.ranks or device.type == self.device_type:
            return device
        return torch.device(self.device_type, torch.accelerator.current_device_index())

    def counts(self, parameter: Tensor) -> bool:
        """Whether this rank's elements of a parameter go into the sum, or equal ones of another rank."""
        if not self.ranks:
            return True
        if not is_dtensor(parameter):
            return dist.get_rank() == self.ranks[0]
        mesh = parameter.device_mesh
        coordinate = mesh.get_coordinate()
        # a mesh may be one of several slices that hold the same: the slice of the first rank counts
        if coordinate is None or not bool((mesh.mesh == self.ranks[0]).any()):
            return False
        along = zip(parameter.placements, coordinate, strict=True)
        return all(mine == 0 for placement, mine in along if placement.is_replicate())

    def add_up(self, sketches: Tensor) -> Tensor:
        """Sum the ranks' sketches, in place; the same bits on every rank."""
        if self.ranks:
            dist.all_reduce(sketches, group=_group(self))
        return sketches

    def everywhere(self, holds: bool, device: torch.device) -> bool:
        """Whether what holds on this rank holds on all of them, which waits for their answers.

        Args:
            holds: on this rank.
            device: of the parameters.
        """
        if not self.ranks:
            return holds
        doubts = torch.tensor(0.0 if holds else 1.0, device=self.home(device))
        return not self.add_up(doubts).item()


def sharing(parameters: Iterable[Tensor], replicas: tuple[int, ...] = ()) -> Sharing:
    """Find out which ranks have to add up their sketches.

    Args:
        parameters: the trainable ones.
        replicas: ranks that hold the same parameters, or the same shards of them: the sketch of the first
            of them then counts for all, and so do its faults.

    Example:
        >>> sharing([torch.ones(3)]).ranks
        ()
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Sharing()
    meshes: dict[int, DeviceMesh] = {}
    sharded = False
    device_type = "cpu"
    for parameter in parameters:
        device_type = parameter.device.type
        if is_dtensor(parameter):
            meshes.setdefault(id(parameter.device_mesh), parameter.device_mesh)
            sharded = sharded or not all(p.is_replicate() for p in parameter.placements)
    if not sharded:
        return Sharing(replicas, device_type) if len(replicas) > 1 else Sharing()
    members = {id(mesh): tuple(sorted(mesh.mesh.flatten().tolist())) for mesh in meshes.values()}
    ranks = tuple(sorted(set(replicas).union(*members.values())))
    if len(ranks) == 1 or dist.get_rank() not in ranks:
        return Sharing()
    exact = [m for m in meshes.values() if m.ndim == 1 and members[id(m)] == ranks]
    device_type = next(iter(meshes.values())).device_type
    all_told = bool(replicas) or len(ranks) == dist.get_world_size()
    return Sharing(ranks, device_type, exact[0] if exact else None, all_told)


def ranks_of(process_group: Any) -> tuple[int, ...]:
    """The global ranks of what a person passes as `process_group`; none of None.

    Raises:
        TypeError: it is no process group.

    Example:
        >>> ranks_of("world")
        Traceback (most recent call last):
        TypeError: process_group='world': pass torch.distributed.group.WORLD, or a group from new_group()
    """
    if process_group is None:
        return ()
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            f"process_group={process_group!r}: pass torch.distributed.group.WORLD, or a group from "
            "new_group()"
        )
    return tuple(dist.get_process_group_ranks(process_group))


def is_dtensor(parameter: Tensor) -> "TypeGuard[DTensor]":
    """Whether a parameter is a DTensor."""
    # where nobody has imported the module there are none, and importing it takes half a second
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(parameter, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank has of it: of a DTensor its shard, otherwise the tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_pieces(parameter: Tensor, place: int) -> Iterable[tuple[Tensor, int]]:
    """The local elements of a parameter as contiguous stretches of the whole one.

    Args:
        parameter: an ordinary tensor or a DTensor; complex elements count as two real ones.
        place: of the whole parameter's first element in the row.

    Returns:
        Pairs (flat real tensor, place of its first element), to be used under `torch.no_grad()`. Where a
        rank holds some columns of a matrix, blocks of whole rows with zeros for the columns it does not
        hold: few large pieces instead of one for each row. No two pieces overlap.

    Raises:
        Unsupported: a placement is Partial or of an unknown kind.
    """
    plain = type(parameter) in (Tensor, torch.nn.Parameter) and not parameter.is_complex()
    if plain and parameter.is_contiguous():
        # nearly every parameter, so without what the others need
        return ((parameter if parameter.ndim == 1 else parameter.view(-1), place),)
    return _any_pieces(parameter.detach(), place)


def _any_pieces(tensor: Tensor, place: int) -> Iterator[tuple[Tensor, int]]:
    shape = list(tensor.shape)
    if is_dtensor(tensor):
        mesh = tensor.device_mesh
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            return
        held = held_indices(shape, tensor.placements, mesh.shape, coordinate)
        tensor = tensor.to_local()
    else:
        held = [[range(size)] for size in shape]
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
        shape, held = [*shape, 2], [*held, [range(2)]]
    if not shape:
        tensor, shape, held = tensor.reshape(1), [1], [[range(1)]]
    expected = [sum(map(len, runs)) for runs in held]
    if tensor.numel() == 0 == prod(expected):
        return
    if list(tensor.shape) != expected:
        raise Unsupported(
            f"a parameter of shape {tuple(shape)} has a local shard of shape {tuple(tensor.shape)} "
            f"where {tuple(expected)} was expected; please report this, with its placements"
        )
    yield from _pieces_of_part(tensor, shape, held, place)


def held_indices(
    shape: Sequence[int],
    placements: "Sequence[Placement]",
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
) -> list[list[range]]:
    """The indices that a rank holds along each dimension, in the order in which it holds them.

    Args:
        shape: of the whole parameter.
        placements: one for each mesh dimension.
        mesh_shape: ranks along each mesh dimension.
        coordinate: of the rank in the mesh.

    Example:
        Four ranks share the rows of a 10 x 2 matrix, the third holds rows 6 to 8:

        >>> from torch.distributed.tensor import Shard
        >>> held_indices((10, 2), [Shard(0)], (4,), (2,))
        [[range(6, 9)], [range(0, 2)]]
    """
    held = [[range(size)] for size in shape]
    for placement, ranks, mine in zip(placements, mesh_shape, coordinate, strict=True):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if dim is None:
            raise Unsupported(
                f"a parameter is placed as {placement} on its mesh: only Shard and Replicate can be "
                "observed; redistribute it before the optimizer steps"
            )
        # _StridedShard: as if the dimension had been split before, by a mesh dimension further right
        parts = int(getattr(placement, "split_factor", 1))
        held[dim] = [
            run
            for part in range(parts)
            for run in _nth_of(_nth_of(held[dim], part, parts), mine, ranks)
        ]
    return held


def refuse(optimizer: torch.optim.Optimizer) -> None:
    """Reject what shards parameters in a way that hides where their elements belong.

    Raises:
        Unsupported: FullyShardedDataParallel, ZeroRedundancyOptimizer or DeepSpeed ZeRO is at work.
    """
    instead = "shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead"
    for leaf in leaves(optimizer):
        if any(p.device.type == "mps" for group in leaf.param_groups for p in group["params"]):
            raise Unsupported(
                "base: its parameters are on MPS, which has no float64 for the sums of a sketch; train on "
                "the CPU or CUDA, or use the wrapped optimizer alone"
            )
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(leaf).__mro__):
            raise Unsupported(
                "base: a ZeroRedundancyOptimizer steps a part of the parameters with an optimizer of "
                f"its own, which cannot be scaled from outside; {instead}"
            )
        for parameter in (p for group in leaf.param_groups for p in group["params"]):
            if getattr(parameter, "_fsdp_flattened", False):
                raise Unsupported(
                    "base: its parameters belong to FullyShardedDataParallel (FSDP1), whose flat "
                    f"shards do not tell which elements they hold; {instead}"
                )
            if _is_deepspeed(parameter):
                raise Unsupported(
                    "base: its parameters are partitions of DeepSpeed ZeRO, which do not tell which "
                    f"elements they hold; {instead}, or use DeepSpeed with ZeRO stage 0"
                )


def alone() -> bool:
    """Whether this is the only process of its kind, so that what it sees is all there is to see."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1


def is_first() -> bool:
    """Whether this process writes what is to be written once."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    # set by torchrun and accelerate, which often initialize the group after the optimizer is built
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def _pieces_of_part(
    part: Tensor, shape: Sequence[int], held: Sequence[list[range]], place: int
) -> Iterator[tuple[Tensor, int]]:
    stride = prod(shape[1:])
    inner_is_whole = all(runs == [range(n)] for runs, n in zip(held[1:], shape[1:], strict=True))
    height = 1 if stride > LARGEST_PIECE else LARGEST_PIECE // stride
    start = 0
    for run in held[0]:
        if inner_is_whole:
            yield part.narrow(0, start, len(run)).reshape(-1), place + run.start * stride
            start += len(run)
            continue
        for first in run[::height]:
            rows = part.narrow(0, start, min(height, run.stop - first))
            start += rows.shape[0]
            if stride > LARGEST_PIECE:
                yield from _pieces_of_part(rows[0], shape[1:], held[1:], place + first * stride)
            else:
                yield _widened(rows, shape[1:], held[1:]).reshape(-1), place + first * stride


def _widened(part: Tensor, shape: Sequence[int], held: Sequence[list[range]]) -> Tensor:
    """Whole rows, with the elements of `part` where they belong and zeros elsewhere."""
    whole = part.new_zeros((part.shape[0], *shape))
    starts = [list(accumulate(map(len, runs), initial=0)) for runs in held]
    for chosen in product(*(range(len(runs)) for runs in held)):
        source, target = part, whole
        for dim, which in enumerate(chosen):
            run = held[dim][which]
            source = source.narrow(dim + 1, starts[dim][which], len(run))
            target = target.narrow(dim + 1, run.start, len(run))
        target.copy_(source)
    return whole


def _nth_of(runs: list[range], n: int, parts: int) -> list[range]:
    """Part n of what `torch.chunk` makes of the indices in `runs`."""
    size = -(-sum(map(len, runs)) // parts)
    first, last = n * size, (n + 1) * size
    chosen = []
    for run in runs:
        chosen.append(run[max(first, 0) : max(last, 0)])
        first, last = first - len(run), last - len(run)
    return [run for run in chosen if run]


def _is_deepspeed(parameter: Tensor) -> bool:
    # stage 3 marks parameters; stages 1 and 2 put bare flat partitions into the groups
    if hasattr(parameter, "ds_id"):
        return True
    bare = parameter.ndim == 1 and not isinstance(parameter, torch.nn.Parameter)
    return bare and "deepspeed" in sys.modules


_groups: dict[tuple[Any, tuple[int, ...]], Any] = {}


def _group(sharing: Sharing) -> Any:
    world = dist.group.WORLD
    if len(sharing.ranks) == dist.get_world_size():
        return world
    if sharing.mesh is not None:
        return sharing.mesh.get_group()
    if any(of is not world for of, _ in _groups):
        _groups.clear()  # the world that they were parts of is gone
    if (world, sharing.ranks) not in _groups:
        _groups[world, sharing.ranks] = dist.new_group(
            list(sharing.ranks), use_local_synchronization=True
        )
    return _groups[world, sharing.ranks]
