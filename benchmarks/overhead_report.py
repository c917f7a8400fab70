"""What the measurements of `benchmarks.overhead` say: its bars and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from benchmarks.costs import Row
from benchmarks.timing import Ratio, exponent, ratio

Verdict = tuple[str, str, bool]  # what is asked, what came out, whether it holds

SHARE_OF_PARAMETERS = 0.001
FIXED_BYTES = 8e6
EXPONENT = (0.95, 1.05)
# step at defaults, step at interval=1, snapshot over a read
CPU_BARS = (1.01, 1.05, 2.5)
CUDA_BARS = (1.005, 1.02, 1.3)


def bars(rows: Sequence[Row]) -> list[Verdict]:
    """Judge the measurements of one device."""
    on_cuda = any("half_copy_seconds" in row for row in rows)
    at_defaults, every_step, over_read = CUDA_BARS if on_cuda else CPU_BARS
    judged: list[Verdict] = []
    for row in _of(rows, "step", method="gapaware"):
        most = every_step if row["interval"] == 1 else at_defaults
        when = "defaults" if row["defaults"] else f"interval={row['interval']}"
        taken = ratio(row["rounds"])
        question = f"{_name(row)}, step at {when} <= {most}"
        judged.append((question, f"{taken}, {_inside(row)} in gapaware", taken.median <= most))
    for row in _of_models(_of(rows, "snapshot")):
        taken = ratio(row["rounds"])
        question = f"{_name(row)}, snapshot over a read <= {over_read}"
        judged.append((question, str(taken), taken.median <= over_read))
        if on_cuda:
            times = row["snapshot_seconds"] / row["half_copy_seconds"]
            question = f"{_name(row)}, snapshot over half a copy <= {over_read}"
            judged.append((question, f"{times:.2f}", times <= over_read))
    for row in _of(rows, "memory"):
        bound = SHARE_OF_PARAMETERS * row["parameter_bytes"] + FIXED_BYTES
        held = row["tensor_bytes"] + row["history_bytes"]
        question = f"{_name(row)}, memory <= {_megabytes(bound)}"
        judged.append((question, _megabytes(held), held <= bound))
    judged += _growth_bar(rows)
    judged += _rival_bars(rows)
    return judged


def _growth_bar(rows: Sequence[Row]) -> Iterable[Verdict]:
    grown = _of(rows, "snapshot", varied="P")
    if len(grown) < 2:
        return
    sizes = [row["numbers"] for row in grown]
    power = exponent(sizes, [row["snapshot_seconds"] for row in grown])
    reading = exponent(sizes, [median(first for first, _ in row["rounds"]) for row in grown])
    low, high = EXPONENT
    answer = f"{power:.3f}, of a read {reading:.3f}"
    yield f"cost grows as P^x, {low} <= x <= {high}", answer, low <= power <= high


def _rival_bars(rows: Sequence[Row]) -> Iterable[Verdict]:
    for ours in _of(rows, "step", method="gapaware", base="AdamW", defaults=True):
        for theirs in _of(rows, "step", model=ours["model"]):
            if theirs["method"].startswith("gapaware"):
                continue
            mine, other = ratio(ours["rounds"]), ratio(theirs["rounds"])
            question = f"{ours['model']}, cheaper than {theirs['method']}"
            answer = f"{mine.median:.4f} against {other}"
            yield question, answer, mine.median < other.median


def tables(rows: Sequence[Row]) -> str:
    """The measurements of one device, in Markdown."""
    steps = [
        (
            row["model"],
            row["base"],
            row["method"],
            f"{row['interval']:.3g}" if "interval" in row else "",
            f"{row['step_seconds'] * 1e3:.1f}",
            ratio(row["rounds"]),
            _inside(row),
        )
        for row in _of(rows, "step")
    ]
    snapshots = [_snapshot_cells(row) for row in _of(rows, "snapshot")]
    memories = [
        (
            row["model"],
            row["base"],
            _megabytes(row["tensor_bytes"]),
            _megabytes(row["history_bytes"]),
            _peak_cell(row),
        )
        for row in _of(rows, "memory")
    ]
    parts = [
        _table("model, base, method, interval, step (ms), ratio, in gapaware", steps),
        _table(
            "of, base, numbers, tensors, snapshot (ms), over a read, over half a copy", snapshots
        ),
        _table("model, base, tensors held, history when full, peak", memories),
    ]
    return "\n\n".join(part for part in parts if part)


def _snapshot_cells(row: Row) -> tuple[object, ...]:
    taken: Ratio = ratio(row["rounds"])
    copied = row.get("half_copy_seconds")
    return (
        row.get("model") or f"{row['varied']} {row['value']}",
        row.get("base", ""),
        f"{row['numbers']:,}",
        row["tensors"],
        f"{row['snapshot_seconds'] * 1e3:.2f}",
        f"{taken.median:.2f} ({taken.low:.2f} to {taken.high:.2f})",
        f"{row['snapshot_seconds'] / copied:.2f}" if copied else "",
    )


def _inside(row: Row) -> str:
    """Time in GapAware as a share of the step, by GapAware's own clock; on CUDA the host's alone."""
    return f"{row['inside_seconds'] / row['step_seconds']:.2%}" if "inside_seconds" in row else ""


def _peak_cell(row: Row) -> str:
    alone, wrapped = row["peak_alone"], row["peak_wrapped"]
    return "unknown" if alone is None else f"{_megabytes(alone)} -> {_megabytes(wrapped)}"


def _table(header: str, lines: Sequence[Sequence[object]]) -> str:
    if not lines:
        return ""
    columns = header.split(", ")
    rule = "|".join("---" for _ in columns)
    cells = [" | ".join(map(str, line)) for line in (columns, *lines)]
    return "\n".join((f"| {cells[0]} |", f"|{rule}|", *(f"| {line} |" for line in cells[1:])))


def _of(rows: Iterable[Row], measure: str, **wanted: object) -> list[Row]:
    wanted = {"measure": measure, **wanted}
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _of_models(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "model" in row]


def _name(row: Row) -> str:
    return f"{row['model']}, {row['base']}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"
