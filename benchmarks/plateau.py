"""Does GapAware leave plateaus faster, and leave everything else alone?

    python -m benchmarks.plateau --quick          # about ten minutes on two cores

Every run trains a task from `benchmarks/tasks` from scratch, with the task's optimizer alone and with
GapAware at its default settings around it, from the same seed: same data, same initialization, same
batches. Finished runs are kept, so the command can be stopped and goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.runs import TASKS, Results, Run, run_all

PLATEAUS = ("modular-add", "modular-multiply")
DEFAULT_RESULTS = Path(__file__).parent / "results" / "plateau-quick.jsonl"

# What the quick benchmark runs: for each task the factors on its tuned learning rate.
QUICK: dict[str, tuple[float, ...]] = {
    "modular-add": (1.0,),
    "modular-multiply": (1.0,),
    "char-lm": (1.0, 0.1, 0.01),
    "digits": (1.0, 0.1),
}


def geometric_mean(values: Sequence[float]) -> float:
    """Exponential of the mean logarithm."""
    return math.exp(fmean(math.log(value) for value in values))


def steps(row: dict[str, Any]) -> int:
    """Steps to the target; a run that missed it counts as its budget."""
    return int(row["steps_to_target"] or row["steps"])


def bars(results: Results) -> list[tuple[str, str, bool]]:
    """The quick benchmark's questions: what is asked, what came out, whether it holds."""
    judged = []
    pairs = [
        (steps(alone), steps(ours))
        for task in PLATEAUS
        for alone, ours in _pairs(results, task, 1.0)
    ]
    if pairs:
        speedup = geometric_mean([alone / ours for alone, ours in pairs])
        judged.append(("plateaus: >= 12 x fewer steps", f"{speedup:.1f} x", speedup >= 12))
    tuned = _mean_losses(results, "char-lm", 1.0)
    if tuned:
        alone, ours = tuned
        change = ours / alone - 1
        judged.append(("char-lm, tuned lr: within 0.5 %", f"{change:+.2%}", change <= 0.005))
        for factor in (0.1, 0.01):
            low = _mean_losses(results, "char-lm", factor)
            if low:
                recovered = (low[0] - low[1]) / (low[0] - alone)
                question = f"char-lm, lr x{factor:g}: recovers >= half"
                judged.append((question, f"{recovered:.0%}", recovered >= 0.5))
    digits = _mean_losses(results, "digits", 1.0)
    if digits:
        change = digits[1] / digits[0] - 1
        judged.append(("digits, good lr: within 2 %", f"{change:+.2%}", change <= 0.02))
    low = _mean_losses(results, "digits", 0.1)
    if low:
        change = low[1] / low[0] - 1
        judged.append(("digits, lr x0.1: better", f"{change:+.1%}", change < 0))
    return judged


def _pairs(
    results: Results, task: str, factor: float
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    alone = {r["seed"]: r for r in results.select(task=task, method="base", lr_factor=factor)}
    ours = {r["seed"]: r for r in results.select(task=task, method="gapaware", lr_factor=factor)}
    return [(alone[seed], ours[seed]) for seed in sorted(alone.keys() & ours.keys())]


def _mean_losses(results: Results, task: str, factor: float) -> tuple[float, float] | None:
    pairs = _pairs(results, task, factor)
    if not pairs:
        return None
    return fmean(a["final_loss"] for a, _ in pairs), fmean(b["final_loss"] for _, b in pairs)


def table(results: Results) -> str:
    """Every run, in Markdown: one line a task and learning rate, seeds side by side."""
    lines = [
        "| task | lr | measure | base alone | GapAware | n |",
        "|---|---|---|---|---|---|",
    ]
    for task, factors in QUICK.items():
        for factor in factors:
            pairs = _pairs(results, task, factor)
            if not pairs:
                continue
            if task in PLATEAUS:
                measure = "steps to 95 %"
                cells = [[_steps_cell(row) for row in side] for side in zip(*pairs, strict=True)]
            else:
                measure = "held-out loss"
                cells = [
                    [f"{row['final_loss']:.4f}" for row in side]
                    for side in zip(*pairs, strict=True)
                ]
            lr = f"{TASKS[task].lr * factor:.2g}"
            columns = " | ".join(", ".join(side) for side in cells)
            lines.append(f"| {task} | {lr} | {measure} | {columns} | {len(pairs)} |")
    return "\n".join(lines)


def _steps_cell(row: dict[str, Any]) -> str:
    return str(row["steps_to_target"] or f"> {row['steps']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its table; 0 when every bar holds."""
    parser = argparse.ArgumentParser(prog="benchmarks.plateau", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small set of tasks (the default)")
    parser.add_argument("--task", choices=sorted(QUICK), action="append", help="only these tasks")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 ... N-1 (default 3)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default 2)")
    parser.add_argument("--json", type=Path, help="also write the verdicts to this file")
    parser.add_argument(
        "--results", type=Path, default=DEFAULT_RESULTS, help="file of finished runs"
    )
    parser.add_argument("--fresh", action="store_true", help="forget finished runs of GapAware")
    options = parser.parse_args(arguments)
    results = Results(options.results)
    if options.fresh:
        results.forget("gapaware")
    runs = [
        Run(task, method, factor, seed)
        for task, factors in QUICK.items()
        if not options.task or task in options.task
        for factor in factors
        for seed in range(options.seeds)
        for method in ("base", "gapaware")
    ]
    run_all(runs, results, options.jobs)
    judged = bars(results)
    print(table(results))
    print()
    for question, answer, holds in judged:
        print(f"{'holds' if holds else 'FAILS':6} {question}: {answer}")
    if options.json:
        options.json.write_text(json.dumps(judged, indent=1))
    return 0 if all(holds for *_, holds in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
