"""Parameters that train in turn: what was decided for others neither stays for ever nor is mixed up."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import batch, mlp, same_parameters
from torch import nn

from gapaware import Decision, GapAware
from gapaware.retain_law import FIRST_PULL, RETAIN_TARGET
from gapaware.trend import RECENT

INTERVAL = 2
SMALL = {"interval": INTERVAL, "sketch_dim": 512}


def build(model=None, **arguments):
    model = model or mlp()
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, GapAware(base, **{**SMALL, **arguments})


def only(model, *layers):
    """Train these alone."""
    for number, layer in enumerate(model):
        for parameter in layer.parameters():
            parameter.requires_grad_(not layers or number in layers)
            parameter.grad = None


def train(model, optimizer, steps, turn=0, loss_of=lambda loss: loss):
    """Train all, or in turns of so many steps the first and the last layer."""
    for step in steps:
        if turn and step % turn == 0:
            only(model, (0, 4)[step // turn % 2])
        x, y = batch(step)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.log(loss=loss_of(loss.detach()))


def off(optimizer):
    return [r for r in optimizer.history if "other parameters train again" in r["why"]]


@pytest.mark.parametrize("granularity", ["global", "group", "block"])
@pytest.mark.parametrize("turn", [1, INTERVAL, 3 * INTERVAL])
def test_a_factor_comes_off_where_nobody_would_ever_lower_it(granularity, turn):
    asked = []

    def controller(observation):
        asked.append(observation.memory.get("times", 0))
        return Decision(8.0, memory={"times": asked[-1] + 1})

    # of turns of one step every snapshot sees another one
    model, optimizer = build(controller=controller, granularity=granularity, interval=turn | 1)
    train(model, optimizer, range(60))
    assert set(optimizer.scales) == {8.0}
    train(model, optimizer, range(60, 120), turn)
    assert set(optimizer.scales) == {1.0}
    (record,) = off(optimizer)
    assert (record["decision"], record["scale"], record["next_scale"]) == ("lower", 8.0, 1.0)
    before = len(asked)
    only(model)
    train(model, optimizer, range(120, 180))
    assert set(optimizer.scales) == {8.0}
    assert min(asked[before:]) > 0 or granularity == "block"  # what it remembered is kept


def test_one_change_leaves_the_factor_to_the_controller():
    model, optimizer = build(controller=lambda seen: 8.0)
    train(model, optimizer, range(20))
    for layers in ((0,), (4,), ()):
        only(model, *layers)
        for step in range(20, 40):
            train(model, optimizer, range(step, step + 1))
            assert optimizer.scales == [8.0]
    assert not off(optimizer)


def test_a_time_without_anything_to_train_leaves_it_too():
    model, optimizer = build(controller=lambda seen: 8.0)
    train(model, optimizer, range(20))
    model.requires_grad_(False)
    for _ in range(20):
        optimizer.step()
    model.requires_grad_(True)
    train(model, optimizer, range(20, 24))
    assert optimizer.scales == [8.0]
    assert not off(optimizer)


def test_a_slow_enough_turn_is_decided_on():
    model, optimizer = build(controller=lambda seen: 8.0)
    train(model, optimizer, range(200), turn=20)
    assert optimizer.scales == [8.0]
    assert not off(optimizer)


@pytest.mark.parametrize("max_scale", [None, 4.0])
@pytest.mark.parametrize("decided", [0, 40])
def test_the_pull_of_retain_gives_way_as_it_would_have(decided, max_scale):
    """From a pull that was decided on, and from the first one, which nobody ever did."""
    model, optimizer = build(mode="retain", max_scale=max_scale)
    optimizer._interval = INTERVAL
    train(model, optimizer, range(decided))
    train(model, optimizer, range(decided, 400), turn=4)
    assert optimizer.scales == [1.0]
    records = off(optimizer)
    assert len(records) > 20
    for record in records:
        expected = 1 / (1 / FIRST_PULL + RETAIN_TARGET * record["step"])
        assert record["pull"] == pytest.approx(expected)
    assert records[-1]["step"] > 390
    assert optimizer._steering.scales("all").pull == records[-1]["pull"]


def test_the_pull_of_a_controller_comes_off():
    model, optimizer = build(controller=lambda seen: Decision(1.0, pull=0.1), anchor="init")
    train(model, optimizer, range(20))
    train(model, optimizer, range(20, 60), turn=4)
    assert optimizer._steering.scales("all").neutral


def test_a_pull_that_a_fault_took_off_stays_off():
    model, optimizer = build(mode="retain")
    train(model, optimizer, range(4))
    optimizer._steering.release(keep_memory=True)
    train(model, optimizer, range(4, 60), turn=4)
    assert optimizer._steering.scales("all").neutral


def test_losses_that_nobody_asks_for_are_few():
    model, optimizer = build(mode="escape")
    train(model, optimizer, range(200), turn=8)
    steering = optimizer.state_dict()["gapaware"]["steering"]
    assert len(steering["losses"]) == RECENT
    # as it was saved before they were
    steering["losses"] = [1.0] * 1000
    optimizer._steering.load_state_dict(steering)
    assert len(optimizer._steering.state_dict()["losses"]) == RECENT


def test_a_copy_from_before_is_let_go():
    """A NaN long after is no work of the factor, and not to be undone by all that was learned since."""
    model, optimizer = build(controller=lambda seen: Decision(8.0, keep=seen.scale == 1.0))
    train(model, optimizer, range(20))
    assert optimizer._copies.rescue.holds
    train(model, optimizer, range(20, 60), turn=4)
    assert not optimizer._copies.rescue.holds


@pytest.mark.parametrize("at", [20, 24, 25, 27, 29, 33])
def test_resumed_bit_for_bit(at, tmp_path):
    runs = [build(controller=lambda seen: 1 + seen.scale) for _ in range(2)]
    (model, optimizer), (again, resumed) = runs
    train(model, optimizer, range(16))
    train(model, optimizer, range(16, at), turn=4)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again.load_state_dict(model.state_dict())
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    for one, other in runs:
        train(one, other, range(at, 60), turn=4)
    assert same_parameters(model, again)
    assert off(optimizer) == off(resumed) != []


# -- which parameters they are -----------------------------------------------------------------------


class Adapters(nn.Module):
    """Two of the same shape, as names tell them apart; B starts at zero."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ParameterDict(
                {
                    f"{kind}_{name}": nn.Parameter(
                        torch.randn(8, 6) if kind == "A" else torch.zeros(6, 8)
                    )
                    for kind in "AB"
                    for name in "ab"
                }
            )
            for _ in range(2)
        )

    def forward(self, x, name):
        for layer in self.layers:
            x = x + x @ (layer[f"B_{name}"] @ layer[f"A_{name}"]).T
        return x

    def switch(self, name):
        for key, parameter in self.named_parameters():
            parameter.requires_grad_(key.endswith(name))
            parameter.grad = None


