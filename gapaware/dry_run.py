"""Whether a step is that of a checkpoint and not of a training."""

import torch

from gapaware.distributed import local, sharing
from gapaware.lr import is_remote


def is_dry_run(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is the step by which DCP creates the state of an optimizer that has none.

    All its gradients and learning rates are zero, it moves nothing and is no step of the training
    (`_init_optim_state` in `torch.distributed.checkpoint.state_dict`).

    Args:
        optimizer: about to step, without a closure.

    Example:
        >>> weights = torch.nn.Parameter(torch.ones(2))
        >>> weights.grad = torch.zeros(2)
        >>> is_dry_run(torch.optim.Adam([weights], lr=0.0)), is_dry_run(torch.optim.Adam([weights]))
        (True, False)
    """
    groups = optimizer.param_groups
    for group in groups:
        if is_remote(group["lr"]) or group["lr"] != 0:
            return False
    if optimizer.state:
        return False
    # only their values tell DCP's gradients from those of a warm-up from zero: to read them waits for the
    # GPU, once in most runs that warm up and never while anything moves
    parameters = [p for group in groups for p in group["params"]]
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    zero = not any(bool((g != 0).any()) for g in dense)
    # a rank whose shards happen to have none must not part with the others
    return sharing(parameters).everywhere(zero, parameters[0].device) if parameters else zero
