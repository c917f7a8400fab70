"""What is kept of the way from parameters to the accumulator never outlives what it stands for."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from gapaware import GapAware
from gapaware.additions import SMALL
from gapaware.blocks import CHUNK
from gapaware.sketch import CountSketch

CPU = torch.device("cpu")
DIM = 512


def storages(*tensors: torch.Tensor) -> frozenset[int]:
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)


def unasked():
    raise AssertionError("the pieces were looked at")
    yield


def test_a_key_saves_looking_at_the_pieces():
    x = torch.randn(CHUNK + 5000)
    sketch, resident = CountSketch(DIM, 0), storages(x)
    first, _ = sketch.rows([[(x, 0)]], CPU, resident=resident, key="here")
    again, _ = sketch.rows([unasked()], CPU, resident=resident, key="here")
    assert torch.equal(again, first)
    x *= 2
    doubled, _ = sketch.rows([unasked()], CPU, resident=resident, key="here")
    assert torch.equal(doubled, 2 * first)
    for key in ("elsewhere", None):
        with pytest.raises(AssertionError, match="looked at"):
            sketch.rows([unasked()], CPU, resident=resident, key=key)
    assert torch.equal(sketch.rows([[(x, 0)]], CPU, resident=resident, key="here")[0], doubled)


def test_copies_are_asked_for_each_time():
    """They would be out of date, and all of them together as large as the model."""
    x, y = torch.randn(3 * SMALL), torch.randn(100)
    sketch, resident = CountSketch(DIM, 0), storages(x)

    def rows():
        yield [(x, 0)]
        yield [(x[:10].clone(), 0), (y, 10), (x[110:], 110)]

    first, _ = sketch.rows(list(rows()), CPU, resident=resident, key=1)
    x *= 2
    y *= 2
    again, _ = sketch.rows(list(rows()), CPU, resident=resident, key=1)
    assert torch.equal(again, 2 * first)
    # the row of which nothing is a copy was kept
    kept, _ = sketch.rows([unasked(), list(rows())[1]], CPU, resident=resident, key=1)
    assert torch.equal(kept, again)
    with pytest.raises(AssertionError, match="looked at"):
        sketch.rows([unasked(), unasked()], CPU, resident=resident, key=1)


def test_after_a_fault_nothing_is_kept():
    """What is kept adds to sums that a fault has left half done."""
    x = torch.randn(1000)
    sketch, resident = CountSketch(DIM, 0), storages(x)
    expected, _ = sketch.rows([[(x, 0)]], CPU, resident=resident, key=1)

    def breaks():
        yield x, 0
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        sketch.rows([breaks()], CPU, resident=resident, key=2)
    assert torch.equal(sketch.rows([[(x, 0)]], CPU, resident=resident, key=2)[0], expected)


def last_sketch(optimizer: GapAware) -> torch.Tensor:
    return optimizer.state_dict()["gapaware"]["observer"]["last"]


def swap(parameter: torch.nn.Parameter) -> None:
    parameter.data = torch.randn_like(parameter)


def widen_and_narrow(parameter: torch.nn.Parameter) -> None:
    parameter.data = parameter.data.double()
    parameter.data = parameter.data.float() + 1


def free_and_allocate(parameter: torch.nn.Parameter) -> None:
    """As FSDP does between steps."""
    storage = parameter.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    parameter.normal_()


def transpose(parameter: torch.nn.Parameter) -> None:
    parameter.data = parameter.data.t().contiguous().t()


@pytest.mark.parametrize("move", [swap, widen_and_narrow, free_and_allocate, transpose])
@torch.no_grad()
def test_parameters_may_move_between_snapshots(move):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(60, 60)) for _ in range(3)]
    optimizer = GapAware(torch.optim.SGD(parameters, lr=0.1), interval=1, sketch_dim=DIM)
    for _ in range(3):
        for parameter in parameters:
            parameter.mul_(1.01)
        optimizer.step()
    move(parameters[1])
    optimizer.step()
    fresh = GapAware(torch.optim.SGD(parameters, lr=0.1), interval=1, sketch_dim=DIM)
    fresh.step()
    assert torch.equal(last_sketch(optimizer), last_sketch(fresh))


def test_nothing_is_kept_of_what_has_moved():
    """A model that goes to another device would stay in the memory of this one as well."""
    sketch, memory = CountSketch(DIM, 0), np.ones(1000)
    x, held = torch.from_numpy(memory), weakref.ref(memory)
    del memory
    sketch.rows([[(x, 0)]], CPU, resident=storages(x), key="here")
    x = torch.randn(1000)
    assert held() is not None
    sketch.rows([[(x, 0)]], CPU, resident=storages(x), key="there")
    assert held() is None


def test_what_is_kept_goes_with_the_optimizer():
    parameter = torch.nn.Parameter(torch.randn(100))
    optimizer = GapAware(torch.optim.SGD([parameter], lr=0.1), interval=1, sketch_dim=DIM)
    for _ in range(3):
        optimizer.step()
    gone = weakref.ref(parameter)
    del optimizer, parameter
    gc.collect()
    assert gone() is None


class Wrapped(torch.Tensor):
    """A tensor without a storage of its own, as quantized and sharded parameters of other packages are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def bare(value):
            return value.inner if isinstance(value, Wrapped) else value

        out = func(*tree_map(bare, args), **tree_map(bare, kwargs or {}))
        if func is torch.ops.aten.detach.default:
            return Wrapped(out)
        return out


@torch.no_grad()
def test_parameters_without_a_storage_are_read_each_time():
    inner, plain = torch.randn(50), torch.nn.Parameter(torch.randn(20))
    parameter = torch.nn.Parameter(Wrapped(inner))
    optimizer = GapAware(torch.optim.SGD([parameter, plain], lr=0.1), interval=1, sketch_dim=DIM)
    for _ in range(4):
        inner.mul_(1.01)
        optimizer.step()
    assert all(record["decision"] != "fault" for record in optimizer.history)
    bare = [torch.nn.Parameter(inner.clone()), plain]
    fresh = GapAware(torch.optim.SGD(bare, lr=0.1), interval=1, sketch_dim=DIM)
    fresh.step()
    assert torch.equal(last_sketch(optimizer), last_sketch(fresh))
