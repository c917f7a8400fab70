"""On real training runs the sketched spectrum agrees with an SVD of the true updates."""

import argparse
import inspect

import numpy as np
import pytest
import torch
from torch import nn

from gapaware import GapAware, muon, reference

TOLERANCE = 0.02
CONTEXT = 48


class CharTransformer(nn.Module):
    """Two layers, about half a million parameters."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, width)
        self.place = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.lm_head = nn.Linear(width, 128)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.place.weight
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, dtype=x.dtype)
        return self.lm_head(self.layers(x, mask=mask, is_causal=True))


def text() -> torch.Tensor:
    """Real text that is always there: the source of a standard library module."""
    return torch.tensor(list(inspect.getsource(argparse).encode("ascii", "replace")))


def adamw(model: nn.Module) -> GapAware:
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return GapAware(
        torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1), interval=1, mode="observe"
    )


def low_rank(model: nn.Module) -> GapAware:
    """Gradients of rank 2, as low-rank adapters and gradient projection make them."""

    def truncate(gradient: torch.Tensor) -> torch.Tensor:
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)
        return left[:, :2] * values[:2] @ right[:2]

    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    for matrix in matrices:
        matrix.register_hook(truncate)
    return GapAware(torch.optim.SGD(matrices, lr=0.1), interval=1, mode="observe")


def embedding_rows(model: nn.Module) -> GapAware:
    """Updates in few rows of one table: as aligned with the memory layout as can be."""
    return GapAware(torch.optim.SGD([model.embed.weight], lr=1.0), interval=1, mode="observe")


RUNS = {
    "adamw": (adamw, torch.float32),
    "adamw bf16": (adamw, torch.bfloat16),
    "muon": (lambda m: muon(m, interval=1, mode="observe"), torch.float32),
    "low rank": (low_rank, torch.float32),
    "embedding rows": (embedding_rows, torch.float32),
}


@pytest.mark.parametrize("run", RUNS)
def test_spectrum_equals_svd_of_true_updates(run):
    build, dtype = RUNS[run]
    torch.manual_seed(0)
    model = CharTransformer().to(dtype)
    optimizer = build(model)
    data = text()
    generator = torch.Generator().manual_seed(0)
    places, compared, same_gap = [], 0, 0

    def vector():
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        return (
            torch.cat([p.detach().flatten() for p in trained if p.requires_grad])
            .double()
            .numpy()
            .copy()
        )

    places.append(vector())
    for _ in range(24):
        start = torch.randint(len(data) - CONTEXT - 1, (8,), generator=generator)
        window = data[start[:, None] + torch.arange(CONTEXT + 1)]
        logits = model(window[:, :-1]).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        places.append(vector())

    updates = np.diff(np.array(places), axis=0)
    for record in optimizer.history:
        last = record["step"]
        if last < 11 or record["spectrum"] is None:
            continue
        window = updates[last - 11 : last]
        sigma = reference.singular_values(window[1:])
        k = reference.gap_position(sigma)
        seen = record["spectrum"]
        above = slice(0, k)
        np.testing.assert_allclose(seen["sigma"][above], sigma[above], rtol=TOLERANCE)
        compared += 1
        if sigma[k - 1] / sigma[k] > 1.2:
            assert seen["gap_position"] == k
            same_gap += 1
        thesis = reference.gap_position_thesis(sigma)
        ratios = np.sort(sigma[:-1] / sigma[1:])
        if ratios[-1] > 1.2 and ratios[-1] > 1.05 * ratios[-2]:
            assert seen["gap_position_thesis"] == thesis
    assert compared >= 10
    assert same_gap >= 1
