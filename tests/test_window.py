"""The window's inner products are those of the updates and of their weight-decay parts themselves."""

import numpy as np
import pytest
import torch
from torch import nn

from gapaware import GapAware, reference
from gapaware.window import Window

SIZE, ROWS, DIM = 5, 2, 300
CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-7}


def walk(steps):
    """Parameters that move and decay: the last ones, the updates and their decay parts, (n, rows, dim)."""
    generator = torch.Generator().manual_seed(0)
    theta = 30 * torch.randn(ROWS, DIM, dtype=torch.float64, generator=generator)
    for _ in range(steps):
        rates = 1e-3 * torch.rand(ROWS, dtype=torch.float64, generator=generator)
        by_gradient = 1e-3 * torch.randn(ROWS, DIM, dtype=torch.float64, generator=generator)
        decay = -rates[:, None] * theta
        theta = theta + by_gradient + decay
        yield by_gradient + decay, decay, theta, rates


def products(path):
    """Inner products of updates and decay parts, (2, 2, rows, n, n), from their definition."""
    parts = torch.stack([torch.stack(step[:2]) for step in path[-SIZE - 1 :]])
    return torch.einsum("nkrd,mlrd->klrnm", parts, parts)


def assert_same(got, expected, tolerance):
    """Up to `tolerance` of the lengths of the two sides."""
    assert got.shape == expected.shape
    lengths = torch.einsum("kkrnn->krn", expected).sqrt()
    scale = lengths[:, None, :, :, None] * lengths[None, :, :, None, :]
    assert ((got - expected).abs() / scale).max() < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("steps", [1, SIZE, SIZE + 1, 3 * SIZE])
def test_equals_the_products_themselves(steps, dtype):
    path = list(walk(steps))
    window = Window(SIZE, ROWS, DIM, CPU, dtype)
    for update, _, theta, rates in path:
        window.push(update, theta, rates)
    assert_same(window.gram(), products(path), TOLERANCE[dtype])
    theta = path[-1][2]
    again = Window.from_state_dict(window.state_dict(), theta, dtype)
    assert torch.equal(again.gram(), window.gram())


@pytest.mark.parametrize("steps", [0, 2, SIZE + 1, 3 * SIZE])
def test_states_with_decay_parts_go_on(steps):
    """Until 0.1.0 the ring had the decay parts, and no rates."""
    path = list(walk(steps + 3))
    ring = torch.zeros(2, SIZE + 1, ROWS, DIM, dtype=torch.float64)
    for number, (update, decay, _, _) in enumerate(path[:steps]):
        ring[:, number % (SIZE + 1)] = torch.stack((update, decay))
    start = path[0][2] - path[0][0]
    theta = path[steps - 1][2] if steps else start
    state = {"pushed": steps, "ring": ring, "gram": torch.zeros(0)}
    window = Window.from_state_dict(state, theta)
    assert window.pushed == steps
    for update, _, theta, rates in path[steps:]:
        window.push(update, theta, rates)
    assert_same(window.gram(), products(path), 1e-10)


@pytest.mark.parametrize(
    "damage", [{"pushed": -1}, {"gram": torch.ones(())}, {"rates": torch.ones(1)}]
)
def test_damaged_states_are_refused(damage):
    window = Window(SIZE, ROWS, DIM, CPU)
    with pytest.raises(ValueError, match="window"):
        Window.from_state_dict({**window.state_dict(), **damage}, torch.zeros(ROWS, DIM))


@pytest.mark.parametrize("sketch_dim", [None, 16_384])
def test_decay_share_of_a_run(sketch_dim):
    """Against the decay that AdamW applies, from the parameters before each step."""
    torch.manual_seed(0)
    lr, weight_decay, model = 1e-2, 1.0, torch.nn.Linear(60, 20)
    optimizer = GapAware(
        torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay),
        interval=1,
        sketch_dim=sketch_dim,
        mode="observe",
    )
    places = []
    for _ in range(20):
        places.append(
            torch.cat([p.detach().flatten() for p in model.parameters()]).double().numpy()
        )
        optimizer.zero_grad()
        model(torch.randn(8, 60)).square().mean().backward()
        optimizer.step()
    seen = next(record for record in optimizer.history if record["step"] == 19)
    updates = np.diff(np.array(places), axis=0)[-10:]
    decay = -lr * weight_decay * np.array(places)[-11:-1]
    expected = reference.decay_share(updates, decay)
    assert 0.01 < expected < 0.99
    assert seen["spectrum"]["decay_share"] == pytest.approx(expected, rel=2e-2)
    if sketch_dim is None:
        assert seen["spectrum"]["decay_share"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("layers", [2, 100])
def test_windows_of_many_rows_take_no_more_than_those_of_a_few(layers):
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(layers)])
    optimizer = GapAware(torch.optim.SGD(model.parameters(), lr=0.1), granularity="block")
    rows = 2 * layers
    optimizer.step()
    ring = optimizer.state_dict()["gapaware"]["observer"]["window"]["ring"]
    assert ring.shape == (11, rows, 16_384 if rows == 4 else 1024)


def test_a_window_saved_with_longer_rows_goes_on(monkeypatch):
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])

    def wrapped():
        return GapAware(
            torch.optim.SGD(model.parameters(), lr=0.1), granularity="block", interval=1
        )

    before, after = wrapped(), wrapped()
    with monkeypatch.context() as patch:
        patch.setattr("gapaware.observer.FULL_ROWS", 8)
        for _ in range(20):
            before.step()
    after.load_state_dict(before.state_dict())
    for _ in range(3):
        after.step()
    assert [record["step"] for record in after.history][-4:] == [19, 20, 21, 22]
    assert not any("fault" in record for record in after.history)
