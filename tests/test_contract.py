"""What users of `torch.optim.Optimizer` rely on: DESIGN section 5, row by row."""

import copy
import inspect
import io
import pickle
import sys
import types
import warnings

import pytest
import torch
from gradients import assert_equal, assert_same_run, base_state, parameters, quadratic, run
from models import batch, mlp, same_parameters, train
from test_cuda import Reads, arrived  # noqa: F401
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gapaware import Composite, GapAware
from gapaware.delegation import Delegating
from gapaware.distributed import Unsupported


def wrap(base, **arguments):
    return GapAware(base, **{"interval": 2, "sketch_dim": 64, **arguments})


def observed(base, **arguments):
    return wrap(base, mode="observe", **arguments)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def split(model):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return Composite(
        torch.optim.Muon(matrices, lr=1e-2),
        torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=3e-3),
    )


# -- type and signatures ------------------------------------------------------------------------------


def overrides(cls):
    own = {name for kind in cls.__mro__[: cls.__mro__.index(Optimizer)] for name in vars(kind)}
    functions = {n for n, f in inspect.getmembers(Optimizer, inspect.isfunction)}
    return sorted((own & functions) - {"__init__"})


@pytest.mark.parametrize(
    ("cls", "name"), [(cls, name) for cls in (GapAware, Composite) for name in overrides(cls)]
)
def test_signatures_are_torchs(cls, name):
    theirs = inspect.signature(getattr(Optimizer, name)).parameters.values()
    ours = inspect.signature(getattr(cls, name)).parameters.values()
    # a step takes what that of the wrapped optimizer takes besides
    ours = [p for p in ours if (name, p.kind) != ("step", p.VAR_KEYWORD)]
    described = [[(p.name, p.kind, p.default) for p in each] for each in (theirs, ours)]
    assert described[0] == described[1]


def test_the_important_methods_are_among_them():
    expected = {"step", "zero_grad", "state_dict", "load_state_dict", "add_param_group"}
    assert expected <= set(overrides(GapAware))


def test_it_is_an_optimizer_and_delegates():
    model = mlp()
    base = adamw(model)
    optimizer = wrap(base)
    assert isinstance(optimizer, Optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 3)
    optimizer.load_state_dict(saved)  # replaces the groups and the state of the base
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    assert "AdamW" in repr(optimizer)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = optimizer.no_such_thing


def test_own_state_is_kept_apart():
    model = mlp()
    optimizer = wrap(adamw(model))
    assert len(optimizer.state) == 0
    train(model, optimizer, 10)
    assert {frozenset(s) for s in optimizer.state.values()} == {
        frozenset({"step", "exp_avg", "exp_avg_sq"})
    }


def test_nothing_is_cached_at_construction():
    """FSDP2 and `nn.Module.to` swap parameters after construction."""
    model = mlp()
    optimizer = wrap(adamw(model))
    replacement = mlp()
    for group in optimizer.param_groups:
        group["params"] = list(replacement.parameters())
    train(replacement, optimizer, 20)
    assert same_parameters(model, mlp())
    assert not same_parameters(replacement, mlp())
    assert "fault" not in optimizer.history.column("decision")


# -- hooks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [adamw, split])
def test_step_hooks_run_once_each_and_may_replace_arguments(build):
    model = mlp()
    optimizer = wrap(build(model))
    calls = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", o)))
    optimizer.base.register_step_pre_hook(lambda o, a, k: calls.append(("base pre", o)))
    optimizer.base.register_step_post_hook(lambda o, a, k: calls.append(("base post", o)))
    train(model, optimizer, 1)
    base = optimizer.base
    assert calls == [
        ("pre", optimizer), ("base pre", base), ("base post", base), ("post", optimizer)
    ]  # fmt: skip

    def with_closure(o, args, kwargs):
        return (o, lambda: 7.0), {}

    optimizer.register_step_pre_hook(with_closure)
    assert optimizer.step() == 7.0
    optimizer.register_step_pre_hook(lambda o, a, k: "nonsense")
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


