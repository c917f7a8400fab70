"""What each panel of the figure shows: every function paints one run into one `Axes`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from gapaware.history import Record, column
from gapaware.spectrum import REGIME_BOUNDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
Labels: TypeAlias = list[tuple[float, str, str]]  # value on the y axis, text, colour

# Okabe and Ito's palette, whose colours stay apart for colour-blind readers
BLUE, ORANGE, RED, SKY, GREEN = "#0072B2", "#E69F00", "#D55E00", "#56B4E9", "#009E73"
OCHRE, INK, DUSK, GREY = "#9A6A00", "#333333", "#777777", "#A8A8A8"
REGIME_COLOURS = {"plateau": SKY, "steady": GREEN, "transition": ORANGE, "forgetting": RED}

_POINTS = 1500  # more than the pixels across one panel
_SMOOTH_FROM = 60  # records from which a running median shows more than the raw line
_MARKED_UP_TO = 30  # records up to which every one gets a dot
_LR_DECADES = 3  # a schedule that ends at zero would squeeze everything else


def series(records: Sequence[Record], name: str) -> Array:
    """A column as float64, NaN where there is no value; 2-D where the values are lists or dicts.

    Example:
        >>> series([{"lr": [0.5, 1.0]}, {"lr": None}], "lr").tolist()
        [[0.5, 1.0], [nan, nan]]
    """
    try:
        values = column(records, name)
    except KeyError:
        return np.full(len(records), np.nan)
    values = [list(value.values()) if isinstance(value, Mapping) else value for value in values]
    width = max((len(value) for value in values if isinstance(value, list)), default=0)
    if not width:
        return np.array(values, dtype=np.float64)
    rows = np.full((len(values), width), np.nan)
    for row, value in zip(rows, values, strict=True):
        if isinstance(value, list):
            row[: len(value)] = value
    return rows


def paint_loss(ax: Axes, records: Sequence[Record]) -> Labels:
    """The loss, on a log axis where it spans more than a factor of 20."""
    ax.set_ylabel("loss")
    loss = series(records, "loss")
    finite = loss[np.isfinite(loss)]
    if finite.size and finite.min() > 0 and finite.max() > 20 * finite.min():
        ax.set_yscale("log")
    _noisy_line(ax, series(records, "step"), loss)
    return []


def paint_spectrum(ax: Axes, records: Sequence[Record]) -> Labels:
    """The singular values, those above the gap in colour, and the gap between them shaded."""
    from matplotlib.collections import LineCollection

    ax.set_ylabel("singular values\nof the last updates")
    seen = [record for record in records if record.get("spectrum")]
    kept = np.linspace(0, len(seen) - 1, min(len(seen), _POINTS // 2)).astype(int)
    seen = [seen[index] for index in kept]
    steps, sigma = series(seen, "step"), _positive(series(seen, "spectrum.sigma"))
    if sigma.ndim < 2 or not np.isfinite(sigma).any():
        return _say(ax, "no spectrum recorded")
    ax.set_yscale("log")
    modes = sigma.shape[1]
    position = np.nan_to_num(series(seen, "spectrum.gap_position")).astype(int)
    position[(position < 1) | (position >= modes)] = 0
    edge = np.clip(np.stack([position - 1, position], axis=1), 0, modes - 1)
    above, below = np.take_along_axis(sigma, edge, axis=1).T
    found = position > 0
    ax.fill_between(steps, below, above, where=list(found), color=ORANGE, alpha=0.25, linewidth=0)
    for mode in range(modes):
        points = np.column_stack([steps, sigma[:, mode]])
        colours = [BLUE if mode < k else GREY for k in position]
        widths = [1.6 if mode < k else 0.7 for k in position]
        lines = list(np.stack([points[:-1], points[1:]], axis=1))
        ax.add_collection(LineCollection(lines, colors=colours, linewidths=widths))
        if len(steps) <= _MARKED_UP_TO:
            ax.scatter(steps, sigma[:, mode], s=9, c=colours, zorder=3)
    ax.autoscale_view(scaley=False)
    _show(ax, np.nanmin(sigma) / 1.3, np.nanmax(sigma) * 1.3)
    last = sigma[np.isfinite(sigma).any(axis=1)][-1]
    labels = [(float(np.nanmin(last)), "below", DUSK)]
    gap = np.sqrt(above * below)[found]
    if np.isfinite(gap).any():
        mostly = np.bincount(position[found]).argmax()
        labels.append((_last(gap), f"gap, mostly\nafter mode {mostly}", OCHRE))
        labels.append((float(np.nanmax(last)), "above the gap", BLUE))
    return labels


def paint_adiabaticity(ax: Axes, records: Sequence[Record]) -> Labels:
    """The scale-free adiabaticity a over bands that show what each height means."""
    ax.set_ylabel("adiabaticity $a$")
    a = _positive(series(records, "spectrum.adiabaticity"))
    if not np.isfinite(a).any():
        return _say(ax, "no spectrum recorded")
    ax.set_yscale("log")
    low, high = min(np.nanmin(a) / 1.5, 0.03), max(np.nanmax(a) * 1.5, 30.0)
    labels = []
    for regime, (start, end) in REGIME_BOUNDS.items():
        bottom, top = max(start, 1e-30), min(end, 1e30)
        ax.axhspan(bottom, top, color=REGIME_COLOURS.get(regime, GREY), alpha=0.16, linewidth=0)
        labels.append((float(np.sqrt(max(start, low) * min(end, high))), regime, INK))
    _noisy_line(ax, series(records, "step"), a)
    _show(ax, low, high)
    return labels


def paint_scale(ax: Axes, records: Sequence[Record]) -> Labels:
    """The factor on the learning rate, those of blocks and weight decay where they differ, and pushes."""
    from matplotlib.ticker import FuncFormatter

    ax.set_ylabel("lr scale")
    ax.set_yscale("log", base=2)
    steps, scale, decay, blocks = (
        _positive(series(records, name))
        for name in ("step", "scale", "weight_decay_scale", "scales")
    )
    kept = _extremes(scale)
    faster, slower = np.maximum(scale[kept], 1), np.minimum(scale[kept], 1)
    ax.fill_between(steps[kept], 1, faster, step="post", color=ORANGE, alpha=0.25, linewidth=0)
    ax.fill_between(steps[kept], slower, 1, step="post", color=BLUE, alpha=0.25, linewidth=0)
    ax.axhline(1, color=GREY, linewidth=0.8)
    labels = []
    pushed = np.nan_to_num(series(records, "push")) > 0
    if pushed.any():
        strip = ax.fill_between(
            steps, 0.94, 1, where=list(pushed), step="post", color=RED, linewidth=0
        )
        strip.set_transform(ax.get_xaxis_transform())
        labels.append((float(np.nanmax(scale)), "pushed (strip)", RED))
    if blocks.ndim == 2:
        for edge, name in ((np.fmin.reduce, "slowest block"), (np.fmax.reduce, "fastest block")):
            values = edge(blocks, axis=1)
            _line(ax, steps, values, DUSK, linewidth=0.8, drawstyle="steps-post")
            labels.append((_last(values), name, DUSK))
    if (np.isfinite(decay) & (decay != 1)).any():
        _line(ax, steps, decay, GREEN, linewidth=1.2, drawstyle="steps-post")
        labels.append((_last(decay), "weight decay", GREEN))
    _line(ax, steps, scale, INK, linewidth=1.6, drawstyle="steps-post")
    drawn = np.concatenate([values[np.isfinite(values)] for values in (scale, decay, blocks)])
    _show(ax, min(drawn.min(initial=1) / 1.2, 0.5), max(drawn.max(initial=1) * 1.2, 2))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"×{value:g}"))
    own = "first block" if blocks.ndim == 2 else "lr"
    return [*labels, (_last(scale), own, INK)] if labels else []


def paint_lr(ax: Axes, records: Sequence[Record]) -> Labels:
    """The learning rate as scheduled and as applied, for every parameter group that differs."""
    ax.set_ylabel("learning rate")
    steps = series(records, "step")
    planned, applied = (
        _positive(series(records, name)).reshape(len(records), -1) for name in ("lr", "lr_scaled")
    )
    both = np.concatenate([planned.ravel(), applied.ravel()])
    both = both[np.isfinite(both)]
    if not both.size:
        return _say(ax, "no learning rate recorded")
    if both.max() > 10 * both.min():
        ax.set_yscale("log")
        _show(ax, max(both.min(), both.max() / 10**_LR_DECADES) / 1.3, both.max() * 1.3)
    groups = zip(planned.T, applied.T, strict=True)
    pairs = {(plan.tobytes(), real.tobytes()): (plan, real) for plan, real in groups}
    labels = []
    for group, (plan, real) in enumerate(pairs.values()):
        _line(ax, steps, real, ORANGE, linewidth=1.8)
        _line(ax, steps, plan, INK, linewidth=1.0, linestyle="--")
        name = f" {group}" if len(pairs) > 1 else ""
        labels.append((_last(real), f"applied{name}", OCHRE))
        labels.append((_last(plan), f"scheduled{name}", INK))
    return labels


def paint_risk(ax: Axes, records: Sequence[Record]) -> Labels:
    """The forgetting risk: the squared distance from the start, relative to the start."""
    ax.set_ylabel("forgetting risk\n" + r"$\|θ - θ_0\|^2 / \|θ_0\|^2$")
    risk = _positive(series(records, "risk"))
    if not np.isfinite(risk).any():
        return _say(ax, "no risk recorded")
    ax.set_yscale("log")
    _line(ax, series(records, "step"), risk, INK, linewidth=1.5)
    _show(ax, np.nanmin(risk) / 1.3, np.nanmax(risk) * 1.3)
    return []


Paint: TypeAlias = "Callable[[Axes, Sequence[Record]], Labels]"
PANELS: dict[str, tuple[Paint, float]] = {  # with their heights, relative to each other
    "loss": (paint_loss, 1.0),
    "singular values": (paint_spectrum, 1.7),
    "adiabaticity": (paint_adiabaticity, 1.4),
    "scale": (paint_scale, 1.0),
    "risk": (paint_risk, 1.0),
    "lr": (paint_lr, 1.0),
}


def _positive(values: Array) -> Array:
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _last(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else 1.0


def _extremes(values: Array) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Indices of few enough points to draw: every stretch's lowest and highest, spikes included."""
    if len(values) <= _POINTS:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), _POINTS // 2):
        if np.isfinite(values[stretch]).any():
            kept |= {stretch[np.nanargmin(values[stretch])], stretch[np.nanargmax(values[stretch])]}
    return np.array(sorted(kept))


