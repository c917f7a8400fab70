"""Dyck-1 depth: how deep is a string of brackets nested at each position?

A transformer first learns the few training strings by heart and only much later to count; weight decay
is what makes it change its mind. A string counts as right when all its depths are.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.tasks import Task, Training
from benchmarks.tasks.transformer import Transformer

LENGTH = 16
TRAIN = 32
HELD_OUT = 256


def balanced(n: int, draw: torch.Generator) -> torch.Tensor:
    """Random balanced strings (n, LENGTH) without repetition, 1 opens and 0 closes.

    Each bracket opens or closes with equal probability where both are possible; all end at depth 0.
    """
    strings: set[tuple[int, ...]] = set()
    while len(strings) < n:
        depth, string = 0, []
        for left in range(LENGTH, 0, -1):
            opens = depth < left and (depth == 0 or torch.rand((), generator=draw).item() < 0.5)
            depth += 1 if opens else -1
            string.append(int(opens))
        strings.add(tuple(string))
    ordered = torch.tensor(sorted(strings))
    return ordered[torch.randperm(n, generator=draw)]


def depths(strings: torch.Tensor) -> torch.Tensor:
    """Depth after each bracket, (n, length).

    >>> depths(torch.tensor([[1, 1, 0, 1, 0, 0]])).tolist()
    [[1, 2, 1, 2, 1, 0]]
    """
    return (2 * strings - 1).cumsum(1)


def dyck(seed: int) -> Training:
    """A two-layer causal transformer, full batch."""
    strings = balanced(TRAIN + HELD_OUT, torch.Generator().manual_seed(seed))
    answers = depths(strings)
    torch.manual_seed(seed)
    model = Transformer(2, LENGTH, width=32, layers=2, heads=2, classes=LENGTH // 2 + 1)

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(strings[:TRAIN]).flatten(0, 1), answers[:TRAIN].flatten())

    def evaluate(_: bool) -> tuple[float, float]:
        logits, held_out = model(strings[TRAIN:]), answers[TRAIN:]
        right = (logits.argmax(2) == held_out).all(1)
        loss = F.cross_entropy(logits.flatten(0, 1), held_out.flatten())
        return loss.item(), right.float().mean().item()

    return Training(model, loss, evaluate)


DYCK = Task(
    name="dyck-depth",
    setup=dyck,
    lr=3e-4,
    budget=4_000,
    target=0.95,
    check_every=20,
    base_kwargs={"weight_decay": 1.0},
)