@pytest.mark.parametrize("build", [adamw, split])
def test_hooks_for_all_optimizers_run_once_for_each_real_one(build):
    """Run in the wrapper as well, a hook that halves gradients would halve them twice."""
    alone, wrapped = mlp(), mlp()
    calls = []

    def halve(optimizer, args, kwargs):
        calls.append(optimizer)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.5)

    handles = [
        register_optimizer_step_pre_hook(halve),
        register_optimizer_step_post_hook(lambda o, a, k: calls.append(o)),
    ]
    try:
        optimizer = observed(build(wrapped))
        train(wrapped, optimizer, 1)
        assert calls == [leaf for leaf in optimizer.leaves() for _ in ("pre", "post")]
        train(wrapped, optimizer, range(1, 12))
        apart = build(alone)
        train(alone, apart, 12)
    finally:
        for handle in handles:
            handle.remove()
    assert same_parameters(alone, wrapped)


@pytest.mark.parametrize("build", [adamw, split])
def test_state_dict_hooks(build):
    model = mlp()
    optimizer = wrap(build(model))
    train(model, optimizer, 6)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("pre"))
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda o, s: calls.append("post"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": 1})
    optimizer.register_state_dict_post_hook(lambda o, s: calls.append("soon"), prepend=True)
    for leaf in optimizer.leaves():
        leaf.register_state_dict_post_hook(lambda o, s: calls.append("leaf"))
    saved = optimizer.state_dict()
    assert calls == ["first", "pre", *["leaf"] * len(optimizer.leaves()), "soon", "post"]
    assert saved["extra"] == 1
    assert "gapaware" in saved

    calls.clear()
    optimizer.register_load_state_dict_pre_hook(lambda o, s: calls.append("pre"))
    optimizer.register_load_state_dict_pre_hook(
        lambda o, s: {k: v for k, v in s.items() if k != "extra"}, prepend=True
    )
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("post"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("soon"), prepend=True)
    for leaf in optimizer.leaves():
        leaf.register_load_state_dict_post_hook(lambda o: calls.append("leaf"))
    optimizer.load_state_dict(state_dict=saved)
    assert calls == ["pre", *["leaf"] * len(optimizer.leaves()), "soon", "post"]
    assert "extra" in saved  # a shallow copy is what hooks may change


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("build", [adamw, split])
def test_copies_have_no_hooks_as_copies_of_torchs_optimizers(duplicate, build):
    model = mlp()
    optimizer = wrap(build(model))
    called = []
    optimizer.register_step_pre_hook(lambda o, a, k: called.append(o))
    optimizer.register_state_dict_post_hook(lambda o, s: called.append(o))
    optimizer.register_load_state_dict_post_hook(lambda o: called.append(o))
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    train(model, optimizer, 9)
    twin_model, twin = duplicate((model, optimizer))
    called.clear()
    train(twin_model, twin, range(9, 20))
    twin.load_state_dict(twin.state_dict())
    assert called == []
    twin.register_step_pre_hook(lambda o, a, k: called.append(o))
    train(twin_model, twin, range(20, 21))
    assert called == [twin]
    train(model, optimizer, range(9, 21))
    assert same_parameters(model, twin_model)


def test_the_profiler_sees_the_step():
    model = mlp()
    optimizer = wrap(adamw(model))
    train(model, optimizer, 1)
    with torch.profiler.profile() as profile:
        train(model, optimizer, 1)
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#GapAware.step", "Optimizer.step#AdamW.step"} <= names


# -- closures, accumulation, clipping -----------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=1e-2),
        lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4),
        lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
        lambda p: Composite(torch.optim.Muon(p[:2]), torch.optim.SGD(p[2:], lr=1e-2)),
    ],
)
def test_closures(build):
    alone, wrapped = parameters(), parameters()
    optimizer_alone, optimizer = build(alone), observed(build(wrapped), interval=1, window=4)
    calls = [0, 0]

    def counted(which, params):
        closure = quadratic(params)

        def run_it():
            calls[which] += 1
            assert torch.is_grad_enabled()
            return closure()

        return run_it

    for _ in range(10):
        expected = optimizer_alone.step(counted(0, alone))
        assert torch.equal(optimizer.step(counted(1, wrapped)), expected)
    assert calls[0] == calls[1]
    assert_same_run(optimizer_alone, optimizer, alone, wrapped)
    assert optimizer.history[0]["loss"] > optimizer.history[-1]["loss"]


