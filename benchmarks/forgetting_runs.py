"""Finished runs, looked at by task, base, method and seed."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from benchmarks import pareto
from benchmarks.pareto import OLD, Curve, Place, Scale

Row = dict[str, Any]
Case = tuple[str, str]  # task and base

SWEEP = 7  # values; a method whose sweep is not finished is not judged

# What tables call it: the runs it is read from, and the curve of them. A walk back begins at the run's end.
VIEWS: dict[str, tuple[str, str]] = {
    "base": ("base", "trajectory"),
    "wise-ft": ("base", "line"),
    "gapaware-retain": ("gapaware-retain", "trajectory"),
    "gapaware-retain, then wise-ft": ("gapaware-retain", "line"),
    "gapaware-distilled": ("gapaware-distilled", "trajectory"),
    "gapaware-distilled, then wise-ft": ("gapaware-distilled", "line"),
    "gapaware-rehearsed": ("gapaware-rehearsed", "trajectory"),
    "gapaware-rehearsed, then wise-ft": ("gapaware-rehearsed", "line"),
    "pseudorehearsal": ("pseudorehearsal", "trajectory"),
    "pseudorehearsal, then wise-ft": ("pseudorehearsal", "line"),
    "gapaware-consolidate": ("gapaware-consolidate", "consolidated"),
    **{
        name: (name, "trajectory")
        for name in ("l2-sp", "spd", "ewc", "lora", "lwf", "ema", "finch")
    },
}


def curve_of(row: Row, kind: str) -> Curve:
    """A run's curve; walks start at the end of the trajectory."""
    trajectory: Curve = row["curves"]["trajectory"]
    return (
        trajectory if kind == "trajectory" else [[1.0, *trajectory[-1][1:]], *row["curves"][kind]]
    )


class Runs:
    """The rows of a results file."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self.cases: list[Case] = list(dict.fromkeys((r["task"], r["base"]) for r in self.rows))

    @functools.cache  # noqa: B019 - lives as long as a report
    def curves(self, case: Case, view: str, seed: int, lr: float | None = None) -> list[Curve]:
        """A method's sweep, or the part of it at a factor on the learning rate."""
        method, kind = VIEWS[view]
        return [
            curve_of(row, kind)
            for row in self.rows
            if ((row["task"], row["base"]), row["method"], row["seed"]) == (case, method, seed)
            and (lr is None or abs(row["lr_factor"] / lr - 1) < 1e-6)
        ]

    def seeds(self, case: Case, view: str) -> list[int]:
        """Seeds with whole sweeps of the method and of the base, without which there is no scale."""
        return [
            seed
            for seed in sorted({row["seed"] for row in self.rows})
            if len(self.curves(case, view, seed)) == len(self.curves(case, "base", seed)) == SWEEP
        ]

    @functools.cache  # noqa: B019 - lives as long as a report
    def scale(self, case: Case, seed: int) -> Scale:
        """Start and best of the base's sweep."""
        chance = next(row["chance"] for row in self.rows if row["task"] == case[0])
        return Scale.of(self.curves(case, "base", seed), chance)

    def places(
        self, case: Case, view: str, share: float, lr: float | None = None
    ) -> dict[int, Place | None]:
        """For each seed the least old loss at a share of the best gain."""
        return {
            seed: pareto.envelope(
                self.curves(case, view, seed, lr), self.scale(case, seed).target(share)
            )
            for seed in self.seeds(case, view)
        }

    def forgotten(
        self, case: Case, view: str, share: float, lr: float | None = None
    ) -> dict[object, float | None]:
        """The same as a rise of the old loss."""
        return {
            (case, seed): place and place[OLD] - self.scale(case, seed).old
            for seed, place in self.places(case, view, share, lr).items()
        }

    def ratios(
        self, cases: Iterable[Case], view: str, other: str, share: float, lr: float | None = None
    ) -> list[float] | None:
        """Logarithms of forgetting against that of `other`, over tasks and seeds."""
        ours: dict[object, float | None] = {}
        theirs: dict[object, float | None] = {}
        usual: dict[object, float | None] = {}
        for case in cases:
            ours |= self.forgotten(case, view, share)
            theirs |= self.forgotten(case, other, share, lr)
            usual |= self.forgotten(case, "base", share, 1.0)
            # without the default's, the sweep's best says what is small
            usual |= {
                k: v for k, v in self.forgotten(case, "base", share).items() if usual[k] is None
            }
        return pareto.log_ratios(ours, theirs, usual)

    def reduction(
        self, cases: Iterable[Case], view: str, other: str, share: float, lr: float | None = None
    ) -> float | None:
        """Share forgotten less than by `other`: geometric mean over tasks, whatever their seeds.

        None where `view` misses a target that `other` reaches. A task on which `other` misses it says
        nothing and is left out.
        """
        logs = [self.ratios([case], view, other, share, lr) for case in cases]
        if None in logs:
            return None
        return pareto.reduction([fmean(ratios) for ratios in logs if ratios])
