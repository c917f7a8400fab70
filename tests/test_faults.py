"""Whatever goes wrong in here, training goes on as with the wrapped optimizer alone."""

import copy
import itertools
import os
import warnings

import numpy as np
import pytest
import torch
from gradients import assert_equal, assert_same_run, base_state, parameters, run, set_gradients

from gapaware import Decision, GapAware
from gapaware.history import read_log

INTERVAL = 2


def build(params=None, **arguments):
    params = parameters() if params is None else params
    base = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    return params, GapAware(base, **{"interval": INTERVAL, "sketch_dim": 64, **arguments})


def faults(optimizer):
    return [record for record in optimizer.history if record["decision"] == "fault"]


def strictly_increasing(steps):
    return all(a < b for a, b in itertools.pairwise(steps))


class Alone:
    """A second run of the base optimizer alone, from where a wrapped one stands."""

    def __init__(self, params, optimizer):
        self.params = copy.deepcopy(params)
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-2, weight_decay=0.1)
        self.optimizer.load_state_dict(base_state(optimizer.base))


# -- controllers that raise or return nonsense ---------------------------------------------------------


def raises(seen):
    raise ZeroDivisionError("an error of the user's")


NONSENSE = {
    "raises": raises,
    "none": lambda seen: None,
    "nan": lambda seen: float("nan"),
    "infinity": lambda seen: float("inf"),
    "text": lambda seen: "x",
    "negative": lambda seen: -1.0,
    "boolean": lambda seen: True,
    "complex": lambda seen: 1j,
    "list": lambda seen: [1.0],
    "tensor of two": lambda seen: torch.ones(2),
    "scale none": lambda seen: Decision(None),
    "scale text": lambda seen: Decision("x"),
    "decay nan": lambda seen: Decision(1.0, weight_decay_scale=float("nan")),
    "decay negative": lambda seen: Decision(1.0, weight_decay_scale=-0.1),
    "momentum nan": lambda seen: Decision(1.0, momentum_scale=float("nan")),
    "momentum 0": lambda seen: Decision(1.0, momentum_scale=0.0),
    "push nan": lambda seen: Decision(1.0, push=float("nan")),
    "push negative": lambda seen: Decision(1.0, push=-1.0),
    "interval 0": lambda seen: Decision(1.0, interval=0),
    "interval 2.5": lambda seen: Decision(1.0, interval=2.5),
    "interval infinite": lambda seen: Decision(1.0, interval=float("inf")),
    "memory text": lambda seen: Decision(1.0, memory="x"),
    "memory object": lambda seen: Decision(1.0, memory={"x": object()}),
    "memory tensor": lambda seen: Decision(1.0, memory={"x": [torch.ones(1)]}),
    "writes": lambda seen: setattr(seen, "scale", 3.0),
}


