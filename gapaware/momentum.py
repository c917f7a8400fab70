"""For how long an optimizer remembers gradients: the time scale that snapshots have to be spaced by."""

import math
from collections.abc import Iterable
from math import inf
from typing import Any

# e^-1.5 of a gradient's first weight is left in an exponential average after this many time constants
TIME_CONSTANTS = 1.5
SNAPSHOTS_PER_MEMORY = 3
FIRST_MEMORIES, FIRST_SHARE = 2, 0.4


def memory_steps(param_groups: Iterable[dict[str, Any]]) -> int:
    """Optimizer steps after which momentum has mostly forgotten a gradient.

    Args:
        param_groups: of the wrapped optimizer; the one that remembers longest counts.

    Returns:
        1.5/(1 − β) for an exponential average with β = betas[0] or momentum; 2 without one.

    Example:
        >>> memory_steps([{"betas": (0.9, 0.999)}]), memory_steps([{"momentum": 0.95}])
        (15, 30)
        >>> memory_steps([{}])
        2
    """
    longest = 2
    for group in param_groups:
        beta = group["betas"][0] if group.get("betas") else group.get("momentum") or 0.0
        if 0.0 <= float(beta) < 1.0:
            # rounded before it is rounded up, since 1.5/(1 - 0.9) is a little more than 15
            longest = max(longest, math.ceil(round(TIME_CONSTANTS / (1.0 - float(beta)), 6)))
    return longest


def interval_for(memory: int, step: float = inf) -> int:
    """Steps between snapshots so that a window of ten spans several memories.

    Closer together during the first two memories: whoever is on a plateau then need not wait for a window.

    Args:
        memory: see `memory_steps`.
        step: optimizer steps made so far.

    Example:
        >>> [interval_for(memory) for memory in (2, 15, 30)]
        [1, 5, 10]
        >>> [interval_for(memory, step=0) for memory in (2, 15, 30)]
        [1, 2, 4]
    """
    interval = max(1, round(memory / SNAPSHOTS_PER_MEMORY))
    return max(1, round(FIRST_SHARE * interval)) if step < FIRST_MEMORIES * memory else interval
