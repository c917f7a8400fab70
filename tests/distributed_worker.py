"""What each process of tests/test_distributed.py does: run by name, the results go to a file."""

import contextlib
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from gapaware import Decision, GapAware, Observation, push, rescue
from gapaware.checkpoint import OwnState
from gapaware.distributed import Unsupported, sharing
from gapaware.layout import Row, real_size
from gapaware.sketch import CountSketch

STEPS, INTERVAL, DIM = 16, 2, 4096
DECISIONS = ("raise", "hold", "lower")
HIDDEN = 1501  # the middle matrix is longer than a chunk of the sketch, and nothing divides evenly


def network(hidden: int = HIDDEN) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, hidden), nn.Tanh(), nn.Linear(hidden, 101), nn.Tanh(), nn.Linear(101, 2)
    )


def wrapped(model: nn.Module, **arguments: Any) -> GapAware:
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if "weight" in n], "weight_decay": 0.1},
        {"params": [p for n, p in named if "weight" not in n], "weight_decay": 0.0},
    ]
    defaults = {
        "window": 4,
        "interval": INTERVAL,
        "sketch_dim": DIM,
        "granularity": "group",
        "controller": law,
    }
    return GapAware(torch.optim.AdamW(groups, lr=1e-3), **{**defaults, **arguments})


def law(observation: Observation) -> Decision:
    """Smooth in what it sees, so that float error stays float error; remembers and counts."""
    calls = observation.memory.get("calls", 0) + 1
    scale = observation.scale
    if observation.spectrum is not None:
        scale *= 1.1 + 0.05 * math.tanh(math.log(observation.spectrum.adiabaticity))
    return Decision(scale, interval=2 + calls % 2, memory={"calls": calls})


def train(
    model: nn.Module,
    optimizer: GapAware,
    steps: Iterable[int] = range(STEPS),
    after: Callable[[float], None] = lambda loss: None,
) -> list[int]:
    """The same batch on every rank; returns the bytes of each collective that a `step` started."""
    sent: list[int] = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 12, generator=generator)
        loss = (model(x) - torch.stack((x[:, 0] * x[:, 1], x.sum(1).sin()), 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        with collectives(sent):
            optimizer.step()
        after(loss.item())
    return sent


@contextlib.contextmanager
def collectives(sent: list[int]) -> Iterator[None]:
    """Note the bytes of every all-reduce; -1 for any other collective."""
    original = dist.all_reduce

    def noting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = noting
    counter = CommDebugMode()
    before = len(sent)
    try:
        with counter:
            yield
    finally:
        dist.all_reduce = original
    sent += [-1] * (counter.get_total_counts() - (len(sent) - before))


def seen(optimizer: GapAware) -> dict[str, Any]:
    """Everything that decisions are made from, and the decisions."""
    state = optimizer.state_dict()["gapaware"]
    return {
        "last": state["observer"]["last"],
        "gram": (state["observer"]["window"] or {}).get("gram"),
        "risks": optimizer.history.column("risk"),
        "signature": state["observer"]["signature"],
        "steering": state["steering"],
        "interval": optimizer.interval,
        "scales": [r.get("next_scale") for r in optimizer.history],
        "sigma": [
            r["spectrum"] and r["spectrum"]["sigma"] for r in optimizer.history if "spectrum" in r
        ],
        "steps": [r["step"] for r in optimizer.history],
        "faults": [r.get("why") for r in optimizer.history if r.get("decision") not in DECISIONS],
    }


def run(
    shard: Callable[[nn.Module], nn.Module], hidden: int = HIDDEN, **arguments: Any
) -> dict[str, Any]:
    model = shard(network(hidden))
    optimizer = wrapped(model, **arguments)
    sent = train(model, optimizer)
    return {**seen(optimizer), "sent": sent}


def fsdp(model: nn.Module, **arguments: Any) -> nn.Module:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **arguments)
    return fully_shard(model, **arguments)


# -- two processes --------------------------------------------------------------------------------


def fully_sharded(folder: Path) -> Any:
    return run(fsdp)


def by_block(folder: Path) -> Any:
    return run(fsdp, granularity="block", interval="auto")


def exact(folder: Path) -> Any:
    return run(fsdp, sketch_dim=None)


def replicas(folder: Path) -> Any:
    return run(DistributedDataParallel)


def sharded_in_the_middle(model: nn.Module) -> nn.Module:
    fully_shard(model[2])
    return model


def partly_sharded(folder: Path) -> Any:
    return run(sharded_in_the_middle)


def other_sharding(folder: Path) -> list[str]:
    """What refusing says, for each way to shard that cannot be observed."""
    said = []

    def attempt(build: Callable[[], Any]) -> None:
        try:
            build()
        except Unsupported as error:
            said.append(str(error))
        else:
            said.append("not refused")

    for original in (True, False):
        model = FullyShardedDataParallel(
            network(), use_orig_params=original, device_id=torch.device("cpu")
        )
        attempt(lambda m=model: GapAware(torch.optim.AdamW(m.parameters(), lr=1e-3)))
    zero = ZeroRedundancyOptimizer(network().parameters(), torch.optim.AdamW, lr=1e-3)
    attempt(lambda: GapAware(zero))
    mesh = init_device_mesh("cpu", (2,))
    partial = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    shard = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Shard(0)]))
    attempt(lambda: GapAware(torch.optim.SGD([partial, shard], lr=0.1)).step())
    return said


