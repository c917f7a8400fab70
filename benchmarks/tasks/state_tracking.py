"""State tracking: after each of many permutations of three elements, how do these lie now?

That is the word problem of a group, which is what recurrent networks are compared with transformers on
(Merrill et al., arXiv 2404.08819; automata in general, Liu et al., arXiv 2210.10749). One permutation that
is misread makes all later answers wrong, so that for long the network does little better than to guess.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.bases import MuonAdamW
from benchmarks.tasks import Task, Training
from benchmarks.tasks.permutations import table

ELEMENTS = 3
STATES = 6
LENGTH = 16
HIDDEN = 32
BATCH_SIZE = 32
HELD_OUT = 500


class Tracker(nn.Module):
    """A GRU that answers at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(STATES, 16)
        self.recurrent = nn.GRU(16, HIDDEN)
        self.output = nn.Linear(HIDDEN, STATES)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Logits (LENGTH, n, STATES) from words (LENGTH, n)."""
        logits: torch.Tensor = self.output(self.recurrent(self.tokens(words))[0])
        return logits


def examples(n: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Words (LENGTH, n) of permutations and the products of all up to each place (LENGTH, n).

    >>> words, products = examples(5, torch.Generator())
    >>> torch.equal(words[0], products[0])
    True
    """
    composed = table(ELEMENTS)[1].view(STATES, STATES)
    words = torch.randint(STATES, (LENGTH, n), generator=draw)
    products = [words[0]]
    for permutations in words[1:]:
        products.append(composed[products[-1], permutations])
    return words, torch.stack(products)


def state_tracking(seed: int) -> Training:
    """Fresh words at every step."""
    draw = torch.Generator().manual_seed(seed)
    held_out, held_out_products = examples(HELD_OUT, draw)
    torch.manual_seed(seed)
    model = Tracker()

    def loss() -> torch.Tensor:
        words, products = examples(BATCH_SIZE, draw)
        return F.cross_entropy(model(words).flatten(0, 1), products.flatten())

    def evaluate(_: bool) -> tuple[float, float]:
        logits = model(held_out)
        accuracy = (logits.argmax(2) == held_out_products).float().mean().item()
        return F.cross_entropy(logits.flatten(0, 1), held_out_products.flatten()).item(), accuracy

    return Training(model, loss, evaluate)


# Muon alone, seeds 0 to 2: 2400, 2680, 2620 steps at this lr, 180, 240, 200 at 32 times, none at 64
MUON = Task(
    name="state-tracking-muon",
    setup=state_tracking,
    lr=1e-3,
    budget=8_000,
    target=0.95,
    check_every=20,
    base=MuonAdamW,
    base_kwargs={"weight_decay": 1e-2},
)
