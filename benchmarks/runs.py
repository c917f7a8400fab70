"""Runs of tasks: which ones, in worker processes, each kept as one JSON line as soon as it ends."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.methods import BASE, GAPAWARE, NO_LOSS, Method, Occasion, Point
from benchmarks.rivals import RIVALS
from benchmarks.suite import TASKS
from benchmarks.tasks import thin
from benchmarks.timing import processor
from gapaware import GapAware

Row = dict[str, Any]  # one finished run
Key = tuple[str, str, float, Point, int]
METHODS: dict[str, Method] = {m.name: m for m in (BASE, GAPAWARE, NO_LOSS, *RIVALS)}
KEPT_POINTS = 20
KEPT_SCALES = 200
KEPT_DECISIONS = 20


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        task: its name.
        method: its name.
        lr_factor: on the task's own learning rate.
        seed: of everything random.
        point: of the method's sweep, where that is not over the learning rate.
        budget: steps allowed; the task's own when None. A sweep cuts hopeless runs off.
        scales: the factors of GapAware's own run, for a method that replays them.
    """

    task: str
    method: str
    lr_factor: float
    seed: int
    point: Point = None
    budget: int | None = field(default=None, compare=False)
    scales: tuple[float, ...] = field(default=(), compare=False)

    @property
    def key(self) -> Key:
        """What makes it the same run as another."""
        return (self.task, self.method, self.lr_factor, self.point, self.seed)

    @property
    def steps_allowed(self) -> int:
        """The budget in force."""
        return self.budget or TASKS[self.task].budget

    def do(self) -> Row:
        """Train and describe the outcome."""
        torch.set_num_threads(1)
        # decay takes unused weights to denormal numbers, which make a CPU several times slower
        torch.set_flush_denormal(True)
        task, built = TASKS[self.task], []
        occasion = Occasion(self.seed, self.scales)
        make = METHODS[self.method].make(task.base, self.point, occasion)

        def build(params: Any, lr: float, **base_kwargs: Any) -> torch.optim.Optimizer:
            built.append(make(params, lr, **base_kwargs))
            return built[0]

        lr = task.lr * self.lr_factor
        result = task.run(build, seed=self.seed, lr=lr, budget=self.budget)
        row = {"method": self.method, "lr_factor": self.lr_factor, **result.to_json()}
        if self.point is not None:
            row["point"] = self.point
        row |= {"budget": self.steps_allowed, "device": processor()}
        row["curve"] = [
            [_rounded(value) for value in point] for point in thin(result.curve, KEPT_POINTS)
        ]
        if isinstance(built[0], GapAware):
            row |= _history(built[0])
        return row


def _history(optimizer: GapAware) -> Row:
    """The factors over time, evenly spaced, and some decisions with their reasons."""
    records = list(optimizer.history)
    told = [
        [
            r["step"],
            _rounded(r["scale"]),
            _rounded(r["spectrum"]["adiabaticity"] if r["spectrum"] else None),
            r["why"],
        ]
        for r in thin(records, KEPT_DECISIONS)
    ]
    return {
        "scales": [_rounded(record["scale"]) for record in thin(records, KEPT_SCALES)],
        "history": told,
        "gapaware_seconds": optimizer.seconds,
    }


def _rounded(value: float | None) -> float | None:
    """To four digits: thousands of rows are committed."""
    return value if value is None or isinstance(value, int) else float(f"{value:.4g}")


def key_of(row: Row) -> Key:
    """The key of the run that a row came from."""
    point = row.get("point")
    point = tuple(point) if isinstance(point, list) else point
    return (row["task"], row["method"], row["lr_factor"], point, row["seed"])


def steps(row: Row) -> int:
    """Steps to the target; a run that missed it counts as its budget."""
    return int(row["steps_to_target"] or row.get("budget", row["steps"]))


def _answers(row: Row | None, run: Run) -> bool:
    """Whether a row tells what the run would: unless it was cut off earlier, before its target."""
    if row is None:
        return False
    budget = row.get("budget", run.steps_allowed)
    ended_early = row["steps_to_target"] is not None or row["steps"] < budget
    return ended_early or budget >= run.steps_allowed


class Results:
    """A file of finished runs, so that an interrupted benchmark goes on where it stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # the line that was being written when the run before was stopped
        self._torn = not text.endswith("\n") and text != ""
        self._index()

    def _index(self) -> None:
        self._last = {key_of(row): row for row in self.rows}
        self._first = {key_of(row): row for row in reversed(self.rows)}

    def add(self, row: Row) -> None:
        """Keep a finished run."""
        self.rows.append(row)
        self._last[key_of(row)] = row
        self._first.setdefault(key_of(row), row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("\n" * self._torn + json.dumps(row) + "\n")
        self._torn = False

    def forget(self, method: str) -> None:
        """Drop the runs of a method, after a change to it."""
        self.rows = [row for row in self.rows if row["method"] != method]
        self._index()
        if self.path.exists():
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those of `runs` that are not there yet, or were cut off too early to stand for them."""
        return [run for run in runs if not _answers(self.find(run), run)]

    def of(self, runs: Iterable[Run]) -> list[Row]:
        """What came of those of `runs` that are there, in their order."""
        return [self._last[run.key] for run in runs if _answers(self.find(run), run)]

    def find(self, run: Run) -> Row | None:
        """What came of a run, even if it was cut off."""
        return self._last.get(run.key)

    def find_first(self, run: Run) -> Row | None:
        """What came of it the first time, as in a sweep, whatever was allowed later."""
        return self._first.get(run.key)


def run_all(runs: Sequence[Run], results: Results, jobs: int, doing: str = "") -> None:
    """Do the runs, `jobs` at a time, with a progress bar, and keep each as soon as it ends."""
    if not runs:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tqdm(total=len(runs), unit="run", desc=doing or None) as bar:

        def keep(run: Run, row: Row) -> None:
            results.add(row)
            bar.set_postfix_str(f"{run.task} {run.method} lr x{run.lr_factor:g} seed {run.seed}")
            bar.update()

        if jobs == 1:
            # in this process, so that a kill stops the training too
            for run in runs:
                keep(run, run.do())
            return
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(run.do): run for run in runs}
            for future in as_completed(futures):
                keep(futures[future], future.result())
