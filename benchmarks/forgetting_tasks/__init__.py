"""Tasks on which fine-tuning forgets, as plain functions of a frozen description.

    from benchmarks.forgetting_tasks.digits import ROTATED as task
    from benchmarks.forgetting_tasks.finetune import finetune, walk

    model = task.pretrain(seed=0)                      # knows the old domain; cached under runs/
    anchor = copy_of(model)                            # its state dict
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr)
    points = finetune(task, model, optimizer, seed=0)  # trains in place, a `Point` now and then
    points[-1].old.loss - points[0].old.loss           # what it forgot
    points[-1].validation, points[-1].test             # what it learned
    walk(task, model, straight_line(anchor, copy_of(model), task.fresh), seed=0)

    task.score(model, task.data(0).validation)         # Score(loss, accuracy) of anything
    for batch in task.batches(seed=0):                 # endless batches of the new domain
        task.loss(model, batch).backward()

Old data serve for pre-training and for the score `old` alone, unless a rival is known to need them and
its row says so. Of the new domain there are three sets: `new_train`, `validation` for every choice,
`test` for what is reported. Everything random follows from `seed` alone.

A model with two heads is called as `model(inputs, head)`, head 0 for the old task and 1 for the new;
`task.fresh` has the prefixes of the parameters that only the new task uses (its head): they start
untrained, so that going back to the start has no meaning for them.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gapaware import scrambled

CACHE = Path("runs/forgetting-pretrained")
OLD, NEW = 0, 1
State = Mapping[str, Tensor]


class Score(NamedTuple):
    """Mean cross-entropy in nats, and the share of right answers."""

    loss: float
    accuracy: float


class Point(NamedTuple):
    """All scores at one place: `at` is a step, or the share of the way from the start."""

    at: float
    validation: Score
    test: Score
    old: Score


@dataclass(frozen=True)
class Examples:
    """Inputs and their classes, (n, ...) and (n,) or (n, time); `head` says which head answers."""

    inputs: Tensor
    targets: Tensor
    head: int = OLD

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, rows: Tensor | slice) -> Examples:
        return replace(self, inputs=self.inputs[rows], targets=self.targets[rows])


@dataclass(frozen=True)
class Domains:
    """The sets of a task."""

    old_train: Examples
    old_test: Examples
    new_train: Examples
    validation: Examples
    test: Examples


@dataclass(frozen=True)
class ForgettingTask:
    """An old domain, a new one, a model, and how the two are learned.

    Attributes:
        name: what results call it.
        build: makes the model; torch's random state is seeded before.
        domains: makes the sets from a seed.
        classes: of the new task, for the loss of guessing.
        steps: of fine-tuning.
        batch_size: of both stages.
        lr: default learning rate of fine-tuning with AdamW, factor 1 of the sweep.
        muon_lr: the same for the matrices under Muon; None where the task has no runs with Muon.
        good: for rivals with a strength to sweep: the factor on the learning rate at which the base
            alone forgot least at 90 % of the best gain, by base.
        old_steps, old_lr: of pre-training, with AdamW, warm-up and cosine.
        two_heads: whether the model takes the head as a second argument.
        fresh: prefixes of the names of parameters that only the new task uses.
        earlier: learned first, with the same method and settings; this task goes on from there, and both
            domains of that one are old here. None for a task of one stage.
        imagined: from the model before fine-tuning and a seed, a function from a batch's inputs to inputs
            of neither set, on which to ask for old answers.
    """

    name: str
    build: Callable[[], nn.Module]
    domains: Callable[[int], Domains]
    classes: int
    steps: int
    batch_size: int
    lr: float
    old_steps: int
    old_lr: float
    muon_lr: float | None = None
    good: Mapping[str, float] = field(default_factory=lambda: {"adamw": 1.0, "muon": 1.0})
    two_heads: bool = False
    fresh: tuple[str, ...] = ()
    imagined: Callable[[nn.Module, int], Callable[[Tensor], Tensor]] = lambda model, seed: scrambled
    points: int = 20
    earlier: ForgettingTask | None = None

    @functools.lru_cache(maxsize=2)  # noqa: B019 - tasks live as long as the process
    def data(self, seed: int) -> Domains:
        """The sets, made once."""
        return self.domains(seed)

    def __hash__(self) -> int:
        return hash(self.name)

    def logits(self, model: nn.Module, batch: Examples) -> Tensor:
        """(n, classes) or (n, time, classes)."""
        answer: Tensor = model(batch.inputs, batch.head) if self.two_heads else model(batch.inputs)
        return answer

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        """Mean cross-entropy in nats."""
        return F.cross_entropy(self.logits(model, batch).flatten(0, -2), batch.targets.flatten())

    @torch.no_grad()
    def score(self, model: nn.Module, examples: Examples, chunk: int = 100) -> Score:
        """Loss and accuracy over a set, in evaluation mode."""
        training = model.training
        model.eval()
        loss = right = 0.0
        for first in range(0, len(examples), chunk):
            part = examples[slice(first, first + chunk)]
            logits, targets = self.logits(model, part).flatten(0, -2), part.targets.flatten()
            loss += F.cross_entropy(logits, targets, reduction="sum").item()
            right += (logits.argmax(-1) == targets).sum().item()
        model.train(training)
        return Score(loss / examples.targets.numel(), right / examples.targets.numel())

    def measure(self, model: nn.Module, at: float, seed: int) -> Point:
        """All scores of a model."""
        data = self.data(seed)
        score = functools.partial(self.score, model)
        return Point(at, score(data.validation), score(data.test), score(data.old_test))

    def batches(self, seed: int) -> Iterator[Examples]:
        """Endless batches of the new domain, a new order for each pass."""
        return shuffled(self.data(seed).new_train, self.batch_size, seed)

    def old_batches(self, seed: int) -> Iterator[Examples]:
        """The same of the old domain: for pre-training, and for rivals that need old data."""
        return shuffled(self.data(seed).old_train, self.batch_size, seed)

    def pretrain(self, seed: int, cache: Path | None = CACHE) -> nn.Module:
        """A model that knows the old domain, read from `cache` where it was trained before."""
        settings = f"{self.old_steps} {self.old_lr} {self.batch_size}"
        torch.manual_seed(seed)
        model = self.build()
        shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
        digest = hashlib.sha256(f"{settings} {shapes}".encode()).hexdigest()[:12]
        path = cache / f"{self.name}-{seed}-{digest}.pt" if cache else None
        if path and path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.old_lr)
        warmup = max(1, self.old_steps // 20)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(
                (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / self.old_steps))
            ),
        )
        batches = self.old_batches(seed)
        model.train()
        for _ in range(self.old_steps):
            optimizer.zero_grad()
            self.loss(model, next(batches)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        # gradients of what is frozen later would count when the others are clipped
        model.zero_grad()
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
        return model


class TwoHeads(nn.Module):
    """A shared trunk, one linear head for each task."""

    def __init__(self, trunk: nn.Module, width: int, old_classes: int, new_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList([nn.Linear(width, old_classes), nn.Linear(width, new_classes)])

    def forward(self, inputs: Tensor, head: int) -> Tensor:
        """Logits of one task, (n, its classes)."""
        logits: Tensor = self.heads[head](self.trunk(inputs))
        return logits


def shuffled(examples: Examples, batch_size: int, seed: int) -> Iterator[Examples]:
    """Endless batches of `batch_size`, a new order for each pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(examples), generator=generator).split(batch_size):
            if len(rows) == min(batch_size, len(examples)):
                yield examples[rows]


def joined(sets: Sequence[Examples]) -> Examples:
    """Several sets as one."""
    inputs, targets = (
        torch.cat([getattr(s, name) for s in sets]) for name in ("inputs", "targets")
    )
    return replace(sets[0], inputs=inputs, targets=targets)


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, copied."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
