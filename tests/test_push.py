"""The push along what the recent steps have in common."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from gapaware import Decision, GapAware, OwnState, room
from gapaware.push import Push
from gapaware.scaling import Scales


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def train(model, optimizer, steps):
    for step in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x[:, :2] - 3).square().mean().backward()
        optimizer.step()


def pushed(model, push=2.0, **more):
    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    given = {"interval": 2, "sketch_dim": 64, "controller": lambda seen: Decision(1.0, push=push)}
    return GapAware(base, **{**given, **more})


def equal(one, other):
    return all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize(
    ("group", "beta"),
    [({"momentum": 0.9}, 0.9), ({"betas": (0.95, 0.999)}, 0.95), ({}, 0.5)],
)
def test_it_adds_the_average_of_the_steps(group, beta):
    """m ← βm + (1 − β)δ, θ ← θ + λm, by hand, while λ changes."""
    steps = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    push, mean, expected = Push(), torch.zeros(3), torch.zeros(3, dtype=torch.float64)
    for number, step in enumerate(steps):
        strength = 1.0 + number % 3
        with torch.no_grad():
            theta.add_(step)
        push([{"params": [theta], **group}], [Scales(push=strength)])
        if number:  # before the first one there is nothing to compare with
            mean = beta * mean + (1 - beta) * step
        expected += step + strength * mean
        assert torch.allclose(theta, expected, rtol=1e-12, atol=1e-12)


def test_a_drift_is_faster_and_a_bounce_is_not():
    theta, push = nn.Parameter(torch.zeros(2)), Push()
    for number in range(400):
        with torch.no_grad():
            theta.add_(torch.tensor([1.0, (-1.0) ** number]))
        push([{"params": [theta], "momentum": 0.9}], [Scales(push=3.0)])
    drifted, bounced = theta.tolist()
    assert drifted == pytest.approx(4 * 400, rel=0.03)
    assert abs(bounced) < 2


def test_without_a_push_nothing_is_kept_and_nothing_moves():
    alone, model = network(), network()
    optimizer = pushed(model, push=0.0)
    train(model, optimizer, range(30))
    train(alone, torch.optim.SGD(alone.parameters(), lr=0.01, momentum=0.9), range(30))
    assert equal(model, alone)
    assert optimizer.state_dict()["gapaware"]["push"] == {}


def test_what_is_kept_is_let_go_with_the_push():
    model = network()
    # from the third snapshot on there is a spectrum, and until step 20 a push
    optimizer = pushed(
        model, controller=lambda seen: Decision(1.0, push=2.0 if seen.step < 20 else 0.0)
    )
    train(model, optimizer, range(18))
    assert optimizer.history[-1]["push"] == 2.0
    assert len(optimizer.state_dict()["gapaware"]["push"]) == 4
    train(model, optimizer, range(18, 30))
    assert "push" not in optimizer.history[-1]
    assert optimizer.state_dict()["gapaware"]["push"] == {}


def test_rows_are_pushed_apart():
    seen = {}

    def one(observation):
        seen[observation.row] = observation.push
        return Decision(1.0, push=3.0 * (observation.row == next(iter(seen))))

    model = network()
    optimizer = pushed(model, granularity="block", controller=one)
    train(model, optimizer, range(30))
    assert list(seen.values()) == [3.0, 0.0, 0.0, 0.0]
    assert list(optimizer.state_dict()["gapaware"]["push"]) == ["0.0"]


@pytest.mark.parametrize("saved_at", [11, 12, 25])
def test_a_resumed_run_takes_the_same_steps(saved_at):
    model = network()
    optimizer = pushed(model)
    train(model, optimizer, range(saved_at))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, range(saved_at, 60))

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = network(seed=1)
    resumed = pushed(other)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(other, resumed, range(saved_at, 60))
    assert equal(model, other)


@pytest.mark.parametrize("ruined", [False, True])
def test_weights_that_are_loaded_are_no_step_to_push_along(ruined):
    """A roll-back to the best model, perhaps from NaN."""
    model = network()
    optimizer = pushed(model)
    train(model, optimizer, range(25))
    if ruined:
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(float("nan"))
    best = network(seed=5)
    model.load_state_dict(best.state_dict())
    optimizer.base.state.clear()
    for group in optimizer.param_groups:
        group["lr"] = 1e-20
    train(model, optimizer, range(25, 28))
    assert optimizer.history[-1]["push"] == 2.0
    assert equal(model, best)


@pytest.mark.parametrize("duplicate", ["saved", "copied"])
def test_weights_that_are_loaded_just_before_a_copy_is_made_are_no_step_either(duplicate):
    model = network()
    optimizer = pushed(model)
    train(model, optimizer, range(25))
    model.load_state_dict(network(seed=5).state_dict())
    if duplicate == "copied":
        other, resumed = copy.deepcopy((model, optimizer))
    else:
        other = network()
        resumed = pushed(other)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        other.load_state_dict(model.state_dict())
    train(model, optimizer, range(25, 40))
    train(other, resumed, range(25, 40))
    assert equal(model, other)


def test_a_learning_rate_of_zero_stops_the_push_too():
    model = network()
    optimizer = pushed(model)
    train(model, optimizer, range(25))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model)
    train(model, optimizer, range(25, 30))
    assert equal(model, before)
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    train(model, optimizer, range(30, 35))
    assert not equal(model, before)
    assert optimizer._copies.push.holds


def test_an_evaluation_is_not_seen_by_a_push():
    """A controller of one's own may ask for both."""
    model, twin = network(), network()
    both = {"controller": lambda seen: Decision(1.5, push=2.0, average=True)}
    optimizer, alone = pushed(model, **both), pushed(twin, **both)
    for step in range(30):
        train(model, optimizer, [step])
        optimizer.eval()
        optimizer.train()
        train(twin, alone, [step])
    assert optimizer.state_dict()["gapaware"]["average"]["weights"]
    assert equal(model, twin)


