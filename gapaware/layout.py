"""Which parameters make up a row of the sketch, and where in the row each one lies.

A row never spans two parameter groups, since learning rate and weight decay belong to a group. The
Gram matrix of the whole model is the sum over the rows.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gapaware.distributed import Sharing, local_pieces

GRANULARITIES = ("global", "group", "block")


@dataclass(frozen=True)
class Row:
    """Parameters that are sketched together.

    Attributes:
        name: for logs, such as "group 0" or "group 1: encoder.layer.3".
        group: index of the parameter group.
        parameters: the trainable parameters, in the group's order.
        sizes: number of real numbers in each of them, over all ranks.
    """

    name: str
    group: int
    parameters: tuple[Tensor, ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of real numbers in all of them."""
        return sum(self.sizes)

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
        for block, parameters in _blocks(group, granularity).items():
            name = f"{group_name(number)}: {block}" if block else group_name(number)
            sizes = tuple(map(real_size, parameters))
            result.append(Row(name, number, tuple(parameters), sizes))
    return result


def group_name(number: int) -> str:
    """The name of a row that is a whole parameter group."""
    return f"group {number}"


def real_size(parameter: Tensor) -> int:
    """Number of real numbers in a whole parameter: a complex element has two."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def _blocks(group: dict[str, Any], granularity: str) -> dict[str, list[Tensor]]:
    """The trainable parameters of a group by block; all in one, "", unless `granularity` is "block"."""
    if granularity != "block":
        trainable = [parameter for parameter in group["params"] if parameter.requires_grad]
        return {"": trainable} if trainable else {}
    blocks: dict[str, list[Tensor]] = {}
    for index, parameter in enumerate(group["params"]):
        if parameter.requires_grad:
            blocks.setdefault(_block(group, index), []).append(parameter)
    return blocks


def _block(group: dict[str, Any], index: int) -> str:
    names = group.get("param_names")
    if not names:
        return f"tensor {index}"
    layer = re.match(r".*?\.\d+(?=\.)", names[index])
    return layer.group() if layer else str(names[index])
