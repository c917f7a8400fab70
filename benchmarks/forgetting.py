"""How much of an old skill does fine-tuning cost, at the same new skill?

    python -m benchmarks.forgetting --quick           # digits, three seeds: a few minutes
    python -m benchmarks.forgetting                   # everything: hours; stop and go on as you like
    python -m benchmarks.forgetting --from-results    # judges the committed runs, trains nothing

A run fine-tunes a model that knows an old domain on a new one, with one method at one value of its
sweep, and scores old and new along the way. Finished runs are kept in runs/forgetting.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.arguments import add_results
from benchmarks.forgetting_figure import draw
from benchmarks.forgetting_report import figures, judge, tables
from benchmarks.forgetting_tasks import ForgettingTask
from benchmarks.forgetting_tasks.char_lm import BIBLE_AUSTEN_CODE, BIBLE_TO_CODE
from benchmarks.forgetting_tasks.digits import ROTATED, SPLIT
from benchmarks.forgetting_tasks.fashion import FASHION_TO_DIGITS
from benchmarks.forgetting_tasks.minilm import NEWS_TO_TWEETS, TWEETS_TO_NEWS
from benchmarks.forgetting_tasks.smollm2 import SMOLLM2
from benchmarks.forgetting_tasks.training import Training
from benchmarks.retention import METHODS

TASKS: dict[str, ForgettingTask] = {
    task.name: task
    for task in (
        SPLIT,
        ROTATED,
        FASHION_TO_DIGITS,
        BIBLE_TO_CODE,
        BIBLE_AUSTEN_CODE,
        NEWS_TO_TWEETS,
        TWEETS_TO_NEWS,
        SMOLLM2,
    )
}
DEAR = (BIBLE_AUSTEN_CODE.name, NEWS_TO_TWEETS.name, TWEETS_TO_NEWS.name, SMOLLM2.name)
# what they leave for a next stage is not the model that was trained
LAST_STAGE_ONLY = ("ema", "gapaware-consolidate")
FIRST = (
    "base",
    "gapaware-retain",
    "gapaware-distilled",
    "gapaware-rehearsed",
    "gapaware-consolidate",
)
QUICK_TASKS, QUICK_SEEDS = (SPLIT.name, ROTATED.name), 3
KEPT_RUNS = Path("runs/forgetting.jsonl")
COMMITTED_RUNS = Path(__file__).parent / "results" / "forgetting.jsonl"
FIGURE = Path("runs/forgetting.png")

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One fine-tuning run; two with the same fields are the same."""

    task: str
    base: str
    method: str
    value: float
    seed: int

    @classmethod
    def of(cls, row: Row) -> Run:
        """The run that a row came from."""
        return cls(*(row[key] for key in ("task", "base", "method", "value", "seed")))

    def do(self) -> Row:
        """Fine-tune and describe what came of it."""
        task, method = TASKS[self.task], METHODS[self.method]
        lr_factor = method.lr_factor(self.value, task.good[self.base])
        settings = (self.base, self.value, lr_factor, self.seed)
        training = Training(task.earlier or task, *settings)
        started = time.perf_counter()
        curves = method.train(training)
        if task.earlier:
            training = Training(task, *settings, earlier=training.model)
            curves = method.train(training)
        return {
            **vars(self),
            "lr_factor": lr_factor,
            "seconds": round(time.perf_counter() - started, 2),
            "extra_bytes": sum(tensor.nbytes for tensor in training.held),
            "chance": math.log(task.classes),
            "curves": {
                kind: [
                    [point.at, *map(_short, (*point[1], *point[2], *point[3]))] for point in points
                ]
                for kind, points in curves.items()
            },
        }


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else 1e9


class Results:
    """A file of finished runs, so that an interrupted benchmark goes on where it stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Run, Row] = {}
        text = path.read_text() if path.exists() else ""
        self.cut_off = not text.endswith("\n") and bool(text)
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that was being written when the run before was stopped
            self.rows[Run.of(row)] = row

    def add(self, run: Run, row: Row) -> None:
        """Keep a finished run."""
        self.rows[run] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("\n" * self.cut_off + json.dumps(row, separators=(",", ":")) + "\n")
        self.cut_off = False


def plan(
    tasks: Iterable[str], methods: Iterable[str], bases: Iterable[str], seeds: int
) -> list[Run]:
    """The runs asked for, first those that say most: GapAware and the base, cheap tasks, AdamW."""
    tasks, methods, bases = list(tasks), list(methods), list(bases)
    runs = [
        Run(task, base, method, value, seed)
        for task in tasks
        for base in bases
        if base == "adamw" or TASKS[task].muon_lr
        for method in methods
        if not (TASKS[task].earlier and method in LAST_STAGE_ONLY)
        for seed in range(seeds)
        for value in METHODS[method].values
    ]

    def order(run: Run) -> tuple[bool, bool, bool, int]:
        return (
            run.task in DEAR,
            run.method not in FIRST,
            run.base != "adamw",
            tasks.index(run.task),
        )

    return sorted(runs, key=order)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its tables, draw its figure; 0 when every bar holds."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.forgetting", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="digits, AdamW, three seeds")
    parser.add_argument("--task", choices=TASKS, action="append", help="only these tasks")
    parser.add_argument("--method", choices=METHODS, action="append", help="only these methods")
    parser.add_argument(
        "--base", choices=("adamw", "muon"), action="append", help="only these bases"
    )
    parser.add_argument("--seeds", type=int, help="seeds 0 ... N-1 (default 5)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--figure", type=Path, default=FIGURE, help=f"default {FIGURE}")
    add_results(parser, KEPT_RUNS, COMMITTED_RUNS)
    options = parser.parse_args(arguments)
    quick = options.quick
    runs = plan(
        options.task or (QUICK_TASKS if quick else TASKS),
        options.method or ([m for m in FIRST if m in METHODS] if quick else METHODS),
        options.base or (("adamw",) if quick else ("adamw", "muon")),
        options.seeds or (QUICK_SEEDS if quick else 5),
    )
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
            results.add(run, run.do())
    rows = [results.rows[run] for run in runs if run in results.rows]
    print(tables(rows))
    judged = judge(rows)
    for question, answer, holds in judged:
        print(f"{'holds' if holds else 'FAILS':6} {question}: {answer}")
    if not judged:
        print("no runs of gapaware-rehearsed: no bar judged")
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, options.figure)
    print(f"figure: {options.figure}")
    if options.json:
        options.json.write_text(json.dumps({"bars": judged, "figures": figures(rows)}, indent=1))
    return 0 if all(holds for *_, holds in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
