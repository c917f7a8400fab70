"""The short sketches of blocks: against the definition, and what they leave alone."""

from itertools import combinations, groupby

import numpy as np
import pytest
import torch

from gapaware.blocks import CHUNK, WIDTH
from gapaware.hashing import chunk_flips, chunk_offsets, sign_table
from gapaware.layout import MOST_BLOCKS, grouped, rows
from gapaware.sketch import CHUNKS_PER_FLUSH, CountSketch

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


# -- which blocks a row has ------------------------------------------------------------------------


def sums_of_several(sizes, numbers):
    """Of each part that has more than one member, their sum."""
    of_part = groupby(zip(sizes, numbers, strict=True), key=lambda pair: pair[1])
    members = [[size for size, _ in part] for _, part in of_part]
    return [sum(part) for part in members if len(part) > 1]


def test_parts_are_as_small_as_they_can_be():
    """Against all ways to cut a short list."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        sizes, most = rng.integers(0, 20, 8).tolist(), int(rng.integers(1, 8))
        numbers = grouped(sizes, most)
        assert numbers[0] == 0
        assert set(np.diff(numbers)) <= {0, 1}
        assert numbers[-1] < most
        best = min(
            max(sums_of_several(sizes, np.searchsorted(cuts, range(8), "right")), default=0)
            for cuts in combinations(range(1, 8), most - 1)
        )
        assert max(sums_of_several(sizes, numbers), default=0) == best


@pytest.mark.parametrize("named", [True, False])
def test_many_units_share_few_blocks_and_never_across_rows(named):
    tensors = [torch.nn.Parameter(x) for x in random(5000, *[100, 3] * 20, 700)]
    first, second = tensors[:-3], tensors[-3:]
    groups = [{"params": first}, {"params": second}]
    if named:
        groups[0]["param_names"] = [f"layer{i // 2}.{i % 2}.x" for i in range(len(first))]
        groups[1]["param_names"] = ["a", "b", "c"]
    one, other = rows(groups, "global")
    name = "group 0: layer0.0" if named else "group 0: tensor 0"
    assert one.blocks[0][:-1] == (name, 1, 5000, 0)
    assert len(one.blocks) == MOST_BLOCKS
    assert sum(count for _, count, *_ in one.blocks) == len(first)
    assert max(size for _, _, size, *_ in one.blocks[1:]) < 2 * 2000 / (MOST_BLOCKS - 1)
    ends = np.cumsum([size for _, _, size, *_ in one.blocks]).tolist()
    assert one.stretches == tuple((end, number) for number, end in enumerate(ends))
    assert [size for _, _, size, *_ in other.blocks] == [100, 3, 700][-len(other.blocks) :]


def test_a_layer_in_several_places_is_in_one_block():
    """Weights first, biases after them: each bias counts with its weight."""
    tensors = [torch.nn.Parameter(x) for x in random(*[90] * 20, *[1] * 20)]
    names = [f"h.{i}.{kind}" for kind in ("weight", "bias") for i in range(20)]
    (row,) = rows([{"params": tensors, "param_names": names}], "global")
    assert sum(size for _, _, size, *_ in row.blocks) == 20 * 91
    assert {size % 91 for _, _, size, *_ in row.blocks} == {0}
    ends, numbers = zip(*row.stretches, strict=True)
    assert ends[-1] == row.size
    assert sorted(numbers) == sorted(2 * list(range(len(row.blocks))))
