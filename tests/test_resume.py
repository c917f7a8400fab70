"""Saved in the middle of a run and loaded into new objects: the next 100 steps are the same."""

import copy
import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bases import BASES
from models import mlp, same_parameters, train

from gapaware import GapAware


def adiabatic_law(seen):
    """A factor that moves at every snapshot: f · (a*/a)^0.1."""
    a = max(seen.spectrum.adiabaticity, 1e-12)
    return seen.scale * min(max((seen.target / a) ** 0.1, 0.5), 1.2)


def build(base, **arguments):
    model = mlp()
    return model, GapAware(BASES[base](model), sketch_dim=512, **arguments)


def through_a_file(state):
    """What torch.save and a load with weights_only leave of a state."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("saved_at", "arguments"),
    [
        (1, {"interval": 3}),
        (7, {"interval": 3, "window": 5}),
        (50, {"mode": "escape", "controller": adiabatic_law, "target": 30.0}),
        (
            51,
            {
                "interval": 2,
                "granularity": "block",
                "mode": "escape",
                "controller": adiabatic_law,
                "target": 30.0,
            },
        ),
        (48, {"interval": 4, "mode": "retain", "granularity": "group", "max_scale": 64.0}),
        (33, {"interval": 1, "sketch_dim": None}),
    ],
)
def test_next_100_steps_are_bitwise_the_same(base, saved_at, arguments):
    arguments = {"sketch_dim": 512, **arguments}
    model, optimizer = build_with(base, arguments)
    train(model, optimizer, saved_at)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = train(model, optimizer, range(saved_at, saved_at + 100))

    again, resumed = build_with(base, arguments)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert train(again, resumed, range(saved_at, saved_at + 100)) == expected
    assert same_parameters(model, again)
    assert resumed.scales == optimizer.scales
    last, expected_last = resumed.history[-1], optimizer.history[-1]
    for key in ("step", "scale", "decision", "spectrum", "interval"):
        assert repr(last[key]) == repr(expected_last[key])  # repr, since NaN differs from itself
    if "target" in arguments:  # otherwise a test of factors that never moved
        assert max(resumed.scales) > 1


def test_a_run_at_rest_goes_on_at_its_interval():
    def at_noise(optimizer, weights, steps):
        for step in steps:
            torch.manual_seed(step)
            weights.grad = torch.randn_like(weights)
            optimizer.step()
        return [record["step"] for record in optimizer.history]

    weights = torch.nn.Parameter(torch.ones(2000))
    optimizer = GapAware(torch.optim.SGD([weights], lr=1e-4))
    taken = at_noise(optimizer, weights, range(80))
    assert taken[:3] + taken[-3:] == [1, 2, 3, 73, 75, 77]
    saved = through_a_file({"weights": weights.data, "optimizer": optimizer.state_dict()})
    expected = at_noise(optimizer, weights, range(80, 100))

    again = torch.nn.Parameter(saved["weights"])
    resumed = GapAware(torch.optim.SGD([again], lr=1e-4))
    resumed.load_state_dict(saved["optimizer"])
    assert at_noise(resumed, again, range(80, 100))[-10:] == expected[-10:]
    assert torch.equal(again, weights)


def build_with(base, arguments):
    model = mlp()
    return model, GapAware(BASES[base](model), **arguments)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike_and_apart(duplicate):
    model, optimizer = build("adamw", interval=2)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)  # puts a bound `step` on the optimizer
    train(model, optimizer, 30)
    twin, twin_optimizer = duplicate((model, optimizer))
    assert train(twin, twin_optimizer, range(30, 60)) == train(model, optimizer, range(30, 60))
    assert same_parameters(model, twin)


def test_plain_adamw_checkpoint_loads_and_history_starts_empty():
    alone = mlp()
    adamw = BASES["adamw"](alone)
    train(alone, adamw, 20)
    model, optimizer = build("adamw", interval=2, mode="observe")
    train(model, optimizer, 5)
    model.load_state_dict(alone.state_dict())
    optimizer.load_state_dict(through_a_file(adamw.state_dict()))
    assert train(model, optimizer, range(20, 60)) == train(alone, adamw, range(20, 60))
    assert optimizer.history[-1]["step"] <= 40


def test_a_plain_checkpoint_begins_anew_whatever_was_before():
    """Snapshots of a run that begins are closer together, and so are those of one that begins again."""
    alone = mlp()
    adamw = BASES["adamw"](alone)
    train(alone, adamw, 5)
    runs = []
    for before in (0, 60):
        model, optimizer = build("adamw")
        train(model, optimizer, before)
        model.load_state_dict(alone.state_dict())
        optimizer.load_state_dict(through_a_file(adamw.state_dict()))
        runs.append((train(model, optimizer, range(5, 60)), optimizer.history.column("step")))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("granularity", ["global", "block"])
def test_a_checkpoint_in_the_middle_of_a_step_has_the_learning_rate_that_was_given(granularity):
    """A handler of the signal that ends a job may save at once."""
    model, optimizer = build("adamw", interval=2, controller=lambda _: 4.0, granularity=granularity)
    train(model, optimizer, 30)
    before = optimizer.state_dict()["param_groups"]
    saved, during = [], []

    def save(*_):
        saved.append(optimizer.state_dict()["param_groups"])
        during.append(optimizer.base.param_groups[0]["lr"])

    with optimizer.base.register_step_pre_hook(save), optimizer.base.register_step_post_hook(save):
        train(model, optimizer, 1)
    assert saved == [before, before]
    # hooks after the step see it as it was given, and may write it
    assert during == [pytest.approx(4 * before[0]["lr"]), before[0]["lr"]]

    def fail(*_):
        raise RuntimeError("an error of the user's")

    with optimizer.base.register_step_pre_hook(fail), pytest.raises(RuntimeError, match="user's"):
        train(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 1e-5
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 1e-5


def test_our_checkpoint_loads_into_plain_adamw():
    model, optimizer = build("adamw", interval=2)
    train(model, optimizer, 40)
    alone = mlp()
    alone.load_state_dict(model.state_dict())
    adamw = BASES["adamw"](alone)
    adamw.load_state_dict(through_a_file(optimizer.state_dict()))
    adamw_of_ours = optimizer.base
    assert train(alone, adamw, range(40, 60)) == train(model, adamw_of_ours, range(40, 60))


@pytest.mark.parametrize(
    "damage",
    [
        lambda ours: ours.pop("observer"),
        lambda ours: ours["observer"].pop("last"),
        lambda ours: ours["observer"].update(conditions=[1, 2]),
        lambda ours: ours["steering"].update(scales={"all": "big"}),
        lambda ours: ours.update(version=99),
        lambda ours: ours.update(steps=None),
    ],
)
def test_damaged_state_is_refused_whole(damage):
    model, optimizer = build("adamw", interval=2)
    train(model, optimizer, 30)
    damaged = copy.deepcopy(optimizer.state_dict())
    damage(damaged["gapaware"])
    other, receiving = build("adamw", interval=2)
    train(other, receiving, 10)
    before = copy.deepcopy(receiving.state_dict())
    with pytest.raises(ValueError, match="nothing was changed"):
        receiving.load_state_dict(damaged)
    after = receiving.state_dict()
    assert after["gapaware"]["steps"] == before["gapaware"]["steps"] == 10
    assert torch.equal(
        after["gapaware"]["observer"]["last"], before["gapaware"]["observer"]["last"]
    )
    for key, value in before["state"][0].items():
        assert torch.equal(value, after["state"][0][key])


def test_other_settings_keep_the_factor_and_start_the_window_anew():
    model, optimizer = build("adamw", interval=1, mode="escape")
    train(model, optimizer, 60)
    twin = mlp()
    other = GapAware(BASES["adamw"](twin), sketch_dim=512, window=5, interval=1, mode="escape")
    with pytest.warns(UserWarning, match="the window starts empty"):
        other.load_state_dict(optimizer.state_dict())
    train(twin, other, range(60, 80))
    assert len(other.history[-1]["spectrum"]["sigma"]) == 5


def test_states_of_version_1_keep_loading():
    """A file written by gapaware 0.1.0 at step 31, with `BASES["adamw"]` and the arguments below."""
    saved = torch.load(Path(__file__).parent / "data" / "state-version-1.pt", weights_only=True)
    model = mlp()
    optimizer = GapAware(BASES["adamw"](model), window=4, interval=2, sketch_dim=64)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.history[-1]["step"] == 28
    train(model, optimizer, range(31, 61))
    assert optimizer.history[-1]["step"] == saved["last_step"] == 58
    assert optimizer.scales == saved["scales"]
    # a window that had started anew would not be full at the first snapshot
    first = next(record for record in optimizer.history if record["step"] == 30)
    assert len(first["spectrum"]["sigma"]) == 4


def test_losses_from_before_the_first_decision_are_saved():
    seen = []

    def controller(observation):
        seen.append((*observation.earlier_losses, observation.loss))
        return 1.0

    def build_one():
        return build("adamw", interval=2, controller=controller)

    def train_on(model, optimizer, steps):
        for step in steps:
            optimizer.log(loss=float(step))
            train(model, optimizer, range(step, step + 1))

    model, optimizer = build_one()
    train_on(model, optimizer, range(5))
    saved = through_a_file(optimizer.state_dict())
    train_on(model, optimizer, range(5, 14))
    uninterrupted, seen[:] = list(seen), []
    twin, resumed = build_one()
    resumed.load_state_dict(saved)
    train_on(twin, resumed, range(5, 14))
    assert seen == uninterrupted
    assert len(seen[0]) > 1


def test_integers_of_numpy_are_saved_as_pythons(tmp_path):
    model = torch.nn.Linear(4, 2)
    optimizer = GapAware(
        torch.optim.SGD(model.parameters(), lr=0.1),
        seed=np.int64(3),
        sketch_dim=np.int64(1024),
        history_size=np.int64(10),
        window=np.int64(10),
        interval=np.int64(5),
    )
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_of_another_granularity_the_smallest_factor_is_kept_for_all():
    parameters = [torch.nn.Parameter(torch.ones(8)) for _ in range(2)]

    def made(granularity, factor=None):
        groups = [{"params": [p]} for p in parameters]
        return GapAware(
            torch.optim.SGD(groups, lr=1e-3),
            controller=(lambda o: 1.0) if factor is None else factor,
            granularity=granularity,
            interval=1,
        )

    apart = made("group", lambda o: 8.0 if o.row == "group 0" else 4.0)
    for _ in range(20):
        for p in parameters:
            p.grad = torch.ones(8)
        apart.step()
    assert apart.scales == [8.0, 4.0]
    for granularity, scales in (("global", [4.0, 4.0]), ("block", [4.0, 4.0])):
        other = made(granularity)
        with pytest.warns(UserWarning, match="the smallest of the factors is kept for all rows"):
            other.load_state_dict(apart.state_dict())
        assert other.scales == scales


def test_a_checkpoint_at_any_line_of_a_step_has_the_learning_rate_that_was_given():
    """A job that is told to end may save wherever it is."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))]} for _ in range(3)]
    optimizer = GapAware(
        torch.optim.SGD(groups, lr=0.01), controller=lambda _: 8.0, interval=1, sketch_dim=None
    )
    for _ in range(20):
        for group in groups:
            group["params"][0].grad = torch.ones(3)
        optimizer.step()
    assert optimizer.scales == [8.0] * 3
    seen = []

    def at_each_line(frame, event, _):
        if event == "line" and "scaling" in frame.f_code.co_filename:
            sys.settrace(None)
            seen.extend(g["lr"] for g in optimizer.state_dict()["param_groups"])
            sys.settrace(at_each_line)
        return at_each_line

    sys.settrace(at_each_line)
    try:
        optimizer.step()
    finally:
        sys.settrace(None)
    assert len(seen) > 30
    assert set(seen) == {0.01}
