"""Delayed recall: a GRU is to copy some symbols after a pause.

The copying memory problem (Hochreiter & Schmidhuber, Neural Computation 9(8), 1997; as it is posed here
Arjovsky et al., arXiv 1511.06464; here only the answers count). The loss stands where symbols are guessed,
at log SYMBOLS, until the state carries something over the pause.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.tasks import Task, Training

SYMBOLS = 8
KEPT = 3
PAUSE = 18
HIDDEN = 48
BATCH_SIZE = 32
HELD_OUT = 500
BLANK, SIGNAL = SYMBOLS, SYMBOLS + 1


class Memory(nn.Module):
    """A GRU that answers while it reads the signals at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(SYMBOLS + 2, 16)
        self.recurrent = nn.GRU(16, HIDDEN)
        self.output = nn.Linear(HIDDEN, SYMBOLS)

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        """Logits (KEPT, n, SYMBOLS) from sequences (KEPT + PAUSE + KEPT, n)."""
        logits: torch.Tensor = self.output(self.recurrent(self.tokens(sequences))[0][-KEPT:])
        return logits


def examples(n: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Symbols, a pause and as many signals, (KEPT + PAUSE + KEPT, n), and the symbols (KEPT, n).

    >>> sequences, symbols = examples(5, torch.Generator())
    >>> torch.equal(sequences[:KEPT], symbols), sequences[KEPT:, 0].tolist().count(BLANK)
    (True, 18)
    """
    symbols = torch.randint(SYMBOLS, (KEPT, n), generator=draw)
    pause, signals = torch.full((PAUSE, n), BLANK), torch.full((KEPT, n), SIGNAL)
    return torch.cat((symbols, pause, signals)), symbols


def delayed_recall(seed: int) -> Training:
    """Fresh sequences at every step."""
    draw = torch.Generator().manual_seed(seed)
    held_out, held_out_symbols = examples(HELD_OUT, draw)
    torch.manual_seed(seed)
    model = Memory()

    def loss() -> torch.Tensor:
        sequences, symbols = examples(BATCH_SIZE, draw)
        return F.cross_entropy(model(sequences).flatten(0, 1), symbols.flatten())

    def evaluate(_: bool) -> tuple[float, float]:
        logits = model(held_out)
        accuracy = (logits.argmax(2) == held_out_symbols).float().mean().item()
        return F.cross_entropy(logits.flatten(0, 1), held_out_symbols.flatten()).item(), accuracy

    return Training(model, loss, evaluate)


# AdamW alone at PyTorch's default lr, seeds 0 to 3: 1280, 1300, 1780, 1500 steps at this lr; seeds 0 and
# 1: 480 and 360 at 4 times it, 280 and 260 at 16 times, 680 and 700 at 64 times; seed 0: none within 5000
# at 1/4
ADAMW = Task(
    name="delayed-recall",
    setup=delayed_recall,
    lr=1e-3,
    budget=5_000,
    target=0.95,
    check_every=20,
    base_kwargs={"weight_decay": 1e-2},
)