def test_a_factor_on_lbfgs_is_its_learning_rate():
    alone, wrapped = parameters(), parameters()
    optimizer_alone = torch.optim.LBFGS(alone, lr=0.25, max_iter=3)
    optimizer = wrap(torch.optim.LBFGS(wrapped, lr=0.0625, max_iter=3), controller=lambda s: 4.0)
    optimizer._steering.load_state_dict(
        {"scales": {"all": [4.0, 1.0]}, "undecided": [1.0, 1.0], "memory": {}}
    )
    run(optimizer_alone, alone, 6)
    run(optimizer, wrapped, 6)
    assert_equal(alone, wrapped)


def test_an_exception_in_a_closure_or_step_leaves_the_groups_as_they_were():
    for granularity in ("global", "block"):
        params = parameters()
        optimizer = wrap(
            torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
            interval=1,
            granularity=granularity,
            controller=lambda seen: 3.0,
        )
        run(optimizer, params, 5)
        assert set(optimizer.scales) == {3.0}
        groups = optimizer.param_groups
        before = [{**group} for group in groups]

        def closure(optimizer=optimizer):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(3e-2)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        assert optimizer.param_groups is groups
        assert_equal(before, groups)


def test_losses_of_any_kind_pass_through():
    params = parameters()
    optimizer = wrap(torch.optim.SGD(params, lr=1e-2), interval=1)
    answers = (None, 1, 0.5, torch.tensor(2.0), torch.ones(3), {"loss": 1.0}, "text", (1.0, 2.0))
    for answer in answers:
        assert optimizer.step(lambda answer=answer: answer) is answer
    assert "fault" not in optimizer.history.column("decision")


def test_accumulation_and_clipping():
    models, optimizers = [mlp(), mlp()], []
    for model in models:
        base = adamw(model)
        optimizers.append(base if model is models[0] else observed(base))
        for step in range(30):
            x, y = batch(step)
            ((model(x) - y).square().mean() / 3).backward()
            if step % 3 == 2:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizers[-1].step()
                optimizers[-1].zero_grad(set_to_none=step % 2 == 0)
    assert_same_run(*optimizers, models[0].parameters(), models[1].parameters())


# -- parameters that come, go, freeze and are shared ----------------------------------------------------


@pytest.mark.parametrize("granularity", ["global", "group", "block"])
def test_a_group_added_in_mid_window(granularity):
    runs = []
    for wrapped in (False, True):
        params = parameters()
        optimizer = torch.optim.AdamW(params[:2], lr=1e-2)
        if wrapped:
            optimizer = observed(optimizer, granularity=granularity)
        run(optimizer, params, 7)
        optimizer.add_param_group({"params": params[2:], "lr": 3e-2})
        run(optimizer, params, range(7, 30))
        runs.append((optimizer, params))
    assert_same_run(runs[0][0], runs[1][0], runs[0][1], runs[1][1])
    history = runs[1][0].history
    assert [len(record["lr"]) for record in history][:: len(history) - 1] == [1, 2]
    assert history.column("step") == sorted(set(history.column("step")))
    assert history[-1]["spectrum"] is not None
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        runs[1][0].add_param_group({"params": params[:1]})


@pytest.mark.parametrize("granularity", ["global", "block"])
@pytest.mark.parametrize("controller", [None, lambda seen: 2.0])
def test_frozen_parameters_unfrozen_later(granularity, controller):
    model = mlp()
    for p in model[0].parameters():
        p.requires_grad_(False)
    optimizer = wrap(adamw(model), granularity=granularity, controller=controller)
    train(model, optimizer, 20)
    assert torch.equal(model[0].weight, mlp()[0].weight)
    for p in model.parameters():
        p.requires_grad_(not p.requires_grad)
    train(model, optimizer, range(20, 40))
    assert not torch.equal(model[0].weight, mlp()[0].weight)
    assert "fault" not in optimizer.history.column("decision")
    assert all(group["lr"] == 3e-3 for group in optimizer.param_groups)


def test_all_frozen_then_trained():
    model = mlp().requires_grad_(False)
    optimizer = wrap(adamw(model))
    for _ in range(5):
        optimizer.step()
    model.requires_grad_(True)
    train(model, optimizer, 40)
    assert optimizer.history[-1]["spectrum"] is not None
    assert "fault" not in optimizer.history.column("decision")


