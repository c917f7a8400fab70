"""What GapAware costs in memory: the bytes that it holds, and the peak of a training step."""

from __future__ import annotations

import gc
import re
import tracemalloc
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.costs import Row, fill, pass_the_start, refuse_faults, wrapped
from benchmarks.gpt2 import SHAPES, Trainee

RECORDS = 40
RESET_PEAK = "5"  # proc(5), clear_refs


def memory(shape: str, base: str, device: torch.device) -> Row:
    """Bytes that GapAware holds, and the peak of a training step with and without it.

    In a process of its own, since tables that instances share would count for the first one only.

    Args:
        shape: a name in `gpt2.SHAPES`.
        base: a name in `gpt2.WRAPPED`.
        device: where the model is.

    Returns:
        With tensor_bytes, the storages that are there because of GapAware; history_bytes, of as many
        records as it keeps; peak_alone and peak_wrapped, of the device on CUDA and of the process else,
        None where the system does not tell.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(torch.set_num_threads, torch.get_num_threads()).result()
        return pool.submit(weigh, shape, base, device).result()


def weigh(shape: str, base: str, device: torch.device) -> Row:
    """What `memory` does, in this process."""
    trainee = Trainee(SHAPES[shape], device)
    optimizer = wrapped(trainee, base, "auto")
    for _ in range(3):
        trainee.step(optimizer.base)
    peak_alone = _peak(lambda: trainee.step(optimizer.base), device)
    optimizer.zero_grad()
    before = _storages(_live_tensors())
    pass_the_start(optimizer, trainee.parameters)
    fill(optimizer, trainee.parameters)
    trainee.step(optimizer)
    peak_wrapped = _peak(
        lambda: [trainee.step(optimizer) for _ in range(optimizer.interval)], device
    )
    optimizer.zero_grad()
    after = _storages(_live_tensors())
    refuse_faults(optimizer)
    return {
        "measure": "memory",
        "base": base,
        "parameter_bytes": sum(p.nbytes for p in trainee.parameters),
        "tensor_bytes": sum(after[place] for place in after.keys() - before.keys()),
        "history_bytes": round(_bytes_of_a_record(base) * optimizer.history.limit),
        "peak_alone": peak_alone,
        "peak_wrapped": peak_wrapped,
    }


def _bytes_of_a_record(base: str) -> float:
    """Python objects that one more snapshot leaves behind; the size of the model does not matter."""
    trainee = Trainee(SHAPES["50k"], torch.device("cpu"))
    optimizer = wrapped(trainee, base, 1)
    tracemalloc.start()
    fill(optimizer, trainee.parameters, 2 * RECORDS)
    before = _python_bytes()
    fill(optimizer, trainee.parameters, RECORDS)
    grown = _python_bytes() - before
    tracemalloc.stop()
    return grown / RECORDS


def _live_tensors() -> list[Tensor]:
    gc.collect()
    # type() rather than isinstance(), which would wake lazy modules up
    # fake tensors and the like have no storage
    return [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Sizes of the distinct storages behind tensors, by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _python_bytes() -> int:
    gc.collect()
    objects = tracemalloc.DomainFilter(True, 0)  # without the data of arrays
    traces = tracemalloc.take_snapshot().filter_traces([objects]).traces
    return sum(trace.size for trace in traces)


def _peak(work: Callable[[], object], device: torch.device) -> int | None:
    """The most memory in use during some work, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None
    reset.write_text(RESET_PEAK)
    work()
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return None if found is None else int(found.group(1)) * 1024
