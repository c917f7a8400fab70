"""Induction heads: a transformer of attention alone is to say what came after a token the last time.

The answer follows from the context only. One layer cannot look it up; two can, when a head of the first
tells each position what stands before it, and one of the second looks for that (Olsson et al., arXiv
2209.11895). Neither is of use without the other: for long the network hardly does better than to guess,
and then the loss falls at once (Reddy, arXiv 2312.03002).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.tasks import Task, Training

VOCABULARY = 24
LENGTH = 12
WIDTH = 32
BATCH_SIZE = 64
HELD_OUT = 500


class Attention(nn.Module):
    """A residual layer with one causal head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, time, WIDTH) to the same shape."""
        q, k, v = self.qkv(self.norm(x)).chunk(3, 2)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x


class TwoLayers(nn.Module):
    """Learned positions, two layers, and the answer at the last position."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH + 1, WIDTH)
        self.layers = nn.Sequential(Attention(), Attention(), nn.LayerNorm(WIDTH))
        self.output = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        """Logits (n, VOCABULARY) from sequences (n, LENGTH + 1)."""
        x = self.layers(self.tokens(sequences) + self.positions.weight)
        logits: torch.Tensor = self.output(x[:, -1])
        return logits


def examples(n: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """LENGTH different tokens and one of them again, (n, LENGTH + 1), and what came after it (n,).

    >>> sequences, answers = examples(5, torch.Generator())
    >>> [s[s.index(s[-1]) + 1] for s in sequences.tolist()] == answers.tolist()
    True
    """
    tokens = torch.rand(n, VOCABULARY, generator=draw).argsort(1)[:, :LENGTH]
    places = torch.randint(LENGTH - 1, (n, 1), generator=draw)
    return torch.cat((tokens, tokens.gather(1, places)), 1), tokens.gather(1, places + 1)[:, 0]


def induction(seed: int) -> Training:
    """Fresh sequences at every step."""
    draw = torch.Generator().manual_seed(seed)
    held_out, held_out_answers = examples(HELD_OUT, draw)
    torch.manual_seed(seed)
    model = TwoLayers()

    def loss() -> torch.Tensor:
        sequences, answers = examples(BATCH_SIZE, draw)
        return F.cross_entropy(model(sequences), answers)

    def evaluate(_: bool) -> tuple[float, float]:
        logits = model(held_out)
        accuracy = (logits.argmax(1) == held_out_answers).float().mean().item()
        return F.cross_entropy(logits, held_out_answers).item(), accuracy

    return Training(model, loss, evaluate)


# AdamW alone, seeds 0 to 2: 4320, 2600, 3680 steps at this lr, 420, 280, 380 at 16 times, 2920, 240, 1580
# at 32 times, none within 3000 at 64 times
ADAMW = Task(
    name="induction",
    setup=induction,
    lr=3e-4,
    budget=10_000,
    target=0.95,
    check_every=20,
    base_kwargs={"weight_decay": 1e-2},
)
