"""Which parameters make up a row of the sketch, and where in the row each one lies.

A row never spans two parameter groups, since learning rate and weight decay belong to a group. The
Gram matrix of the whole model is the sum over the rows.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from gapaware.blocks import Stretch
from gapaware.distributed import Sharing, local_pieces

GRANULARITIES = ("global", "group", "block")
# of a row. Each costs a look at the accumulator of its sketch, and more of them foretell nothing more
MOST_BLOCKS = 8

# name, number of parameters, numbers in them, and which of the group's parameters they are
RowSignature = tuple[str, int, int, str]
# name of the first unit, number of parameters, numbers in them, place of the first in the row, and which
BlockSignature = tuple[str, int, int, int, str]
# which they are, in a state that does not say
UNTOLD = ""


@dataclass(frozen=True)
class Row:
    """Parameters that are sketched together.

    Attributes:
        name: for logs, such as "group 0" or "group 1: encoder.layer.3".
        group: index of the parameter group.
        parameters: the trainable parameters, in the group's order.
        sizes: number of real numbers in each of them, over all ranks.
        units: the layer of each parameter, or where the group has no names the tensor.
        members: index of each in the group: another adapter of the same shape is something else.
    """

    name: str
    group: int
    parameters: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    units: tuple[str, ...]
    members: tuple[int, ...] = ()

    @cached_property
    def size(self) -> int:
        """Number of real numbers in all of them."""
        return sum(self.sizes)

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """Where in the row each stretch of one block ends, and the number of the block."""
        return self._divided[0]

    @cached_property
    def blocks(self) -> tuple[BlockSignature, ...]:
        """What has to stay the same for two sketches of each block to be comparable, in order.

        A block is a unit, or in a row of more than `MOST_BLOCKS` units some neighbours together; then a
        parameter more or less may change them all.
        """
        return self._divided[1]

    @cached_property
    def _divided(self) -> tuple[tuple[Stretch, ...], tuple[BlockSignature, ...]]:
        return _divided(self.group, self.sizes, self.units, self.members)

    def pieces(self, device: torch.device, sharing: Sharing) -> Iterator[tuple[Tensor, int]]:
        """What this rank adds to the row's sketch, without copying more than a block at a time.

        Args:
            device: only the parameters there.
            sharing: tells which of several equal copies counts.

        Yields:
            Pairs (flat real tensor, place in the row).
        """
        place = 0
        for parameter, size in zip(self.parameters, self.sizes, strict=True):
            if parameter.device == device and sharing.counts(parameter):
                yield from local_pieces(parameter, place)
            place += size

    def signature(self) -> RowSignature:
        """What has to stay the same for two sketches of the row to be comparable."""
        return (self.name, len(self.parameters), self.size, _digest(self.members))


def rows(param_groups: Sequence[dict[str, Any]], granularity: str) -> list[Row]:
    """Divide the trainable parameters of an optimizer into rows.

    Args:
        param_groups: of the wrapped optimizer.
        granularity: "global" and "group" give one row a group; "block" gives one a layer where names
            (`named_parameters()`) number it, as in "blocks.3.weight", else one a tensor.

    Returns:
        The rows, in the order of the groups; groups without trainable parameters have none.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> [row.size for row in rows([{"params": list(layer.parameters())}], "block")]
        [6, 2]
    """
    result = []
    for number, group in enumerate(param_groups):
        everything = group["params"]
        units = _units(tuple(group.get("param_names") or ()), len(everything))
        held: dict[str, list[int]] = {}
        for index, parameter in enumerate(everything):
            if parameter.requires_grad:
                held.setdefault(units[index] if granularity == "block" else "", []).append(index)
        for unit, members in held.items():
            name = f"{group_name(number)}: {unit}" if unit else group_name(number)
            parameters = tuple([everything[index] for index in members])
            sizes = tuple(map(real_size, parameters))
            of_each = tuple([units[i] for i in members])
            result.append(Row(name, number, parameters, sizes, of_each, tuple(members)))
    return result


def agree(saved: Sequence[tuple[Any, ...]], now: Sequence[tuple[Any, ...]]) -> bool:
    """Whether signatures are the same, as far as those from a state tell which parameters they are of.

    Example:
        >>> agree([("group 0", 2, 8, UNTOLD)], [("group 0", 2, 8, "a7")])
        True
        >>> agree([("group 0", 2, 8, "5c")], [("group 0", 2, 8, "a7")])
        False
    """
    return len(saved) == len(now) and all(
        one[:-1] == other[:-1] and one[-1] in (UNTOLD, other[-1])
        for one, other in zip(saved, now, strict=True)
    )


def group_name(number: int) -> str:
    """The name of a row that is a whole parameter group."""
    return f"group {number}"


def real_size(parameter: Tensor) -> int:
    """Number of real numbers in a whole parameter: a complex element has two."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


@lru_cache(maxsize=256)
def _units(names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """The unit of each of a group's parameters, with or without names."""
    if not names:
        return tuple(f"tensor {index}" for index in range(count))
    layers = [re.match(r".*?\.\d+(?=\.)", name) for name in names]
    return tuple(
        found.group() if found else str(name) for found, name in zip(layers, names, strict=True)
    )


@lru_cache(maxsize=1024)
def _digest(members: tuple[int, ...]) -> str:
    """Indices in a few letters: a state has one for each row and block."""
    return blake2b(repr(members).encode(), digest_size=8).hexdigest()


@lru_cache(maxsize=1024)
def _divided(
    group: int, sizes: tuple[int, ...], units: tuple[str, ...], members: tuple[int, ...]
) -> tuple[tuple[Stretch, ...], tuple[BlockSignature, ...]]:
    """The stretches and the blocks of a row."""
    size_of: dict[str, int] = {}
    for size, unit in zip(sizes, units, strict=True):
        size_of[unit] = size_of.get(unit, 0) + size
    number_of = dict(zip(size_of, grouped(tuple(size_of.values()), MOST_BLOCKS), strict=True))
    stretches: list[Stretch] = []
    blocks: dict[int, tuple[str, int, int]] = {}
    of_block: dict[int, list[int]] = {}
    place = 0
    for member, size, unit in zip(members, sizes, units, strict=True):
        number = number_of[unit]
        name, so_far, first = blocks.get(number, (f"{group_name(group)}: {unit}", 0, place))
        blocks[number] = (name, so_far + size, first)
        of_block.setdefault(number, []).append(member)
        place += size
        if stretches and stretches[-1][1] == number:
            stretches.pop()
        stretches.append((place, number))
    signatures = [
        (name, len(of_block[number]), so_far, first, _digest(tuple(of_block[number])))
        for number, (name, so_far, first) in blocks.items()
    ]
    return tuple(stretches), tuple(signatures)


def grouped(sizes: Sequence[int], most: int) -> list[int]:
    """Put neighbours together until there are few parts, none larger than need be.

    Args:
        sizes: of what is put together.
        most: number of parts.

    Returns:
        The part of each, from 0. What is large is alone in its part, and the largest part of several is as
        small as `most` allows.

    Example:
        >>> grouped([9, 1, 1, 2, 1], most=3)
        [0, 1, 1, 2, 2]
    """

    def within(bound: int) -> list[int]:
        numbers: list[int] = []
        number = filled = 0
        for size in sizes:
            if numbers and filled + size > bound:
                number, filled = number + 1, 0
            numbers.append(number)
            filled += size
        return numbers

    if len(sizes) <= most:
        return list(range(len(sizes)))
    bound = bisect_left(range(sum(sizes)), True, key=lambda bound: within(bound)[-1] < most)
    return within(bound)
