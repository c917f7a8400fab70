"""Scales on learning rate, weight decay and momentum that hold for one step of the wrapped optimizer."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from gapaware.delegation import is_number, leaves


@dataclass(frozen=True)
class Scales:
    """Factors on the hyperparameters of a parameter group for one step; 1 leaves them alone.

    Attributes:
        lr: on the learning rate. AdamW and Muon decay by lr × weight_decay, so it scales that too.
        weight_decay: on the weight decay, on top of that.
        momentum: on 1/(1 − β₁), the steps that the momentum of Adam or AdamW remembers; that of others is
            left alone.
        push: times the average of the recent steps that follows a step, see `gapaware.push`.
        pull: share of the way back to the starting weights that follows a step, see `gapaware.anchor`.
        average: whether the weights are averaged for evaluation, see `gapaware.average`.
    """

    lr: float = 1.0
    weight_decay: float = 1.0
    pull: float = 0.0
    momentum: float = 1.0
    push: float = 0.0
    average: bool = False

    @property
    def neutral(self) -> bool:
        """Whether nothing is scaled, pulled, pushed or averaged."""
        return self == NEUTRAL


NEUTRAL = Scales()

# optimizers, and their groups with the values that a person has given them
Given = list[tuple[torch.optim.Optimizer, list[dict[str, Any]]]]


@contextmanager
def as_given(given: Given) -> Iterator[None]:
    """Put other groups in the place of scaled ones; a step that is under way has those it began with.

    Args:
        given: from `as_they_are`.
    """
    scaled_ones = [(leaf, leaf.param_groups) for leaf, _ in given]
    try:
        for leaf, groups in given:
            leaf.param_groups = groups
        yield
    finally:
        for leaf, groups in scaled_ones:
            leaf.param_groups = groups


def as_they_are(
    optimizer: torch.optim.Optimizer,
    by_group: Sequence[Scales],
    by_parameter: Mapping[int, Scales] | None = None,
) -> Given:
    """The groups before `scaled`, for a checkpoint that is made in the middle of a step.

    Args:
        optimizer: the wrapped one.
        by_group: as for `scaled`. Where all are neutral no group has to be put in place of another.
        by_parameter: likewise.
    """
    if by_parameter is None and all(scales.neutral for scales in by_group):
        return []
    return [(leaf, [dict(group) for group in leaf.param_groups]) for leaf in leaves(optimizer)]


@contextmanager
def scaled(
    optimizer: torch.optim.Optimizer,
    by_group: Sequence[Scales],
    by_parameter: Mapping[int, Scales] | None = None,
    *,
    given: Given | None = None,
) -> Iterator[None]:
    """Scale the hyperparameters of an optimizer's groups and put them back, whatever happens.

    Neutral groups are not touched at all. Schedulers may overwrite or multiply `group["lr"]` between
    steps, or in a hook after a step, and never see a scaled one: groups are themselves again before the
    hooks that follow their optimizer's step.

    Args:
        optimizer: the wrapped one.
        by_group: scales of each of its `param_groups`.
        by_parameter: scales by `id(parameter)`, which then decide instead; the groups are divided for
            the step, so that no copy of an update is needed.
        given: from `as_they_are`; loses what is itself again.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> with scaled(sgd, [Scales(lr=8.0)]):
        ...     sgd.param_groups[0]["lr"]
        0.8
        >>> sgd.param_groups[0]["lr"]
        0.1
    """
    if by_parameter is None and all(scales.neutral for scales in by_group):
        yield
        return
    of_each = iter(by_group)
    with ExitStack() as afterwards:
        for leaf in leaves(optimizer):
            own = afterwards.enter_context(ExitStack())
            own.callback(_itself_again, given, leaf)
            _before_other_hooks(leaf, own.close, afterwards)
            chosen = list(islice(of_each, len(leaf.param_groups)))
            if by_parameter is None:
                _scale(leaf, chosen, own)
            else:
                _divide(leaf, by_parameter, own)
        yield


def _itself_again(given: Given | None, leaf: torch.optim.Optimizer) -> None:
    if given is not None:
        given[:] = [(other, groups) for other, groups in given if other is not leaf]


def _before_other_hooks(
    leaf: torch.optim.Optimizer, work: Callable[[], None], afterwards: ExitStack
) -> None:
    """Do some work after the optimizer's next step and before the hooks that follow it."""
    hooks = getattr(leaf, "_optimizer_step_post_hooks", None)
    if not isinstance(hooks, OrderedDict):  # one that never called `Optimizer.__init__` has none
        return
    depth = 0

    def begins(*_: object) -> None:
        nonlocal depth
        depth += 1

    def ends(*_: object) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:  # else it is `super().step()`, after which the step goes on
            work()

    handle = leaf.register_step_post_hook(ends)
    hooks.move_to_end(handle.id, last=False)
    afterwards.callback(handle.remove)
    afterwards.callback(leaf.register_step_pre_hook(begins).remove)


