"""What the runs say: steps to target in pairs, geometric means, one-sided tests, what was censored.

A run that missed its target counts as its budget. Where a rival's runs did, the ratio is larger than it is
shown; where GapAware's did, it is smaller, and the table marks it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy.stats import ttest_rel, wilcoxon

from benchmarks.runs import Row, steps


def geometric_mean(values: Iterable[float]) -> float:
    """Exponential of the mean logarithm.

    >>> geometric_mean([1, 100])
    10.0
    """
    return math.exp(fmean(math.log(value) for value in values))


def _mean_if_any(values: Iterable[float]) -> float:
    """Geometric mean of those that are numbers; NaN where none is."""
    numbers = [value for value in values if not math.isnan(value)]
    return geometric_mean(numbers) if numbers else math.nan


def missed(row: Row) -> bool:
    """Whether the run did not reach its target."""
    return row["steps_to_target"] is None


def diverged(row: Row) -> bool:
    """Whether the run ended in a loss that is no number."""
    return not math.isfinite(row["final_loss"])


@dataclass(frozen=True)
class Comparison:
    """A rival against GapAware on one task, in pairs of the same seed.

    Attributes:
        task: its name.
        pairs: the rival's row and GapAware's, one pair a seed.
    """

    task: str
    pairs: tuple[tuple[Row, Row], ...]

    @property
    def ratio(self) -> float:
        """How many times more steps the rival took, geometric mean over seeds."""
        return geometric_mean(steps(rival) / steps(ours) for rival, ours in self.pairs)

    @property
    def seconds_ratio(self) -> float:
        """How many times more processor time the rival took to the target, or to its budget.

        Of pairs that are known to have run on one kind of machine; NaN where none is.
        """
        return _mean_if_any(
            rival["cpu_seconds"] / ours["cpu_seconds"]
            for rival, ours in self.pairs
            if "device" in ours and rival.get("device") == ours["device"]
        )

    @property
    def p(self) -> float:
        """One-sided paired t-test on log steps: GapAware takes fewer.

        NaN with fewer than two pairs, or where all differ by the same.
        """
        if len(self.pairs) < 2:
            return math.nan
        rival, ours = (
            [math.log(steps(row)) for row in side] for side in zip(*self.pairs, strict=True)
        )
        differences = {a - b for a, b in zip(rival, ours, strict=True)}
        if len(differences) == 1:  # the test divides by their spread
            return math.nan
        return float(ttest_rel(rival, ours, alternative="greater").pvalue)

    @property
    def missed(self) -> tuple[int, int]:
        """Runs that missed the target: the rival's and GapAware's."""
        return (
            sum(missed(rival) for rival, _ in self.pairs),
            sum(missed(ours) for _, ours in self.pairs),
        )

    def at_worst(self, base: Comparison) -> Comparison:
        """The same with the base's run in place of each of the rival's that took longer.

        A rival whose sweep did not arrive in the base's own time may still be one that costs nothing.

        Args:
            base: against the base alone, on the same task.
        """
        alone = {row["seed"]: row for row, _ in base.pairs}
        pairs = (
            (min((rival, alone.get(ours["seed"], rival)), key=steps), ours)
            for rival, ours in self.pairs
        )
        return Comparison(self.task, tuple(pairs))


def compare(task: str, rivals: Iterable[Row], ours: Iterable[Row]) -> Comparison | None:
    """Pair rows of one task by their seeds; None where no seed has both."""
    by_seed = {row["seed"]: row for row in rivals}
    pairs = [(by_seed[row["seed"]], row) for row in ours if row["seed"] in by_seed]
    return (
        Comparison(task, tuple(sorted(pairs, key=lambda pair: pair[1]["seed"]))) if pairs else None
    )


@dataclass(frozen=True)
class Summary:
    """A rival against GapAware over tasks, each task counting once.

    Attributes:
        ratio: geometric mean of the tasks' ratios.
        seconds_ratio: the same of the processor time, over the tasks of which it is known.
        p: one-sided Wilcoxon signed-rank test over the tasks' log ratios.
        faster: tasks on which GapAware took fewer steps.
        tasks: how many there are.
        missed: runs that missed the target, the rival's and GapAware's.
        runs: pairs of runs.
    """

    ratio: float
    seconds_ratio: float
    p: float
    faster: int
    tasks: int
    missed: tuple[int, int]
    runs: int


def summarize(comparisons: Sequence[Comparison]) -> Summary | None:
    """Put the comparisons of several tasks together; None where there are none."""
    if not comparisons:
        return None
    logs = [math.log(comparison.ratio) for comparison in comparisons]
    p = float(wilcoxon(logs, alternative="greater").pvalue) if any(logs) else 1.0
    return Summary(
        ratio=math.exp(fmean(logs)),
        seconds_ratio=_mean_if_any(comparison.seconds_ratio for comparison in comparisons),
        p=p,
        faster=sum(log > 0 for log in logs),
        tasks=len(logs),
        missed=(
            sum(comparison.missed[0] for comparison in comparisons),
            sum(comparison.missed[1] for comparison in comparisons),
        ),
        runs=sum(len(comparison.pairs) for comparison in comparisons),
    )


def loss_change(pairs: Sequence[tuple[Row, Row]]) -> tuple[float, float]:
    """Relative change of the mean final loss from the base's rows to GapAware's, and p that it is worse.

    p is of a one-sided paired t-test; NaN with fewer than two pairs or where all are equal.
    """
    base = [row["final_loss"] for row, _ in pairs]
    ours = [row["final_loss"] for _, row in pairs]
    p = math.nan
    if len(pairs) > 1 and base != ours:
        p = float(ttest_rel(ours, base, alternative="greater").pvalue)
    return fmean(ours) / fmean(base) - 1, p