def _running_median(values: Array) -> Array:
    half = len(values) // 60 + 1
    padded = np.pad(values, half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    return cast(Array, np.nanmedian(windows, axis=1))


def _line(ax: Axes, steps: Array, values: Array, colour: str, **style: Any) -> None:
    kept = _extremes(values)
    marker = "o" if np.isfinite(values).sum() <= _MARKED_UP_TO else ""
    ax.plot(steps[kept], values[kept], color=colour, marker=marker, markersize=3, **style)


def _noisy_line(ax: Axes, steps: Array, values: Array) -> None:
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(values) < _SMOOTH_FROM:
        _line(ax, steps, values, INK, linewidth=1.5)
        return
    _line(ax, steps, values, INK, linewidth=0.6, alpha=0.35)
    _line(ax, steps, _running_median(values), INK, linewidth=1.8)


def _show(ax: Axes, low: float, high: float) -> None:
    """Make room for these values, and keep what panels that share the axis need."""
    if not ax.get_autoscaley_on():
        low, high = min(low, ax.get_ylim()[0]), max(high, ax.get_ylim()[1])
    ax.set_ylim(low, high)


def _say(ax: Axes, text: str) -> Labels:
    if ax.get_autoscaley_on():  # no panel that shares the axis has values either
        ax.tick_params(left=False, labelleft=False)
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=DUSK)
    return []
