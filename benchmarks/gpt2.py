"""GPT-2-shaped models with random weights, and one real training step of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.methods import Occasion
from benchmarks.rivals import RIVALS
from gapaware import GapAware, muon

LR = 1e-5  # small: the same model is stepped by several optimizers in turn


@dataclass(frozen=True)
class Shape:
    """A model's size and the batch it is stepped with.

    The batches are small. A larger one makes forward and backward slower and nothing else, so that the
    same overhead would be a smaller share of the step.
    """

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    length: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("50k", 2, 32, 2, 768, 2, 16),
        Shape("10M", 10, 256, 4, 8192, 2, 128),
        Shape("124M", 12, 768, 12, 50_257, 8, 1024),
        Shape("350M", 24, 1024, 16, 50_257, 4, 1024),
        Shape("1.5B", 48, 1600, 25, 50_257, 2, 1024),
    )
}


class Trainee:
    """A model on a device, and batches of random tokens.

    A new batch for each step, as in training: on one batch alone every update goes the same way, which is
    a plateau to GapAware.

    Args:
        shape: of model and batch.
        device: CUDA computes forward and backward in bfloat16, as training there does.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=shape.vocabulary,
            n_positions=shape.length,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
        self.device = device
        with device:
            self.model = GPT2LMHeadModel(config)
        self.shape = shape
        self.parameters = list(self.model.parameters())

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Forward, backward, optimizer."""
        optimizer.zero_grad()
        size = (self.shape.batch, self.shape.length)
        tokens = torch.randint(self.shape.vocabulary, size, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()


def around_adamw(model: nn.Module, **arguments: Any) -> GapAware:
    """GapAware around AdamW, both at their defaults but for the learning rate and what is given."""
    return GapAware(torch.optim.AdamW(model.parameters(), lr=LR), **arguments)


def around_muon(model: nn.Module, **arguments: Any) -> GapAware:
    """GapAware around Muon with AdamW, at their defaults but for learning rates and what is given."""
    return muon(model, lr=LR, adamw_lr=LR, **arguments)


WRAPPED: dict[str, Callable[..., GapAware]] = {"AdamW": around_adamw, "Muon": around_muon}


def _rival(name: str, model: nn.Module) -> torch.optim.Optimizer:
    method = next(rival for rival in RIVALS if rival.name == name)
    build = method.make(torch.optim.AdamW, method.points[len(method.points) // 2], Occasion())
    return build(list(model.named_parameters()), lr=LR)


RIVALS_OF_ADAMW: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    name: partial(_rival, name) for name in ("grokfast", "schedule-free", "prodigy")
}