def quietly(action: Callable[[], None]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if "GapAware" in str(w.message)]


def controller_fault(folder: Path) -> Any:
    """A controller that raises on one rank only, as one that writes to a service would."""

    def fragile(observation: Observation) -> Decision:
        if dist.get_rank() == 1 and observation.step == 20:
            raise ConnectionError("no answer")
        return law(observation)

    model = fsdp(network())
    optimizer = wrapped(model, controller=fragile, interval="auto")
    warned = quietly(lambda: train(model, optimizer, range(70)))
    return {**seen(optimizer), "warned": warned}


def break_next_sketch(optimizer: GapAware, rank: int) -> None:
    """Let one rank run out of memory in its next sketch, and only in that one."""
    healthy = optimizer._observer._sketch

    class Full(CountSketch):
        def rows(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            optimizer._observer._sketch = healthy
            raise MemoryError("no memory on this rank")

    if dist.get_rank() == rank:
        optimizer._observer._sketch = Full(DIM, 0)


def sketch_fault(folder: Path) -> Any:
    model = fsdp(network())
    optimizer = wrapped(model)
    train(model, optimizer, range(5))
    break_next_sketch(optimizer, rank=1)
    warned = quietly(lambda: train(model, optimizer, range(5, STEPS)))
    return {**seen(optimizer), "warned": warned}


def replica_fault(folder: Path) -> Any:
    """Replicas that say which ranks they are on: what happens to one happens to all."""
    model = DistributedDataParallel(network())
    optimizer = wrapped(model, process_group=dist.group.WORLD)
    train(model, optimizer, range(9))
    break_next_sketch(optimizer, rank=1)
    warned = quietly(lambda: train(model, optimizer, range(9, 30)))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {**seen(optimizer), "warned": warned, "weights": weights}


def push_fault(folder: Path) -> Any:
    """Replicas, one of which has no memory for a push: none is pushed, so that they stay replicas."""
    model = DistributedDataParallel(network())
    pushing = {"controller": lambda seen: Decision(1.0, push=2.0)}
    optimizer = wrapped(model, process_group=dist.group.WORLD, **pushing)

    def no_room(parameters: Any) -> None:
        raise MemoryError("no memory on this rank")

    check = push.check_room
    if dist.get_rank() == 1:
        push.check_room = no_room
    warned = quietly(lambda: train(model, optimizer, range(30)))
    push.check_room = check
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    pushes = [record.get("push", 0.0) for record in optimizer.history]
    return {**seen(optimizer), "warned": warned, "weights": weights, "pushes": pushes}


def fault_before_a_push(folder: Path) -> Any:
    """The controller of one rank raises where that of the other lets a push begin."""

    def fragile(observation: Observation) -> Decision:
        if dist.get_rank() == 1 and observation.step == 20:
            raise ConnectionError("no answer")
        return Decision(1.0, push=2.0 * (observation.step >= 20))

    model = DistributedDataParallel(network())
    optimizer = wrapped(model, process_group=dist.group.WORLD, controller=fragile)
    warned = quietly(lambda: train(model, optimizer, range(40)))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {**seen(optimizer), "warned": warned, "weights": weights}


def start_fault(folder: Path) -> Any:
    """One rank has no memory for the starting weights."""
    model = DistributedDataParallel(network())
    optimizer = wrapped(model, process_group=dist.group.WORLD, mode="retain", controller=None)

    def no_room(*given: torch.Tensor) -> torch.Tensor:
        raise MemoryError("no memory on this rank")

    if dist.get_rank() == 1:
        optimizer._anchor._kept = no_room  # type: ignore[method-assign, union-attr]
    return {"warned": quietly(lambda: train(model, optimizer)), "steps": optimizer._steps}


def warm_up(folder: Path) -> Any:
    """The first learning rate is zero, and of the gradient of a head that begins at zero one shard is."""
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))
    nn.init.zeros_(model[2].weight)
    optimizer = wrapped(fsdp(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(2, 12)).square().mean().backward()
        optimizer.step()
        schedule.step()
    return optimizer._steps


def trainers_optimizer(folder: Path) -> Any:
    from gapaware.huggingface import Factory

    def base(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters())

    optimizer = Factory()(network(), args=None, base=base)
    return optimizer._observer.replicas


def accounting_fault(folder: Path) -> Any:
    """An exception between two snapshots, on one rank only."""
    model = fsdp(network())
    optimizer = wrapped(model)
    train(model, optimizer, range(5))
    if dist.get_rank() == 0:
        optimizer._observer._rates = []
    warned = quietly(lambda: train(model, optimizer, range(5, STEPS)))
    return {**seen(optimizer), "warned": warned}


def not_a_number(folder: Path) -> Any:
    model = fsdp(network())
    optimizer = wrapped(model)
    train(model, optimizer, range(7))
    if dist.get_rank() == 1:
        model[2].weight.to_local().detach()[0, 0] = float("nan")
    warned = quietly(lambda: train(model, optimizer, range(7, STEPS)))
    return {**seen(optimizer), "warned": warned}


def losses(folder: Path) -> Any:
    """Each rank has a loss of its own, which must not part the replicas."""

    def believer(observation: Observation) -> float:
        return 1.0 if observation.loss is None else 2.0 + observation.loss

    model = DistributedDataParallel(network(40))
    optimizer = wrapped(model, controller=believer)
    for step in range(6):
        optimizer.log(loss=float(dist.get_rank()))
        train(model, optimizer, range(step, step + 1))
    return {"scales": optimizer.scales, "losses": optimizer.history.column("loss")}


SHARDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "shards": fsdp,
    "replicas": DistributedDataParallel,
}


