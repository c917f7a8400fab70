"""What a run did, in a dozen lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gapaware.history import Record, column
from gapaware.spectrum import REGIME_BOUNDS

_EVENTS_SHOWN = 3


def statistics(header: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """The numbers behind `summarize`, as plain values ready for JSON.

    Args:
        header: the log's header line, or any dict with the run's "settings".
        records: one dict per snapshot, oldest first, at least one.

    Returns:
        A dict; a value is None where no record has it. Shares are between 0 and 1. A regime's
        share is of optimizer steps, a gap position's share is of snapshots with a spectrum.

    Raises:
        ValueError: there are no records.

    Example:
        >>> records = [{"step": 10, "interval": 10, "scale": 1.0, "regime": "plateau"},
        ...            {"step": 20, "interval": 10, "scale": 2.0, "regime": "steady"}]
        >>> found = statistics({}, records)
        >>> found["scale"]["max"], found["regimes"]
        (2.0, {'plateau': 0.5, 'steady': 0.5})
    """
    if not records:
        raise ValueError("no records: the run has not reached its first snapshot")
    decisions = Counter(_values(records, "decision"))
    loss = _numbers(records, "loss")
    scale = _numbers(records, "scale")
    risk = _numbers(records, "risk")
    return {
        "gapaware": header.get("gapaware"),
        "settings": dict(header.get("settings") or {}),
        "first_step": records[0].get("step"),
        "last_step": records[-1].get("step"),
        "snapshots": sum(record.get("spectrum") is not None for record in records),
        "seconds": _seconds(records),
        "gapaware_share": _gapaware_share(records),
        "regimes": _regime_shares(records),
        "decisions": dict(decisions),
        "raised": _first_and_last(records, "decision", "raise"),
        "lowered": _first_and_last(records, "decision", "lower"),
        "scale": {**_range(scale), "median": _median(scale)},
        "push": _push(records),
        "average": _first_and_last(records, "average", True),
        "lr": _range(_numbers(records, "lr")),
        "lr_scaled": _range(_numbers(records, "lr_scaled")),
        "gap_position": _most_common(records, "spectrum.gap_position"),
        "gap_position_thesis": _most_common(records, "spectrum.gap_position_thesis"),
        "gap_ratio": _median(_numbers(records, "spectrum.gap_ratio")),
        "adiabaticity": _median(_numbers(records, "spectrum.adiabaticity")),
        "decay_share": _median(_numbers(records, "spectrum.decay_share")),
        "loss": {"first": float(loss[0]), "last": float(loss[-1]), "lowest": float(loss.min())}
        if loss.size
        else None,
        "risk": {"last": float(risk[-1]), "largest": float(risk.max())} if risk.size else None,
        "returns": [
            {"step": record.get("step"), "back_to": record["back_to"]}
            for record in records
            if record.get("back_to") is not None
        ],
        "faults": [
            {"step": record.get("step"), "why": record.get("why", "")}
            for record in records
            if record.get("decision") == "fault"
        ],
    }


def summarize(header: Mapping[str, Any], records: Sequence[Record]) -> str:
    """A table of a dozen lines for the terminal: what was seen, what was done about it.

    Args:
        header: the log's header line, or any dict with the run's "settings".
        records: one dict per snapshot, oldest first, at least one.

    Raises:
        ValueError: there are no records.

    Example:
        >>> print(summarize({}, [{"step": 10, "scale": 1.0}, {"step": 20, "scale": 2.0}]))
        steps       10 - 20, 0 snapshots
        scale       1 - 2, median 1.5
    """
    found = statistics(header, records)
    lines = {
        "settings": describe_settings(header),
        "steps": _steps_line(found),
        "regime": ", ".join(f"{name} {_percent(part)}" for name, part in found["regimes"].items()),
        "decision": _decision_line(found),
        "scale": _scale_line(found),
        "push": _push_line(found),
        "average": _average_line(found),
        "lr": _lr_line(found),
        "gap": _gap_line(found),
        "a": _adiabaticity_line(found),
        "loss": _loss_line(found),
        "risk": _risk_line(found),
        "returns": _return_line(found["returns"]),
        "faults": _fault_line(found["faults"]),
    }
    return "\n".join(f"{name:<12}{line}" for name, line in lines.items() if line)


def describe_settings(header: Mapping[str, Any]) -> str:
    """The header's settings in one line, without those that are None."""
    settings = header.get("settings") or {}
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def _values(records: Sequence[Record], name: str) -> list[Any]:
    try:
        return [value for value in column(records, name) if value is not None]
    except KeyError:
        return []


def _numbers(records: Sequence[Record], name: str) -> np.ndarray:
    """All finite numbers of a column, lists laid out flat."""
    found = _values(records, name)
    flat = [item for value in found for item in (value if isinstance(value, list) else (value,))]
    try:
        values = np.array(flat, dtype=float)
    except ValueError as error:
        raise TypeError(f"{name}: {error}") from error
    finite: np.ndarray = values[np.isfinite(values)]
    return finite


def _range(values: np.ndarray) -> dict[str, float | None]:
    if not values.size:
        return {"min": None, "max": None}
    return {"min": float(values.min()), "max": float(values.max())}


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if values.size else None


def _seconds(records: Sequence[Record]) -> float | None:
    """The run's length, whose clock starts again from zero when it is resumed."""
    clock = _numbers(records, "seconds")
    if not clock.size:
        return None
    ticks = np.diff(clock)
    return float(clock[0] + np.where(ticks >= 0, ticks, clock[1:]).sum())


