"""The compiled loop on the CPU: the same bits as without it, and harmless where it cannot be used."""

import os
import subprocess
import sys
from itertools import groupby

import pytest
import torch

from gapaware import GapAware, openmp, sketch
from gapaware.blocks import CHUNK, WIDTH
from gapaware.sketch import CHUNKS_PER_FLUSH, CountSketch

compiled = pytest.importorskip("gapaware.compiled", reason="needs Numba")

CPU = torch.device("cpu")
SEED = 3


def random(*sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def laid_out(tensors, gap=0):
    pieces, place = [], gap
    for tensor in tensors:
        pieces.append((tensor, place))
        place += tensor.numel() + gap
    return pieces


def stretches(pieces, blocks):
    """Where each run of pieces of one block ends."""
    ends = [(place + x.numel(), block) for (x, place), block in zip(pieces, blocks, strict=True)]
    return [list(run)[-1] for _, run in groupby(ends, key=lambda end: end[1])]


def resident(*rows):
    return frozenset(x.untyped_storage().data_ptr() for row in rows for x, _ in row)


@pytest.fixture
def eager(monkeypatch):
    """A sketch that never uses the loop."""

    def rows(*args, dim=1000, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(sketch, "_compiled", lambda: None)
            return CountSketch(dim, SEED).rows(*args, **kwargs)

    return rows


@pytest.fixture
def taken(monkeypatch):
    """What the loop was given."""
    plans = []
    call = compiled.Loop.__call__
    monkeypatch.setattr(
        compiled.Loop, "__call__", lambda self, plan: plans.append(plan) or call(self, plan)
    )
    return plans


@pytest.fixture(params=["one thread", "two of torch's", "two of our own"])
def threads(request, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "one thread" else 2)
    if request.param == "two of our own":
        monkeypatch.setattr(openmp, "_parallel", lambda: None)
    yield request.param
    torch.set_num_threads(before)


MODELS = {
    "one tensor": lambda: (random(CHUNK + 1), [0]),
    "across chunks": lambda: (random(CHUNK - 10, 30, CHUNK, 2 * CHUNK + 1, 9), range(5)),
    "small neighbours": lambda: (random(5000, *[900] * 300, 0, CHUNK), [0] * 150 + [1] * 153),
    "taking turns": lambda: (random(70_000, 90_000, 4, 20_000, 60_000), (0, 1, 0, 1, 2)),
    "half precision": lambda: (random(40_000, 300, 3 * CHUNK, dtype=torch.bfloat16), range(3)),
    "infinite": lambda: ([*random(CHUNK), torch.tensor([float("inf")]), *random(7)], range(3)),
    "NaN": lambda: ([*random(CHUNK), torch.tensor([float("nan")]), *random(7)], range(3)),
}


@pytest.mark.parametrize("gap", [0, 13], ids=["neighbours", "gaps"])
@pytest.mark.parametrize("model", MODELS)
def test_same_bits_as_without_it(model, gap, threads, eager, taken):
    tensors, blocks = MODELS[model]()
    pieces = laid_out(tensors, gap)
    given = {"stretches": [stretches(pieces, blocks)], "resident": resident(pieces)}
    expected, short = eager([pieces], CPU, **given)
    assert not taken
    loop = CountSketch(1000, SEED)
    for _ in range(2):  # the second time in sums that the first has used
        found, shares = loop.rows([pieces], CPU, **given)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        # those are folded in another order
        bound = 2e-6 * short[short.isfinite()].abs().max()
        torch.testing.assert_close(shares, short, rtol=0, atol=bound, equal_nan=True)
    assert len(taken) == 2


def test_more_chunks_than_one_float32_sum_takes(threads, eager, taken):
    """The float32 sums are emptied within the second block, and within the third, of zeros."""
    large = random((CHUNKS_PER_FLUSH - 2) * CHUNK, 4 * CHUNK)
    pieces = laid_out([*large, torch.zeros(CHUNKS_PER_FLUSH * CHUNK), *random(500)])
    given = {"stretches": [stretches(pieces, range(4))], "resident": resident(pieces)}
    expected, short = eager([pieces], CPU, **given)
    found, shares = CountSketch(1000, SEED).rows([pieces], CPU, **given)
    assert torch.equal(found, expected)
    torch.testing.assert_close(shares, short, rtol=0, atol=2e-6 * short.abs().max())
    assert not shares.view(-1, WIDTH)[2].any()
    assert taken[0].flushed.sum() == 2


OTHERS = {
    "float64": lambda: random(CHUNK, 5, dtype=torch.float64),
    "half": lambda: random(CHUNK, 5, dtype=torch.float16),
    "two dtypes": lambda: [*random(CHUNK), *random(5, dtype=torch.bfloat16)],
    "strided": lambda: [*random(CHUNK), *(x[::2] for x in random(10))],
    "small": lambda: random(CHUNK - 5, 5),
    "empty": lambda: random(0),
}


@pytest.mark.parametrize("model", OTHERS)
def test_what_it_cannot_take_goes_the_other_way(model, eager, taken):
    pieces = laid_out(OTHERS[model]())
    expected, _ = eager([pieces], CPU, resident=resident(pieces))
    loop = CountSketch(1000, SEED)
    given = {"stretches": [stretches(pieces, range(len(pieces)))], "resident": resident(pieces)}
    for _ in range(2):  # with a key it is found out once
        found, _ = loop.rows([iter(pieces)], CPU, **given, key="same")
        assert torch.equal(found, expected)
    assert not taken


def test_copies_are_not_kept_until_it_runs(eager, taken):
    held = random(CHUNK, 700)

    def pieces():
        place = 0
        for x in [*held, *[held[1].clone() for _ in range(3)]]:
            copy = x if x is held[0] else x.clone()
            yield copy, place
            place += x.numel()

    expected, _ = eager([pieces()], CPU)
    found, _ = CountSketch(1000, SEED).rows([pieces()], CPU, resident=resident([(held[0], 0)]))
    assert torch.equal(found, expected)
    assert not taken


def test_pieces_are_asked_for_again_only_under_another_key(taken):
    first, second = (laid_out(random(CHUNK, size)) for size in (10, 20))
    loop = CountSketch(1000, SEED)

    def rows(pieces, key):
        return loop.rows([iter(pieces)], CPU, resident=resident(first, second), key=key)[0]

    before = rows(first, key=1)
    assert torch.equal(rows([], key=1), before)
    first[0][0].mul_(2)
    assert not torch.equal(rows([], key=1), before)
    assert not torch.equal(rows(second, key=2), rows(first, key=1))
    assert not torch.equal(rows(second, key=None), rows(first, key=None))
    assert [plan.size - CHUNK for plan in taken] == [10, 10, 10, 20, 10, 20, 10]


def train(steps=60):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(400, 600), torch.nn.Tanh(), torch.nn.Linear(600, 1))
    optimizer = GapAware(torch.optim.AdamW(model.parameters(), lr=1e-6), interval=3)
    x = torch.randn(64, 400)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - x[:, :1]).square().mean()
        loss.backward()
        optimizer.log(loss=loss)
        optimizer.step()
    return optimizer, [p.detach().clone() for p in model.parameters()]