def believer(observation: Observation) -> float:
    """A controller that goes by the loss."""
    return 1.0 if observation.loss is None else 2.0 + observation.loss


def together(kind: str) -> dict[str, Any]:
    """What a wrapper needs to know of models that are trained by several ranks."""
    return {"process_group": dist.group.WORLD} if kind == "replicas" else {}


def shared_losses(folder: Path) -> Any:
    """Ranks that share a sketch share their losses with it; at the end one of them logs none."""
    found = {}
    for kind, shard in SHARDS.items():
        model = shard(network(40))
        optimizer = wrapped(model, controller=believer, **together(kind))
        scales = []
        for step in range(24):
            if step < 12 or dist.get_rank() == 1:
                optimizer.log(loss=float(dist.get_rank()))
            train(model, optimizer, range(step, step + 1))
            scales.append(optimizer.scales[0])
        found[kind] = {"scales": scales, "losses": optimizer.history.column("loss")}
    return found


def escaping(kind: str, shard: Callable[[nn.Module], nn.Module]) -> Any:
    """The built-in law at a learning rate that is far too small, by losses that differ between ranks."""
    rank, ranks = (dist.get_rank(), 2) if dist.is_initialized() else (0, 1)
    model = shard(network(40))
    base = torch.optim.AdamW(model.parameters(), lr=1e-6)
    # a push begins two snapshots later where there are others
    optimizer = GapAware(base, interval=5, max_push=0, **together(kind))
    part = 2 * (rank + 1) / (ranks + 1)  # of the loss, 1 in the mean of the ranks
    one_batch = [0] * 120
    train(model, optimizer, one_batch, lambda loss: optimizer.log(loss=part * loss))
    return seen(optimizer)


def escaped(folder: Path) -> Any:
    return {kind: escaping(kind, shard) for kind, shard in SHARDS.items()}


def returning(observation: Observation) -> Decision:
    """Keeps the weights at its second decision, and goes back at its sixth if it can."""
    calls = observation.memory.get("calls", 0) + 1
    memory = {"calls": calls, "kept": [*observation.memory.get("kept", []), observation.kept]}
    return Decision(4.0, keep=calls == 2, back=calls == 6, memory=memory)


