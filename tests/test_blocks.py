"""The short sketches of blocks: against the definition, and what they leave alone."""

import numpy as np
import pytest
import torch

from gapaware.blocks import CHUNK, WIDTH
from gapaware.sketch import CHUNKS_PER_FLUSH, CountSketch, chunk_flips, chunk_offsets, sign_table

CPU = torch.device("cpu")


def laid_out(tensors):
    pieces, place = [], 0
    for tensor in tensors:
        pieces.append((tensor, place))
        place += tensor.numel()
    return pieces


def stretches(pieces, blocks):
    return [(place + x.numel(), block) for (x, place), block in zip(pieces, blocks, strict=True)]


def expected(pieces, blocks, seed):
    """Element at place p: sign of the long sketch, bucket (p mod CHUNK) mod WIDTH."""
    sums = np.zeros((max(blocks) + 1, WIDTH))
    for (x, place), block in zip(pieces, blocks, strict=True):
        chunk, at = np.divmod(place + np.arange(x.numel()), CHUNK)
        signs = sign_table(seed)[chunk_offsets(chunk, seed) + at] * chunk_flips(chunk, seed)
        np.add.at(sums[block], at % WIDTH, x.double().numpy() * signs)
    return sums


def random(*sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


MODELS = {
    "small": lambda: (random(3, WIDTH, 1, 5 * WIDTH + 7), range(4)),
    "across chunks": lambda: (random(CHUNK - 10, 30, CHUNK, 2 * CHUNK + 1, 9), range(5)),
    "taking turns": lambda: (random(70_000, 90_000, 4, 20_000, 60_000), (0, 1, 0, 1, 2)),
    "empty": lambda: (random(0, 5, 0, 9, 0), range(5)),
    "half precision": lambda: (random(40_000, 300, dtype=torch.bfloat16), range(2)),
    "float64": lambda: (random(50_000, 300, CHUNK, dtype=torch.float64), range(3)),
    "dtypes": lambda: (
        [*random(9000, 50), *random(3 * CHUNK, dtype=torch.float64), *random(800)],
        (0, 1, 1, 2),
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_short_sketches_follow_from_their_definition(model):
    tensors, blocks = MODELS[model]()
    pieces = laid_out(tensors)
    sketch = CountSketch(64, seed=5)
    # the second time in accumulators that the first has used
    for _ in range(2):
        _, shares = sketch.rows([pieces], CPU, stretches=[stretches(pieces, blocks)])
    sums = expected(pieces, blocks, 5)
    found = shares.view(-1, WIDTH).numpy()[: len(sums)]
    np.testing.assert_allclose(found, sums, rtol=0, atol=2e-6 * np.abs(sums).max())


def test_more_chunks_than_one_float32_sum_takes():
    """The float32 sums are emptied within the second block, and within the third, of zeros."""
    large = random((CHUNKS_PER_FLUSH - 2) * CHUNK, 4 * CHUNK)
    tensors = [*large, torch.zeros(CHUNKS_PER_FLUSH * CHUNK), *random(500)]
    pieces = laid_out(tensors)
    sketch = CountSketch(64, seed=5)
    whole, shares = sketch.rows([pieces], CPU, stretches=[stretches(pieces, range(4))])
    sums, found = expected(pieces, range(4), 5), shares.view(-1, WIDTH).numpy()
    np.testing.assert_allclose(found, sums, rtol=0, atol=2e-6 * np.abs(sums).max())
    assert not found[2].any()
    assert torch.equal(whole[0], sketch(pieces))


@pytest.mark.parametrize("model", MODELS)
def test_the_long_sketch_has_the_same_bits_with_and_without(model):
    tensors, blocks = MODELS[model]()
    pieces = laid_out(tensors)
    sketch = CountSketch(1000, seed=0)
    whole, _ = sketch.rows([pieces], CPU, stretches=[stretches(pieces, blocks)])
    assert torch.equal(whole[0], sketch(pieces))


@pytest.mark.parametrize("kind", ["dense", "rank 1", "rows", "columns", "constant"])
def test_error_of_a_squared_norm(kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 512, generator=generator)
    if kind == "rank 1":
        x = torch.outer(x[:, 0], x[0])
    elif kind == "rows":
        x[torch.arange(900) % 90 > 0] = 0
    elif kind == "columns":
        x[:, torch.arange(512) % 90 > 0] = 0
    elif kind == "constant":
        x = torch.ones(900, 512)
    errors = []
    for seed in range(0, 30 * 10**6, 10**6):
        _, shares = CountSketch(64, seed).rows([[(x.view(-1), 0)]], CPU)
        errors.append(float(shares.square().sum() / x.double().square().sum()) - 1)
    assert np.sqrt(np.mean(np.square(errors))) < 1.4 * (2 / WIDTH) ** 0.5
