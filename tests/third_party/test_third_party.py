"""GapAware around optimizers of other packages: exact when neutral, saved and resumed, modes reach through.

They are installed by `make test-third-party`; elsewhere each test says what it misses.
"""

import io
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from gradients import assert_same_run, parameters
from models import batch, mlp, same_parameters

from gapaware import Composite, GapAware

MATRICES = ((4, 3), (3, 2))


def make(package, name, **kwargs):
    def build(params):
        module = pytest.importorskip(package, reason=f"needs {package}: make test-third-party")
        return getattr(module, name)(params, **kwargs)

    return build


OPTIMIZERS = {
    "schedulefree AdamW": make("schedulefree", "AdamWScheduleFree", lr=1e-2, weight_decay=0.1),
    "schedulefree SGD": make("schedulefree", "SGDScheduleFree", lr=1e-1, warmup_steps=5),
    "schedulefree RAdam": make("schedulefree", "RAdamScheduleFree", lr=1e-2),
    "prodigy": make("prodigyopt", "Prodigy", weight_decay=0.1, safeguard_warmup=True),
    "Lion": make("pytorch_optimizer", "Lion", lr=1e-3, weight_decay=0.1),
    "SOAP": make("pytorch_optimizer", "SOAP", lr=1e-2),
    "Adan": make("pytorch_optimizer", "Adan", lr=1e-2),
    "Lookahead": lambda params: make("pytorch_optimizer", "Lookahead")(
        torch.optim.AdamW(params, lr=1e-2)
    ),
    "Lion and AdamW": lambda params: Composite(
        make("pytorch_optimizer", "Lion", lr=1e-3)(params[::2]),
        torch.optim.AdamW(params[1::2], lr=1e-2),
    ),
}


def wrap(base, **arguments):
    return GapAware(base, **{"interval": 2, "sketch_dim": 64, **arguments})


def mode(optimizer, name):
    if hasattr(optimizer, name):
        getattr(optimizer, name)()


def train(model, optimizer, steps):
    mode(optimizer, "train")
    losses = []
    for step in steps:
        x, y = batch(step)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "observe"},
        {"mode": "escape", "controller": lambda seen: 1.0},
    ],
    ids=["observe", "neutral"],
)
def test_neutral_is_exact(name, arguments):
    alone, wrapped = mlp(), mlp()
    optimizer_alone, base = (
        OPTIMIZERS[name](list(alone.parameters())),
        OPTIMIZERS[name](list(wrapped.parameters())),
    )
    optimizer = wrap(base, **arguments)
    assert train(wrapped, optimizer, range(40)) == train(alone, optimizer_alone, range(40))
    assert_same_run(optimizer_alone, optimizer, alone.parameters(), wrapped.parameters())
    assert "fault" not in optimizer.history.column("decision")
    assert optimizer.history[-1]["spectrum"] is not None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_blocks_are_refused(name):
    """How a step looks at groups that are divided is known of torch's own alone."""
    base = OPTIMIZERS[name](list(mlp().parameters()))
    with pytest.raises(ValueError, match="pass granularity='group' or 'global'"):
        wrap(base, granularity="block")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("granularity", ["global", "group"])
def test_a_factor_reaches_the_step_and_leaves_no_trace(name, granularity):
    model = mlp()
    base = OPTIMIZERS[name](list(model.parameters()))
    optimizer = wrap(base, granularity=granularity, controller=lambda seen: 2.0)
    lrs = [group["lr"] for group in optimizer.param_groups]
    keys = [set(group) for group in optimizer.param_groups]
    train(model, optimizer, range(30))
    assert set(optimizer.scales) == {2.0}
    assert [group["lr"] for group in optimizer.param_groups] == lrs
    assert all(before <= set(g) for before, g in zip(keys, optimizer.param_groups, strict=True))
    assert "fault" not in optimizer.history.column("decision")
    for group in optimizer.param_groups:
        for counter in ("k", "step"):  # kept in the group, and counted once a step
            if counter in group:
                assert group[counter] in (29, 30)
    plain = mlp()
    train(plain, OPTIMIZERS[name](list(plain.parameters())), range(30))
    assert not same_parameters(plain, model)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("saved_at", [7, 20])
def test_saved_and_resumed(name, saved_at):
    model = mlp()
    optimizer = wrap(OPTIMIZERS[name](list(model.parameters())), controller=lambda seen: 2.0)
    train(model, optimizer, range(saved_at))
    saved = through_a_file((model.state_dict(), optimizer.state_dict()))
    again = mlp()
    resumed = wrap(OPTIMIZERS[name](list(again.parameters())), controller=lambda seen: 2.0)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    expected = train(model, optimizer, range(saved_at, saved_at + 30))
    assert train(again, resumed, range(saved_at, saved_at + 30)) == expected
    assert same_parameters(model, again)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name.startswith("schedulefree")])
def test_schedule_frees_modes_reach_through(name):
    """eval() swaps the averaged weights in; step() without train() raises, as it does alone."""
    alone, wrapped = mlp(), mlp()
    optimizers = [
        OPTIMIZERS[name](list(alone.parameters())),
        wrap(OPTIMIZERS[name](list(wrapped.parameters()))),
    ]
    optimizers[1] = GapAware(optimizers[1].base, mode="observe", interval=2, sketch_dim=64)
    for model, optimizer in zip((alone, wrapped), optimizers, strict=True):
        train(model, optimizer, range(20))
        training = [p.detach().clone() for p in model.parameters()]
        optimizer.eval()
        averaged = list(model.parameters())
        assert not all(torch.equal(a, b) for a, b in zip(training, averaged, strict=True))
        with pytest.raises(Exception, match="train mode"):
            optimizer.step()
        optimizer.train()
        train(model, optimizer, range(20, 40))
        optimizer.eval()
    assert same_parameters(alone, wrapped)
    assert "fault" not in optimizers[1].history.column("decision")


def test_parameters_without_a_model():
    params = parameters(MATRICES)
    optimizer = wrap(OPTIMIZERS["SOAP"](params), mode="observe")
    for _ in range(12):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert len(optimizer.history) == 5
