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

    # of each method its points, (steps over the base's, task)
    shown: dict[str, list[tuple[float, str]]] = {}
    for task in PLATEAUS:
        ours = results.of(Run(task.name, GAPAWARE.name, 1.0, seed) for seed in range(seeds))
        rows = {
            **rivals_rows(results, task.name, methods, seeds),
            **({"GapAware": ours} if ours else {}),
        }
        if task.name not in tasks or ALONE not in rows:
            continue
        alone = geometric_mean(map(steps, rows[ALONE]))
        for method, found in rows.items():
            point = geometric_mean(map(steps, found)) / alone, task.name
            shown.setdefault(method, []).append(point)
    drawn = [name for _, name in shown.pop(ALONE, [])]
    least = {name: share for share, name in shown.get("GapAware", [])}
    # the held-out ones above, and ours from left to right
    chosen_on = {task.name: task.tuned_on for task in PLATEAUS}
    drawn.sort(key=lambda name: (not chosen_on[name], -least.get(name, 1.0)))
    figure, axes = pyplot.subplots(
        figsize=(9, max(4.5, 1 + 0.3 * len(drawn))), layout="constrained"
    )
    axes.axvline(1.0, color="gray", label=ALONE)
    for number, (method, points) in enumerate(sorted(shown.items())):
        shares, of = zip(*points, strict=True)
        ours = method == "GapAware"
        axes.plot(
            shares,
            [drawn.index(name) for name in of],
            "D" if ours else "os"[number // 10 % 2],
            label=method,
            color="black" if ours else f"C{number % 10}",
            markersize=7 if ours else 5,
            zorder=3 if ours else 2,
        )
    axes.set_xscale("log")
    axes.set_yticks(range(len(drawn)), drawn)
    for label in axes.get_yticklabels():
        label.set_fontweight("normal" if chosen_on[label.get_text()] else "bold")
    axes.set_xlabel(
        "steps to target / those of the base alone (geometric means, a miss is its budget); bold: held out"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
