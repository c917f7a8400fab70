"""Parameters of any shape and dtype with made-up gradients: training without a model."""

import copy

import torch
from torch import nn

SHAPES = ((4, 3), (3, 2), (5,), ())


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_gradients(params, step, sparse=False):
    """A drift that stays and noise that changes, so that spectra have a gap."""
    steady, noise = (torch.Generator().manual_seed(seed) for seed in (7, 100 + step))
    for p in params:
        real = [torch.randn(p.shape, generator=g) for g in (steady, noise)]
        gradient = (real[0] + 0.3 * real[1]).to(p.dtype)
        p.grad = gradient.to_sparse() if sparse else gradient


def run(optimizer, params, steps, sparse=False):
    for step in range(steps) if isinstance(steps, int) else steps:
        if isinstance(inner(optimizer), torch.optim.LBFGS):
            optimizer.step(quadratic(params))
        else:
            set_gradients(params, step, sparse)
            optimizer.step()


def quadratic(params):
    def closure():
        loss = sum(((p - 1).abs() ** 2).sum() * (n + 1) for n, p in enumerate(params))
        for p in params:
            p.grad = None
        loss.backward()
        return loss

    return closure


def inner(optimizer):
    return getattr(optimizer, "base", optimizer)


def assert_equal(one, other, where=""):
    """Nested containers of tensors and numbers are the same, bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        one, other = (each.detach().to_dense() for each in (one, other))
        assert torch.equal(one.isnan(), other.isnan()), where
        assert torch.equal(one[~one.isnan()], other[~other.isnan()]), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for n, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{n}]")
    else:
        assert one == other or (one != one and other != other), where


def base_state(optimizer):
    """The state dict without GapAware's part, apart from the live one."""
    state = copy.deepcopy(optimizer.state_dict())
    state.pop("gapaware", None)
    return state


def assert_same_run(alone, wrapped, params_alone, params_wrapped):
    assert_equal(list(params_alone), list(params_wrapped), "parameters")
    assert_equal(base_state(alone), base_state(wrapped), "state")