def go_back(
    shard: Callable[[nn.Module], nn.Module],
    kind: str,
    harm: Callable[[nn.Module, GapAware], None] = lambda *_: None,
    at: int = 13,
    controller: Callable[[Observation], Decision] = returning,
) -> Any:
    """Train with a controller that goes back at step 22; something happens after step `at`."""
    model = shard(network(40))
    optimizer = wrapped(model, controller=controller, granularity="global", **together(kind))
    trail: list[torch.Tensor] = []

    def after(loss: float) -> None:
        trail.append(torch.cat([p.flatten() for p in weights(model)]))
        if len(trail) == at:
            harm(model, optimizer)

    warned = quietly(lambda: train(model, optimizer, range(30), after))
    backs = [(r["step"], r["back_to"]) for r in optimizer.history if "back_to" in r]
    kept = optimizer.state_dict()["gapaware"]["steering"]["memory"].get("all", {})
    return {
        **seen(optimizer),
        "warned": warned,
        "backs": backs,
        "kept": kept.get("kept"),
        "trail": trail,
    }


def way_back(folder: Path) -> Any:
    return {kind: go_back(shard, kind) for kind, shard in SHARDS.items()}


def no_way_back(folder: Path) -> Any:
    """One rank has no memory for a copy: none goes back."""

    def no_room(tensors: Any) -> None:
        raise MemoryError("no memory on this rank")

    check = rescue.check_room
    if dist.get_rank() == 1:
        rescue.check_room = no_room
    found = {kind: go_back(shard, kind) for kind, shard in SHARDS.items()}
    rescue.check_room = check
    return found


def copy_let_go(folder: Path) -> Any:
    """One rank lets go of its copy after all have said that they have one."""

    def forget(model: nn.Module, optimizer: GapAware) -> None:
        if dist.get_rank() == 1:
            optimizer._copies.rescue.forget()

    return {kind: go_back(shard, kind, forget, at=17) for kind, shard in SHARDS.items()}


def fault_in_a_return(folder: Path) -> Any:
    """One rank decides to go back where the controller of the other raises."""

    def fragile(observation: Observation) -> Decision:
        decision = returning(observation)
        if decision.back and dist.get_rank() == 1:
            raise ConnectionError("no answer")
        return decision

    return {kind: go_back(shard, kind, controller=fragile) for kind, shard in SHARDS.items()}


def lost(folder: Path) -> Any:
    """NaN in the weights, unseen by autograd: every rank goes back."""

    def spoil(model: nn.Module, optimizer: GapAware) -> None:
        if dist.get_rank() == 1 or isinstance(model, DistributedDataParallel):
            next(iter(model.parameters())).data.fill_(float("nan"))

    return {kind: go_back(shard, kind, spoil) for kind, shard in SHARDS.items()}


def fault_with_a_copy(folder: Path) -> Any:
    """A rank without memory for a sketch is no reason to go back."""

    def fault(model: nn.Module, optimizer: GapAware) -> None:
        break_next_sketch(optimizer, rank=1)

    return {kind: go_back(shard, kind, fault) for kind, shard in SHARDS.items()}


def one_log(folder: Path) -> list[str]:
    model = fsdp(network())
    optimizer = wrapped(model, log_to=folder / "log" / "run.jsonl")
    train(model, optimizer)
    dist.barrier()
    return sorted(path.name for path in (folder / "log").iterdir())


