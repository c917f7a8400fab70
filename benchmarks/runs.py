"""Runs of tasks: which ones, in worker processes, each kept as one JSON line as soon as it ends."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.methods import METHODS
from benchmarks.tasks import Task
from benchmarks.tasks.char_lm import CHAR_LM
from benchmarks.tasks.digits import DIGITS
from benchmarks.tasks.modular import ADD, MULTIPLY

Row = dict[str, Any]  # one finished run
TASKS: dict[str, Task] = {task.name: task for task in (ADD, MULTIPLY, CHAR_LM, DIGITS)}


@dataclass(frozen=True)
class Run:
    """One training run: a task, a method, a factor on the task's own learning rate, a seed."""

    task: str
    method: str
    lr_factor: float
    seed: int

    @property
    def key(self) -> tuple[str, str, float, int]:
        """What makes it the same run as another."""
        return (self.task, self.method, self.lr_factor, self.seed)

    def do(self) -> Row:
        """Train and describe the outcome."""
        torch.set_num_threads(1)
        task = TASKS[self.task]
        build = METHODS[self.method](task.base)
        result = task.run(build, seed=self.seed, lr=task.lr * self.lr_factor)
        return {"method": self.method, "lr_factor": self.lr_factor, **result.to_json()}


class Results:
    """A file of finished runs, so that an interrupted benchmark goes on where it stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    self.rows.append(json.loads(line))
                except json.JSONDecodeError:
                    continue  # the line that was being written when the run before was stopped

    def add(self, row: Row) -> None:
        """Keep a finished run."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def forget(self, method: str) -> None:
        """Drop the runs of a method, after a change to it."""
        self.rows = [row for row in self.rows if row["method"] != method]
        if self.path.exists():
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those of `runs` that are not there yet."""
        done = self._by_key()
        return [run for run in runs if run.key not in done]

    def of(self, runs: Iterable[Run]) -> list[Row]:
        """What came of those of `runs` that are there, in their order."""
        done = self._by_key()
        return [done[run.key] for run in runs if run.key in done]

    def _by_key(self) -> dict[tuple[str, str, float, int], Row]:
        return {(r["task"], r["method"], r["lr_factor"], r["seed"]): r for r in self.rows}


def run_all(runs: Sequence[Run], results: Results, jobs: int) -> None:
    """Do the runs, `jobs` at a time, with a progress bar, and keep each as soon as it ends."""
    if not runs:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(runs), unit="run") as bar,
    ):
        futures = {pool.submit(run.do): run for run in runs}
        for future in as_completed(futures):
            run = futures[future]
            results.add(future.result())
            bar.set_postfix_str(f"{run.task} {run.method} lr x{run.lr_factor:g} seed {run.seed}")
            bar.update()
