"""Optimizers of other packages: what they remember goes back, what they cannot take is refused."""

import math

import pytest
import torch
from gradients import parameters

from gapaware import Composite, Decision, GapAware
from gapaware.rescue import Rescue, inner


class Adapting(torch.optim.Optimizer):
    """Estimates its step size and keeps it in its groups, as Prodigy does; all of them have to agree."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "d": 1e-2, "d_numerator": 0.0, "k": 0, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure=None):
        if len({group["lr"] for group in self.param_groups}) > 1:
            raise RuntimeError("Setting different lr values is not supported")
        for group in self.param_groups:
            group["d_numerator"] += sum(p.grad.square().sum().item() for p in group["params"])
            group["d"] = max(1e-3 * group["lr"] * math.sqrt(group["d_numerator"]), group["d"])
            group["k"] += 1
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * group["d"])


class Lookahead(torch.optim.Optimizer):
    """Has an optimizer inside, whose groups are its own too, and slow weights as its state."""

    def __init__(self, optimizer, k=3):
        self.optimizer, self.k, self.steps = optimizer, k, 0
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        self.steps += 1
        for p, state in self.state.items() if self.steps % self.k == 0 else ():
            p.copy_(state["slow"].lerp_(p, 0.5))


class Several(Lookahead):
    """Has its optimizer in a list, and another around it that shows the same state, as wrappers may."""

    def __init__(self, optimizer):
        outer = Lookahead(optimizer)
        self.chained = [outer]
        super().__init__(outer)
        del self.optimizer
        self.state = outer.state

    def step(self, closure=None):
        self.chained[0].step()


class MyAdamW(torch.optim.AdamW):
    """A class of a user, whose step is torch's."""


class Hessian(torch.optim.SGD):
    """Takes more than a closure, as AdaHessian and SophiaH do."""

    seen = ()

    def step(self, closure=None, hessian=None):
        self.seen = (*self.seen, hessian)
        return super().step(closure)


FOREIGN = {
    "adapting": Adapting,
    "lookahead": lambda params: Lookahead(torch.optim.AdamW(params, lr=1e-2)),
    "lookahead of two": lambda params: Lookahead(
        Composite(
            torch.optim.AdamW(params[:1], lr=1e-2),
            torch.optim.SGD(params[1:], lr=1e-2, momentum=0.9),
        )
    ),
    "several": lambda params: Several(torch.optim.AdamW(params, lr=1e-2)),
    "composite": lambda params: Composite(
        Adapting(params[:1]), Lookahead(torch.optim.AdamW(params[1:], lr=1e-2))
    ),
}


def train(optimizer, params, steps, factor=1.0, **given):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = factor * sum(p.square().sum() for p in params)
        loss.backward()
        optimizer.step(**given)
    return [p.detach().clone() for p in params]


def same(these, those):
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


# -- the way back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoilt", [1e3, math.nan])
@pytest.mark.parametrize("name", FOREIGN)
def test_all_that_it_remembers_goes_back(name, spoilt):
    params = parameters()
    base = FOREIGN[name](params)
    train(base, params, 6)
    rescue = Rescue()
    rescue.keep(base, step=6)
    expected = train(base, params, 6)
    train(base, params, 3, factor=spoilt)
    assert rescue.put_back(base) == 6
    assert not rescue.holds
    assert same(train(base, params, 6), expected)


@pytest.mark.parametrize("name", ["lookahead", "several"])
def test_weights_and_a_state_that_is_shown_twice_are_copied_once(name):
    params = parameters()
    base = FOREIGN[name](params)
    train(base, params, 3)
    rescue = Rescue()
    rescue.keep(base, step=3)
    copies = [
        tensor for weights, state in rescue._kept.values() for tensor in (weights, *state.values())
    ]
    # the weights, what Lookahead has of them, two moments and a count of steps
    assert len({id(copy) for copy in copies}) == 5 * len(params)


def test_what_people_and_schedulers_write_stays():
    params = parameters()
    base = torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)
    written = {
        "lr": 0.2,
        "initial_lr": 0.3,
        "max_lr": 0.4,
        "min_lr": 0.5,
        "momentum": 0.6,
        "base_momentum": 0.7,
        "max_momentum": 0.8,
        "weight_decay": 0.9,
        "swa_lr": 1.0,
        "anchor": False,
        "name": "body",
    }
    (group,) = base.param_groups
    group.update({key: 0.0 for key in written} | {"anchor": True, "name": "head"})
    rescue = Rescue()
    rescue.keep(base, step=0)
    group.update(written)
    rescue.put_back(base)
    assert written.items() <= group.items()


def test_a_number_that_is_a_tensor_goes_back_in_place():
    params = parameters()
    base = Adapting(params)
    (group,) = base.param_groups
    group["d"] = known = torch.tensor(0.5)
    rescue = Rescue()
    rescue.keep(base, step=0)
    known.fill_(math.nan)
    rescue.put_back(base)
    assert group["d"] is known
    assert known == 0.5


