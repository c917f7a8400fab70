"""In-context linear regression by linear attention: long plateaus, one for each direction learnt.

A prompt holds points x_i with y_i = w·x_i for a w of its own, and a query. Heads of rank one from a
small initialization learn the directions of x one after the other, from saddle to saddle.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from benchmarks.tasks import Task, Training

DIMENSIONS = 4
POINTS = 32
HEADS = 8
SCALE = 0.05
BATCH_SIZE = 128
HELD_OUT = 2000


class LinearAttention(nn.Module):
    """ŷ = Σ_h v_h (k_h·β)(q_h·x) with β = mean of y_i x_i over the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Parameter(SCALE * torch.randn(HEADS, DIMENSIONS))
        self.query = nn.Parameter(SCALE * torch.randn(HEADS, DIMENSIONS))
        self.value = nn.Parameter(SCALE * torch.randn(HEADS))

    def forward(self, moments: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Predictions (n,) for queries (n, D) from the moments β (n, D) of their prompts."""
        return ((moments @ self.key.T) * (queries @ self.query.T)) @ self.value


def prompts(n: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moments β (n, D), queries (n, D) and their answers (n,); variances of x fall as 1, 1/2, 1/3, 1/4."""
    spread = torch.arange(1, DIMENSIONS + 1).rsqrt()
    w = torch.randn(n, DIMENSIONS, 1, generator=draw)
    x = torch.randn(n, POINTS + 1, DIMENSIONS, generator=draw) * spread
    y = (x @ w)[:, :, 0]
    moments = (x[:, :-1] * y[:, :-1, None]).mean(1)
    return moments, x[:, -1], y[:, -1]


def linear_attention(seed: int) -> Training:
    """Fresh prompts at every step, squared error."""
    draw = torch.Generator().manual_seed(seed)
    held_out = prompts(HELD_OUT, draw)
    torch.manual_seed(seed)
    model = LinearAttention()

    def error(data: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        moments, queries, answers = data
        return (model(moments, queries) - answers).square().mean()

    return Training(
        model,
        lambda: error(prompts(BATCH_SIZE, draw)),
        lambda _: (error(held_out).item(), None),
    )


SGD = Task(
    name="linear-attention-sgd",
    setup=linear_attention,
    lr=1e-2,
    budget=4_000,
    target=0.6,
    target_is_loss=True,
    base=torch.optim.SGD,
    base_kwargs={"momentum": 0.9},
)
ADAMW = replace(
    SGD,
    name="linear-attention",
    lr=1e-4,
    budget=10_000,
    base=torch.optim.AdamW,
    base_kwargs={"weight_decay": 1e-2},
)
