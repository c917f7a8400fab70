"""A hundred thousand steps: does memory stay flat, the history bounded, the factor where it belongs?

    python -m benchmarks.soak

The updates are white noise, the case in which no factor other than the first is ever right.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from gapaware import GapAware

HISTORY = 200


def resident_bytes() -> int:
    """Memory of this process that is in RAM (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def soak(steps: int, mode: str, log_to: Path) -> dict[str, float]:
    """Train on white noise; what there is to report."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(20_000))
    optimizer = GapAware(
        torch.optim.SGD([parameter], lr=1e-3), mode=mode, history_size=HISTORY, log_to=log_to
    )
    parameter.grad = torch.empty_like(parameter)
    warm_up, before = steps // 10, 0
    largest = smallest = 1.0
    started = time.perf_counter()
    for step in tqdm(range(steps), unit="step"):
        parameter.grad.normal_()
        optimizer.step()
        largest, smallest = max(largest, *optimizer.scales), min(smallest, *optimizer.scales)
        if step == warm_up:
            gc.collect()
            before = resident_bytes()
    gc.collect()
    return {
        "steps": steps,
        "rss_growth_bytes": resident_bytes() - before,
        "records_in_memory": len(optimizer.history),
        "largest_scale": largest,
        "smallest_scale": smallest,
        "last_scale": optimizer.scales[0],
        "share_of_time": optimizer.seconds / (time.perf_counter() - started),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak test; 0 when memory, history and factor stay in bounds."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000, help="default 100,000")
    parser.add_argument("--mode", default="auto", help="of GapAware (default auto)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        seen = soak(options.steps, options.mode, Path(scratch, "run.jsonl"))
    for name, value in seen.items():
        print(f"{name:18} {value:,.6g}")
    bars = {
        "memory flat": seen["rss_growth_bytes"] < 2**20,
        "history bounded": seen["records_in_memory"] == HISTORY,
        "no drift": seen["smallest_scale"] == seen["largest_scale"] == 1.0,
    }
    for name, holds in bars.items():
        print(f"{'holds' if holds else 'FAILS':6} {name}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {"mode": options.mode, **seen, "holds": bars}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
