"""Which parameters make up a row of the sketch, and where in the row each one lies.

A row never spans two parameter groups, since learning rate and weight decay belong to a group. The
Gram matrix of the whole model is the sum over the rows.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from gapaware.blocks import Stretch
from gapaware.distributed import Sharing, local_pieces

GRANULARITIES = ("global", "group", "block")

# name, number of parameters, numbers in them, place of the first in the row
BlockSignature = tuple[str, int, int, int]


@dataclass(frozen=True)
class Row:
    """Parameters that are sketched together.

    Attributes:
        name: for logs, such as "group 0" or "group 1: encoder.layer.3".
        group: index of the parameter group.
        parameters: the trainable parameters, in the group's order.
        sizes: number of real numbers in each of them, over all ranks.
        block_names: of the block of each parameter.
    """

    name: str
    group: int
    parameters: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    block_names: tuple[str, ...]

    @cached_property
    def size(self) -> int:
        """Number of real numbers in all of them."""
        return sum(self.sizes)

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """Where in the row each stretch of one block ends, and the number of the block."""
        numbers: dict[str, int] = {}
        found: list[Stretch] = []
        place = 0
        for size, block in zip(self.sizes, self.block_names, strict=True):
            number = numbers.setdefault(block, len(numbers))
            place += size
            if found and found[-1][1] == number:
                found.pop()
            found.append((place, number))
        return tuple(found)

    @cached_property
    def blocks(self) -> tuple[BlockSignature, ...]:
        """What has to stay the same for two sketches of each block to be comparable, in order."""
        found: dict[str, tuple[int, int, int]] = {}
        place = 0
        for size, block in zip(self.sizes, self.block_names, strict=True):
            count, sofar, first = found.get(block, (0, 0, place))
            found[block] = (count + 1, sofar + size, first)
            place += size
        name = group_name(self.group)
        return tuple((f"{name}: {block}", *numbers) for block, numbers in found.items())

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

    def signature(self) -> tuple[str, int, int]:
        """What has to stay the same for two sketches of the row to be comparable."""
        return (self.name, len(self.parameters), self.size)


def rows(param_groups: Sequence[dict[str, Any]], granularity: str) -> list[Row]:
    """Divide the trainable parameters of an optimizer into rows.

    Args:
        param_groups: of the wrapped optimizer.
        granularity: "global" and "group" give one row a group; "block" gives one a layer where the
            group has parameter names (`named_parameters()`), else one a tensor.

    Returns:
        The rows, in the order of the groups; groups without trainable parameters have none.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> [row.size for row in rows([{"params": list(layer.parameters())}], "block")]
        [6, 2]
    """
    result = []
    for number, group in enumerate(param_groups):
        held: dict[str, list[tuple[Tensor, str]]] = {}
        for index, parameter in enumerate(group["params"]):
            if parameter.requires_grad:
                block = _block(group, index)
                row = block if granularity == "block" else ""
                held.setdefault(row, []).append((parameter, block))
        for row, members in held.items():
            name = f"{group_name(number)}: {row}" if row else group_name(number)
            parameters, blocks = zip(*members, strict=True)
            sizes = tuple(map(real_size, parameters))
            result.append(Row(name, number, parameters, sizes, blocks))
    return result


def group_name(number: int) -> str:
    """The name of a row that is a whole parameter group."""
    return f"group {number}"


def real_size(parameter: Tensor) -> int:
    """Number of real numbers in a whole parameter: a complex element has two."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def _block(group: dict[str, Any], index: int) -> str:
    names = group.get("param_names")
    if not names:
        return f"tensor {index}"
    return _layer(names[index])


@lru_cache(maxsize=16_384)
def _layer(name: str) -> str:
    layer = re.match(r".*?\.\d+(?=\.)", name)
    return layer.group() if layer else str(name)
