"""The figure of one run, or of several side by side: which panels, where, labels and ticks."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gapaware.history import Record
from gapaware.panels import DUSK, GREY, INK, PANELS, RED, Labels, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FULL_LINES = 12  # more than that would hide the panels: short ticks at the bottom instead
_LABEL_POINTS = 8.5
_FORMATS = (".png", ".svg", ".pdf")


def write_figure(
    runs: Sequence[Record] | Sequence[Sequence[Record]],
    path: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    subtitles: Sequence[str] | None = None,
) -> Path:
    """Draw one run, or several side by side, and write the file.

    Args:
        runs: the records of one run (an optimizer's history will do), or a list of such runs.
        path: the file; its ending is the format: .png, .svg or .pdf. Missing folders are made.
        names: one title per run.
        subtitles: one small line per run, such as its settings.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the path's ending is no format, a run has no records, or there are not as many names or
            subtitles as runs.
        OSError: the file cannot be written.
    """
    path = Path(path)
    figure = draw(runs, names=names, subtitles=subtitles)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"figure={str(path)!r}: no format of that ending; use .png, .svg or .pdf")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def draw(
    runs: Sequence[Record] | Sequence[Sequence[Record]],
    *,
    names: Sequence[str] | None = None,
    subtitles: Sequence[str] | None = None,
) -> Figure:
    """The figure of `write_figure` as a matplotlib `Figure`, one column of panels per run.

    The label of every `Axes` is its panel's name: "loss", "singular values",
    "adiabaticity", "scale", "risk", "lr"; "loss" and "risk" only where a run recorded them.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a run has no records, or there are not as many names or subtitles as runs.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the figure needs matplotlib: pip install gapaware[plot]") from error
    columns = _as_runs(runs)
    for what, given in (("names", names), ("subtitles", subtitles)):
        if given and len(given) != len(columns):
            raise ValueError(
                f"{what}: {len(given)} of them for {len(columns)} run(s); pass one per run"
            )
    panels = dict(PANELS)
    for name in ("loss", "risk"):
        if not any(np.isfinite(series(records, name)).any() for records in columns):
            del panels[name]
    heights = [height for _, height in panels.values()]

    figure = Figure(figsize=(1.5 + 6.5 * len(columns), 1.0 + 1.6 * sum(heights)))
    figure.set_layout_engine("constrained", h_pad=0.05, w_pad=0.08)
    grid = figure.subplots(
        len(panels), len(columns), sharex="col", sharey="row", squeeze=False, height_ratios=heights
    )
    labels: dict[Axes, Labels] = {}
    for across, records in enumerate(columns):
        for down, (name, (paint, _)) in enumerate(panels.items()):
            ax = grid[down, across]
            ax.set_label(name)
            labels[ax] = paint(ax, records)
            _mark_events(ax, records, labelled=down == 0)
            if across:
                ax.set_ylabel("")
        subtitle = subtitles[across] if subtitles else ""
        _title(grid[0, across], names[across] if names else "", subtitle)
        grid[-1, across].set_xlabel("optimizer step")
    for ax in labels:
        _finish(ax)
    figure.align_ylabels()
    for (down, _), ax in np.ndenumerate(grid):  # last: shared axes have their final limits now
        _label_right(ax, labels[ax], points=heights[down] * 1.6 * 72 * 0.85)
    return figure


def _as_runs(runs: Sequence[Any]) -> list[list[Record]]:
    columns = [list(runs)] if len(runs) and isinstance(runs[0], Mapping) else [*map(list, runs)]
    if not columns or not all(columns):
        raise ValueError("no records to draw: the run has not reached its first snapshot")
    return columns


def _mark_events(ax: Axes, records: Sequence[Record], *, labelled: bool) -> None:
    """Dotted lines where the weights went back, and where there were faults."""
    faults = [record["step"] for record in records if record.get("decision") == "fault"]
    returns = [record["step"] for record in records if record.get("back_to") is not None]
    texts = []
    for steps, what, color in ((returns, "return", DUSK), (faults, "fault", RED)):
        few = len(steps) <= _FULL_LINES
        height, cap = (1.0, "butt") if few else (0.07, "projecting")
        style: dict[str, Any] = {"linestyles": ":" if few else "-", "capstyle": cap}
        if steps:
            # in one piece: a run that diverged has a fault at every snapshot
            across = ax.get_xaxis_transform()
            ax.vlines(steps, 0, height, color, linewidth=0.9, transform=across, **style)
            texts.append(f"{len(steps)} {what}" + "s" * (len(steps) > 1))
    if texts and labelled:
        color = RED if faults else DUSK
        ax.set_title(", ".join(texts), loc="right", fontsize=_LABEL_POINTS, color=color)


def _title(ax: Axes, name: str, subtitle: str) -> None:
    lines = textwrap.wrap(subtitle, 88, max_lines=2, placeholder=" ...")
    # a name or a setting may have a $
    ax.set_title("\n".join(lines), loc="left", fontsize=8, color="#666666", parse_math=False)
    if name:
        ax.annotate(
            name,
            (0, 1),
            (0, 8 + 11 * len(lines)),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=12,
            fontweight="bold",
            color=INK,
            parse_math=False,
        )


def _finish(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(color=GREY, labelcolor=INK, labelsize=9)
    ax.margins(x=0.01)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    low, high = ax.get_ylim()
    if ax.get_yscale() != "log":
        ax.yaxis.set_major_locator(MaxNLocator(4))
        return
    ax.yaxis.set_minor_locator(NullLocator())
    if ax.get_label() == "scale":
        ax.yaxis.set_major_locator(LogLocator(2, numticks=6))
    elif high / low > 100:
        ax.yaxis.set_major_locator(LogLocator(10, numticks=6))
    else:  # powers of ten alone would leave one tick or none
        ax.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0), numticks=6))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _label_right(ax: Axes, labels: Labels, points: float) -> None:
    """Write each text at the right edge at the height of its value, moved apart where needed.

    Args:
        ax: the panel, `points` high.
        labels: (value on the y axis, text, colour) each.
        points: the panel's height in points.
    """
    if not labels:
        return
    labels = sorted(labels, key=lambda label: label[0])
    to_axes = ax.transData + ax.transAxes.inverted()
    wanted = np.array([to_axes.transform((1, value))[1] for value, *_ in labels]).clip(0, 1)
    halves = np.array([0.65 * _LABEL_POINTS * (text.count("\n") + 1) for _, text, _ in labels])
    gaps = np.concatenate([[0.0], np.cumsum(halves[:-1] + halves[1:])]) / points
    placed = np.maximum.accumulate(wanted - gaps) + gaps
    placed += np.mean(wanted - placed)
    placed -= max(placed[-1] - 1, 0)
    placed += max(-placed[0], 0)
    for height, (_, text, colour) in zip(placed, labels, strict=True):
        ax.annotate(
            text,
            (1, height),
            (5, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            fontsize=_LABEL_POINTS,
            color=colour,
        )
