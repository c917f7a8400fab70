"""Does the forgetting risk, which needs no old data, tell what fine-tuning forgets?

    python -m benchmarks.risk --quick           # digits, two seeds: a minute or two
    python -m benchmarks.risk                   # everything: most of an hour; stop and go on as you like
    python -m benchmarks.risk --from-results    # judges the committed runs, trains nothing

A run fine-tunes a model that knows an old domain on a new one, at one learning rate. Along it the risk is
read out of GapAware's history and the old skill is measured. Judged is their rank correlation, next to that
of the sum of the learning rates so far, for which nobody needs a sketch. Then an alarm is tried whose
threshold comes from the other tasks.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

from benchmarks.arguments import add_results
from benchmarks.forgetting import TASKS, Results, Row, Run
from benchmarks.forgetting_tasks import Point
from benchmarks.forgetting_tasks.char_lm import BIBLE_TO_CODE
from benchmarks.forgetting_tasks.digits import ROTATED, SPLIT
from benchmarks.forgetting_tasks.fashion import FASHION_TO_DIGITS
from benchmarks.forgetting_tasks.training import Training
from gapaware import GapAware
from recipes.table import table

LR_FACTORS = (0.1, 1 / 3, 1.0, 3.0, 10.0)
POINTS = 30  # of a run, about evenly spaced in the logarithm of the step
CHEAP = (SPLIT.name, ROTATED.name, FASHION_TO_DIGITS.name)
SEEDS = {**dict.fromkeys(CHEAP, 5), BIBLE_TO_CODE.name: 2}
MODES: dict[str, dict[str, Any]] = {
    "default": {"mode": "observe", "interval": 1},
    "tensors": {
        "mode": "observe",
        "interval": 1,
    },  # the optimizer was not told the parameters' names
    "retain": {"mode": "retain"},
    "blocks": {"mode": "observe", "interval": 1, "granularity": "block"},
}
JUDGED = ("adamw", "default")
# base and how it is watched, and where; the last two move the weights further or less for a learning rate
CASES = {
    JUDGED: tuple(SEEDS),
    ("adamw", "retain"): CHEAP,
    ("adamw", "tensors"): (SPLIT.name, ROTATED.name, BIBLE_TO_CODE.name),
    ("adamw", "blocks"): tuple(SEEDS),
    ("muon", "blocks"): (SPLIT.name, ROTATED.name),
}
GOAL = 0.8
EARLY = 0.1  # share of the steps after which the end is foretold
LOST = 0.05  # old accuracy lost, in share of all answers: what the alarm is to come before
CAUGHT = 0.9  # share of the other tasks' runs for which the threshold is low enough
RESAMPLED = 1000
KEPT_RUNS = Path("runs/risk.jsonl")
COMMITTED_RUNS = Path(__file__).parent / "results" / "risk.jsonl"

Predictor = Callable[[Row], "np.ndarray"]


def do(run: Run) -> Row:
    """Fine-tune and describe it: step, risk, old loss and old accuracy at every point."""
    task = replace(TASKS[run.task], points=POINTS)
    training = Training(task, run.base, run.value, run.value, run.seed)
    base = training.optimizer()
    if task.fresh and run.base == "adamw":  # a new head has no start worth keeping
        _set_apart(base, lambda name, _: name.startswith(task.fresh), anchor=False)
    if run.method == "tensors":
        for group in base.param_groups:
            del group["param_names"]
    optimizer = GapAware(base, history_size=2 * task.steps, **MODES[run.method])
    started = time.perf_counter()
    points = training.finetune(optimizer)
    optimizer.step()  # at learning rate 0, so that the last snapshot reaches the history
    risks = {record["step"]: record["risk"] for record in optimizer.history if "risk" in record}
    return {
        **vars(run),
        "steps": task.steps,
        "seconds": round(time.perf_counter() - started, 2),
        "curve": list(_curve(points, risks)),
    }


def _set_apart(
    optimizer: torch.optim.Optimizer, chosen: Callable[[str, torch.Tensor], bool], **options: Any
) -> None:
    """Move parameters from the first group to one of their own."""
    group = optimizer.param_groups[0]
    named = list(zip(group["param_names"], group["params"], strict=True))
    group["param_names"] = [name for name, p in named if not chosen(name, p)]
    group["params"] = [p for name, p in named if not chosen(name, p)]
    moved = [(name, p) for name, p in named if chosen(name, p)]
    optimizer.add_param_group({"params": moved, **options})


def _curve(points: Iterable[Point], risks: dict[int, float]) -> Iterable[list[float]]:
    """(step, risk, old loss, old accuracy): the risk is that of the last snapshot at or before the step."""
    for point in points:
        known = [step for step in risks if step <= point.at]
        if known or point.at == 0:
            risk = risks[max(known)] if known else 0.0
            values = (risk, point.old.loss, point.old.accuracy)
            yield [point.at, *(float(f"{value:.5g}") for value in values)]


def rise(row: Row) -> np.ndarray:
    """Of the old loss since the start, in nats, at each point but the first."""
    losses = np.array(row["curve"])[:, 2]
    return np.asarray(losses[1:] - losses[0])


def risk(row: Row) -> np.ndarray:
    """That GapAware recorded, at each point but the first."""
    return np.array(row["curve"])[1:, 1]


def sum_of_lrs(row: Row) -> np.ndarray:
    """Of the linear schedule up to each point but the first, in units of the task's default rate."""
    steps = np.array(row["curve"])[1:, 0]
    return np.asarray(row["value"] * (steps - steps * (steps - 1) / 2 / row["steps"]))


