"""Base optimizers that torch does not have as one class."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch

from gapaware import Composite
from gapaware.composite import ADAMW_PARAMETERS

# beside the names that gapaware.muon knows, those of the tasks' embeddings and output layers
NOT_HIDDEN = (*ADAMW_PARAMETERS, "tokens", "positions", "output")


class MuonAdamW(Composite):
    """Muon for the hidden matrices, AdamW for everything else, both at one learning rate.

    Muon's updates are given the size of AdamW's (`match_rms_adamw`), so that one learning rate serves
    both. Vectors have no weight decay.

    Args:
        params: pairs of a name and a parameter, as from `Module.named_parameters`.
        lr: of both.
        weight_decay: decoupled, of every matrix.
        momentum: of Muon.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, torch.nn.Parameter]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        hidden, others = [], []
        for name, parameter in params:
            special = any(
                fnmatchcase(part, pattern) for part in name.split(".") for pattern in NOT_HIDDEN
            )
            (others if special or parameter.ndim != 2 else hidden).append((name, parameter))
        groups = [
            {"params": [(n, p) for n, p in others if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [(n, p) for n, p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        super().__init__(
            torch.optim.Muon(
                hidden,
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW([group for group in groups if group["params"]], lr=lr),
        )