def test_the_built_in_law_pushes_and_a_resumed_run_takes_the_same_steps():
    """A learning rate that even 64 times larger is too small."""

    def creeping(model):
        base = torch.optim.AdamW(model.parameters(), lr=1e-5)
        return GapAware(base, mode="escape", sketch_dim=1024)

    model, slower = network(), network()
    optimizer = creeping(model)
    train(model, optimizer, range(130))
    assert optimizer.scales == [64.0]
    assert optimizer.history[-1]["push"] == 2.0
    assert optimizer.history[-1]["momentum_scale"] == pytest.approx(0.5)
    train(slower, GapAware(torch.optim.AdamW(slower.parameters(), lr=1e-5), max_push=0), range(130))
    start, end, other = (
        torch.cat([p.flatten() for p in m.parameters()]) for m in (network(), model, slower)
    )
    assert (end - start).norm() > 1.2 * (other - start).norm()

    twin = network(seed=1)
    twin.load_state_dict(model.state_dict())
    twins = creeping(twin)
    twins.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(130, 200))
    train(twin, twins, range(130, 200))
    assert equal(model, twin)


def test_saved_after_a_parameter_was_frozen_it_loads():
    model = network()
    optimizer = pushed(model)
    train(model, optimizer, range(20))
    model[0].bias.requires_grad_(False)
    frozen = model[0].bias.detach().clone()
    twin = copy.deepcopy(model)
    resumed = pushed(twin)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(20, 40))
    train(twin, resumed, range(20, 40))
    assert equal(model, twin)
    assert torch.equal(twin[0].bias, frozen)


def test_a_copy_goes_on_alike_and_apart():
    model = network()
    optimizer = pushed(model)
    train(model, optimizer, range(20))
    twin, twins = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(20, 40))
    train(twin, twins, range(20, 40))
    assert equal(model, twin)


def test_distributed_checkpoints_leave_it_out():
    model = network()
    optimizer = pushed(model)
    train(model, optimizer, range(20))
    saved = OwnState(optimizer).state_dict()
    other = pushed(network())
    OwnState(other).load_state_dict(saved)
    restored = other.state_dict()["gapaware"]
    assert restored["push"] == {}
    assert restored["steering"] == optimizer.state_dict()["gapaware"]["steering"]


def test_a_state_that_fits_no_parameter_is_refused_whole():
    model = network()
    optimizer = pushed(model)
    train(model, optimizer, range(20))
    damaged = copy.deepcopy(optimizer.state_dict())
    damaged["gapaware"]["push"]["0.0"] = torch.zeros(5)
    before = copy.deepcopy(optimizer.state_dict()["gapaware"]["push"])
    with pytest.raises(ValueError, match="fits no parameter"):
        optimizer.load_state_dict(damaged)
    after = optimizer.state_dict()["gapaware"]["push"]
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_fault_in_the_push_never_costs_the_run(monkeypatch):
    """As where there is no memory for a copy of the weights: the run goes on as the base's."""

    def broken(*args, **kwargs):
        raise MemoryError("out of memory")

    monkeypatch.setattr(Push, "__call__", broken)
    model, alone = network(), network()
    optimizer = pushed(model)
    with pytest.warns(UserWarning, match="the push along the recent steps: MemoryError"):
        train(model, optimizer, range(20))
    train(alone, torch.optim.SGD(alone.parameters(), lr=0.01, momentum=0.9), range(20))
    assert equal(model, alone)


def test_a_fault_is_the_last_of_the_push_but_not_of_the_factor(monkeypatch):
    """For what was wrong may be the lack of memory; a resumed run and a copy know it too."""
    model = network()
    given = {"controller": lambda seen: Decision(2.0, push=2.0)}
    optimizer = pushed(model, **given)
    train(model, optimizer, range(20))
    assert optimizer.history[-1]["push"] == 2.0
    with monkeypatch.context() as patched:
        patched.setattr(Push, "__call__", lambda *_: 1 / 0)
        with pytest.warns(UserWarning, match="took its factors off"):
            train(model, optimizer, [20])
    train(model, optimizer, range(21, 50))
    assert optimizer.scales == [2.0]
    assert "push" not in optimizer.history[-1]
    resumed = pushed(network(), **given)
    resumed.load_state_dict(optimizer.state_dict())
    model.load_state_dict(model.state_dict())
    train(model, resumed, range(50, 70))
    assert resumed.scales == [2.0]
    assert "push" not in resumed.history[-1]