def test_tied_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    models = [Tied(), Tied()]
    optimizers = [adamw(models[0]), observed(adamw(models[1]), granularity="block")]
    for model, optimizer in zip(models, optimizers, strict=True):
        for step in range(20):
            x = torch.arange(step, step + 7) % 11
            loss = nn.functional.cross_entropy(model(x), (x + 1) % 11)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_same_run(*optimizers, models[0].parameters(), models[1].parameters())
    assert len(optimizers[1].state_dict()["gapaware"]["observer"]["signature"]) == 1


def test_parameters_without_gradients_and_without_elements():
    runs = []
    for wrapped in (False, True):
        params = parameters(((3, 2), (0,), (0, 4), (), (4,)))
        optimizer = torch.optim.AdamW(params, lr=1e-2)
        if wrapped:
            optimizer = observed(optimizer, granularity="block", sketch_dim=None)
        for step in range(20):
            run(optimizer, params[: 4 if step % 3 else 5], range(step, step + 1))
            params[4].grad = None
        runs.append((optimizer, params))
    assert_same_run(runs[0][0], runs[1][0], runs[0][1], runs[1][1])
    assert "fault" not in runs[1][0].history.column("decision")


# -- dtypes and layouts -------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["global", "block"])
@pytest.mark.parametrize("sketch_dim", [64, None])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128]
)
def test_dtypes(dtype, sketch_dim, granularity):
    runs = []
    for arguments in (None, {"mode": "observe"}, {"controller": lambda seen: 2.0}):
        params = parameters(dtype=dtype)
        # the default eps is zero in float16
        optimizer = torch.optim.Adam(params, lr=1e-2, eps=1e-4)
        if arguments is not None:
            optimizer = wrap(optimizer, **arguments, sketch_dim=sketch_dim, granularity=granularity)
        run(optimizer, params, 24)
        runs.append((optimizer, params))
    assert_same_run(runs[0][0], runs[1][0], runs[0][1], runs[1][1])
    for optimizer, params in runs[1:]:
        assert optimizer.history[-1]["spectrum"]["gap"] >= 0
        assert "fault" not in optimizer.history.column("decision")
        assert all(p.isfinite().all() for p in params)
    assert set(runs[2][0].scales) == {2.0}


def test_mixed_dtypes_in_one_group():
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.complex64)
    params = [parameters(((4, 3),), dtype)[0] for dtype in dtypes]
    optimizer = wrap(torch.optim.Adam(params, lr=1e-2), controller=lambda seen: 2.0)
    run(optimizer, params, 24)
    assert optimizer.scales == [2.0]


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SparseAdam(p, lr=1e-2),
        lambda p: torch.optim.SGD(p, lr=1e-1),
        lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, lr=1e-1),
    ],
)
@pytest.mark.parametrize("arguments", [{"mode": "observe"}, {"controller": lambda seen: 2.0}])
def test_sparse_gradients(build, arguments):
    runs = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = nn.EmbeddingBag(30, 4, mode="sum", sparse=True)
        optimizer = build(model.parameters())
        if wrapped:
            optimizer = wrap(optimizer, **arguments)
        for step in range(24):
            generator = torch.Generator().manual_seed(step)
            words = torch.randint(0, 30, (5, 3), generator=generator)
            optimizer.zero_grad()
            (model(words) - 1).square().mean().backward()
            assert model.weight.grad.is_sparse
            optimizer.step()
        runs.append((optimizer, model.parameters()))
    if "mode" in arguments:
        assert_same_run(runs[0][0], runs[1][0], runs[0][1], runs[1][1])
    assert "fault" not in runs[1][0].history.column("decision")
    assert runs[1][0].history[-1]["spectrum"] is not None


def test_parameters_that_are_not_contiguous():
    storage = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    views = [nn.Parameter(storage.t()[::2]), nn.Parameter(channels_last)]
    optimizer = wrap(torch.optim.AdamW(views, lr=1e-2), sketch_dim=None)
    run(optimizer, views, 20)
    assert optimizer.history[-1]["spectrum"] is not None
    assert "fault" not in optimizer.history.column("decision")


# -- saving, moving, copying ----------------------------------------------------------------------------


