"""What GapAware cannot do correctly: refused with what to do instead, never silently wrong."""

from typing import Any

import torch

from gapaware.delegation import is_number, leaves
from gapaware.distributed import Unsupported, refuse
from gapaware.rescue import inner


def refuse_capture() -> None:
    """Reject a step that is being captured into a CUDA graph.

    Raises:
        Unsupported: it is.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise Unsupported(
            "GapAware.step() in a CUDA graph: the graph would repeat the factors of this moment for "
            "ever; capture the forward and backward pass alone and call step() after each replay"
        )


def refuse_base(base: Any) -> None:
    """Reject what cannot be wrapped.

    Args:
        base: what a person passed as the optimizer.

    Raises:
        TypeError: it is no optimizer, or wrapped already.
        ValueError: it has no lr to scale, or is differentiable.
        Unsupported: it hides where its parameters' elements belong.
    """
    if type(base).__module__.startswith("deepspeed.runtime"):
        raise Unsupported(
            f"base={type(base).__name__}: DeepSpeed partitions the parameters and does not tell which "
            "elements a partition holds; use torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )
    if type(base).__module__.startswith("accelerate."):
        raise TypeError(
            f"base={type(base).__name__}: skips the steps of gradient accumulation, which would be counted "
            "here all the same; wrap first and prepare then: accelerator.prepare(GapAware(optimizer))"
        )
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(
            f"base={type(base).__name__}: not a torch.optim.Optimizer; pass one that is built, such "
            "as torch.optim.AdamW(model.parameters(), lr=3e-4)"
        )
    refuse(base)
    for number, group in enumerate(base.param_groups):
        if not is_number(group.get("lr")):
            raise ValueError(
                f"base={type(base).__name__}: its parameter group {number} has "
                f"lr={group.get('lr')!r}, no number to scale; wrap an optimizer that is given its lr"
            )
        if group.get("differentiable"):
            raise ValueError(
                f"base={type(base).__name__}: differentiable=True differentiates through the learning "
                "rate, which GapAware replaces while it steps; pass differentiable=False"
            )


def refuse_factors(base: torch.optim.Optimizer, granularity: str) -> None:
    """Reject factors that differ where an optimizer looks at its parameter groups together.

    Args:
        base: what is to be wrapped.
        granularity: see `layout.rows`.

    Raises:
        ValueError: it does.
    """
    for leaf in leaves(base):
        _refuse_factors(leaf, granularity)


def _refuse_factors(leaf: torch.optim.Optimizer, granularity: str) -> None:
    name, foreign = type(leaf).__name__, not _steps_as_torch(leaf)
    # as Prodigy and D-Adaptation call their estimate, which is one for all groups; Adafactor of torch.optim
    # has another `d`
    adapts = foreign and any("d" in group for group in leaf.param_groups)
    if granularity != "global" and adapts and len(leaf.param_groups) > 1:
        raise ValueError(
            f"granularity={granularity!r}: {name} estimates one step size for all its parameter groups, "
            "which cannot have factors that differ; pass granularity='global'"
        )
    if granularity == "block" and (foreign or isinstance(leaf, torch.optim.LBFGS) or inner(leaf)):
        raise ValueError(
            f"granularity='block': {name} would have its parameter groups divided into blocks for a step, "
            "which only optimizers of torch.optim, and not LBFGS, are known to take; "
            "pass granularity='group' or 'global'"
        )


def _steps_as_torch(leaf: torch.optim.Optimizer) -> bool:
    """Whether its step is that of a class in torch.optim, which treats each parameter group by itself."""
    # torch wraps the step of each class, and the wrapper names the module that the step is from
    return str(getattr(type(leaf).step, "__module__", "")).startswith("torch.optim.")
