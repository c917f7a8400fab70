"""With a factor of 1 the trajectory is bit for bit that of the wrapped optimizer."""

import copy

import pytest
import torch
from bases import BASES
from models import mlp, same_parameters, train

from gapaware import Decision, GapAware
from gapaware.delegation import leaves


def neutral(observation):
    return Decision(1.0, "neutral")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("how", ["observe", "neutral controller", "block"])
def test_trajectory_is_the_base_optimizers(base, how):
    arguments = {
        "observe": {"mode": "observe"},
        "neutral controller": {"controller": neutral},
        "block": {"controller": neutral, "granularity": "block"},
    }[how]
    alone, wrapped = mlp(), mlp()
    optimizer_alone = BASES[base](alone)
    optimizer = GapAware(BASES[base](wrapped), interval=2, sketch_dim=256, **arguments)
    losses_alone = train(alone, optimizer_alone, 60)
    assert train(wrapped, optimizer, 60) == losses_alone
    assert same_parameters(alone, wrapped)
    assert len(optimizer.history) > 20
    assert all(record["decision"] == "hold" for record in optimizer.history)
    for theirs, ours in zip(optimizer_alone.state.values(), optimizer.state.values(), strict=True):
        for key in theirs:
            assert torch.equal(torch.as_tensor(theirs[key]), torch.as_tensor(ours[key])), key


def test_scaled_steps_are_those_of_a_scaled_learning_rate():
    """A constant factor of 4 is the base optimizer at four times the lr, also by block."""
    for granularity in ("global", "group", "block"):
        alone, wrapped = mlp(), mlp()
        sgd = torch.optim.SGD(alone.parameters(), lr=4e-2)
        # 4 from the first step on: what the controller says comes after the first snapshots
        base = torch.optim.SGD(wrapped.parameters(), lr=1e-2)
        optimizer = GapAware(
            base, interval=1, sketch_dim=256, granularity=granularity, controller=lambda o: 4.0
        )
        train(wrapped, optimizer, 7)
        alone.load_state_dict(wrapped.state_dict())
        assert set(optimizer.scales) == {4.0}
        assert train(wrapped, optimizer, range(7, 30)) == train(alone, sgd, range(7, 30))
        assert same_parameters(alone, wrapped)
        assert optimizer.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("granularity", ["global", "group", "block"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_scaled_momentum_is_that_of_other_betas(kind, granularity):
    """Half of the steps that β₁ = 0.9 remembers are those of 0.8."""
    alone, wrapped = mlp(), mlp()
    kwargs = {"lr": 1e-2, "betas": (0.9, 0.99)}
    other = kind(alone.parameters(), **kwargs)
    optimizer = GapAware(
        kind(wrapped.parameters(), **kwargs),
        interval=1,
        sketch_dim=256,
        granularity=granularity,
        controller=lambda seen: Decision(1.0, momentum_scale=0.5),
    )
    train(wrapped, optimizer, 7)
    alone.load_state_dict(wrapped.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
    other.param_groups[0]["betas"] = (1 - (1 - 0.9) / 0.5, 0.99)
    assert train(wrapped, optimizer, range(7, 30)) == train(alone, other, range(7, 30))
    assert same_parameters(alone, wrapped)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    assert optimizer.history[-1]["momentum_scale"] == 0.5


@pytest.mark.parametrize("base", [name for name in BASES if not name.startswith("adam")])
def test_only_adams_momentum_is_scaled(base):
    """What other optimizers keep in betas may be something else, and so may `momentum`."""
    alone, wrapped = mlp(), mlp()
    theirs = BASES[base](alone)
    ours = GapAware(
        BASES[base](wrapped),
        interval=1,
        sketch_dim=256,
        controller=lambda seen: Decision(1.0, momentum_scale=0.5),
    )
    adams = any(isinstance(leaf, torch.optim.Adam) for leaf in leaves(ours.base))
    assert (train(alone, theirs, 20) != train(wrapped, ours, 20)) == adams