def _gapaware_share(records: Sequence[Record]) -> float | None:
    names = ("seconds", "gapaware_seconds")
    timed = [[record[name] for name in names] for record in records if record.keys() >= set(names)]
    if not timed:
        return None
    clocks = np.array(timed, dtype=float)
    ticks = np.diff(clocks, axis=0) if len(clocks) > 1 else clocks
    total, inside = ticks[(ticks >= 0).all(axis=1)].sum(axis=0)
    return float(inside / total) if total > 0 else None


def _regime_shares(records: Sequence[Record]) -> dict[str, float]:
    steps: Counter[str] = Counter()
    for record in records:
        if record.get("regime") is not None and record.get("decision") != "fault":
            steps[record["regime"]] += record.get("interval") or 1
    ordered = [name for name in REGIME_BOUNDS if name in steps]
    ordered += [name for name in steps if name not in REGIME_BOUNDS]
    return {name: steps[name] / steps.total() for name in ordered}


def _first_and_last(records: Sequence[Record], name: str, value: Any) -> list[int] | None:
    steps = [record["step"] for record in records if record.get(name) == value]
    return [steps[0], steps[-1]] if steps else None


def _push(records: Sequence[Record]) -> dict[str, float] | None:
    pushed = [record for record in records if record.get("push")]
    if not pushed:
        return None
    largest = max(float(record["push"]) for record in pushed)
    return {"first": pushed[0]["step"], "last": pushed[-1]["step"], "max": largest}


def _most_common(records: Sequence[Record], name: str) -> dict[str, float] | None:
    positions = Counter(_values(records, name))
    if not positions:
        return None
    mode, count = positions.most_common(1)[0]
    return {"mode": mode, "share": count / positions.total()}


def _steps_line(found: Mapping[str, Any]) -> str:
    line = f"{found['first_step']} - {found['last_step']}, {found['snapshots']} snapshots"
    if found["seconds"] is not None:
        line += f", {found['seconds']:.1f} s"
    if found["gapaware_share"] is not None:
        line += f" ({found['gapaware_share']:.1%} of it in gapaware)"
    return line


def _decision_line(found: Mapping[str, Any]) -> str:
    spans = {"raise": found["raised"], "lower": found["lowered"]}
    parts = []
    for decision in ("raise", "hold", "lower", "none"):
        if count := found["decisions"].get(decision):
            first, last = spans.get(decision) or (None, None)
            where = "" if first is None else f" (steps {first} - {last})"
            parts.append(f"{decision} {count}{where}")
    return ", ".join(parts)


def _scale_line(found: Mapping[str, Any]) -> str:
    scale = found["scale"]
    if scale["min"] is None:
        return ""
    if scale["min"] == scale["max"]:
        return f"{scale['min']:.3g} throughout"
    return f"{_span(scale)}, median {scale['median']:.3g}"


def _push_line(found: Mapping[str, Any]) -> str:
    push = found["push"]
    if push is None:
        return ""
    return (
        f"up to {push['max']:.3g} times the recent steps (steps {push['first']} - {push['last']})"
    )


def _average_line(found: Mapping[str, Any]) -> str:
    average = found["average"]
    return (
        "" if average is None else f"of the weights, for eval() (steps {average[0]} - {average[1]})"
    )


def _lr_line(found: Mapping[str, Any]) -> str:
    if found["lr"]["min"] is None:
        return ""
    line = f"{_span(found['lr'])} scheduled"
    return line + (f", {_span(found['lr_scaled'])} applied" if found["lr_scaled"]["max"] else "")


def _gap_line(found: Mapping[str, Any]) -> str:
    signal, thesis = found["gap_position"], found["gap_position_thesis"]
    if signal is None:
        return ""
    line = f"after mode {signal['mode']} in {_percent(signal['share'])} of snapshots"
    if thesis is not None:
        line += f" (thesis: {thesis['mode']} in {_percent(thesis['share'])})"
    return line + ("" if found["gap_ratio"] is None else f", ratio R {found['gap_ratio']:.3g}")


def _adiabaticity_line(found: Mapping[str, Any]) -> str:
    if found["adiabaticity"] is None:
        return ""
    line = f"median {found['adiabaticity']:.2g}"
    share = found["decay_share"]
    return line + ("" if share is None else f", weight decay's share of the updates {share:.1%}")


def _loss_line(found: Mapping[str, Any]) -> str:
    loss = found["loss"]
    if loss is None:
        return ""
    return f"{loss['first']:.4g} -> {loss['last']:.4g}, lowest {loss['lowest']:.4g}"


def _risk_line(found: Mapping[str, Any]) -> str:
    risk = found["risk"]
    if risk is None:
        return ""
    line = f"of forgetting: {risk['last']:.3g} at the end, largest {risk['largest']:.3g}"
    return line + " (squared distance from the start, relative)"


def _return_line(returns: Sequence[Mapping[str, Any]]) -> str:
    return _first_few([f"from step {each['step']} to {each['back_to']}" for each in returns])


def _fault_line(faults: Sequence[Mapping[str, Any]]) -> str:
    return _first_few([f"step {fault['step']} ({fault['why']})" for fault in faults])


def _first_few(events: Sequence[str]) -> str:
    if not events:
        return ""
    shown = list(events[:_EVENTS_SHOWN])
    more = [f"{len(events) - len(shown)} more"] if len(events) > len(shown) else []
    return f"{len(events)}: " + ", ".join(shown + more)


def _span(bounds: Mapping[str, float]) -> str:
    low, high = f"{bounds['min']:.3g}", f"{bounds['max']:.3g}"
    return low if low == high else f"{low} - {high}"


def _percent(share: float) -> str:
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"
