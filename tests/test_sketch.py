"""The sketch is the linear map that reference.py says and keeps the geometry of real updates."""

import itertools

import numpy as np
import pytest
import torch

from gapaware import reference
from gapaware.hashing import buckets, sign_table
from gapaware.identity import Identity
from gapaware.sketch import CHUNK, CHUNKS_PER_FLUSH, CountSketch

DIM = 16_384


def sketch_of(x: torch.Tensor, dim: int = DIM, seed: int = 0) -> np.ndarray:
    return CountSketch(dim, seed)([(x.reshape(-1), 0)]).numpy()


@pytest.mark.parametrize("size", [1, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17])
@pytest.mark.parametrize("dim", [64, 1000, DIM])
def test_equals_reference(size, dim):
    x = torch.randn(size, generator=torch.Generator().manual_seed(size))
    expected = reference.count_sketch(x.double().numpy(), dim, seed=3)
    np.testing.assert_allclose(sketch_of(x, dim, 3), expected, rtol=0, atol=2e-5)


def test_float64_parameters_keep_their_precision():
    x = torch.randn(3 * CHUNK, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = reference.count_sketch(x.numpy(), DIM, seed=0)
    np.testing.assert_allclose(sketch_of(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_read_as_they_are(dtype):
    x = torch.randn(2 * CHUNK, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = reference.count_sketch(x.double().numpy(), DIM, seed=0)
    np.testing.assert_allclose(sketch_of(x), expected, rtol=0, atol=2e-5)


def test_many_chunks_lose_no_precision():
    # more chunks than one float32 accumulation takes, with an offset that would drown small values
    x = 100 + torch.randn(150 * CHUNK, generator=torch.Generator().manual_seed(0))
    expected = reference.count_sketch(x.double().numpy(), DIM, seed=0)
    error = np.abs(sketch_of(x) - expected).max() / np.abs(expected).max()
    assert error < 1e-6


def test_pieces_add_up_to_the_whole():
    x = torch.randn(2 * CHUNK + 5, generator=torch.Generator().manual_seed(0))
    sketch = CountSketch(DIM, 0)
    whole = sketch([(x, 0)])
    cuts = [0, 10, CHUNK - 3, CHUNK + 1000, len(x)]
    pieces = [(x[a:b], a) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(sketch(pieces), whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(sum(sketch([piece]) for piece in pieces), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_same_bits_however_the_vector_is_cut(dtype):
    """Small neighbours are copied together; more pieces than chunks in one float32 accumulation."""
    x = torch.randn(3 * CHUNK + 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    sketch = CountSketch(DIM, 0)
    sizes = [0, 1, 10, 5000, CHUNK, 700, 16_384, 16_385, 3, *[900] * 200]
    sizes.append(len(x) - sum(sizes))
    places = itertools.accumulate(sizes, initial=0)
    pieces = list(zip(x.split(sizes), places, strict=False))
    assert len(pieces) > CHUNKS_PER_FLUSH
    assert torch.equal(sketch(pieces), sketch([(x, 0)]))
    # what is not next to each other is not joined
    for piece, _ in pieces[1::2]:
        piece.zero_()
    assert torch.equal(sketch(pieces[::2]), sketch([(x, 0)]))


def test_same_bits_every_time_and_no_state_between_calls():
    x = torch.randn(CHUNK + 7)
    sketch = CountSketch(DIM, 0)
    first = sketch([(x, 0)])
    sketch([(torch.randn(5 * CHUNK), 0)])
    assert torch.equal(sketch([(x, 0)]), first)
    assert torch.equal(CountSketch(DIM, 0)([(x, 0)]), first)
    assert not torch.equal(CountSketch(DIM, 1)([(x, 0)]), first)


def test_gpu_fold_is_the_same_map():
    """The gather order used on GPUs gives what adding by bucket gives."""
    from gapaware.sketch import _gather_order

    total = torch.randn(CHUNK + 1, dtype=torch.float64)
    total[-1] = 0
    for dim in (64, 1000, DIM):
        bucket = torch.from_numpy(buckets(dim, 0))
        expected = torch.zeros(dim, dtype=torch.float64).index_add_(0, bucket, total[:-1])
        gathered = total.index_select(0, _gather_order(bucket, dim)).view(-1, dim).sum(0)
        torch.testing.assert_close(gathered, expected, rtol=0, atol=1e-12)


def test_hash_is_balanced():
    assert abs(sign_table(0).mean()) < 0.01
    counts = np.bincount(buckets(DIM, 0), minlength=DIM)
    assert counts.max() - counts.min() <= 1


def updates_of_shape(kind: str, n: int, generator: torch.Generator) -> torch.Tensor:
    """Update matrices as optimizers make them, and the ones that break weaker sketches."""
    rows, columns = 1024, 1536
    if kind == "random":
        return torch.randn(n, rows, columns, generator=generator)
    if kind == "low rank":
        left, right = torch.randn(n, rows, 1, generator=generator), torch.randn(1, columns)
        return left @ right
    if kind == "constant":
        return torch.ones(n, rows, columns) * torch.arange(1, n + 1)[:, None, None]
    update = torch.zeros(n, rows, columns)
    if kind == "one column":
        update[:, :, 7] = torch.randn(n, rows, generator=generator)
    elif kind == "one row":
        update[:, 5, :] = torch.randn(n, columns, generator=generator)
    elif kind == "aligned columns":
        update[:, :, ::256] = torch.randn(n, rows, columns // 256, generator=generator)
    elif kind == "badly scaled":
        update = torch.randn(n, rows, columns, generator=generator)
        update *= torch.logspace(-4, 4, columns)
    return update


KINDS = [
    "random",
    "low rank",
    "constant",
    "one column",
    "one row",
    "aligned columns",
    "badly scaled",
]


@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_and_tight_whatever_the_layout(kind):
    """Relative error of ‖x‖² over seeds: mean near 0, spread near √(2/dim) = 1.1 %."""
    x = updates_of_shape(kind, 1, torch.Generator().manual_seed(1)).reshape(-1)
    true = x.double().square().sum().item()
    dim = 4096
    errors = np.array([(sketch_of(x, dim, seed) ** 2).sum() / true - 1 for seed in range(24)])
    spread = np.sqrt(2 / dim)
    assert abs(errors.mean()) < 4 * spread / np.sqrt(len(errors))
    assert errors.std() < 1.6 * spread


def test_identity_is_exact():
    x = torch.randn(100)
    pieces = [(x[:30], 0), (x[30:], 30)]
    assert torch.equal(Identity(100)(pieces), x.double())


def test_a_failure_in_the_middle_leaves_nothing_behind():
    def failing(x):
        yield x, 0
        raise MemoryError

    x, sketch = torch.randn(100), CountSketch(64, seed=0)
    before = sketch([(x, 0)])
    with pytest.raises(MemoryError):
        sketch(failing(x), x.device)
    assert torch.equal(sketch([(x, 0)]), before)
