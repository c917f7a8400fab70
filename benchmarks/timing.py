"""Timing two things against each other on a machine whose speed changes all the time."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap

Work = Callable[[], object]
Round = tuple[float, float]  # seconds in the first and in the second of two things

LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Ratio:
    """How long the second of two things takes, the first being 1.

    Attributes:
        median: of the rounds' ratios.
        low: end of the 95 % bootstrap interval of that median.
        high: its other end.
        rounds: number of them.
    """

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.4f} ({self.low:.4f} to {self.high:.4f}, n = {self.rounds})"


def ratio(rounds: Sequence[Round]) -> Ratio:
    """The ratio of second to first, round by round, so that what slows both cancels.

    Example:
        >>> ratio([(1.0, 1.1), (2.0, 2.2), (1.0, 9.0)]).median
        1.1
    """
    ratios = np.array([second / first for first, second in rounds])
    middle = float(np.median(ratios))
    if len(ratios) < 2:
        return Ratio(middle, math.nan, math.nan, len(ratios))
    interval = bootstrap(
        (ratios,), np.median, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Ratio(middle, float(interval.low), float(interval.high), len(ratios))


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The x of seconds ∝ size^x, by least squares on logarithms.

    Example:
        >>> round(exponent([1, 2, 4], [3.0, 12.0, 48.0]), 6)
        2.0
    """
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def seconds(work: Work, device: torch.device) -> float:
    """How long some work takes; on CUDA from the first kernel's start to the last one's end."""
    if device.type != "cuda":
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(
    first: Work,
    second: Work,
    device: torch.device,
    *,
    repeats: int,
    budget: float,
    before: Work = lambda: None,
) -> list[Round]:
    """Time two things in turn, A B B A A B B A ..., each call on its own.

    Args:
        first: what comes first in a round.
        second: what it is compared with.
        device: where it works.
        repeats: calls of each in a round; with work that differs from call to call, such as a snapshot
            on each fifth step, a whole period.
        budget: seconds for all of it; after them the round that has begun is the last.
        before: done before every call, outside the time that is taken.

    Returns:
        At least LEAST_ROUNDS rounds.
    """
    rounds: list[Round] = []
    pairs = 0
    until = time.perf_counter() + budget
    while len(rounds) < LEAST_ROUNDS or time.perf_counter() < until:
        spent = [0.0, 0.0]
        for _ in range(repeats):
            for which in (0, 1) if pairs % 2 == 0 else (1, 0):
                before()
                spent[which] += seconds((first, second)[which], device)
            pairs += 1
        rounds.append((spent[0], spent[1]))
    return rounds


def device_name(device: torch.device) -> str:
    """What results are filed under: the GPU, or the CPU, the threads in use, and Numba if it is there."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    numba = ", Numba" if find_spec("numba") else ""
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}{numba}"


def processor() -> str:
    """The CPU and the instructions that torch uses of it, on which speed and rounding depend."""
    return f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


def _cpu_name() -> str:
    description = Path("/proc/cpuinfo")
    if description.exists():
        for line in description.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