def test_a_group_that_was_added_since_keeps_what_it_has():
    params = parameters()
    base = Adapting(params[:1])
    rescue = Rescue()
    rescue.keep(base, step=0)
    base.add_param_group({"params": params[1:], "k": 7})
    train(base, params, 1)
    rescue.put_back(base)
    assert [group["k"] for group in base.param_groups] == [0, 8]


def test_an_optimizer_inside_itself_is_walked_once():
    params = parameters()
    base = Lookahead(torch.optim.SGD(params, lr=0.1, momentum=0.9))
    base.optimizer.outer = base
    rescue = Rescue()
    rescue.keep(base, step=0)
    assert rescue.put_back(base) == 0
    assert inner(base) == [base.optimizer]


def test_a_run_that_overflows_inside_goes_on():
    """The moments of the optimizer inside were NaN for ever, however often the weights went back."""
    params = parameters()
    base = FOREIGN["lookahead"](params)
    factors = iter([Decision(2.0, keep=True), Decision(1e30), *[1.0] * 1000])
    optimizer = GapAware(
        base, controller=lambda seen: next(factors), interval=2, max_scale=1e30, max_push=0.0
    )
    with pytest.warns(UserWarning, match="weights and state are those of step"):
        last = train(optimizer, params, 120)
    assert all(p.isfinite().all() for p in last)
    assert sum(record["decision"] == "fault" for record in optimizer.history) == 1


# -- factors that differ ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base",
    [
        Adapting,
        lambda params: Hessian(params, lr=0.1),
        lambda params: Composite(torch.optim.SGD(params[:1], lr=0.1), Adapting(params[1:])),
        FOREIGN["lookahead"],
        FOREIGN["several"],
    ],
)
def test_blocks_are_refused_to_a_step_that_is_not_torchs(base):
    with pytest.raises(ValueError, match=r"granularity='block': \w+ .*pass granularity='group' or"):
        GapAware(base(parameters()), granularity="block")
    for granularity in ("global", "group"):
        GapAware(base(parameters()), granularity=granularity)


@pytest.mark.parametrize("granularity", ["group", "block"])
def test_what_only_looks_on_sees_each_part_of_any(granularity):
    params = parameters()
    base = Adapting(two(params))
    optimizer = GapAware(base, mode="observe", granularity=granularity, interval=1)
    train(optimizer, params, 8)
    assert len(optimizer.scales) > 1
    assert set(optimizer.scales) == {1.0}
    assert "fault" not in optimizer.history.column("decision")


def two(params):
    return [{"params": params[:1]}, {"params": params[1:]}]


@pytest.mark.parametrize("granularity", ["group", "block"])
@pytest.mark.parametrize(
    "base", [Adapting, lambda groups: Composite(Adapting(groups), MyAdamW(parameters()))]
)
def test_groups_are_refused_to_one_that_estimates_its_step_size(base, granularity):
    with pytest.raises(ValueError, match=rf"'{granularity}': Adapting .*pass granularity='global'"):
        GapAware(base(two(parameters())), granularity=granularity)
    GapAware(base(two(parameters())))


@pytest.mark.parametrize("make", [MyAdamW, torch.optim.AdamW, torch.optim.Adafactor])
@pytest.mark.parametrize("granularity", ["group", "block"])
def test_torchs_own_steps_take_factors_that_differ(make, granularity):
    """Also that of Adafactor, whose groups have a `d` too, and of a class that inherits one."""
    params = parameters()
    factors = iter(range(2, 1000))
    optimizer = GapAware(
        make(two(params), lr=1e-3),
        granularity=granularity,
        interval=1,
        controller=lambda seen: float(next(factors)),
        max_scale=1000.0,
        max_push=0.0,
    )
    train(optimizer, params, 8)
    assert len(set(optimizer.scales)) > 1
    assert "fault" not in optimizer.history.column("decision")


# -- more than a closure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_step_takes_what_that_of_the_base_takes(factor):
    params = parameters()
    base = Hessian(params, lr=1e-3)
    optimizer = GapAware(base, interval=1, controller=lambda seen: factor)
    torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)  # which wraps step() once more
    train(optimizer, params, 6, hessian="exact")
    assert optimizer.scales == [factor]
    assert optimizer.step(lambda: 3.0, hessian="late") == 3.0
    assert optimizer.step(closure=None) is None
    assert base.seen == (*["exact"] * 6, "late", None)


def test_a_step_of_a_checkpoint_takes_it_too():
    params = parameters()
    base = Hessian(params, lr=0.0)
    optimizer = GapAware(base)
    train(optimizer, params, 1, factor=0.0, hessian="dry")
    assert base.seen == ("dry",)
    assert optimizer._steps == 0


def test_what_the_base_does_not_take_is_refused_by_it():
    params = parameters()
    composite = Composite(torch.optim.SGD(params, lr=0.1))
    for base in (composite, torch.optim.SGD(params, lr=0.1)):
        optimizer = GapAware(base)
        with pytest.raises(TypeError, match="unexpected keyword argument 'hessian'"):
            train(optimizer, params, 1, hessian=1)
        assert optimizer._steps == 0