@pytest.mark.parametrize("granularity", ["global", "group", "block"])
@pytest.mark.parametrize("mode", ["auto", "retain"])
@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_takes_the_factors_off_for_good(nonsense, mode, granularity):
    sane = 12
    calls = 0

    def controller(seen):
        nonlocal calls
        calls += 1
        return 0.5 if seen.step < sane else NONSENSE[nonsense](seen)

    params, optimizer = build(
        controller=controller, mode=mode, granularity=granularity, min_scale=0.1, interval="auto"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = 0
        while not faults(optimizer):
            run(optimizer, params, range(steps, steps + 1))
            steps += 1
        assert set(optimizer.scales) == {1.0}
        alone = Alone(params, optimizer)
        run(optimizer, params, range(steps, steps + 40))
    run(alone.optimizer, alone.params, range(steps, steps + 40))
    assert_same_run(alone.optimizer, optimizer.base, alone.params, params)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1
    assert "AdamW alone" in messages[0]
    assert len(faults(optimizer)) >= 2
    assert "a snapshot" in faults(optimizer)[0]["why"]
    assert strictly_increasing(optimizer.history.column("step"))
    assert calls > 3


def test_a_controller_that_recovers_steers_again():
    params, optimizer = build(
        controller=lambda seen: 1 / 0 if 14 <= seen.step <= 16 else 2.0, window=4
    )
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        run(optimizer, params, 60)
    assert optimizer.scales == [2.0]
    assert [record["step"] for record in faults(optimizer)] == [16]
    # what was observed is sound, so the window goes on and there is a spectrum at once
    after = next(record for record in optimizer.history if record["step"] > 16)
    assert after["spectrum"] is not None


def test_an_interrupt_in_a_controller_is_the_users():
    def controller(seen):
        raise KeyboardInterrupt

    params, optimizer = build(controller=controller)
    with pytest.raises(KeyboardInterrupt):
        run(optimizer, params, 20)
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_sane_decisions_of_unusual_types_are_understood():
    for answer in (2, np.float32(2), np.float64(2), np.int64(2), Decision(np.float64(2))):
        params, optimizer = build(controller=lambda seen, answer=answer: answer)
        run(optimizer, params, 20)
        assert optimizer.scales == [2.0]
        assert type(optimizer.scales[0]) is float


def test_a_controllers_memory_comes_back_plain_and_saved():
    seen_memories = []

    def controller(seen):
        seen_memories.append(seen.memory)
        count = seen.memory.get("count", 0) + 1
        return Decision(1.0, memory={"count": count, "last": np.float64(0.5), "all": (1, [2])})

    params, optimizer = build(controller=controller)
    run(optimizer, params, 16)
    assert seen_memories[0] == {}
    assert seen_memories[-1] == {"count": 3, "last": 0.5, "all": [1, [2]]}
    assert type(seen_memories[-1]["last"]) is float
    memory = optimizer.state_dict()["gapaware"]["steering"]["memory"]["all"]
    assert memory == {"count": 4, "last": 0.5, "all": [1, [2]]}


@pytest.mark.parametrize("mode", ["auto", "retain"])
def test_a_law_whose_memory_was_damaged_starts_afresh(mode):
    """A checkpoint that was edited, or written by another version: not a fault at every snapshot."""
    params, optimizer = build(mode=mode, max_scale=4.0, interval=5)
    run(optimizer, params, 100)
    state = optimizer.state_dict()
    memory = state["gapaware"]["steering"]["memory"]["all"]
    memory["trend"] = memory["highest_lr"] = "damaged"
    optimizer.load_state_dict(state)
    with pytest.warns(UserWarning, match="a snapshot: ControllerFault"):
        run(optimizer, params, range(100, 200))
    assert len(faults(optimizer)) == 2
    assert optimizer.history[-1]["decision"] != "fault"


def test_a_controller_keeps_its_memory_through_a_single_fault():
    seen_memories = []

    def controller(seen):
        seen_memories.append(seen.memory)
        if len(seen_memories) in (3, 6, 7):
            raise ZeroDivisionError
        return Decision(1.0, memory={"count": seen.memory.get("count", 0) + 1})

    params, optimizer = build(controller=controller)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        run(optimizer, params, 40)
    counts = [memory.get("count", 0) for memory in seen_memories]
    assert counts[:9] == [0, 1, 2, 2, 3, 4, 4, 0, 1]


def test_factors_stay_within_what_the_user_allows():
    params, optimizer = build(controller=lambda seen: 10.0 ** (seen.step % 13 - 6), max_scale=3.0)
    run(optimizer, params, 60)
    assert min(optimizer.history.column("scale")) == 0.001
    assert max(optimizer.history.column("scale")) == 3.0
    params, optimizer = build(controller=lambda seen: 1e-6, min_scale=0.5)
    run(optimizer, params, 60)
    assert min(optimizer.history.column("scale")) == 0.5


# -- numbers that are none -------------------------------------------------------------------------------


def poison_gradient(value):
    def poison(params, optimizer):
        params[0].grad[0, 0] = value

    return poison


def blow_up(params, optimizer):
    with torch.no_grad():
        params[1].mul_(1e38).mul_(1e38)


@pytest.mark.parametrize(
    "poison",
    [poison_gradient(float("nan")), poison_gradient(float("inf")), blow_up],
    ids=["nan", "inf", "blow up"],
)
@pytest.mark.parametrize("arguments", [{"mode": "observe"}, {"controller": lambda seen: 2.0}])
def test_nan_and_infinity_from_one_step_on(poison, arguments):
    at, steps = 13, 60
    params, optimizer = build(**arguments)
    run(optimizer, params, at)
    alone = Alone(params, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(at, steps):
            for p, o in ((params, optimizer), (alone.params, alone.optimizer)):
                set_gradients(p, step)
                if step == at:
                    poison(p, o)
                o.step()
    assert len(caught) == 1
    assert "NaN or infinit" in str(caught[0].message)
    assert faults(optimizer)
    assert set(optimizer.scales) <= {1.0}
    if "mode" in arguments:
        assert_same_run(alone.optimizer, optimizer.base, alone.params, params)
    assert strictly_increasing(optimizer.history.column("step"))


def test_a_passing_nan_is_forgotten():
    """Parameters that are repaired (by a reload, say) are steered again, with the same factor of errors."""
    params, optimizer = build(controller=lambda seen: 2.0)
    run(optimizer, params, 11)
    kept = copy.deepcopy([p.data for p in params])
    with torch.no_grad():
        params[0].fill_(float("nan"))
    with pytest.warns(UserWarning, match="NaN"):
        run(optimizer, params, range(11, 16))
    with torch.no_grad():
        for p, value in zip(params, kept, strict=True):
            p.copy_(value)
        for state in optimizer.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
    run(optimizer, params, range(28, 60))
    assert optimizer.scales == [2.0]
    assert optimizer.history[-1]["spectrum"] is not None


@pytest.mark.parametrize("what", ["zero lr", "no gradients", "zero gradients", "skips"])
def test_updates_of_nothing(what):
    class Skipping(torch.optim.SGD):
        def step(self, closure=None):
            return None

    params = parameters()
    lr = 0.0 if what == "zero lr" else 1e-2
    base = (Skipping if what == "skips" else torch.optim.SGD)(params, lr=lr)
    optimizer = GapAware(base, interval=1, sketch_dim=64)
    before = copy.deepcopy(params)
    for step in range(40):
        set_gradients(params, step)
        for p in params:
            if what == "no gradients":
                p.grad = None
            elif what == "zero gradients":
                p.grad.zero_()
        optimizer.step()
    assert_equal(before, params)
    assert optimizer.scales == [1.0]
    assert not faults(optimizer)
    assert all(record["spectrum"] is None for record in optimizer.history)
    run(optimizer, params, 1)


def test_learning_rate_zero_for_a_while():
    params, optimizer = build()
    run(optimizer, params, 20)
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, params, range(20, 40))
    optimizer.param_groups[0]["lr"] = 1e-2
    run(optimizer, params, range(40, 60))
    assert not faults(optimizer)
    steps = optimizer.history.column("step")
    assert not [step for step in steps if 20 < step <= 40]


# -- a broken observer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("breaks", ["CountSketch.rows", "Window.push", "Steering.decide"])
def test_an_error_in_here_is_no_error_of_training(monkeypatch, breaks):
    import gapaware.sketch
    import gapaware.steering
    import gapaware.window

    name, method = breaks.split(".")
    module = {
        "CountSketch": gapaware.sketch,
        "Window": gapaware.window,
        "Steering": gapaware.steering,
    }[name]
    params, optimizer = build(controller=lambda seen: 2.0, interval=4)
    run(optimizer, params, 26)
    assert optimizer.scales == [2.0]
    alone = Alone(params, optimizer)

    def broken(*args, **kwargs):
        raise MemoryError("out of memory")

    monkeypatch.setattr(getattr(module, name), method, broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(optimizer, params, range(26, 28))
        run(alone.optimizer, alone.params, range(26, 28))
        alone = Alone(params, optimizer)  # the last factor was in force up to here
        run(optimizer, params, range(28, 60))
    run(alone.optimizer, alone.params, range(28, 60))
    assert_same_run(alone.optimizer, optimizer.base, alone.params, params)
    assert 1 <= len(caught) <= 2
    assert all("MemoryError: out of memory" in str(warning.message) for warning in caught)
    assert strictly_increasing(optimizer.history.column("step"))
    assert len(faults(optimizer)) <= 12  # one a snapshot at most, not one a step
    monkeypatch.undo()
    run(optimizer, params, range(60, 90))
    assert optimizer.scales == [2.0]


def test_broken_from_the_start(monkeypatch):
    from gapaware.sketch import CountSketch

    def broken(*args, **kwargs):
        raise RuntimeError("no such device")

    monkeypatch.setattr(CountSketch, "rows", broken)
    params, optimizer = build(mode="retain", interval=5)
    alone = Alone(params, optimizer)
    with pytest.warns(UserWarning, match="no such device"):
        run(optimizer, params, 50)
    run(alone.optimizer, alone.params, 50)
    assert_same_run(alone.optimizer, optimizer.base, alone.params, params)
    assert strictly_increasing(optimizer.history.column("step"))
    assert len(optimizer.history) <= 12


# -- the log ---------------------------------------------------------------------------------------------


def unwritable(tmp_path):
    yield tmp_path  # a folder
    (tmp_path / "file").write_text("not a log\n")
    yield tmp_path / "file"
    yield tmp_path / "file" / "below.jsonl"
    yield "/proc/no/such/place.jsonl"
    if os.path.exists("/dev/full"):
        yield "/dev/full"


def test_a_log_that_cannot_be_written(tmp_path):
    for path in unwritable(tmp_path):
        params, optimizer = build(log_to=path, mode="observe")
        alone = Alone(params, optimizer)
        with pytest.warns(RuntimeWarning, match="cannot be written") as caught:
            run(optimizer, params, 30)
        assert len(caught) == 1
        run(alone.optimizer, alone.params, 30)
        assert_same_run(alone.optimizer, optimizer.base, alone.params, params)
        assert len(optimizer.history) == 14
    assert (tmp_path / "file").read_text() == "not a log\n"


def test_faults_are_in_the_log(tmp_path):
    params, optimizer = build(log_to=tmp_path / "run.jsonl", controller=raises)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        run(optimizer, params, 30)
    _, records = read_log(tmp_path / "run.jsonl")
    faulty = [record for record in records if record["decision"] == "fault"]
    assert "an error of the user's" in faulty[0]["why"]
    assert strictly_increasing([record["step"] for record in records])


@pytest.mark.parametrize(
    "damage",
    [
        lambda o: o["observer"].update(last=o["observer"]["last"][:, :1]),
        lambda o: o["observer"].update(last=None),
        lambda o: o["observer"].update(rates=[]),
        lambda o: o["observer"].update(row_groups=[7]),
        lambda o: o["observer"].update(row_groups=[-1]),
        lambda o: o["observer"].update(span=-1),
        lambda o: o["observer"].update(span=float("inf")),
        lambda o: o["observer"].update(window=None),
        lambda o: o["observer"]["conditions"].pop(),
        lambda o: o["observer"]["conditions"][0][0].append(1.0),
        lambda o: o["observer"]["window"].update(pushed=2),
        lambda o: o["observer"]["window"].update(pushed=-1),
        lambda o: o["observer"]["window"].update(ring=o["observer"]["window"]["ring"][..., :1]),
        lambda o: o["observer"]["window"].update(gram=torch.ones(())),
        lambda o: o["pending"].update(gram=torch.ones(2, 2, 1, 1, 1)),
        lambda o: o["pending"]["separable"].append(True),
        lambda o: o["steering"].update(scales={"all": [-1.0, 1.0]}),
        lambda o: o["steering"].update(scales={"all": [float("nan"), 1.0]}),
        lambda o: o["steering"].update(memory={"all": {"x": object()}}),
        lambda o: o["history"].update(records="[" * 5000),
        lambda o: o.update(interval=0),
        lambda o: o.update(steps=-5),
        lambda o: o.update(next_snapshot=float("nan")),
    ],
)
def test_states_whose_parts_do_not_fit_are_refused(damage):
    params, optimizer = build()
    run(optimizer, params, 30)
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved["gapaware"])
    before = copy.deepcopy((params, optimizer.state_dict()))
    with pytest.raises(ValueError, match="nothing was changed"):
        optimizer.load_state_dict(saved)
    assert_equal(before, (params, optimizer.state_dict()))


def test_a_saved_factor_beyond_todays_bounds_goes_to_the_bound():
    params, optimizer = build(controller=lambda seen: 32.0)
    run(optimizer, params, 20)
    params, narrower = build(params, controller=lambda seen: 32.0, max_scale=4.0)
    narrower.load_state_dict(optimizer.state_dict())
    assert narrower.scales == [4.0]


def test_a_refused_state_leaves_the_log_alone(tmp_path):
    path = tmp_path / "run.jsonl"
    params, optimizer = build(log_to=path)
    run(optimizer, params, 30)
    saved = copy.deepcopy(optimizer.state_dict())
    run(optimizer, params, range(30, 50))
    before = path.read_bytes()
    saved["gapaware"]["observer"]["span"] = "x"
    with pytest.raises(ValueError, match="nothing was changed"):
        optimizer.load_state_dict(saved)
    assert path.read_bytes() == before
    run(optimizer, params, range(50, 60))
    assert path.read_bytes().startswith(before)
    _, records = read_log(path)
    assert [r["step"] for r in records] == list(range(2, 60, 2))


def test_a_plain_state_in_mid_run_begins_a_new_log(tmp_path):
    path = tmp_path / "run.jsonl"
    params, optimizer = build(log_to=path)
    run(optimizer, params, 30)
    run_before = path.read_bytes()
    optimizer.load_state_dict(base_state(optimizer))
    assert len(optimizer.history) == 0
    run(optimizer, params, range(30, 60))
    assert (tmp_path / "run.1.jsonl").read_bytes() == run_before
    assert strictly_increasing(optimizer.history.column("step"))
    assert [r["step"] for r in read_log(path)[1]] == optimizer.history.column("step")


# -- what reviewers found ----------------------------------------------------------------------------------


def test_a_fault_does_not_make_the_law_forget_that_the_schedule_cools_down():
    from gapaware.law import drift_law

    params, optimizer = build(controller=drift_law, interval=5, window=10)
    run(optimizer, params, 70)
    for group in optimizer.param_groups:
        group["lr"] *= 0.1
    run(optimizer, params, range(70, 130))
    assert "cools down" in optimizer.history[-1]["why"]
    with pytest.warns(UserWarning, match="nonsense"):
        optimizer._fault("a test", RuntimeError("nonsense"))
    run(optimizer, params, range(130, 260))
    assert "cools down" in optimizer.history[-1]["why"]
    assert optimizer.scales == [1.0]


def test_sparse_gradients_at_learning_rate_zero():
    table = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = GapAware(torch.optim.SparseAdam(list(table.parameters())), interval=1)
    optimizer.param_groups[0]["lr"] = 0.0
    table(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert len(faults(optimizer)) == 0


def test_a_closure_has_gradients_whatever_the_base_does_about_them():
    class Plain(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        def step(self, closure=None):
            loss = None if closure is None else closure()
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p -= group["lr"] * p.grad
            return loss

    p = torch.nn.Parameter(torch.ones(3))
    optimizer = GapAware(Plain([p]), interval=1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.8))


def test_groups_with_none_for_a_hyperparameter():
    p = torch.nn.Parameter(torch.ones(3))
    base = torch.optim.SGD([p], lr=0.1)
    base.param_groups[0].update(momentum=None, weight_decay=None)
    assert GapAware(base).interval == 1


def test_the_default_device_does_not_matter():
    """Tables are built on the host whatever the default device is, as on a GPU that is the default."""
    from gapaware.sketch import CHUNK, _gather_order

    bucket = torch.arange(CHUNK) % 100
    expected = _gather_order(bucket, 100)
    with torch.device("meta"):
        assert torch.equal(_gather_order(bucket, 100), expected)


def test_a_default_device_that_is_not_the_models_costs_no_snapshot():
    with torch.device("cpu"):
        p = torch.nn.Parameter(torch.ones(3))
        x = torch.ones(3)
    with torch.device("meta"):
        optimizer = GapAware(torch.optim.SGD([p], lr=1e-3), interval=1)
        for _ in range(20):
            p.grad = x.clone()
            optimizer.step()
    assert len(optimizer.history) == 19
    assert "fault" not in optimizer.history.column("decision")


def test_arguments_that_would_be_ignored_are_not():
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="never be asked"):
        GapAware(torch.optim.SGD([p], lr=0.1), mode="observe", controller=lambda seen: 1.0)
    with pytest.raises(ValueError, match=r'max_scale=64.*mode="observe"'):
        GapAware(torch.optim.SGD([p], lr=0.1), mode="observe", max_scale=64)
    with pytest.raises(ValueError, match=r'max_push=1.*mode="retain"'):
        GapAware(torch.optim.SGD([p], lr=0.1), mode="retain", max_push=1)
    with pytest.warns(
        UserWarning, match="never raise the learning rate; pass interval=.auto. or at least 2"
    ):
        GapAware(torch.optim.AdamW([p], lr=0.1), interval=1)
