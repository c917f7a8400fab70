"""What only a GPU shows: nothing in step() waits for it, and the kernel's sketch is the CPU's.

The first tests run without one: they watch for what would wait, on the CPU.
"""

import copy
import io

import numpy as np
import pytest
import torch
from models import batch, mlp, same_parameters
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gapaware import Composite, Decision, GapAware, reference
from gapaware.observer import Observer
from gapaware.refusals import Unsupported
from gapaware.sketch import CHUNK, CountSketch
from gapaware.transfer import Transfer

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WATCH = {"window": 32, "sketch_dim": 512, "interval": 1, "mode": "escape"}

BASES = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-3, weight_decay=0.1),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4),
    "adamw loop": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, foreach=False),
    "adamw fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True),
    "adamw capturable": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, capturable=True),
    "adamw fused, lr on the GPU": lambda m: torch.optim.AdamW(
        m.parameters(), lr=torch.tensor(1e-4, device=GPU), fused=True
    ),
    "adamw capturable, lr on the GPU": lambda m: torch.optim.AdamW(
        m.parameters(), lr=torch.tensor(1e-4, device=GPU), capturable=True
    ),
    "muon and adamw": lambda m: Composite(
        torch.optim.Muon([p for p in m.parameters() if p.ndim == 2], lr=1e-3),
        torch.optim.AdamW([p for p in m.parameters() if p.ndim != 2], lr=1e-4),
    ),
}


def faults(optimizer):
    return [record for record in optimizer.history if record["decision"] == "fault"]


def train(model, optimizer, steps, forbid=None):
    """Steps on one batch; `forbid` makes a context in which only `optimizer.step()` runs."""
    device = next(model.parameters()).device
    x, y = (t.to(device) for t in batch(0))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        if forbid is None:
            optimizer.step()
        else:
            with forbid():
                optimizer.step()


# -- without a GPU ----------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Notes operators that need a tensor's values on the host, except values that a Transfer brought."""

    # float(), bool() and item() are the first; the sizes of the others' results depend on values
    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "equal", "is_nonzero")

    def __init__(self, arrived):
        super().__init__()
        self.arrived = arrived
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        brought = args and isinstance(args[0], torch.Tensor) and _storage(args[0]) in self.arrived
        if name.startswith(self.WAITING) and not brought:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.fixture
def arrived(monkeypatch):
    seen, result = set(), Transfer.result

    def noted(self):
        tensor = result(self)
        seen.add(_storage(tensor))
        return tensor

    monkeypatch.setattr(Transfer, "result", noted)
    return seen


@pytest.mark.parametrize("granularity", ["global", "block"])
def test_step_reads_no_value_but_those_that_were_sent(granularity, arrived):
    """Each read would be a synchronisation on a GPU."""
    model = mlp()
    optimizer = GapAware(BASES["sgd"](model), granularity=granularity, **WATCH)
    reads = Reads(arrived)
    train(model, optimizer, 100, lambda: reads)
    assert reads.found == []
    assert not faults(optimizer)
    assert sum(record["spectrum"] is not None for record in optimizer.history) > 60
    assert max(optimizer.scales) > 1


def test_reads_are_noticed(arrived):
    """So that the test above can fail."""
    with Reads(arrived) as reads:
        bool(torch.ones(3).isfinite().all())
        float(torch.ones(()))
        float(Transfer(torch.ones(())).result())
    assert reads.found == ["_local_scalar_dense"] * 2


# -- the sketch -------------------------------------------------------------------------------------


def sketch_of(tensors, device, dim=16_384):
    pieces, place = [], 0
    for tensor in tensors:
        pieces.append((tensor.to(device).reshape(-1), place))
        place += tensor.numel()
    resident = frozenset(_storage(flat) for flat, _ in pieces)
    return CountSketch(dim, 0).rows([pieces], device, resident=resident)[0].cpu()[0]


def random(*sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@cuda
def test_the_kernel_is_what_runs():
    from gapaware.sketch import _has_kernel

    assert _has_kernel(GPU)


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [(1,), (1000,), (CHUNK + 3,), (5, 70_000, 3, 2 * CHUNK, 1, 9000, CHUNK), (300 * CHUNK + 5,)],
)
def test_equals_the_cpu_and_the_reference(dtype, sizes):
    tensors = random(*sizes, dtype=dtype)
    got, cpu = sketch_of(tensors, GPU), sketch_of(tensors, CPU)
    exact = reference.count_sketch(torch.cat(tensors).double().numpy(), 16_384, 0)
    assert np.abs(got.numpy() - exact).max() <= 1e-6 * np.abs(exact).max()
    assert (got - cpu).abs().max() <= 1e-6 * cpu.abs().max()


