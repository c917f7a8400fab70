"""Where a parameter stands in an optimizer, by which copies of weights are kept, saved and found again."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from gapaware.scaling import NEUTRAL, Scales

Groups = Sequence[dict[str, Any]]
Place = tuple[int, int]  # parameter group and position in it: FSDP2 swaps the tensors themselves


def places(groups: Groups) -> Iterator[tuple[Place, Tensor]]:
    """All parameters, frozen ones too, by parameter group and position in it."""
    for number, group in enumerate(groups):
        for index, parameter in enumerate(group["params"]):
            yield (number, index), parameter


def scaled_places(
    groups: Groups, by_group: Sequence[Scales], by_parameter: Mapping[int, Scales] | None
) -> Iterator[tuple[Place, Tensor, Scales]]:
    """All parameters, with the scales that were on each during the step.

    Args:
        groups: of the wrapped optimizer.
        by_group: scales of each group; one that was added in the step has none.
        by_parameter: scales by `id(parameter)`, which then decide instead.
    """
    for place, parameter in places(groups):
        if by_parameter is not None:
            yield place, parameter, by_parameter.get(id(parameter), NEUTRAL)
        else:
            yield place, parameter, by_group[place[0]] if place[0] < len(by_group) else NEUTRAL


def without_gradient(groups: Groups) -> set[int]:
    """The parameters, by id, that the last step left alone: others had a gradient, these had none.

    Example:
        >>> import torch
        >>> one, other = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
        >>> one.sum().backward()
        >>> without_gradient([{"params": [one, other]}]) == {id(other)}
        True
    """
    idle = {id(p) for _, p in places(groups) if p.grad is None}
    # what steps without gradients, or frees them as it goes, moves all of them
    return idle if any(p.grad is not None for _, p in places(groups)) else set()


def to_state(weights: Mapping[Place, Tensor]) -> dict[str, Tensor]:
    """Weights by place, with keys as a checkpoint has them: "group.index"."""
    return {f"{group}.{index}": kept for (group, index), kept in weights.items()}


def from_state(
    state: Mapping[str, Tensor], groups: Groups, of: str
) -> Iterator[tuple[Place, Tensor, Tensor]]:
    """What `to_state` returned: place, parameter and saved weight of each.

    Args:
        state: what was saved.
        groups: of the optimizer that it is restored into; parameters that were frozen since are found too.
        of: whose weights these are, for the message.

    Raises:
        ValueError: a weight does not fit its parameter.
    """
    parameters = dict(places(groups))
    for key, saved in state.items():
        group, index = map(int, key.split("."))
        parameter = parameters.get((group, index))
        if parameter is None or parameter.shape != saved.shape:
            raise ValueError(f"the {of} has a weight {key} that fits no parameter")
        yield (group, index), parameter, saved