def _scale(leaf: torch.optim.Optimizer, by_group: Sequence[Scales], own: ExitStack) -> None:
    for group, scales in zip(leaf.param_groups, by_group, strict=True):
        for key, factor, during in _changes(leaf, group, scales):
            # first what puts it back: whatever interrupts here leaves nothing scaled
            own.callback(_put_back, group, key, factor, group[key], during)
            group[key] = during


def _put_back(group: dict[str, Any], key: str, factor: float, before: Any, during: Any) -> None:
    # written during the step, by the optimizer itself or a hook before it
    if group[key] is during or not factor:
        group[key] = before
    elif key != "betas":
        group[key] = group[key] / factor


def _changes(
    leaf: torch.optim.Optimizer, group: dict[str, Any], scales: Scales
) -> Iterator[tuple[str, float, Any]]:
    """What scales make of a group's values: key, factor, value."""
    for key, factor in (("lr", scales.lr), ("weight_decay", scales.weight_decay)):
        before: Any = group.get(key)
        if factor != 1.0 and is_number(before):
            # a tensor lr is replaced, not multiplied in place: a scheduler may hold the same tensor
            yield key, factor, before * factor
    # of other optimizers betas[0] may be something else, such as where Schedule-Free takes its gradient
    if scales.momentum != 1.0 and isinstance(leaf, torch.optim.Adam):
        betas = group["betas"]
        if isinstance(betas[0], float):  # a tensor may be on a GPU
            shorter = max(0.0, 1 - (1 - betas[0]) / scales.momentum)
            yield "betas", scales.momentum, (shorter, *betas[1:])


def _divide(
    leaf: torch.optim.Optimizer, by_parameter: Mapping[int, Scales], own: ExitStack
) -> None:
    groups = leaf.param_groups
    parts = [_parts(leaf, group, by_parameter) for group in groups]
    own.callback(_join, leaf, groups, parts)
    leaf.param_groups = [part for some in parts for part in some]


def _join(
    leaf: torch.optim.Optimizer,
    groups: list[dict[str, Any]],
    parts: Sequence[Sequence[dict[str, Any]]],
) -> None:
    leaf.param_groups = groups
    for group, some in zip(groups, parts, strict=True):
        _take_back(group, some[0])


def _parts(
    leaf: torch.optim.Optimizer, group: dict[str, Any], by_parameter: Mapping[int, Scales]
) -> list[dict[str, Any]]:
    """Divide a group into one for each distinct scale; an undivided neutral group stays itself."""
    chosen = [by_parameter.get(id(p), NEUTRAL) for p in group["params"]]
    distinct = list(dict.fromkeys(chosen))
    if distinct == [NEUTRAL] or not distinct:
        return [group]
    parts = []
    for scales in distinct:
        members = [i for i, own in enumerate(chosen) if own == scales]
        part = {**group, "params": [group["params"][i] for i in members]}
        if "param_names" in group:
            part["param_names"] = [group["param_names"][i] for i in members]
        part |= {key: value for key, _, value in _changes(leaf, part, scales)}
        parts.append(part)
    return parts


def _take_back(group: dict[str, Any], part: dict[str, Any]) -> None:
    """Keep what the optimizer wrote into a part of a group, such as a step count."""
    for key, value in part.items():
        if key not in ("params", "param_names", "lr", "weight_decay", "betas"):
            group[key] = value
