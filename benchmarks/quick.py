"""The quick version of the plateau benchmark: four tasks, base alone against GapAware, and its bars.

    python -m benchmarks.plateau --quick                   # about 12 minutes on two cores
    python -m benchmarks.plateau --quick --from-results    # judges the committed runs, trains nothing

Every run trains a task from `benchmarks/tasks` from scratch, with the task's optimizer alone and with
GapAware at its default settings around it, from the same seed: same data, same initialization, same
batches. Finished runs are kept in runs/plateau-quick.jsonl, so the command can be stopped and goes on
where it was; after a change to GapAware, `--fresh` trains its runs again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.arguments import add_results
from benchmarks.runs import Results, Row, Run, run_all, steps
from benchmarks.statistics import geometric_mean
from benchmarks.suite import TASKS

PLATEAUS = ("modular-add", "modular-multiply")
KEPT_RUNS = Path("runs/plateau-quick.jsonl")
COMMITTED_RUNS = Path(__file__).parent / "results" / "plateau-quick.jsonl"
LEAST_SPEEDUP = 12

# For each task the factors on its own learning rate: the best of a sweep for char-lm; for digits 1e-2,
# a good one, where 4e-2 is the best of its sweep.
QUICK: dict[str, tuple[float, ...]] = {
    "modular-add": (1.0,),
    "modular-multiply": (1.0,),
    "char-lm": (1.0, 0.1, 0.01),
    "digits": (1.0, 0.1),
}


def bars(rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """The quick benchmark's questions: what is asked, what came out, whether it holds."""
    judged = []
    pairs = [pair for task in PLATEAUS for pair in _pairs(rows, task, 1.0)]
    if pairs:
        speedup = geometric_mean([steps(alone) / steps(ours) for alone, ours in pairs])
        missed = sum(ours["steps_to_target"] is None for _, ours in pairs)
        answer = f"{speedup:.1f} x"
        if missed:
            answer += f", but {missed} of {len(pairs)} runs with GapAware missed the target"
        holds = speedup >= LEAST_SPEEDUP and not missed
        judged.append((f"plateaus: >= {LEAST_SPEEDUP} x fewer steps", answer, holds))
    tuned = _mean_losses(rows, "char-lm", 1.0)
    if tuned:
        alone, ours = tuned
        change = ours / alone - 1
        judged.append(("char-lm, tuned lr: within 0.5 %", f"{change:+.2%}", change <= 0.005))
        for factor in (0.1, 0.01):
            low = _mean_losses(rows, "char-lm", factor)
            if low:
                recovered = (low[0] - low[1]) / (low[0] - alone)
                question = f"char-lm, lr x{factor:g}: recovers >= half"
                judged.append((question, f"{recovered:.0%}", recovered >= 0.5))
    digits = _mean_losses(rows, "digits", 1.0)
    if digits:
        change = digits[1] / digits[0] - 1
        judged.append(("digits, good lr: within 2 %", f"{change:+.2%}", change <= 0.02))
    low = _mean_losses(rows, "digits", 0.1)
    if low:
        change = low[1] / low[0] - 1
        judged.append(("digits, lr x0.1: better", f"{change:+.1%}", change < 0))
    return judged


def _pairs(rows: Sequence[Row], task: str, factor: float) -> list[tuple[Row, Row]]:
    here = [row for row in rows if (row["task"], row["lr_factor"]) == (task, factor)]
    alone = {row["seed"]: row for row in here if row["method"] == "base"}
    ours = {row["seed"]: row for row in here if row["method"] == "gapaware"}
    return [(alone[seed], ours[seed]) for seed in sorted(alone.keys() & ours.keys())]


def _mean_losses(rows: Sequence[Row], task: str, factor: float) -> tuple[float, float] | None:
    pairs = _pairs(rows, task, factor)
    if not pairs:
        return None
    return fmean(a["final_loss"] for a, _ in pairs), fmean(b["final_loss"] for _, b in pairs)


def table(rows: Sequence[Row]) -> str:
    """The runs, in Markdown: one line a task and learning rate, seeds side by side."""
    lines = [
        "| task | lr | measure | base alone | GapAware | n |",
        "|---|---|---|---|---|---|",
    ]
    for task, factors in QUICK.items():
        for factor in factors:
            pairs = _pairs(rows, task, factor)
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


def _steps_cell(row: Row) -> str:
    return str(row["steps_to_target"] or f"> {row['steps']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its table; 0 when every bar holds."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.plateau --quick", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--task", choices=sorted(QUICK), action="append", help="only these tasks")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 ... N-1 (default 3)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default 2)")
    parser.add_argument("--json", type=Path, help="also write the verdicts to this file")
    add_results(parser, KEPT_RUNS, COMMITTED_RUNS, fresh="forget finished runs of GapAware")
    options = parser.parse_args(arguments)
    results = Results(options.from_results or options.results)
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
    missing = results.missing(runs)
    if options.from_results and missing:
        parser.error(
            f"--from-results: {results.path} lacks {len(missing)} of the {len(runs)} runs asked for; "
            "ask for fewer --seeds, or leave --from-results out to train"
        )
    run_all(missing, results, options.jobs)
    rows = results.of(runs)
    judged = bars(rows)
    print(f"{len(runs) - len(missing)} runs read from {results.path}, {len(missing)} trained\n")
    print(table(rows))
    print()
    for question, answer, holds in judged:
        print(f"{'holds' if holds else 'FAILS':6} {question}: {answer}")
    if options.json:
        options.json.write_text(json.dumps(judged, indent=1))
    return 0 if all(holds for *_, holds in judged) else 1
