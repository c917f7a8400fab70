"""torch's own generators of optimizer inputs, through GapAware around every optimizer torch ships.

A factor of 1 leaves trajectory and state as they are bit for bit; a factor of 2 makes the steps of twice
the learning rate; wrong inputs raise what the optimizer itself raises.
"""

import inspect
import warnings

import pytest
import torch
from gradients import assert_same_run, inner, parameters, run

from gapaware import Composite, Decision, GapAware

common_optimizers = pytest.importorskip(
    "torch.testing._internal.common_optimizers", reason="needs expecttest"
)
OPTIMIZERS = {info.optim_cls.__name__: info for info in common_optimizers.optim_db}
MATRICES = ((4, 3), (3, 2))
STEPS = 8


def test_every_optimizer_of_torch_is_here():
    shipped = {
        name
        for name, member in vars(torch.optim).items()
        if inspect.isclass(member) and issubclass(member, torch.optim.Optimizer)
    }
    assert shipped - {"Optimizer"} == set(OPTIMIZERS)


def inputs(info, every_implementation=False):
    """Each of torch's inputs in each implementation that runs on the CPU, as keyword arguments."""
    made = info.optim_inputs_func(device="cpu")
    implementations = [{}]
    if "foreach" in info.supported_impls:
        implementations += [{"foreach": True}]
    if "cpu" in info.supports_fused_on:
        implementations += [{"fused": True}]
    for entry in made:
        for implementation in implementations[: None if every_implementation else 1]:
            yield {**entry.kwargs, **implementation}


def problem(info):
    params = parameters(MATRICES if info.optim_cls is torch.optim.Muon else (*MATRICES, (5,), ()))
    return params, {"sparse": info.only_supports_sparse_grads}


def copied(kwargs):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


WRAPPINGS = {
    "observe": {"mode": "observe"},
    "neutral": {"mode": "escape", "controller": lambda seen: 1.0},
    "exact": {"controller": lambda seen: 1.0, "sketch_dim": None, "granularity": "group"},
}


def wrap(base, **arguments):
    return GapAware(base, **{"interval": 1, "window": 4, "sketch_dim": 64, **arguments})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_neutral_is_exact(name):
    info = OPTIMIZERS[name]
    tried = 0
    for number, kwargs in enumerate(inputs(info, every_implementation=True)):
        alone, how = problem(info)
        try:
            optimizer_alone = info.optim_cls(alone, **copied(kwargs))
        except (ValueError, RuntimeError):  # tensor lr with foreach and not capturable
            with pytest.raises((ValueError, RuntimeError)):
                wrap(info.optim_cls(problem(info)[0], **copied(kwargs)))
            continue
        run(optimizer_alone, alone, STEPS, **how)
        for wrapping in ("observe", "neutral") if number else WRAPPINGS:
            wrapped, _ = problem(info)
            optimizer = wrap(info.optim_cls(wrapped, **copied(kwargs)), **WRAPPINGS[wrapping])
            run(optimizer, wrapped, STEPS, **how)
            assert_same_run(optimizer_alone, optimizer, alone, wrapped)
            assert [r["decision"] for r in optimizer.history] == ["hold"] * (STEPS - 1)
            tried += 1
    assert tried >= 2 * len(info.optim_inputs_func(device="cpu"))