@pytest.mark.parametrize("build", [adamw, split])
def test_saved_state_is_plain_and_in_torchs_layout(build):
    model = mlp()
    alone = mlp()
    plain, optimizer = build(alone), observed(build(model))
    for each, m in ((plain, alone), (optimizer, model)):
        train(m, each, 12)
    saved = optimizer.state_dict()
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    assert_equal(torch.load(buffer, weights_only=True), saved)
    assert set(saved) == {"state", "param_groups", "gapaware"}
    assert list(saved["state"]) == list(range(6))
    flat = [n for group in saved["param_groups"] for n in group["params"]]
    assert flat == list(range(6))
    assert_equal(base_state(plain), base_state(optimizer))


def test_accelerate_prepare():
    from accelerate import Accelerator

    models, optimizers = [mlp(), mlp()], []
    for model in models:
        base = adamw(model)
        base = base if model is models[0] else observed(base, interval="auto")
        accelerator = Accelerator(cpu=True)
        prepared_model, optimizer, scheduler = accelerator.prepare(
            model, base, torch.optim.lr_scheduler.StepLR(base, 5)
        )
        for step in range(30):
            x, y = batch(step)
            optimizer.zero_grad()
            accelerator.backward((prepared_model(x) - y).square().mean())
            accelerator.clip_grad_norm_(prepared_model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        assert not optimizer.step_was_skipped
        optimizers.append(base)
    assert_same_run(*optimizers, models[0].parameters(), models[1].parameters())
    assert optimizers[1].history


def test_distributed_checkpoint_functions_in_one_process():
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    runs = []
    for asked in (False, True):
        model = mlp()
        optimizer = wrap(adamw(model), controller=lambda seen: 2.0)
        if asked:  # makes the optimizer step once, with gradients and learning rate of zero
            get_optimizer_state_dict(model, optimizer)
            assert optimizer.param_groups[0]["lr"] == 3e-3
            for entry in optimizer.state.values():
                entry["step"].zero_()  # AdamW has counted the step, which is torch's own doing
        train(model, optimizer, 25)
        runs.append((model, optimizer))
    assert same_parameters(runs[0][0], runs[1][0])
    assert runs[0][1].history.column("step") == runs[1][1].history.column("step")

    model, optimizer = runs[1]
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    again = copy.deepcopy(model)
    restored = wrap(adamw(again), mode="observe")
    set_optimizer_state_dict(again, restored, saved)
    base = optimizer.base
    assert_equal(base_state(base), base_state(restored))
    train(model, base, range(25, 45))
    train(again, restored, range(25, 45))
    assert same_parameters(model, again)


def test_phantom_steps_of_a_stateless_optimizer_in_mid_training():
    """SGD without momentum never has state, so each call of DCP steps it once more."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    runs = []
    for every in (1000, 5):
        model = mlp()
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=1e-2), controller=lambda s: 2.0)
        for step in range(30):
            if step % every == every - 1:
                optimizer.zero_grad()
                get_optimizer_state_dict(model, optimizer)
            train(model, optimizer, range(step, step + 1))
        runs.append((model, optimizer))
    assert same_parameters(runs[0][0], runs[1][0])
    assert runs[0][1].history.column("step") == runs[1][1].history.column("step")


def test_warmup_from_zero_counts_its_first_step():
    model = mlp()
    optimizer = wrap(adamw(model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(n / 5, 1.0))
    train(model, optimizer, 20, scheduler)
    assert optimizer.state_dict()["gapaware"]["steps"] == 20


# -- learning rates that are tensors ---------------------------------------------------------------------


class SaidToBeOnAGpu(torch.Tensor):
    """So is all that is computed from it."""

    is_cuda = True


class Plain(Optimizer):
    """Reads no value of a tensor, as fused and capturable optimizers do not."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)

    step.__module__ = "torch.optim.plain"  # as those whose groups may be divided into blocks


def on_the_cpu(lr):
    return torch.tensor(lr)


def on_a_gpu(lr):
    return torch.tensor(lr).as_subclass(SaidToBeOnAGpu)


@pytest.mark.parametrize("granularity", ["global", "group", "block"])
@pytest.mark.parametrize("mode", ["escape", "retain"])
def test_a_tensor_as_learning_rate_is_as_a_number(mode, granularity, arrived):  # noqa: F811
    """Under a warm-up from zero and a decay, to zero again; and one on a GPU is never read."""
    ends = []
    for kind in (float, on_the_cpu, on_a_gpu):
        model = mlp()
        weights = [p for p in model.parameters() if p.ndim == 2]
        biases = [p for p in model.parameters() if p.ndim == 1]
        lr, arguments = 2e-4, {"mode": mode, "granularity": granularity, "window": 4}
        groups = [{"params": weights}, {"params": biases, "lr": kind(2 * lr)}]
        optimizer = wrap(Plain(groups, lr=kind(lr)), **arguments)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: min(n / 4, 1.0, max(80 - n, 0) / 40)
        )
        arrived.clear()  # of addresses that have another tensor by now
        reads = Reads(arrived)
        x, y = batch(0)
        for _ in range(90):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            with reads:
                optimizer.step()
            schedule.step()
        assert "fault" not in optimizer.history.column("decision")
        if kind is on_a_gpu:
            assert reads.found == []
        ends.append((optimizer, torch.cat([p.detach().reshape(-1) for p in model.parameters()])))
    assert (max(ends[0][0].scales) > 1) == (mode == "escape")
    for optimizer, end in ends[1:]:
        assert optimizer.scales == pytest.approx(ends[0][0].scales, rel=1e-3)
        assert torch.allclose(end, ends[0][1], atol=1e-5)