@cuda
@pytest.mark.parametrize("dim", [64, 1000, 16_384, CHUNK])
def test_any_dim(dim):
    tensors = random(3 * CHUNK, 500)
    got, cpu = sketch_of(tensors, GPU, dim), sketch_of(tensors, CPU, dim)
    assert (got - cpu).abs().max() <= 1e-6 * cpu.abs().max()


@cuda
def test_same_bits_on_every_run_and_at_every_address():
    tensors = [tensor.to(GPU) for tensor in random(5, 90 * CHUNK, 70_001, 9000)]
    first = sketch_of(tensors, GPU)
    for _ in range(20):
        assert torch.equal(sketch_of(tensors, GPU), first)
        assert torch.equal(sketch_of([tensor.clone() for tensor in tensors], GPU), first)


def of_all_kinds(device):
    """Parameters that the kernel reads, and some that go the other way."""
    big, small, half, double = random(3 * CHUNK, 1000, 5000, 700)
    return [
        nn.Parameter(t)
        for t in (
            big.to(device).view(3, CHUNK),
            small.to(device).view(20, 50).t(),
            half.to(device).bfloat16(),
            half.to(device).half()[1:].clone(),
            double.to(device).double(),
            torch.complex(small, small.flip(0)).to(device),
            torch.ones((), device=device),
            big.to(device)[::2],
        )
    ]


@cuda
@pytest.mark.parametrize("granularity", ["global", "block"])
def test_parameters_of_all_kinds(granularity):
    found = []
    for device in (CPU, GPU):
        base = torch.optim.SGD(of_all_kinds(device), lr=0.1)
        observer = Observer(5, 1024, granularity, seed=0)
        observer.start(base)
        found.append(observer.state_dict()["last"].cpu())
    cpu, gpu = found
    assert ((gpu - cpu).abs().amax(1) <= 1e-6 * cpu.abs().amax(1)).all()


# -- nothing waits ----------------------------------------------------------------------------------


class NoWaiting:
    """Inside, torch raises where the host would wait for the GPU."""

    def __enter__(self):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.parametrize("granularity", ["global", "group", "block"])
@pytest.mark.parametrize("base", BASES)
def test_step_never_waits(base, granularity):
    alone = mlp().to(GPU)
    try:
        train(alone, BASES[base](alone), 2, NoWaiting)
    except RuntimeError as error:
        pytest.skip(f"torch's own optimizer waits: {error}")
    model = mlp().to(GPU)
    optimizer = GapAware(BASES[base](model), granularity=granularity, **WATCH)
    # the first step, with its compilation and the first copies, included
    train(model, optimizer, 90, NoWaiting)
    assert not faults(optimizer), faults(optimizer)
    assert sum(record["spectrum"] is not None for record in optimizer.history) > 30
    # a factor other than 1 was in force on the way, too
    assert max(optimizer.scales) > 1


@cuda
def test_a_push_does_not_wait_and_needs_room(monkeypatch):
    def always(_):
        return Decision(1.0, push=1.0)

    model = mlp().to(GPU)
    optimizer = GapAware(BASES["adamw fused"](model), controller=always, **WATCH)
    train(model, optimizer, 60, NoWaiting)
    assert not faults(optimizer), faults(optimizer)
    assert optimizer.history[-1]["push"] == 1.0
    # what a person's run has reserved stays its own
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 << 30))
    model = mlp().to(GPU)
    optimizer = GapAware(BASES["adamw fused"](model), controller=always, **WATCH)
    with pytest.warns(UserWarning, match="for a copy of the weights"):
        train(model, optimizer, 60)
    assert "push" not in optimizer.history[-1]


