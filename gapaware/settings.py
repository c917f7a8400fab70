"""What a person asks of GapAware: checked, and completed with what goes with the mode."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gapaware import arguments, layout
from gapaware.blocks import CHUNK
from gapaware.caution import caution
from gapaware.controller import Controller, Decision, Observation
from gapaware.modes import MODES, NAMES, Mode, resolve
from gapaware.momentum import interval_for, memory_steps
from gapaware.spectrum import MIN_UPDATES

# a controller of the user's is not held to what the built-in laws may do
MIN_SCALE_OF_A_CONTROLLER = 1e-3


@dataclass(frozen=True)
class Settings:
    """The arguments of `GapAware` that have a default of the mode's, or a rule of their own.

    Attributes:
        mode: never "auto", but what it stands for.
        window: W.
        interval: optimizer steps to the first snapshot.
        sketch_dim: length of the sketch, or None for exact updates.
        controller: None to observe only.
        target: what the built-in law steers to.
        min_scale: smallest factor on the learning rate.
        max_scale: largest factor.
        max_push: strongest push along the recent steps.
        pull: towards the starting weights, before there is anything to decide on.
        anchor: what to pull to, or None.
        history_size: records kept in memory.
        seed: of the sketch.
    """

    mode: str
    window: int
    interval: int
    sketch_dim: int | None
    controller: Controller | None
    target: float
    min_scale: float
    max_scale: float
    max_push: float
    pull: float
    anchor: str | Mapping[str, Tensor] | None
    history_size: int
    seed: int


def settle(
    param_groups: Sequence[dict[str, Any]],
    *,
    mode: str,
    window: int,
    interval: int | str,
    sketch_dim: int | None,
    target: float | None,
    max_scale: float | None,
    min_scale: float | None,
    max_push: float | None,
    granularity: str,
    anchor: str | Mapping[str, Tensor] | nn.Module | None,
    anchor_device: torch.device | str | None,
    anchor_dtype: torch.dtype | None,
    controller: Controller | None,
    history_size: int,
    seed: int,
) -> Settings:
    """Check the arguments of `GapAware`, where all but `param_groups` are described.

    `None` becomes the mode's default; `param_groups` are the wrapped optimizer's.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says what to pass.

    Example:
        >>> settled = settle([{"betas": (0.9, 0.999)}], mode="retain", window=10, interval="auto",
        ...     sketch_dim=64, target=None, max_scale=None, min_scale=None, max_push=None,
        ...     granularity="global", anchor=None, anchor_device=None, anchor_dtype=None,
        ...     controller=None, history_size=1, seed=0)
        >>> settled.interval, settled.max_scale, settled.anchor
        (5, 1.0, 'init')
    """
    arguments.choice("mode", mode, NAMES)
    # an anchor beside a controller is the controller's
    mode = resolve(mode, anchored=anchor is not None and controller is None)
    arguments.choice("granularity", granularity, layout.GRANULARITIES)
    chosen = MODES[mode]
    window = arguments.integer(
        "window", window, low=MIN_UPDATES, why="a gap that moves needs a few updates"
    )
    law = chosen.law if controller is None else controller
    memory = memory_steps(param_groups)
    if sketch_dim is not None:
        sketch_dim = arguments.integer(
            "sketch_dim",
            sketch_dim,
            low=64,
            high=CHUNK,
            why="length of the sketch (None for exact updates)",
        )
    target = arguments.positive(
        "target",
        chosen.target if target is None else target,
        why="what the built-in law steers to",
    )
    high = arguments.positive(
        "max_scale",
        chosen.max_scale if max_scale is None else max_scale,
        low=1.0,
        why="the largest factor on the learning rate",
    )
    if chosen.law is None and high > 1:
        raise ValueError(
            f'max_scale={max_scale}: mode="{mode}" never changes the learning rate; leave it out, or pass '
            'mode="escape"'
        )
    # where a built-in law may raise the factor, it should soon
    grows = controller is None and chosen.law is not None and high > 1
    steps = _interval(interval, memory, close=grows)
    if grows and interval != "auto" and (window - 1) * steps < memory:
        caution(
            f"interval={interval} with window={window}: the window is shorter than the {memory} steps that "
            "momentum remembers, so the built-in law will never raise the learning rate; pass "
            f'interval="auto" or at least {-(-memory // (window - 1))}'
        )
        high = 1.0
    lowest = 1.0 if controller is None else MIN_SCALE_OF_A_CONTROLLER
    low = arguments.positive(
        "min_scale",
        lowest if min_scale is None else min_scale,
        high=1.0,
        why="the smallest factor on the learning rate",
    )
    push = pushes = float("inf") if controller is not None else chosen.max_push
    if max_push is not None:
        why = "the strongest push along the recent steps"
        push = arguments.not_negative("max_push", max_push, why=why)
        if push and not pushes:
            raise ValueError(
                f'max_push={max_push}: mode="{mode}" never pushes; leave it out, or pass mode="escape"'
            )
    history_size = arguments.integer(
        "history_size", history_size, low=1, why="records kept in memory"
    )
    seed = arguments.integer("seed", seed, low=0, why="seed of the sketch")
    _check_controller(controller, mode)
    anchor = _anchor(anchor, mode, chosen, controller)
    for name, kept in (("anchor_device", anchor_device), ("anchor_dtype", anchor_dtype)):
        if anchor is None and kept is not None:
            raise ValueError(
                f'{name}={kept!r}: mode="{mode}" keeps no starting weights; pass mode="retain", or leave '
                "it out"
            )
    if controller is not None and anchor is None:
        law = partial(_without_an_anchor, controller)
    return Settings(
        mode=mode,
        window=window,
        interval=steps,
        sketch_dim=sketch_dim,
        controller=law,
        target=target,
        min_scale=low,
        max_scale=high,
        max_push=push,
        pull=chosen.first_pull if controller is None else 0.0,
        anchor=anchor,
        history_size=history_size,
        seed=seed,
    )


def _interval(interval: int | str, memory: int, *, close: bool) -> int:
    if isinstance(interval, str):
        if interval != "auto":
            raise ValueError(
                f'interval={interval!r}: unknown; pass "auto", or how many optimizer steps lie between '
                "snapshots"
            )
        return interval_for(memory, step=0) if close else interval_for(memory)
    return arguments.integer("interval", interval, low=1, why="optimizer steps between snapshots")


def _check_controller(controller: Any, mode: str) -> None:
    if controller is not None and not callable(controller):
        raise TypeError(
            f"controller={controller!r}: not callable; pass a function of an Observation"
        )
    if controller is not None and mode == "observe":
        raise ValueError(
            'mode="observe": touches nothing, so the controller would never be asked; pass another mode'
        )


def _without_an_anchor(controller: Controller, observation: Observation) -> Decision | float:
    """Ask a controller that cannot pull, so that no history tells of a pull that was none."""
    answer = controller(observation)
    if isinstance(answer, Decision) and answer.pull:
        raise ValueError(
            f"controller returned pull={answer.pull}: there is nothing to pull to; pass anchor='init', or "
            "the weights themselves"
        )
    return answer


def _anchor(
    anchor: str | Mapping[str, Tensor] | nn.Module | None,
    mode: str,
    chosen: Mode,
    controller: Controller | None,
) -> str | Mapping[str, Tensor] | None:
    if isinstance(anchor, str):
        arguments.choice("anchor", anchor, ("init",))
    elif anchor is not None:
        anchor = arguments.state_dict("anchor", anchor)
    if anchor is None:
        return "init" if chosen.first_pull else None
    if controller is None and not chosen.first_pull:
        raise ValueError(
            f'anchor: mode="{mode}" pulls to nothing; pass mode="retain" or leave the anchor out'
        )
    return anchor