@pytest.mark.parametrize("granularity", ["global", "block"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_factor_of_2_is_twice_the_learning_rate(name, granularity):
    info = OPTIMIZERS[name]
    if granularity == "block" and name == "LBFGS":
        pytest.skip("refused, see test_contract")
    for kwargs in inputs(info):
        if name == "LBFGS":  # which otherwise arrives before there is a spectrum
            kwargs = {**kwargs, "lr": 1e-3, "max_iter": 1}
        double, how = problem(info)
        try:
            optimizer_double = info.optim_cls(double, **copied(kwargs))
        except (ValueError, RuntimeError):
            continue
        wrapped, _ = problem(info)
        optimizer = wrap(
            info.optim_cls(wrapped, **copied(kwargs)),
            granularity=granularity,
            controller=lambda seen: 2.0,
        )
        before = 5  # steps until there is a spectrum and its decision is in force
        run(optimizer_double, double, before, **how)
        lrs = [group["lr"] for group in optimizer_double.param_groups]
        for group in optimizer_double.param_groups:
            group["lr"] = group["lr"] * 2.0
        run(optimizer_double, double, range(before, STEPS), **how)
        run(optimizer, wrapped, STEPS, **how)
        assert optimizer.scales[0] == 2
        for group, lr in zip(optimizer_double.param_groups, lrs, strict=True):
            group["lr"] = lr
        assert_same_run(optimizer_double, optimizer, double, wrapped)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_wrong_inputs_raise_what_the_optimizer_raises(name):
    info = OPTIMIZERS[name]
    for error_input in info.optim_error_inputs_func("cpu", torch.float32):
        wrong = error_input.optimizer_error_input
        params = parameters(((2, 2),)) if wrong.params is None else wrong.params

        at_step = error_input.error_on is common_optimizers.OptimizerErrorEnum.STEP_ERROR
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = None
            if at_step:
                optimizer = wrap(info.optim_cls(params, **copied(wrong.kwargs)), mode="observe")
            with pytest.raises(error_input.error_type, match=error_input.error_regex):
                optimizer.step() if at_step else wrap(
                    info.optim_cls(params, **copied(wrong.kwargs))
                )


DECOUPLED = {
    "SGD": {}, "AdamW": {}, "Muon": {}, "Adafactor": {}, "Adam": {"decoupled_weight_decay": True},
    "NAdam": {"decoupled_weight_decay": True}, "RAdam": {"decoupled_weight_decay": True},
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [n for n in OPTIMIZERS if n not in ("SparseAdam", "Rprop", "LBFGS")]
)
def test_how_much_of_an_update_is_decay(name):
    """Without gradients all of it is, whatever the factors; where it cannot be told, nothing is said."""
    kwargs = DECOUPLED.get(name, {})
    params = parameters(MATRICES)
    optimizer = wrap(
        getattr(torch.optim, name)(params, lr=1e-2, weight_decay=0.3, **kwargs),
        interval=3,
        sketch_dim=None,
        controller=lambda seen: Decision(2.0, weight_decay_scale=0.5 + seen.step % 2),
    )
    for _ in range(30):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    share = optimizer.history[-1]["spectrum"]["decay_share"]
    if name in DECOUPLED:
        assert share == pytest.approx(1.0, abs=0.02)
    else:
        assert share is None or share != share


def test_step_errors_are_the_optimizers():
    dense = parameters(((3, 2),))
    for optimizer in (torch.optim.SparseAdam(dense), wrap(torch.optim.SparseAdam(dense))):
        with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
            run(optimizer, dense, 1)
    for optimizer in (torch.optim.Adam(dense), wrap(torch.optim.Adam(dense))):
        with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
            run(optimizer, dense, 1, sparse=True)
        assert optimizer.param_groups[0]["lr"] == 1e-3
    for optimizer in (torch.optim.LBFGS(dense), wrap(torch.optim.LBFGS(dense))):
        with pytest.raises((TypeError, RuntimeError)):
            optimizer.step()


@pytest.mark.parametrize("kwargs", list(inputs(OPTIMIZERS["Muon"])), ids=str)
@pytest.mark.parametrize("how", WRAPPINGS)
def test_composite_muon_is_muon_and_adamw(kwargs, how):
    alone, wrapped = parameters(), parameters()

    def build(params):
        return (
            torch.optim.Muon(params[:2], **copied(kwargs)),
            torch.optim.AdamW(params[2:], lr=1e-2),
        )

    apart = build(alone)
    for step in range(STEPS):
        for optimizer in apart:
            run(optimizer, alone, range(step, step + 1))
    together = wrap(Composite(*build(wrapped)), **WRAPPINGS[how])
    run(together, wrapped, STEPS)
    assert inner(together).optimizers[0].state
    for mine, theirs in zip(apart, together.leaves(), strict=True):
        assert_same_run(mine, theirs, alone, wrapped)