def test_the_peak_of_a_learning_rate_on_a_gpu_is_saved_as_a_number():
    model = mlp()
    optimizer = wrap(Plain(model.parameters(), lr=on_a_gpu(0.5)), mode="retain")
    train(model, optimizer, 1)
    optimizer.param_groups[0]["lr"].fill_(0.25)
    train(model, optimizer, 10)
    own = optimizer.state_dict()["gapaware"]
    assert own["anchor"]["highest_lr"] == {"0": 0.5}
    assert type(own["anchor"]["highest_lr"]["0"]) is float
    optimizer.load_own_state(own)
    train(model, optimizer, 10)
    assert optimizer.state_dict()["gapaware"]["anchor"]["highest_lr"] == {"0": 0.5}
    assert "fault" not in optimizer.history.column("decision")


# -- a schedule that was under way ----------------------------------------------------------------------


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)


def trained_in_the_cool_down(keep):
    """From step 280 of 400 of a cosine schedule on, resumed from what `keep` leaves of a state."""
    runs = []
    for steps in (range(280), range(280, 380)):
        model = mlp()
        optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=1e-5), mode="escape", window=16)
        scheduler = cosine(optimizer)
        if runs:
            before, saved, schedule = runs[0]
            model.load_state_dict(before.state_dict())
            optimizer.load_state_dict(keep(copy.deepcopy(saved.state_dict())))
            scheduler.load_state_dict(schedule.state_dict())
        train(model, optimizer, steps, scheduler)
        runs.append((model, optimizer, scheduler))
    return runs[1][1]


def test_a_plain_checkpoint_in_the_cool_down_is_not_sped_up():
    def plain(state):
        return {key: value for key, value in state.items() if key != "gapaware"}

    def without_first_lr(state):
        for group in state["param_groups"]:
            del group["initial_lr"]
        return plain(state)

    optimizer = trained_in_the_cool_down(plain)
    assert optimizer.scales == [1.0]
    assert "cools down" in optimizer.history[-1]["why"]
    assert optimizer.state_dict()["gapaware"]["midway"]
    # otherwise a test of a law that would have held anyway
    assert trained_in_the_cool_down(without_first_lr).scales[0] > 1


def test_where_every_step_was_seen_a_first_learning_rate_far_above_all_does_not_count():
    """A base lr of 1 times a schedule of learning rates, as many write it."""
    model = mlp()
    optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=1.0), mode="escape", window=16)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1e-5)
    train(model, optimizer, 200, scheduler)
    assert optimizer.param_groups[0]["initial_lr"] == 1.0
    assert optimizer.scales[0] > 1
    assert not optimizer.state_dict()["gapaware"]["midway"]


# -- compiled, averaged ---------------------------------------------------------------------------------


def test_a_compiled_model():
    alone, wrapped = mlp(), mlp()
    optimizer_alone, optimizer = adamw(alone), observed(adamw(wrapped))
    for model, each in ((alone, optimizer_alone), (wrapped, optimizer)):
        train(torch.compile(model, backend="aot_eager"), each, 12)
    assert_same_run(optimizer_alone, optimizer, alone.parameters(), wrapped.parameters())