def checkpoint(model: nn.Module, optimizer: GapAware) -> dict[str, Any]:
    """What a distributed checkpoint holds."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "gapaware": OwnState(optimizer),
    }


def weights(model: nn.Module) -> list[torch.Tensor]:
    """The whole parameters, on every rank."""
    return [
        p.full_tensor().detach() if isinstance(p, DTensor) else p.detach()
        for p in model.parameters()
    ]


def anchored(shard: Callable[[nn.Module], nn.Module]) -> list[torch.Tensor]:
    """Trained in mode retain."""
    model = shard(network())
    train(model, wrapped(model, mode="retain", controller=None, interval="auto", max_scale=64.0))
    return weights(model)


def extrapolated(shard: Callable[[nn.Module], nn.Module]) -> list[torch.Tensor]:
    """Trained with a push along the recent steps, which begins when it does where there are ranks."""
    model = shard(network())
    optimizer = wrapped(model, controller=lambda seen: Decision(1.0, push=2.0))
    optimizer._is_shared = lambda: True
    train(model, optimizer)
    return weights(model)


def pushed(folder: Path) -> Any:
    return extrapolated(fsdp)


def averaged(folder: Path) -> Any:
    """Of shards there is no average; of replicas each has its own, whoever asks for it."""
    found = {}
    for kind, shard in (
        ("shards", fsdp),
        ("partly", sharded_in_the_middle),
        ("replicas", DistributedDataParallel),
    ):
        model = shard(network())
        group = dist.group.WORLD if kind == "replicas" else None
        averaging = {"controller": lambda seen: Decision(2.0, average=True)}
        optimizer = wrapped(model, process_group=group, **averaging)
        if kind != "replicas" or dist.get_rank() == 0:
            optimizer.train()
        train(model, optimizer)
        trained = [p.clone() for p in weights(model)]
        optimizer.eval()
        found[kind] = (trained, [p.clone() for p in weights(model)])
        optimizer.train()
        train(model, optimizer, range(STEPS, STEPS + 4))
        found[f"{kind}, later"] = weights(model)
    return found


def swapped(folder: Path) -> Any:
    """Every rank swaps other weights in and out; the first one alone saves or evaluates in between."""
    found = []
    for meanwhile in (lambda optimizer: optimizer.state_dict(), evaluated):
        model = DistributedDataParallel(network(40))
        pushing = {"controller": lambda seen: Decision(2.0, push=1.0, keep=True)}
        optimizer = wrapped(model, process_group=dist.group.WORLD, granularity="global", **pushing)
        for step in range(0, STEPS, 4):
            train(model, optimizer, range(step, step + 4))
            trained = [p.detach().clone() for p in model.parameters()]
            with torch.no_grad():
                torch._foreach_mul_(list(model.parameters()), 0.5)
            if dist.get_rank() == 0:
                meanwhile(optimizer)
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), trained)
        pushes = any(record.get("push") for record in optimizer.history)
        found.append((pushes, optimizer._copies.rescue.holds, weights(model)))
    return found


def evaluated(optimizer: GapAware) -> None:
    optimizer.eval()
    optimizer.train()


def retained(folder: Path) -> Any:
    return anchored(fsdp)


def retained_and_saved(folder: Path) -> Any:
    """The starting weights travel with a checkpoint."""
    model = fsdp(network())
    optimizer = wrapped(model, mode="retain", controller=None)
    train(model, optimizer, range(9))
    state = checkpoint(model, optimizer)
    dcp.save(state, checkpoint_id=folder.parent / "retained")
    train(model, optimizer, range(9, STEPS))
    return weights(model)


def retained_and_resumed(folder: Path) -> Any:
    """On four ranks what two have saved, from other weights than those of the start."""
    model = fsdp(network())
    optimizer = wrapped(model, mode="retain", controller=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    state = checkpoint(model, optimizer)
    dcp.load(state, checkpoint_id=folder.parent / "retained")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, range(9, STEPS))
    return weights(model)


def save(folder: Path) -> Any:
    """Save in mid-window, and go on: what resumed runs have to reproduce."""
    model = fsdp(network())
    optimizer = wrapped(model)
    train(model, optimizer, range(9))
    state = checkpoint(model, optimizer)
    dcp.save(state, checkpoint_id=folder.parent / "saved")
    train(model, optimizer, range(9, STEPS))
    return seen(optimizer)


# -- four processes -------------------------------------------------------------------------------


def blocks(folder: Path) -> Any:
    """Two of the ranks hold nothing of the last bias, which is a row of its own."""
    return run(fsdp, granularity="block")


def hybrid(folder: Path) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return run(lambda model: fsdp(model, mesh=mesh))


def two_dimensional(folder: Path) -> Any:
    """FSDP x TP; the last layer is sharded by FSDP alone, on a slice of the mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def shard(model: nn.Module) -> nn.Module:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        return fsdp(parallelize_module(model, mesh["tp"], plan), mesh=mesh["dp"])

    return run(shard, hidden=1504)


def columns(folder: Path) -> Any:
    def place(parameter: nn.Parameter) -> Shard:
        return Shard(1 if parameter.ndim == 2 and parameter.shape[1] % 4 == 0 else 0)

    return run(lambda model: fsdp(model, shard_placement_fn=place), hidden=1504)


