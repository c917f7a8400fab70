"""The plateau benchmark in one picture: steps to target of every method on every task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.methods import GAPAWARE
from benchmarks.report import ALONE, rivals_rows
from benchmarks.runs import Results, Run, steps
from benchmarks.statistics import geometric_mean
from benchmarks.suite import PLATEAUS


def draw(
    results: Results, tasks: Sequence[str], methods: Sequence[str], seeds: int, path: Path
) -> None:
    """Steps to target of every method on every task, relative to the base alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [task.name for task in PLATEAUS if task.name in tasks]
    figure, axes = pyplot.subplots(
        figsize=(9, max(4.5, 1 + 0.3 * len(names))), layout="constrained"
    )
    shown: dict[str, list[tuple[float, int]]] = {}
    for height, name in enumerate(reversed(names)):
        ours = results.of(Run(name, GAPAWARE.name, 1.0, seed) for seed in range(seeds))
        rows = {
            **rivals_rows(results, name, methods, seeds),
            **({"GapAware": ours} if ours else {}),
        }
        if ALONE not in rows:
            continue
        alone = geometric_mean(map(steps, rows[ALONE]))
        for method, found in rows.items():
            shown.setdefault(method, []).append((geometric_mean(map(steps, found)) / alone, height))
    axes.axvline(1.0, color="gray", label=ALONE)
    shown.pop(ALONE, None)
    for method, points in shown.items():
        ours = method == "GapAware"
        axes.plot(
            *zip(*points, strict=True),
            "D" if ours else "o",
            label=method,
            color="black" if ours else None,
            markersize=7 if ours else 5,
            zorder=3 if ours else 2,
        )
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel(
        "steps to target / those of the base alone (geometric means, a miss is its budget)"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