@pytest.mark.parametrize("controller", [lambda seen: 1.0, lambda seen: 2.0])
def test_a_compiled_training_step(controller):
    """`optimizer.step()` inside a compiled function is not traced: the factors stay alive."""
    runs = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = mlp()
        optimizer = wrap(adamw(model), controller=controller)

        def training_step(x, y, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()

        step_function = training_step
        if compiled:
            step_function = torch.compile(training_step, backend="eager")
        for step in range(12):
            step_function(*batch(step))
        runs.append((optimizer, model))
    assert_same_run(runs[0][0], runs[1][0], runs[0][1].parameters(), runs[1][1].parameters())
    assert runs[0][0].scales == runs[1][0].scales == [controller(None)]
    assert runs[0][0].history.column("step") == runs[1][0].history.column("step")


def test_stochastic_weight_averaging():
    from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

    averages = []
    for wrapped in (False, True):
        model = mlp()
        optimizer = observed(adamw(model)) if wrapped else adamw(model)
        swa = AveragedModel(model)
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        scheduler = SWALR(optimizer, swa_lr=1e-3, anneal_epochs=5)
        for step in range(20):
            train(model, optimizer, range(step, step + 1))
            swa.update_parameters(model)
            ema.update_parameters(model)
            scheduler.step()
        update_bn([batch(0)[0]], swa)
        averages.append((swa, ema))
    for one, other in zip(*averages, strict=True):
        assert same_parameters(one, other)


# -- optimizers with habits of their own ------------------------------------------------------------------


class Counting(torch.optim.SGD):
    """Keeps its step count in the group, as Prodigy and schedule-free do, and has two modes."""

    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)
        for group in self.param_groups:
            group["k"] = 0
        self.mode = "eval"

    def train(self):
        self.mode = "train"

    def step(self, closure=None):
        assert self.mode == "train"
        loss = super().step(closure)
        for group in self.param_groups:
            group["k"] = group["k"] + 1
            group["seen_lr"] = group["lr"]
        return loss


@pytest.mark.parametrize("granularity", ["global", "group"])
def test_what_the_base_writes_into_its_groups_stays(granularity):
    params = parameters()
    optimizer = wrap(
        Counting(params, lr=1e-2),
        interval=1,
        granularity=granularity,
        controller=lambda seen: 2.0,
    )
    optimizer.train()  # reaches through
    assert optimizer.mode == "train"
    run(optimizer, params, 10)
    (group,) = optimizer.param_groups
    assert group["k"] == 10
    assert group["lr"] == 1e-2
    assert group["seen_lr"] == 2e-2
    assert len(group["params"]) == len(params)


def test_what_a_hook_writes_into_groups_that_are_divided_stays():
    params = parameters()
    base = torch.optim.SGD(params, lr=1e-2)

    def count(base, args, kwargs):
        for group in base.param_groups:
            group["k"] = group.get("k", 0) + 1

    base.register_step_post_hook(count)
    optimizer = wrap(
        base,
        interval=1,
        granularity="block",
        controller=lambda seen: 2.0 if "tensor 1" not in seen.row else 4.0,
    )
    run(optimizer, params, 10)
    (group,) = optimizer.param_groups
    assert group["k"] == 10
    assert group["lr"] == 1e-2
    assert len(group["params"]) == len(params)


