"""How runs of the plateau benchmark went, on three held-out tasks that nobody has picked.

Those on which GapAware gains most, as much as in the middle, and least.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.methods import BASE, GAPAWARE
from benchmarks.report import ALONE, ORACLE, comparisons, rivals_rows
from benchmarks.runs import Results, Row, Run
from benchmarks.suite import PLATEAUS, TASKS

STYLES = {
    ALONE: {"color": "gray"},
    ORACLE: {"color": "C1", "linestyle": "--"},
    "GapAware": {"color": "black", "linewidth": 1.8},
}


def draw_curves(results: Results, tasks: Sequence[str], seeds: int, path: Path) -> None:
    """What each run's target is about, held-out accuracy or loss, over its steps; a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = _extremes(results, tasks, seeds)
    figure, every = pyplot.subplots(
        1, len(chosen), figsize=(4 * len(chosen), 3.2), layout="constrained", squeeze=False
    )
    for axes, (name, gain) in zip(every[0], chosen, strict=True):
        task = TASKS[name]
        ours = results.of(Run(name, GAPAWARE.name, 1.0, seed) for seed in range(seeds))
        shown = {**rivals_rows(results, name, [BASE.name], seeds), "GapAware": ours}
        for method, style in STYLES.items():
            for number, row in enumerate(shown.get(method, [])):
                steps, values = _curve(row, loss=task.target_is_loss)
                label = method if number == 0 else None
                axes.plot(steps, values, label=label, alpha=0.8, **style)
        axes.axhline(task.target, color="gray", linestyle=":", linewidth=1)
        axes.set_xscale("log")
        if task.target_is_loss:
            axes.set_yscale("log")
        axes.set_title(f"{name} ({task.base.__name__}): steps / {gain:.2g}", fontsize=10)
        axes.set_xlabel("steps")
        axes.set_ylabel("held-out loss" if task.target_is_loss else "held-out accuracy")
        axes.grid(alpha=0.3)
    every[0][0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _extremes(results: Results, tasks: Sequence[str], seeds: int) -> list[tuple[str, float]]:
    """The held-out tasks of the largest, the middle and the smallest gain, and these gains."""
    held_out = {task.name for task in PLATEAUS if not task.tuned_on}
    found = comparisons(results, tasks, [BASE.name, GAPAWARE.name], seeds).get(ALONE, [])
    gains = sorted(
        ((one.task, one.ratio) for one in found if one.task in held_out), key=lambda each: -each[1]
    )
    return [gains[number] for number in sorted({0, len(gains) // 2, len(gains) - 1}) if gains]


def _curve(row: Row, *, loss: bool) -> tuple[list[int], list[float]]:
    points = [(step, one if loss else other) for step, one, other in row["curve"]]
    steps, values = zip(*points, strict=True)
    return list(steps), list(values)