@cuda
def test_an_average_does_not_wait_and_needs_room(monkeypatch):
    def always(_):
        return Decision(2.0, average=True)

    model = mlp().to(GPU)
    optimizer = GapAware(BASES["adamw fused"](model), controller=always, **WATCH)
    optimizer.train()
    train(model, optimizer, 60, NoWaiting)
    assert not faults(optimizer), faults(optimizer)
    trained = [p.detach().clone() for p in model.parameters()]
    with NoWaiting():
        optimizer.eval()
    assert not any(map(torch.equal, trained, model.parameters()))
    with NoWaiting():
        optimizer.train()
    assert all(map(torch.equal, trained, model.parameters()))
    # what a person's run has reserved stays its own
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 << 30))
    model = mlp().to(GPU)
    optimizer = GapAware(BASES["adamw fused"](model), controller=always, **WATCH)
    optimizer.train()
    with pytest.warns(UserWarning, match="keeps no average of the weights"):
        train(model, optimizer, 60)
    assert optimizer.scales == [2.0]


@cuda
def test_waiting_is_noticed():
    """So that the test above can fail."""
    x = torch.ones(3, device=GPU)
    with pytest.raises(RuntimeError), NoWaiting():
        float(x.sum())


@cuda
def test_neither_a_scheduler_nor_logging_nor_a_closure_makes_it_wait():
    model = mlp().to(GPU)
    optimizer = GapAware(BASES["adamw fused"](model), **WATCH)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    for step in range(30):
        x, y = (t.to(GPU) for t in batch(step))

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        with NoWaiting():
            loss = optimizer.step(closure)
            optimizer.log(other=loss.detach())
        scheduler.step()
    assert not faults(optimizer)
    assert any("loss" in record for record in optimizer.history)


@cuda
def test_a_loaded_state_comes_back_without_waiting():
    """A checkpoint is on the CPU; the window goes to the GPU at the next snapshot."""
    model = mlp().to(GPU)
    optimizer = GapAware(BASES["adamw fused"](model), **WATCH)
    train(model, optimizer, 12)
    optimizer.load_state_dict(to_cpu_and_back(optimizer.state_dict()))
    train(model, optimizer, 12, NoWaiting)
    assert not faults(optimizer)


# -- with the rest of torch -------------------------------------------------------------------------