def test_a_base_that_changes_its_own_learning_rate():
    class Decaying(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                group["lr"] = group["lr"] * 0.5
            return loss

    alone, wrapped = parameters(), parameters()
    optimizer_alone = Decaying(alone, lr=1.0)
    optimizer = wrap(Decaying(wrapped, lr=1.0), interval=1, controller=lambda seen: 4.0)
    run(optimizer_alone, alone, 10)
    run(optimizer, wrapped, 10)
    assert optimizer.param_groups[0]["lr"] == optimizer_alone.param_groups[0]["lr"] == 0.5**10


# -- refused, with the way out ----------------------------------------------------------------------------


def bare(**group):
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    optimizer.param_groups[0].update(group)
    return optimizer


@pytest.mark.parametrize(
    ("base", "error", "says"),
    [
        (lambda: [1, 2], TypeError, "not a torch.optim.Optimizer"),
        (lambda: nn.Linear(2, 2), TypeError, "such as torch.optim.AdamW"),
        (lambda: wrap(bare()), TypeError, "base.base"),
        (lambda: bare(lr=None), ValueError, "lr=None"),
        (lambda: bare(lr="fast"), ValueError, "lr='fast'"),
        (
            lambda: torch.optim.SGD(parameters(), lr=0.1, differentiable=True),
            ValueError,
            "pass differentiable=False",
        ),
    ],
)
def test_refused_at_construction(base, error, says):
    with pytest.raises(error, match=says):
        GapAware(base())


@pytest.mark.parametrize(
    "base",
    [
        lambda p: torch.optim.LBFGS(p),
        lambda p: Composite(torch.optim.SGD(p[:1]), Lookahead(torch.optim.SGD(p[1:]))),
        lambda p: Lookahead(torch.optim.SGD(p)),
    ],
)
def test_blocks_are_refused_where_groups_cannot_be_divided(base):
    with pytest.raises(ValueError, match="pass granularity='group'"):
        GapAware(base(parameters()), granularity="block")
    GapAware(base(parameters()), granularity="group")


def test_one_that_accelerate_has_prepared_is_refused():
    accelerate_optimizer = pytest.importorskip("accelerate.optimizer")
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    prepared = accelerate_optimizer.AcceleratedOptimizer(torch.optim.SGD(parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"accelerator\.prepare\(GapAware"):
        GapAware(prepared)


def test_an_optimizer_whose_step_takes_no_closure():
    class Plain(torch.optim.SGD):
        def step(self):
            return super().step()

    alone, mine = parameters(), parameters()
    optimizers = Plain(alone, lr=0.1), wrap(Plain(mine, lr=0.1))
    for optimizer, held in zip(optimizers, (alone, mine), strict=True):
        for _ in range(8):
            for p in held:
                p.grad = torch.ones_like(p)
            optimizer.step()
    assert all(map(torch.equal, alone, mine))


def test_a_fault_is_warned_of_where_a_person_steps():
    def broken(observation):
        raise RuntimeError("no")

    optimizer = wrap(torch.optim.SGD(parameters(), lr=0.1), controller=broken)
    torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)  # which wraps step() once more
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(12):
            optimizer.step()
    assert "took its factors off" in str(caught[0].message)
    assert {warning.filename for warning in caught} == {__file__}


class Lookahead(torch.optim.Optimizer):
    def __init__(self, optimizer):
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, optimizer.defaults)


def test_deepspeed_is_refused():
    class DeepSpeedZeroOptimizer:
        __module__ = "deepspeed.runtime.zero.stage_1_and_2"

    with pytest.raises(Unsupported, match="DeepSpeed partitions the parameters"):
        GapAware(DeepSpeedZeroOptimizer())

    class FusedAdam(torch.optim.Adam):  # its plain optimizers are like any other
        __module__ = "deepspeed.ops.adam.fused_adam"

    GapAware(FusedAdam(parameters()))


def test_parameters_that_deepspeed_partitions_later_are_refused_in_step(monkeypatch):
    params = parameters()
    optimizer = wrap(torch.optim.SGD(params, lr=0.1))
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    partition = torch.randn(12)
    optimizer.param_groups[0]["params"] = [partition.requires_grad_()]
    partition.grad = torch.ones(12)
    with pytest.raises(Unsupported, match="DeepSpeed ZeRO"):
        optimizer.step()


def test_capture_in_a_cuda_graph_is_refused_before_anything_is_done(monkeypatch):
    params = parameters()
    optimizer = wrap(torch.optim.SGD(params, lr=0.1))
    run(optimizer, params, 3)
    before = copy.deepcopy((params, optimizer.state_dict()))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(Unsupported, match="after each replay"):
        optimizer.step()
    assert_equal(before, (params, optimizer.state_dict()))


def test_the_base_class_says_what_is_missing():
    class Incomplete(Delegating):
        param_groups = ()
        state = ()
        defaults = {}  # noqa: RUF012

    optimizer = Incomplete()
    with pytest.raises(NotImplementedError, match="_save"):
        optimizer.state_dict()
    with pytest.raises(NotImplementedError, match="_load"):
        optimizer.load_state_dict({})