def test_training_is_the_same_with_and_without(monkeypatch, taken):
    optimizer, with_loop = train()
    assert len(taken) > 15
    assert max(record["scale"] for record in optimizer.history) > 1
    monkeypatch.setattr(sketch, "_compiled", lambda: None)
    _, without = train()
    assert all(map(torch.equal, with_loop, without))


def test_a_numba_that_does_not_work_costs_a_warning(monkeypatch):
    sketch._compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "gapaware.compiled", None)
    monkeypatch.delattr("gapaware.compiled")
    try:
        with pytest.warns(UserWarning, match="Numba does not work here, so snapshots are slower"):
            optimizer, *_ = train(steps=10)
        assert not any(record["decision"] == "fault" for record in optimizer.history)
    finally:
        sketch._compiled.cache_clear()


def test_it_needs_no_place_for_what_is_compiled():
    """Where the cache cannot be written everything is compiled anew."""
    code = "from gapaware import sketch; assert sketch._compiled()"
    environment = {**os.environ, "NUMBA_CACHE_DIR": os.devnull}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_numba_is_not_imported_for_a_small_model():
    code = (
        "import sys, torch, gapaware\n"
        "p = torch.nn.Parameter(torch.ones(100))\n"
        "optimizer = gapaware.GapAware(torch.optim.SGD([p], lr=0.1), interval=1)\n"
        "for _ in range(20): optimizer.step()\n"
        "assert 'numba' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
