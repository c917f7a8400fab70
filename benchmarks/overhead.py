"""What does it cost to know the spectrum?

    python -m benchmarks.overhead --quick           # under five minutes on two quiet cores
    python -m benchmarks.overhead                   # longer, and on CUDA the larger models too
    python -m benchmarks.overhead --from-results    # judges the runs in benchmarks/results, times nothing

Times training steps with and without GapAware, and with rivals, in turn within one process; snapshots
against plain reads of the same tensors; weighs what GapAware holds; and varies the model's size, the number
of tensors, the window and the sketch. Only a quiet machine gives figures worth quoting. Measurements are
kept in runs/overhead-<device>.jsonl, the raw times of every round among them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.costs import (
    EXTRAS,
    Row,
    snapshot_of_model,
    snapshot_of_tensors,
    step_with_gapaware,
    step_with_rival,
)
from benchmarks.gpt2 import RIVALS_OF_ADAMW, SHAPES, WRAPPED, Trainee
from benchmarks.memory import memory
from benchmarks.overhead_report import bars, tables
from benchmarks.timing import device_name
from gapaware.momentum import interval_for, memory_steps

TENSORS = 64  # of a synthetic model, where they are not what is varied
KEPT_RUNS = Path("runs")
COMMITTED_RUNS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        shapes: names in `gpt2.SHAPES`.
        step_budget: seconds for each comparison of training steps; twice that at rest, where
            only one step of many has a snapshot.
        snapshot_budget: seconds for each comparison of a snapshot with a read.
        numbers: in the tensors of the smallest synthetic model.
        growth: for each thing that is varied, its values: factors on `numbers`, or what they are.
    """

    shapes: tuple[str, ...]
    step_budget: float
    snapshot_budget: float
    numbers: int
    growth: dict[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        """Number of measurements."""
        of_a_shape = 5 * len(WRAPPED) + len(EXTRAS) + len(RIVALS_OF_ADAMW)
        return of_a_shape * len(self.shapes) + sum(map(len, self.growth.values()))


GROWTH: dict[str, tuple[int, ...]] = {
    "P": (1, 2, 4, 8),
    "tensors": (8, 32, 128, 512),
    "window": (5, 10, 20, 50),
    "sketch_dim": (256, 1024, 4096, 16_384, 65_536),
}


def plan(device: torch.device, quick: bool) -> Plan:
    """What is measured where: on CUDA every shape that fits, but only the smallest when in a hurry."""
    if device.type == "cpu":
        budgets = (12.0, 1.0) if quick else (120.0, 10.0)
        return Plan(("10M",), *budgets, numbers=10_000_000, growth=GROWTH)
    capacity = torch.cuda.get_device_properties(device).total_memory
    fits = [
        name
        for name, numbers in (("124M", 124e6), ("350M", 355e6), ("1.5B", 1560e6))
        # float32 parameters, gradients, and up to four states of a rival, beside the activations
        if numbers * 4 * 6 + 12e9 < capacity
    ]
    budgets = (10.0, 1.0) if quick else (60.0, 5.0)
    return Plan(tuple(fits[:1] if quick else fits), *budgets, numbers=100_000_000, growth=GROWTH)


def measurements(chosen: Plan, device: torch.device) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Every measurement of a plan: what it is of, and what makes the rest of its row."""
    for shape in chosen.shapes:
        of = {"model": shape}
        for base in WRAPPED:
            yield of, partial(memory, shape, base, device)
        trainee = Trainee(SHAPES[shape], device)
        of = {**of, "numbers": sum(p.numel() for p in trainee.parameters)}
        for base in WRAPPED:
            yield of, partial(snapshot_of_model, trainee, base, 3 * chosen.snapshot_budget)
            # "auto" is timed at rest; before that, and on a plateau, it is this one
            busy = interval_for(memory_steps(WRAPPED[base](trainee.model).param_groups))
            for interval, share in (("auto", 2), (busy, 1), (1, 1)):
                budget = share * chosen.step_budget
                yield of, partial(step_with_gapaware, trainee, base, interval, budget)
        budget = chosen.step_budget
        for extra in EXTRAS:
            yield of, partial(step_with_gapaware, trainee, "AdamW", "auto", budget, extra=extra)
        for rival in RIVALS_OF_ADAMW:
            yield of, partial(step_with_rival, trainee, rival, chosen.step_budget)
    for varied, values in chosen.growth.items():
        for value in values:
            numbers = chosen.numbers * value if varied == "P" else chosen.numbers
            tensors = value if varied == "tensors" else TENSORS
            arguments = {varied: value} if varied in ("window", "sketch_dim") else {}
            yield (
                {"varied": varied, "value": value},
                partial(
                    snapshot_of_tensors,
                    numbers,
                    tensors,
                    device,
                    chosen.snapshot_budget,
                    **arguments,
                ),
            )


def run(chosen: Plan, device: torch.device, path: Path) -> list[Row]:
    """Take every measurement of a plan, and keep each in a file of JSON lines as soon as it is there."""
    rows = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file, tqdm(total=chosen.size, unit="measurement") as bar:
        for of, measure in measurements(chosen, device):
            bar.set_postfix_str(" ".join(map(str, of.values())))
            row = {**of, **measure(), "device": device_name(device), "torch": torch.__version__}
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            bar.update()
    return rows


def read(paths: Sequence[Path]) -> list[Row]:
    """The rows of finished runs."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its tables; 0 when every bar holds."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.overhead", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, one model")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to measure (default: CUDA where there is one)",
    )
    parser.add_argument("--json", type=Path, help="also write the verdicts to this file")
    parser.add_argument(
        "--results", type=Path, help=f"file of measurements (default in {KEPT_RUNS}/)"
    )
    parser.add_argument(
        "--from-results",
        type=Path,
        nargs="?",
        const=COMMITTED_RUNS,
        metavar="FILE",
        help="time nothing, judge the measurements in FILE (default: those committed, of every device)",
    )
    options = parser.parse_args(arguments)
    if options.from_results:
        at = options.from_results
        paths = sorted(at.glob("overhead-*.jsonl")) if at.is_dir() else [at]
        if not all(path.exists() for path in paths) or not paths:
            parser.error(f"--from-results: no measurements in {at}; leave it out to take some")
        rows = read(paths)
    else:
        device = torch.device(options.device)
        name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
        path = options.results or KEPT_RUNS / f"overhead-{name}.jsonl"
        rows = run(plan(device, options.quick), device, path)
        print(f"{len(rows)} measurements kept in {path}")
    judged = []
    for device_measured in dict.fromkeys(row["device"] for row in rows):
        there = [row for row in rows if row["device"] == device_measured]
        print(f"\n{device_measured}\n\n{tables(there)}\n")
        for question, answer, holds in bars(there):
            print(f"{'holds' if holds else 'FAILS':6} {question}: {answer}")
            judged.append((device_measured, question, answer, holds))
    if options.json:
        options.json.write_text(json.dumps(judged, indent=1))
    return 0 if all(holds for *_, holds in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
