"""The tables and the figure of the plateau benchmark, made from finished runs and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from benchmarks.methods import BASE, GAPAWARE, NO_LOSS
from benchmarks.plan import applies, best_point, chosen_rows, judging_seeds
from benchmarks.rivals import RIVALS
from benchmarks.runs import Results, Row, Run, steps
from benchmarks.statistics import (
    Comparison,
    compare,
    diverged,
    geometric_mean,
    loss_change,
    missed,
    summarize,
)
from benchmarks.suite import AT_BEST, LOOKED_AT, NEWEST, OTHERS, PLATEAUS, ROBUSTNESS, TASKS
from benchmarks.tasks import Task

ALONE, ORACLE = "base alone", "best lr of the sweep"


def rivals_rows(
    results: Results, task: str, methods: Sequence[str], seeds: int
) -> dict[str, list[Row]]:
    """Rows of GapAware's rivals on a task by the rival's name; only those that there are."""
    alone = results.of(Run(task, BASE.name, 1.0, seed) for seed in range(seeds))
    rows = {ALONE: alone, ORACLE: chosen_rows(results, task, BASE, seeds)}
    for rival in (NO_LOSS, *RIVALS):
        if rival.name in methods and applies(rival, TASKS[task].base):
            rows[rival.name] = chosen_rows(results, task, rival, seeds)
    return {name: found for name, found in rows.items() if found}


def comparisons(
    results: Results, tasks: Sequence[str], methods: Sequence[str], seeds: int
) -> dict[str, list[Comparison]]:
    """For each rival its comparisons with GapAware on the tasks that both have run.

    Where all runs of both missed the target there is nothing to compare.
    """
    found: dict[str, list[Comparison]] = {}
    for task in PLATEAUS:
        if task.name not in tasks:
            continue
        ours = results.of(Run(task.name, GAPAWARE.name, 1.0, seed) for seed in range(seeds))
        for name, rows in rivals_rows(results, task.name, methods, seeds).items():
            comparison = compare(task.name, rows, ours)
            if comparison is not None and not nobody_arrived(comparison):
                found.setdefault(name, []).append(comparison)
    return found


def nobody_arrived(comparison: Comparison) -> bool:
    """Whether neither side has a run that reached the target."""
    return comparison.missed == (len(comparison.pairs), len(comparison.pairs))


def groups() -> dict[str, tuple[str, ...]]:
    """Names of groups of plateau tasks: those held out, used to choose, written last, and of each base."""
    bases: dict[str, tuple[str, ...]] = {}
    for task in PLATEAUS:
        bases[task.base.__name__] = (*bases.get(task.base.__name__, ()), task.name)
    held_out = tuple(task.name for task in PLATEAUS if not task.tuned_on)
    return {
        "held out": held_out,
        "held out, never looked at": tuple(name for name in held_out if name not in LOOKED_AT),
        "tuned on": tuple(task.name for task in PLATEAUS if task.tuned_on),
        "newest": tuple(task.name for task in PLATEAUS if task.name in NEWEST),
        **bases,
    }


def _mean_steps(rows: Sequence[Row]) -> str:
    late = sum(missed(row) for row in rows)
    text = f"{geometric_mean(steps(row) for row in rows):.0f}"
    return f"> {text} ({late} of {len(rows)} missed)" if late else text


def _times(ratio: float, censored: tuple[int, int]) -> str:
    """A ratio with a mark for what it is only a bound of."""
    mark = {(True, False): "> ", (False, True): "< ", (True, True): "? "}
    return mark.get((censored[0] > 0, censored[1] > 0), "") + f"{ratio:.2f}"


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _head(*cells: str) -> list[str]:
    return [_line(*cells), "|" + "---|" * len(cells)]


def _plateaus(results: Results, tasks: Sequence[str], seeds: int, of: Sequence[Task]) -> list[str]:
    lines = _head(
        "task",
        "base",
        "target",
        ALONE,
        f"{ORACLE} (factor)",
        "GapAware",
        "alone / GapAware",
        "p",
        "n",
    )
    for task in of:
        ours = results.of(Run(task.name, GAPAWARE.name, 1.0, seed) for seed in range(seeds))
        rows = rivals_rows(results, task.name, (), seeds)
        comparison = compare(task.name, rows.get(ALONE, []), ours)
        if task.name not in tasks or comparison is None:
            continue
        best = best_point(results, task.name, BASE)
        oracle = f"{_mean_steps(rows[ORACLE])} (x {best:g})" if ORACLE in rows else "not run"
        name = f"{task.name} (tuned on)" if task.tuned_on else task.name
        sign = "<=" if task.target_is_loss else ">="
        measure = "loss" if task.target_is_loss else "accuracy"
        lines.append(
            _line(
                name,
                f"{task.base.__name__}, {task.lr:.2g}",
                f"{measure} {sign} {task.target}",
                _mean_steps([alone for alone, _ in comparison.pairs]),
                oracle,
                _mean_steps([row for _, row in comparison.pairs]),
                "nobody arrived"
                if nobody_arrived(comparison)
                else _times(comparison.ratio, comparison.missed),
                f"{comparison.p:.1g}",
                len(comparison.pairs),
            )
        )
    return lines


def _summaries(found: dict[str, list[Comparison]]) -> list[str]:
    lines = _head(
        "against", "tasks", "their steps / GapAware's", "as the base at worst",
        "their CPU time / GapAware's, where on one machine", "fewer steps on",
        "p",         "runs that missed: theirs, GapAware's",
    )  # fmt: skip
    alone = {comparison.task: comparison for comparison in found.get(ALONE, [])}
    for group, members in {"all": tuple(TASKS), **groups()}.items():
        for name, each in found.items():
            at_worst = summarize(
                [c.at_worst(alone[c.task]) for c in each if c.task in members and c.task in alone]
            )
            summary = summarize([c for c in each if c.task in members])
            if summary is None:
                continue
            lines.append(
                _line(
                    name,
                    group,
                    _times(summary.ratio, summary.missed),
                    f"{at_worst.ratio:.2f}" if at_worst else "-",
                    "-" if math.isnan(summary.seconds_ratio) else f"{summary.seconds_ratio:.2f}",
                    f"{summary.faster} of {summary.tasks}",
                    f"{summary.p:.1g}",
                    f"{summary.missed[0]}, {summary.missed[1]} of {summary.runs}",
                )
            )
    return lines


def _pairs(
    results: Results, task: str, factor: float, seeds: Iterable[int]
) -> list[tuple[Row, Row]]:
    rows = []
    for seed in seeds:
        both = results.of(Run(task, name, factor, seed) for name in (BASE.name, GAPAWARE.name))
        if len(both) == 2:
            rows.append((both[0], both[1]))
    return rows


def others(
    results: Results, tasks: Sequence[str], seeds: int
) -> Iterator[tuple[str, list[tuple[Row, Row]]]]:
    """Tasks without a plateau, and the base's row and GapAware's of each seed."""
    for task in OTHERS:
        if task.name in tasks:
            seeds_here = judging_seeds(results, task.name, seeds)
            yield task.name, _pairs(results, task.name, 1.0, seeds_here)


def _others(results: Results, tasks: Sequence[str], seeds: int) -> list[str]:
    lines = _head(
        "task",
        "base",
        "final loss alone",
        "GapAware",
        "change",
        "p that it is worse",
        "diverged",
        "n",
    )
    for found, rows in others(results, tasks, seeds):
        if not rows:
            continue
        task = TASKS[found]
        change, p = loss_change(rows)
        name = f"{task.name} (tuned on)" if task.tuned_on else task.name
        lines.append(
            _line(
                name,
                f"{task.base.__name__}, {task.lr:.2g}",
                *(
                    f"{fmean(r['final_loss'] for r in side):.4f}"
                    for side in zip(*rows, strict=True)
                ),
                f"{change:+.2%}",
                f"{p:.2g}",
                ", ".join(str(sum(map(diverged, side))) for side in zip(*rows, strict=True)),
                len(rows),
            )
        )
    return lines


def _robustness(results: Results, tasks: Sequence[str], seeds: int) -> list[str]:
    lines = _head("task", "lr / tuned", "final loss alone", "GapAware", "n")
    spread = {task: (alone, ours) for task, alone, ours in ranges(results, tasks, seeds)}
    for task, means in _by_lr(results, tasks, seeds):
        for factor, (alone, ours, n) in means.items():
            lines.append(_line(task, f"{factor:g}", f"{alone:.4f}", f"{ours:.4f}", n))
        if task in spread:
            alone, ours = spread[task]
            lines.append(
                _line(task, "range", f"{alone:.4f}", f"{ours:.4f}", f"ratio {ours / alone:.2f}")
            )
    return lines


def _by_lr(
    results: Results, tasks: Sequence[str], seeds: int
) -> Iterator[tuple[str, dict[float, tuple[float, float, int]]]]:
    """Mean final loss of the base and of GapAware, and runs, by factor on the tuned learning rate."""
    for task, factors in ROBUSTNESS.items():
        if task in tasks:
            found = {factor: _pairs(results, task, factor, range(seeds)) for factor in factors}
            yield (
                task,
                {
                    factor: (*_means(rows, lambda row: row["final_loss"]), len(rows))
                    for factor, rows in found.items()
                    if rows
                },
            )


def ranges(
    results: Results, tasks: Sequence[str], seeds: int
) -> Iterator[tuple[str, float, float]]:
    """Tasks run at all learning rates; how far apart final losses are, alone and in GapAware."""
    for task, means in _by_lr(results, tasks, seeds):
        if len(means) == len(ROBUSTNESS[task]):
            alone, ours, _ = zip(*means.values(), strict=True)
            yield task, max(alone) - min(alone), max(ours) - min(ours)


def norms(
    results: Results, tasks: Sequence[str], seeds: int
) -> Iterator[tuple[str, float, float, int]]:
    """Tasks with an interpolator; its mean norm over the smallest, alone and in GapAware, and runs."""
    for task in PLATEAUS:
        rows = _pairs(results, task.name, 1.0, range(seeds))
        if task.name in tasks and rows and "norm_over_smallest" in rows[0][0]["extras"]:
            means = _means(rows, lambda row: row["extras"]["norm_over_smallest"])
            yield (task.name, *means, len(rows))


def _means(rows: Sequence[tuple[Row, Row]], figure: Callable[[Row], float]) -> tuple[float, float]:
    alone, ours = (fmean(map(figure, side)) for side in zip(*rows, strict=True))
    return alone, ours


def _norms(results: Results, tasks: Sequence[str], seeds: int) -> list[str]:
    lines = _head("task", "norm / smallest, alone", "GapAware", "change", "n")
    for task, alone, ours, n in norms(results, tasks, seeds):
        lines.append(_line(task, f"{alone:.3f}", f"{ours:.3f}", f"{ours / alone - 1:+.2%}", n))
    return lines


def markdown(results: Results, tasks: Sequence[str], methods: Sequence[str], seeds: int) -> str:
    """All tables."""
    sections = {
        "Steps to the target, geometric mean over seeds": _plateaus(
            results, tasks, seeds, PLATEAUS
        ),
        "The same, where the learning rate is the best one already": _plateaus(
            results, tasks, seeds, AT_BEST
        ),
        "GapAware against each rival, each task on which anybody arrived counting once": _summaries(
            comparisons(results, tasks, methods, seeds)
        ),
        "Without a plateau": _others(results, tasks, seeds),
        "Learning rates that are too small": _robustness(results, tasks, seeds),
        "Norm of the ReLU network's interpolator": _norms(results, tasks, seeds),
    }
    full = {title: lines for title, lines in sections.items() if len(lines) > 2}
    return "\n\n".join(f"**{title}**\n\n" + "\n".join(lines) for title, lines in full.items())


def figures(
    results: Results, tasks: Sequence[str], methods: Sequence[str], seeds: int
) -> dict[str, Any]:
    """What the tables show of rivals, as plain values: by rival and group, and by rival and task."""
    found = comparisons(results, tasks, methods, seeds)
    described: dict[str, Any] = {"groups": {}, "tasks": {}}
    for group, members in {"all": tuple(TASKS), **groups()}.items():
        for name, each in found.items():
            summary = summarize([c for c in each if c.task in members])
            if summary is not None:
                described["groups"].setdefault(group, {})[name] = asdict(summary)
    for name, each in found.items():
        described["tasks"][name] = {
            c.task: {"ratio": c.ratio, "p": c.p, "missed": c.missed, "n": len(c.pairs)}
            for c in each
        }
    return described