def correlation(rows: Sequence[Row], predictor: Predictor) -> float:
    """Spearman's rank correlation with the rise of the old loss, over all points of the runs."""
    found = spearmanr(
        np.concatenate([predictor(row) for row in rows]), np.concatenate([*map(rise, rows)])
    )
    return float(found.statistic)


def interval(rows: Sequence[Row], predictor: Predictor) -> tuple[float, float]:
    """95 % of it over bootstrap samples of the runs, as many of each task as there are."""
    rng = np.random.default_rng(0)
    by_task = [
        [row for row in rows if row["task"] == task] for task in {r["task"]: 0 for r in rows}
    ]
    found = [
        correlation(
            [runs[i] for runs in by_task for i in rng.integers(0, len(runs), len(runs))], predictor
        )
        for _ in range(RESAMPLED)
    ]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def foretold(rows: Sequence[Row]) -> float:
    """Rank correlation of the risk after a tenth of the steps with the rise at the end of the run."""
    early = []
    for row in rows:
        steps = np.array(row["curve"])[1:, 0]
        early.append(risk(row)[np.argmax(steps >= EARLY * row["steps"])])
    return float(spearmanr(early, [rise(row)[-1] for row in rows]).statistic)


def alarm(row: Row, threshold: float) -> tuple[float | None, float | None]:
    """Steps at which the risk passes a threshold and at which the old skill is lost; None for never."""
    step, level, _, accuracy = np.array(row["curve"]).T
    passed, lost = level[1:] >= threshold, accuracy[1:] <= accuracy[0] - LOST
    return tuple(float(step[1:][np.argmax(at)]) if at.any() else None for at in (passed, lost))


def threshold(rows: Sequence[Row]) -> float:
    """The highest that is passed in time in `CAUGHT` of the runs that lose the old skill; inf for none."""
    at_loss = []
    for row in rows:
        _, lost = alarm(row, np.inf)
        if lost is not None:
            at_loss.append(max(level for step, level, *_ in row["curve"] if step <= lost))
    return float(np.quantile(at_loss or [np.inf], 1 - CAUGHT, method="lower"))


def correlations(rows: Sequence[Row]) -> str:
    """Rank correlations by task, and pooled."""
    body = []
    for name, chosen in _views(rows):
        low, high = interval(chosen, risk)
        low_lr, high_lr = interval(chosen, sum_of_lrs)
        body.append(
            [
                name,
                str(len(chosen)),
                f"{correlation(chosen, risk):.3f}",
                f"{low:.3f} - {high:.3f}",
                f"{correlation(chosen, sum_of_lrs):.3f}",
                f"{low_lr:.3f} - {high_lr:.3f}",
                f"{foretold(chosen):.3f}",
            ]
        )
    header = ["", "runs", "risk", "95 %", "sum of lrs", "95 %", f"risk at {EARLY:.0%}, end"]
    return table(header, body)


