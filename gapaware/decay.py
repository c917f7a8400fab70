"""How much of an update is weight decay, as far as the optimizer's kind tells it.

After grokking 95 to 99.8 % of the edge's energy is weight decay (The Lifecycle of the Spectral Edge,
arXiv 2604.07380), so the two parts of an update are kept apart.
"""

from typing import Any

import torch

# The others add decay to the gradient, where it passes through a division or a line search, or are not
# torch's and decay in ways of their own: what it does to the parameters cannot be told from lr and
# weight_decay.
_DECOUPLED = (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor, torch.optim.Muon)


def decay_rate(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], lr: float, weight_decay: float
) -> float | None:
    """The rate ρ at which one step takes θ to (1 − ρ)θ, apart from what the gradient does.

    Args:
        optimizer: the one that owns the group.
        group: its parameter group, for momentum and the kind of decay.
        lr: learning rate of the step, after scaling.
        weight_decay: weight decay of the step, after scaling.

    Returns:
        ρ, or None where decay cannot be told from gradient. With momentum μ, SGD's decay passes
        through the momentum buffer: ρ is the stationary lr·weight_decay·(1 − dampening)/(1 − μ).

    Example:
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> adamw = torch.optim.AdamW([p], lr=1e-3, weight_decay=0.1)
        >>> decay_rate(adamw, adamw.param_groups[0], lr=1e-3, weight_decay=0.1)
        0.0001
    """
    if weight_decay == 0:
        return 0.0
    if not isinstance(optimizer, _DECOUPLED) and not group.get("decoupled_weight_decay"):
        return None
    if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
        kept = (1 - float(group["dampening"])) / (1 - float(group["momentum"]))
        return lr * weight_decay * kept
    return lr * weight_decay