def pairs(folder: Path) -> Any:
    """Two pairs of ranks, each with a whole model in two shards, that do not know of one another."""
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("pair", "shard", "one"))
    one_dimensional, two_dimensional = mesh["shard"], mesh["shard", "one"]
    first = run(lambda model: fsdp(model, mesh=one_dimensional))

    parameters = [
        nn.Parameter(distribute_tensor(p.detach(), two_dimensional, [Shard(0), Replicate()]))
        for p in network().parameters()
    ]
    optimizer = GapAware(torch.optim.SGD(parameters, lr=0.1), sketch_dim=DIM, interval=1, window=4)
    sent: list[int] = []
    for _ in range(6):
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        with collectives(sent):
            optimizer.step()
    return first, {**seen(optimizer), "sent": sent}


def replicas_of_shards(folder: Path) -> Any:
    """The same pairs, as parts of one run that a person names; and where nobody does, by other losses."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "shard"))["shard"]
    found = [run(lambda model: fsdp(model, mesh=mesh), process_group=dist.group.WORLD)]
    for group in (dist.group.WORLD, None):
        model = fsdp(network(40), mesh=mesh)
        optimizer = wrapped(model, controller=believer, process_group=group)
        for step in range(12):
            optimizer.log(loss=float(dist.get_rank()))
            train(model, optimizer, range(step, step + 1))
        found.append({"scales": optimizer.scales, "losses": optimizer.history.column("loss")})
    return found


def placements(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Sketches of sharded tensors beside those of the whole ones."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    generator = torch.Generator().manual_seed(3)
    shapes = [(), (3,), (7, 5), (300, 1000), (5, 6, 7), (3, 2, 3, 3)]
    results = {}
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        for shape in shapes:
            whole = torch.randn(shape, generator=generator).to(dtype)
            options = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
            for one in options:
                for other in options:
                    sharded = distribute_tensor(whole, mesh, [one, other])
                    results[f"{dtype} {shape} {one} {other}"] = both_sketches(sharded, whole)
    return results


def both_sketches(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    sketch, found = CountSketch(64, seed=0), []
    for tensor in tensors:
        row = Row("row", 0, (tensor,), (real_size(tensor),), ("",))
        among = sharing([tensor])
        found.append(among.add_up(sketch(row.pieces(tensor.device, among), tensor.device)))
    return tuple(found)


def resume(folder: Path) -> Any:
    return resumed(folder.parent / "saved", fsdp(network()))


def resumed(saved: Path, model: nn.Module) -> Any:
    """Load a checkpoint of two ranks on any number of ranks, and go on."""
    optimizer = wrapped(model)
    state = checkpoint(model, optimizer)
    dcp.load(state, checkpoint_id=saved)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, range(9, STEPS))
    return seen(optimizer)


def accelerated(folder: Path) -> None:
    """The program that `accelerate launch` starts: train, save, train on, go back, train again."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = network()
    optimizer = wrapped(model)
    model, prepared = accelerator.prepare(model, optimizer)
    train(model, prepared, range(9))
    accelerator.save_state(str(folder / "state"))
    results = []
    for _ in range(2):
        train(model, prepared, range(9, STEPS))
        results.append(seen(optimizer))
        accelerator.load_state(str(folder / "state"))
    torch.save(results, folder / f"rank{accelerator.process_index}.pt")


SCENARIOS = {
    2: [
        fully_sharded, by_block, exact, replicas, partly_sharded, other_sharding, controller_fault,
        sketch_fault, accounting_fault, replica_fault, push_fault, fault_before_a_push, start_fault,
        warm_up, trainers_optimizer, not_a_number, losses, one_log, save, retained, retained_and_saved,
        pushed, averaged, shared_losses, escaped, way_back, no_way_back, copy_let_go, lost,
        fault_with_a_copy, fault_in_a_return, swapped,
    ],
    4: [
        fully_sharded, blocks, hybrid, two_dimensional, columns, pairs, placements, resume,
        retained_and_resumed, replicas_of_shards,
    ],
}  # fmt: skip


def work(rank: int, ranks: int, folder: Path) -> None:
    """The life of one process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    results = {}
    for scenario in SCENARIOS[ranks]:
        try:
            results[scenario.__name__] = scenario(folder)
        except BaseException:  # a CheckpointException is not an Exception
            results[scenario.__name__] = traceback.format_exc()
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    accelerated(Path(sys.argv[1]))