def _views(rows: Sequence[Row]) -> Iterable[tuple[str, list[Row]]]:
    for base, method in CASES:
        case = [row for row in rows if (row["base"], row["method"]) == (base, method)]
        for task in SEEDS:
            chosen = [row for row in case if row["task"] == task]
            if chosen:
                yield f"{task}, {base}, {method}", chosen
        if case:
            yield f"pooled, {base}, {method}", case


def alarms(rows: Sequence[Row], *, same_task: bool) -> str:
    """How a threshold does on each task that comes from its other seeds, or from the other tasks."""
    body = []
    for task in {row["task"]: 0 for row in rows}:
        held_out = [row for row in rows if row["task"] == task]
        levels = [
            threshold([r for r in held_out if r["seed"] != row["seed"]])
            if same_task
            else threshold([r for r in rows if r["task"] != task])
            for row in held_out
        ]
        steps = [alarm(row, level) for row, level in zip(held_out, levels, strict=True)]
        losing = [(passed, lost) for passed, lost in steps if lost is not None]
        leads = [lost - passed for passed, lost in losing if passed is not None and passed <= lost]
        quiet = [passed for passed, lost in steps if lost is None]
        body.append(
            [
                task,
                f"{np.median(levels):.2g}",
                f"{len(leads)} of {len(losing)}",
                f"{np.median(leads):.0f} ({min(leads):.0f} - {max(leads):.0f})" if leads else "-",
                f"{np.median([lost for _, lost in losing]):.0f}" if losing else "-",
                f"{sum(passed is not None for passed in quiet)} of {len(quiet)}",
            ]
        )
    header = [
        "task",
        "threshold",
        "in time",
        "lead, steps",
        "lost at step",
        "false alarms",
    ]
    return table(header, body)


def plan(tasks: Sequence[str], seeds: int | None) -> list[Run]:
    """The runs asked for, the judged ones first."""
    return [
        Run(task, base, method, value, seed)
        for (base, method), held in CASES.items()
        for task in held
        if task in tasks
        for seed in range(seeds or SEEDS[task])
        for value in LR_FACTORS
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and print its tables; 0 when the bar holds."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.risk", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="digits, two seeds")
    parser.add_argument("--task", choices=SEEDS, action="append", help="only these tasks")
    parser.add_argument("--seeds", type=int, help=f"seeds 0 ... N-1 (default {SEEDS})")
    add_results(parser, KEPT_RUNS, COMMITTED_RUNS)
    options = parser.parse_args(arguments)
    tasks = options.task or (CHEAP[:2] if options.quick else tuple(SEEDS))
    runs = plan(tasks, options.seeds or (2 if options.quick else None))
    results = Results(options.from_results or options.results)
    missing = [run for run in runs if run not in results.rows]
    if options.from_results:
        print(f"{len(missing)} of {len(runs)} planned runs are not in {results.path}\n")
    else:
        torch.set_num_threads(1)
        for run in (bar := tqdm(missing, unit="run")):
            bar.set_postfix_str(
                f"{run.task} {run.base} {run.method} {run.value:.3g} seed {run.seed}"
            )
            results.add(run, do(run))
    rows = [results.rows[run] for run in runs if run in results.rows]
    judged = [row for row in rows if (row["base"], row["method"]) == JUDGED]
    print(
        f"Rank correlation with the rise of the old loss, along the runs:\n\n{correlations(rows)}\n"
    )
    for same_task, source in ((True, "other seeds of the task"), (False, "the other tasks")):
        if len({row["seed" if same_task else "task"] for row in judged}) > 1:
            print(
                f"Alarm before {LOST:.0%} of the old answers are lost, threshold from {source}, "
                f"{', '.join(JUDGED)}:\n\n{alarms(judged, same_task=same_task)}\n"
            )
    reached = correlation(judged, risk)
    low, high = interval(judged, risk)
    holds = reached >= GOAL
    print(
        f"{'holds' if holds else 'FAILS':6} rank correlation >= {GOAL} over tasks and learning rates: "
        f"{reached:.3f} (95 %: {low:.3f} - {high:.3f})"
    )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
