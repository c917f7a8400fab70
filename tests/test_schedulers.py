"""Every scheduler of torch gives the same learning rates as without the wrapper, while a factor is on."""

import copy
import warnings

import pytest
import torch
from gradients import assert_equal, parameters, run
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from gapaware import Composite, Decision, GapAware

STEPS = 50

SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda n: 0.95**n),
    "LambdaLR warmup": lambda o: schedulers.LambdaLR(o, lambda n: min(n / 10, 1.0)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda n: 0.97),
    "StepLR": lambda o: schedulers.StepLR(o, step_size=7, gamma=0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [3, 11, 40], gamma=0.3),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, factor=0.25, total_iters=8),
    "LinearLR": lambda o: schedulers.LinearLR(o, start_factor=0.1, total_iters=20),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, gamma=0.93),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=45, power=2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=20, eta_min=1e-5),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 9, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
    "OneCycleLR linear": lambda o: schedulers.OneCycleLR(
        o, max_lr=0.1, total_steps=STEPS + 1, anneal_strategy="linear", three_phase=True
    ),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 1e-2, step_size_up=6),
    "CyclicLR exp_range": lambda o: schedulers.CyclicLR(
        o, 1e-3, 1e-2, step_size_up=6, mode="exp_range", gamma=0.99, cycle_momentum=False
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=2, cooldown=1),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o,
        [schedulers.LinearLR(o, 0.1, total_iters=10), schedulers.ExponentialLR(o, 0.95)],
        milestones=[10],
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, total_iters=5), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=5),
}

BASES = {
    "sgd": lambda p: torch.optim.SGD(
        [{"params": p[:2]}, {"params": p[2:], "lr": 3e-2}], lr=1e-2, momentum=0.9
    ),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)),
    "composite": lambda p: Composite(
        torch.optim.Muon(p[:2], lr=2e-2), torch.optim.AdamW(p[2:], lr=1e-3)
    ),
}


# Muon's momentum and AdamW's betas have no name in common that a scheduler could cycle
NO_SHARED_MOMENTUM = {
    "OneCycleLR": lambda o: schedulers.OneCycleLR(
        o, max_lr=0.1, total_steps=STEPS + 1, cycle_momentum=False
    ),
    "OneCycleLR linear": lambda o: schedulers.OneCycleLR(
        o, max_lr=0.1, total_steps=STEPS + 1, anneal_strategy="linear", cycle_momentum=False
    ),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 1e-2, step_size_up=6, cycle_momentum=False),
}


@pytest.mark.parametrize("name", NO_SHARED_MOMENTUM)
def test_momentum_that_cannot_be_cycled_is_refused(name):
    optimizer = GapAware(BASES["composite"](parameters()), interval=5)
    with pytest.raises(ValueError, match="cycle_momentum"):
        SCHEDULERS[name](optimizer)


def build_of(name, base):
    return (
        NO_SHARED_MOMENTUM.get(name, SCHEDULERS[name]) if base == "composite" else SCHEDULERS[name]
    )


def test_every_scheduler_of_torch_is_here():
    covered = {name.split()[0] for name in SCHEDULERS}
    assert set(schedulers.__all__) - {"LRScheduler"} <= covered


def rates_of(optimizer, params, build, steps=range(STEPS), scheduler=None):
    """Ordinary training; what the scheduler says and what it wrote, after each step."""
    scheduler = scheduler or build(optimizer)
    seen = []
    for step in steps:
        run(optimizer, params, range(step, step + 1))
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            scheduler.step(1.0 / min(step + 1, 10))
        else:
            scheduler.step()
        keys = ("lr", "momentum", "betas", "initial_lr", "max_lr", "min_lr", "swa_lr")
        seen.append(
            copy.deepcopy(
                (
                    scheduler.get_last_lr(),
                    [{k: g[k] for k in keys if k in g} for g in optimizer.param_groups],
                )
            )
        )
    return seen


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_same_rates_as_without_the_wrapper(name, base):
    alone, wrapped = parameters(), parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it takes the order of steps for wrong
        warnings.filterwarnings("ignore", message=".*epoch parameter", category=UserWarning)
        expected = rates_of(BASES[base](alone), alone, build_of(name, base))
        optimizer = GapAware(
            BASES[base](wrapped),
            interval=2,
            sketch_dim=64,
            granularity="block" if base == "adamw" else "global",
            controller=lambda seen: Decision(1.0 + seen.step % 3, momentum_scale=0.5),
        )
        assert_equal(expected, rates_of(optimizer, wrapped, build_of(name, base)))
    assert set(optimizer.history.column("next_scale")) == {1.0, 2.0, 3.0}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_neutral_trajectories_and_resumed_schedulers(name):
    alone, wrapped = parameters(), parameters()
    optimizer_alone = BASES["sgd"](alone)
    expected = rates_of(optimizer_alone, alone, SCHEDULERS[name])
    optimizer = GapAware(BASES["sgd"](wrapped), mode="observe", interval=3, sketch_dim=64)
    scheduler = SCHEDULERS[name](optimizer)
    first = rates_of(optimizer, wrapped, None, range(20), scheduler)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    optimizer = GapAware(BASES["sgd"](wrapped), mode="observe", interval=3, sketch_dim=64)
    scheduler = SCHEDULERS[name](optimizer)
    scheduler.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[0])
    second = rates_of(optimizer, wrapped, None, range(20, STEPS), scheduler)
    assert_equal(expected, first + second)
    assert_equal(list(alone), list(wrapped))


@pytest.mark.parametrize("granularity", ["global", "block"])
@pytest.mark.parametrize("kind", ["ExponentialLR", "LambdaLR"])
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_a_scheduler_stepped_by_a_hook_of_the_base_never_sees_the_factor(lr, kind, granularity):
    """Groups are themselves again before the hooks after a step."""
    make = {
        "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
        "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    }[kind]
    alone, wrapped = parameters(), parameters()
    rates, running = [], []
    for params in (alone, wrapped):
        base = torch.optim.SGD(params, lr=copy.deepcopy(lr))
        # first among them, before anything of ours is there
        base.register_step_post_hook(lambda *_: running[-1].step())
        optimizer = base
        if params is wrapped:
            optimizer = GapAware(
                base,
                interval=1,
                sketch_dim=64,
                granularity=granularity,
                controller=lambda seen: 8.0 if seen.row in ("all", "group 0: tensor 0") else 4.0,
            )
        running.append(make(optimizer))
        run(optimizer, params, 30)
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert max(optimizer.scales) == 8.0
    assert rates[1] == rates[0]


def test_a_scheduler_of_momentum_stepped_by_a_hook_never_sees_the_factor():
    """OneCycleLR writes betas; inside the step they are scaled, and what it makes of them stays."""
    alone, wrapped = parameters(), parameters()
    written = []
    for params in (alone, wrapped):
        base = optimizer = torch.optim.AdamW(params, lr=0.01)
        if params is wrapped:
            optimizer = GapAware(
                base,
                interval=1,
                sketch_dim=64,
                controller=lambda seen: Decision(1.0, momentum_scale=0.5),
            )
        scheduler = schedulers.OneCycleLR(base, max_lr=0.1, total_steps=50)
        base.register_step_post_hook(lambda o, a, k, s=scheduler: s.step())
        run(optimizer, params, 30)
        written.append((optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["lr"]))
    assert written[0] == written[1]