def to_cpu_and_back(state):
    """As in a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


@cuda
@pytest.mark.parametrize("base", ["sgd", "adamw fused", "adamw capturable"])
def test_resume_through_the_cpu_bit_for_bit(base):
    model = mlp().to(GPU)
    optimizer = GapAware(BASES[base](model), **WATCH)
    train(model, optimizer, 23)
    saved, weights = to_cpu_and_back(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, 30)

    twin = mlp().to(GPU)
    twin.load_state_dict(weights)
    # by way of an optimizer on the CPU
    on_cpu = mlp()
    on_cpu.load_state_dict(weights)
    middle = GapAware(torch.optim.AdamW(on_cpu.parameters(), lr=1e-4), **WATCH)
    middle.load_own_state(saved["gapaware"])
    passed_on = {**saved, "gapaware": to_cpu_and_back(middle.state_dict()["gapaware"])}
    other = GapAware(BASES[base](twin), **WATCH)
    other.load_state_dict(passed_on)
    train(twin, other, 30)
    assert same_parameters(model, twin)
    assert optimizer.scales == other.scales
    one, two = (o.state_dict()["gapaware"]["observer"] for o in (optimizer, other))
    assert torch.equal(one["window"]["ring"], two["window"]["ring"])
    assert torch.equal(one["window"]["gram"], two["window"]["gram"])


@cuda
def test_factors_one_change_nothing():
    alone, watched = mlp().to(GPU), mlp().to(GPU)
    train(alone, BASES["adamw fused"](alone), 30)
    train(watched, GapAware(BASES["adamw fused"](watched), **{**WATCH, "mode": "observe"}), 30)
    assert same_parameters(alone, watched)


@cuda
def test_same_run_twice_bit_for_bit():
    models = [mlp().to(GPU) for _ in range(2)]
    for model in models:
        train(model, GapAware(BASES["adamw fused"](model), **WATCH), 60)
    assert same_parameters(*models)


@cuda
def test_sees_what_the_cpu_sees():
    """The same parameters, moved by hand, have the same spectra on both devices."""
    seen = []
    for device in (CPU, GPU):
        model = mlp().to(device)
        optimizer = GapAware(
            torch.optim.SGD(model.parameters(), lr=0.0), **{**WATCH, "mode": "observe"}
        )
        generator = torch.Generator().manual_seed(0)
        for group in optimizer.param_groups:
            group["lr"] = 1.0
        for _ in range(40):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
                step = 1e-3 * torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(step.to(device))
            optimizer.step()
        spectra = [record["spectrum"] for record in optimizer.history if record["spectrum"]]
        seen.append([s["sigma"] for s in spectra])
    assert len(seen[0]) > 30
    for cpu, gpu in zip(*seen, strict=True):
        np.testing.assert_allclose(gpu, cpu, rtol=1e-5)


@cuda
@pytest.mark.parametrize("fused", [True, False])
def test_grad_scaler(fused):
    """A step that overflows is skipped and is no fault."""
    model = mlp().to(GPU)
    base = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    optimizer = GapAware(base, **WATCH)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    for step in range(24):
        x, y = (t.to(GPU) for t in batch(step))
        with torch.autocast("cuda", torch.float16):
            loss = (model(x) - y).square().mean()
        if step in (2, 7, 8):
            loss = loss * float("inf")
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved == (step not in (2, 7, 8))
    assert not faults(optimizer)


@cuda
def test_refuses_to_be_captured():
    model = mlp().to(GPU)
    optimizer = GapAware(BASES["adamw capturable"](model), **WATCH)
    train(model, optimizer, 3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(Unsupported, match="CUDA graph"), torch.cuda.graph(graph):
        optimizer.step()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_devices():
    model = mlp()
    model[0].to("cuda:0")
    model[2].to("cuda:1")
    model[4].to("cuda:1")
    observer = Observer(5, 1024, "block", seed=0)
    observer.start(torch.optim.SGD(model.parameters(), lr=0.1))
    got = observer.state_dict()["last"]
    on_cpu = Observer(5, 1024, "block", seed=0)
    on_cpu.start(torch.optim.SGD(model.to("cpu").parameters(), lr=0.1))
    cpu = on_cpu.state_dict()["last"]
    assert got.device.index == 0
    assert (got.cpu() - cpu).abs().max() <= 1e-6 * cpu.abs().max()


# -- what it costs ----------------------------------------------------------------------------------


def launches(sizes, granularity, dim=1024):
    """Kernels and copies of one snapshot, by name."""
    parameters = [nn.Parameter(torch.randn(size, device=GPU)) for size in sizes]
    base = torch.optim.SGD(parameters, lr=0.1)
    observer = Observer(5, dim, granularity, seed=0)
    with torch.no_grad():
        observer.start(base)
        rows = len(observer.names)
        observer.look(base, 1, [_scales()] * rows)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            observer.look(base, 2, [_scales()] * rows)
            torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == device]


def _scales():
    from gapaware.scaling import Scales

    return Scales()


@cuda
def test_launches_do_not_grow_with_tensors():
    few, many = launches([4096] * 3, "global"), launches([4096] * 300, "global")
    assert len(many) == len(few) <= 40
    assert sum("_add_up" in name for name in many) == 1
    assert sum("_fold" in name for name in many) == 1


@cuda
@pytest.mark.parametrize("size", [4096, CHUNK + 1])
def test_launches_of_many_blocks_are_bounded(size):
    dim = 16_384
    names = launches([size] * 300, "block", dim)
    batches = 2 + CHUNK // (2 * dim)
    assert sum("_add_up" in name for name in names) <= batches
    assert sum("_fold" in name for name in names) <= batches
    assert len(names) <= 40 + 2 * batches


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype):
    """State, tables and what a snapshot takes for a moment: under 0.1 % of the parameters and 8 MB."""
    parameters = [
        nn.Parameter(torch.randn(n, 1000, device=GPU, dtype=dtype))
        for n in (50_000, 7, 3000, 1) * 2
    ]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    bytes_of_parameters = sum(p.numel() * p.element_size() for p in parameters)
    base = torch.optim.SGD(parameters, lr=0.1, foreach=False)
    base.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer = GapAware(base, mode="escape", interval=5)
    for _ in range(80):
        optimizer.step()
    torch.cuda.synchronize()
    assert not faults(optimizer)
    state = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    print(f"{dtype}: state {state / 1e6:.2f} MB, peak {peak / 1e6:.2f} MB")
    assert state <= peak <= 1e-3 * bytes_of_parameters + 8e6
