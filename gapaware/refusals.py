"""What GapAware cannot do correctly: refused with what to do instead, never silently wrong."""

from typing import Any

import torch

from gapaware.delegation import is_number, leaves
from gapaware.distributed import Unsupported, refuse


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


def refuse_base(base: Any, granularity: str) -> None:
    """Reject what cannot be wrapped.

    Args:
        base: what a person passed as the optimizer.
        granularity: see `layout.rows`.

    Raises:
        TypeError: it is no optimizer, or wrapped already.
        ValueError: it has no lr to scale, is differentiable, or cannot be divided into blocks.
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
    for leaf in leaves(base) if granularity == "block" else ():
        if isinstance(leaf, torch.optim.LBFGS) or _holds_an_optimizer(leaf):
            raise ValueError(
                f"granularity='block': {type(leaf).__name__} cannot have its parameter groups divided "
                "into blocks for a step; pass granularity='group'"
            )


def _holds_an_optimizer(optimizer: torch.optim.Optimizer) -> bool:
    return any(isinstance(held, torch.optim.Optimizer) for held in vars(optimizer).values())
