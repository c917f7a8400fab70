"""Pareto curves: what each method forgets against what it learns, a panel a task and base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import pareto
from benchmarks.forgetting_runs import VIEWS, Row, Runs

SHARES = [*np.arange(0.1, 0.9, 0.05), 0.9, 0.925, 0.95, 0.975, 1.0]
STYLES = {
    "base": {"color": "0.2", "linewidth": 2.2},
    "wise-ft": {"color": "tab:blue", "linewidth": 2.2},
    "gapaware-retain": {"color": "tab:orange", "linewidth": 2.2},
    "gapaware-retain, then wise-ft": {"color": "tab:orange", "linewidth": 2.2, "linestyle": "--"},
    "gapaware-rehearsed": {"color": "tab:purple", "linewidth": 1.6},
    "gapaware-rehearsed, then wise-ft": {
        "color": "tab:purple",
        "linewidth": 2.6,
        "linestyle": "--",
    },
    "gapaware-distilled": {"color": "tab:red", "linewidth": 1.6},
    "gapaware-distilled, then wise-ft": {"color": "tab:red", "linewidth": 2.6, "linestyle": "--"},
    "pseudorehearsal": {"color": "tab:green", "linewidth": 1.6},
    "pseudorehearsal, then wise-ft": {"color": "tab:green", "linewidth": 2.6, "linestyle": "--"},
    "gapaware-consolidate": {"color": "tab:orange", "linewidth": 1.2, "linestyle": ":"},
}
RIVALS = ("tab:cyan", "tab:olive", "tab:pink", "tab:brown", "gold", "black", "0.6")
LINEAR = 0.1  # nats


def draw(rows: Sequence[Row], path: Path) -> None:
    """Mean over seeds of the lower envelope of every sweep, for the shares that all seeds reach."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = Runs(rows)
    colors = dict(zip([view for view in VIEWS if view not in STYLES], RIVALS, strict=True))
    columns = min(4, max(1, len(runs.cases)))
    lines = max(1, math.ceil(len(runs.cases) / columns))
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.6 * lines), squeeze=False, layout="constrained"
    )
    for panel, case in zip(axes.flat, runs.cases, strict=False):
        for view in VIEWS:
            if not runs.seeds(case, view):
                continue
            means = [pareto.mean(runs.forgotten(case, view, share).values()) for share in SHARES]
            points = [(100 * s, m) for s, m in zip(SHARES, means, strict=True) if m is not None]
            if points:
                style = STYLES.get(view) or {"color": colors[view], "linewidth": 1.1}
                panel.plot(*zip(*points, strict=True), label=view, **style)
        # below the threshold the axis is linear anyway, and without a decade on it its ticks are odd
        if max(map(abs, panel.dataLim.intervaly)) > LINEAR:
            panel.set_yscale("symlog", linthresh=LINEAR)
        panel.set_title(", ".join(case), loc="left", fontweight="bold")
        panel.set_xlabel("new task, % of the best gain")
        panel.set_ylabel("rise of the old loss, nats")
    for panel in axes.flat[len(runs.cases) :]:
        panel.set_axis_off()
    handles = {
        label: h
        for panel in axes.flat
        for h, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
