"""Grokking without commutativity: two permutations of five elements are composed.

From a part of the group's table a small network learns the rest long after it knows that part by heart
(Power et al., arXiv 2201.02177). What it learns are representations of the group, and not frequencies as
for a modular sum (Chughtai et al., arXiv 2302.03025).
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch.nn import functional as F

from benchmarks.tasks import Task, Training
from benchmarks.tasks.modular import PairMLP

ELEMENTS = 5
TRAIN_FRACTION = 0.5
BATCH_SIZE = 512


def table(elements: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of permutations (n, 2), by their place in the alphabet, and their compositions (n,).

    >>> pairs, answers = table(3)
    >>> pairs[8].tolist(), answers[8].item()  # 021 after 102 is 201
    ([1, 2], 4)
    """
    group = list(permutations(range(elements)))
    places = {permutation: place for place, permutation in enumerate(group)}
    answers = [places[tuple(outer[i] for i in inner)] for outer in group for inner in group]
    numbers = torch.arange(len(group))
    return torch.cartesian_prod(numbers, numbers), torch.tensor(answers)


def composed(seed: int) -> Training:
    """Random batches from a part of the table; the rest is held out."""
    pairs, answers = table(ELEMENTS)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    cut = int(TRAIN_FRACTION * len(pairs))
    train, held_out = order[:cut], order[cut:]
    torch.manual_seed(seed)
    model = PairMLP(int(pairs.max()) + 1)
    draw = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        batch = train[torch.randint(cut, (BATCH_SIZE,), generator=draw)]
        return F.cross_entropy(model(pairs[batch]), answers[batch])

    def evaluate(_: bool) -> tuple[float, float]:
        logits = model(pairs[held_out])
        accuracy = (logits.argmax(1) == answers[held_out]).float().mean().item()
        return F.cross_entropy(logits, answers[held_out]).item(), accuracy

    return Training(model, loss, evaluate)


# AdamW alone, seeds 0 and 1: 5160 and 3120 steps at this lr; seed 0: 400 at 16 times it, none at 64 times
S5 = Task(
    name="permutations-5",
    setup=composed,
    lr=2e-3,
    budget=10_000,
    target=0.95,
    check_every=20,
    base_kwargs={"weight_decay": 1.0},
)