def adapt(model, optimizer, steps, name):
    for step in steps:
        x, _ = batch(step)
        optimizer.zero_grad()
        (model(x, name) - x.flip(1)).square().mean().backward()
        optimizer.step()


def adapters(granularity="global", *, named=True, **arguments):
    model = Adapters()
    model.switch("a")
    base = torch.optim.AdamW(
        list(model.named_parameters()) if named else model.parameters(), lr=1e-3
    )
    arguments = {"mode": "observe", "granularity": granularity, **SMALL, **arguments}
    return model, GapAware(base, **arguments)


@pytest.mark.parametrize("granularity", ["global", "block"])
@pytest.mark.parametrize("named", [True, False])
def test_another_adapter_is_no_update(granularity, named):
    model, optimizer = adapters(granularity, named=named)
    adapt(model, optimizer, range(30), "a")
    model.switch("b")
    adapt(model, optimizer, range(30, 70), "b")
    largest = max(r["spectrum"]["sigma"][0] for r in optimizer.history if r["spectrum"])
    # 20 steps of 1e-3 each in 192 numbers
    assert largest < 20 * 1e-3 * 192**0.5
    # and where it began is not where the other one did
    assert max(r["risk"] for r in optimizer.history if "risk" in r) < 1
    assert not any("risk" in r for r in optimizer.history if r["step"] > 40)


@pytest.mark.parametrize("granularity", ["global", "block"])
@pytest.mark.parametrize("risk", [True, False])
def test_states_that_do_not_say_which_they_are_of_go_on(granularity, risk):
    (model, optimizer), (again, resumed) = adapters(granularity), adapters(granularity)
    adapt(model, optimizer, range(31), "a")
    saved = copy.deepcopy(optimizer.state_dict())
    observer = saved["gapaware"]["observer"]
    del observer["members"]
    if risk:
        del observer["start"]["members"]
    else:
        del observer["start"]
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    for one, other in ((model, optimizer), (again, resumed)):
        adapt(one, other, range(31, 51), "a")
    spectra = [repr(o.history.column("spectrum")) for o in (optimizer, resumed)]
    assert spectra[0] == spectra[1]
    if risk:
        assert resumed.history.column("risk") == optimizer.history.column("risk")
    # from then on it is known
    states = [o.state_dict()["gapaware"]["observer"] for o in (optimizer, resumed)]
    assert states[0]["members"] == states[1]["members"]
    again.switch("b")
    adapt(again, resumed, range(51, 56), "b")
    assert not resumed._observer._conditions or len(resumed._observer._conditions) < 4


@pytest.mark.parametrize("part", ["observer", "start"])
def test_states_with_too_few_of_them_are_refused(part):
    model, optimizer = adapters()
    adapt(model, optimizer, range(20), "a")
    saved = copy.deepcopy(optimizer.state_dict())
    observer = saved["gapaware"]["observer"]
    (observer if part == "observer" else observer["start"])["members"].pop()
    with pytest.raises(ValueError, match="nothing was changed"):
        optimizer.load_state_dict(saved)


# -- several processes -------------------------------------------------------------------------------


def _process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, optimizer = build(
        controller=lambda seen: Decision(1 + seen.loss, keep=seen.scale == 1.0),
        process_group=dist.group.WORLD,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps, turn in ((range(30), 0), (range(30, 60), 4), (range(60, 80), 0)):
            if not turn:
                only(model)
            train(model, optimizer, steps, turn, loss_of=lambda loss: loss + rank)
    held = ("step", "why", "scale", "next_scale", "decision")
    records = [{key: record.get(key) for key in held} for record in optimizer.history]
    weights = [parameter.detach() for parameter in model.parameters()]
    torch.save([records, weights, off(optimizer)], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.xdist_group("distributed")
def test_replicas_do_it_together(tmp_path):
    torch.multiprocessing.start_processes(
        _process, args=(tmp_path,), nprocs=2, start_method="forkserver"
    )
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one[0] == other[0]
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    assert len(one[2]) == 1
