"""One fine-tuning run: its model, where it started, its optimizer, the memory it took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

import gapaware
from benchmarks.forgetting_tasks import ForgettingTask, Point, copy_of
from benchmarks.forgetting_tasks.finetune import finetune, straight_line, walk


@dataclass
class Training:
    """One run: what is trained, with what, and what it has left behind.

    Attributes:
        earlier: a model to go on from; None for the task's own.
    """

    task: ForgettingTask
    base: str
    value: float
    lr_factor: float
    seed: int
    steps: int | None = None
    earlier: nn.Module | None = None
    model: nn.Module = field(init=False)
    anchor: dict[str, Tensor] = field(init=False)
    held: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = (
            self.task.pretrain(self.seed) if self.earlier is None else self.taken_over(self.earlier)
        )
        self.anchor = copy_of(self.model)

    def taken_over(self, model: nn.Module) -> nn.Module:
        """A model as the task builds it with the weights of another; adapters are merged into theirs."""
        mine = self.task.build()
        mine.load_state_dict({name: attrgetter(name)(model) for name in mine.state_dict()})
        return mine

    def optimizer(self, **adamw: Any) -> torch.optim.Optimizer:
        """The base optimizer at the run's learning rate."""
        lr = self.task.lr * self.lr_factor
        if self.base == "adamw":
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=lr, **adamw)
        assert self.task.muon_lr is not None, f"{self.task.name} has no lr for Muon"
        muon_lr = self.task.muon_lr * self.lr_factor
        decay = {"weight_decay": 0.01, **adamw}
        return gapaware.muon(self.model, lr=muon_lr, adamw_lr=lr, mode="observe", **decay).base

    def pretrained(self) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """Parameters that have a start worth keeping, each with its start."""
        pairs = {
            name: (parameter, self.anchor[name])
            for name, parameter in self.model.named_parameters()
            if not name.startswith(self.task.fresh or ("\0",))
        }
        self.held += [start for _, start in pairs.values()]
        return pairs

    def finetune(self, optimizer: torch.optim.Optimizer, **hooks: Any) -> list[Point]:
        """Train, and note the optimizer's memory."""
        points = finetune(self.task, self.model, optimizer, self.seed, steps=self.steps, **hooks)
        self.held += tensors(optimizer.state_dict())
        return points

    def line(self) -> list[Point]:
        """The straight way back to the start (WiSE-FT)."""
        places = straight_line(self.anchor, copy_of(self.model), self.task.fresh)
        return walk(self.task, self.model, places, self.seed)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


@contextmanager
def scaled(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """The learning rates times `factor` for a while."""
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= factor
    yield
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