def test_no_more_than_the_user_allows():
    model = network()
    optimizer = pushed(model, push=9.0, max_push=0.5)
    train(model, optimizer, range(20))
    assert optimizer.history[-1]["push"] == 0.5
    # loaded where none is allowed, what was saved is not
    without = pushed(network(), push=9.0, max_push=0)
    without.load_state_dict(optimizer.state_dict())
    assert all(scales.push == 0 for scales in without._begin()[0])


def test_no_copy_that_training_may_lack_the_memory_for(monkeypatch):
    """What is free when training takes as much as it ever did, here 100 bytes of each device."""
    monkeypatch.setattr(room, "_room", lambda device: 100)
    with FakeTensorMode():
        small, large = (nn.Parameter(torch.zeros(n, device="cuda")) for n in (20, 30))
        on_the_cpu = nn.Parameter(torch.zeros(1000))
        Push()([{"params": [small, on_the_cpu]}], [Scales(push=1.0)])
        with pytest.raises(MemoryError, match="for a copy of the weights"):
            Push()([{"params": [large]}], [Scales(push=1.0)])
        with pytest.raises(MemoryError, match="for a copy of the weights"):
            Push()([{"params": [small, small]}], [Scales(push=1.0)])


def test_parameters_that_come_go_and_change_shape():
    model = network()
    optimizer = pushed(model)
    train(model, optimizer, range(20))
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra]})
    model[0].bias.requires_grad_(False)
    frozen = model[0].bias.detach().clone()
    optimizer.param_groups[0]["params"][2] = model[2].weight = nn.Parameter(torch.zeros(2, 8))
    train(model, optimizer, range(20, 60))
    assert torch.equal(model[0].bias, frozen)
    assert torch.equal(extra, torch.ones(3))
    assert all(record["decision"] != "fault" for record in optimizer.history)


def test_several_ranks_are_not_pushed_before_all_have_shown_that_they_can_be():
    theta, push = nn.Parameter(torch.zeros(2)), Push()
    group, shared = {"params": [theta], "momentum": 0.9}, lambda: True

    def step():
        with torch.no_grad():
            theta.add_(1.0)
        before = theta[0].item()
        push([group], [Scales(push=2.0)], shared=shared)
        return theta[0].item() - before

    assert [step(), step()] == [0.0, 0.0]
    push.seen()  # has yet to tell of what was wrong when it was taken
    assert step() == 0.0
    push.seen()
    assert step() > 0.1
    assert step() > 0.1
    # what is to be pushed, too, has to be copied first
    group["params"].append(nn.Parameter(torch.zeros(2)))
    assert step() == 0.0
    push([group], [Scales()], shared=shared)
    assert push.waits == 0
    assert not push.holds


def test_a_resumed_run_waits_for_as_long():
    model = network()
    optimizer = pushed(model)
    train(model, optimizer, range(20))
    optimizer._copies.push.waits = 2
    resumed = pushed(copy.deepcopy(model))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed._copies.push.holds
    assert resumed._copies.push.waits == 2


def test_what_has_no_gradient_is_left_alone_as_by_any_optimizer():
    one, other = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    optimizer = GapAware(
        torch.optim.AdamW([one, other], lr=1e-2),
        controller=lambda _: Decision(2.0, "push", push=1.0),
        interval=1,
        sketch_dim=None,
    )
    for _ in range(30):
        one.grad, other.grad = torch.ones(4), torch.ones(4)
        optimizer.step()
    before, lag = other.detach().clone(), optimizer._copies.push.state_dict()["0.1"].clone()
    assert not torch.equal(before, lag)
    for _ in range(5):
        one.grad, other.grad = torch.ones(4), None
        optimizer.step()
    assert torch.equal(other, before)
    # and goes on with the momentum that it had
    assert torch.equal(optimizer._copies.push.state_dict()["0.1"], lag)
    # where nothing has a gradient, steps are made in another way
    other.grad = one.grad = None
    with torch.no_grad():
        for parameter in (one, other):
            parameter.sub_(0.1)
    optimizer.step()
    assert not torch.equal(optimizer._copies.push.state_dict()["0.1"], lag)


def test_a_checkpoint_in_the_middle_of_a_step_has_the_push():
    weights = torch.nn.Parameter(torch.zeros(4))
    base = torch.optim.SGD([weights], lr=1e-2, momentum=0.9)
    optimizer = GapAware(base, controller=lambda _: Decision(2.0, "push", push=1.0), interval=1)
    for _ in range(30):
        weights.grad = torch.ones(4)
        optimizer.step()
    lag = optimizer._copies.push.state_dict()["0.0"].clone()
    saved = []
    base.register_step_post_hook(lambda *_: saved.append(copy.deepcopy(optimizer.state_dict())))
    optimizer.step()
    assert torch.equal(saved[0]["gapaware"]["push"]["0.0"], lag)
