"""Which run comes next, so that what is there at any time is worth reading.

First GapAware and its base on every task, one seed after the other; then more seeds where there is no
plateau and the two differ; then GapAware without the loss; then the best learning rate of the base's
sweep, the oracle; then learning rates that are too small; then every rival at the best point of its own
sweep. Two seeds choose a point, and all seeds judge it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks.bases import MuonAdamW
from benchmarks.methods import BASE, GAPAWARE, NO_LOSS, Base, Method, Point
from benchmarks.rivals import RIVALS
from benchmarks.runs import METHODS, Results, Row, Run, steps
from benchmarks.statistics import geometric_mean
from benchmarks.suite import OTHER_NAMES, PLATEAU_NAMES, ROBUSTNESS, TASKS

SWEEP_SEEDS = (0, 1)
# where there is no plateau and a factor has moved: the law was chosen on 10 to 29. Five seeds cannot tell
# half a percent there, since any change of a run, however small, moves its final loss by several
ENOUGH_SEEDS, MORE_SEEDS = 5, (*range(5, 10), *range(30, 40))
CUT_OFF = 2  # times the fewest steps of a sweep so far, after which another run of it is hopeless


def at(task: str, method: str, point: Point, seed: int) -> Run:
    """A run of a method at a point of its sweep."""
    if METHODS[method].lr_swept and point is not None:
        return Run(task, method, float(point), seed)  # type: ignore[arg-type]
    return Run(task, method, 1.0, seed, point)


def applies(method: Method, base: Base) -> bool:
    """Mechanic tunes one optimizer, and Muon with AdamW is two."""
    return not (method.name == "mechanic" and issubclass(base, MuonAdamW))


def inner_first(points: Sequence[Point]) -> list[Point]:
    """From the middle of a sweep outwards, since a good point early cuts the others short."""
    middle = (len(points) - 1) / 2
    return sorted(points, key=lambda point: abs(points.index(point) - middle))


def best_point(results: Results, task: str, method: Method) -> Point:
    """The point with the fewest steps over the sweep's seeds, ties by final loss; None before its end.

    Only what the sweep saw counts: a run that was cut off in it and then done whole does not change the
    choice.
    """
    ranked = []
    for point in method.points:
        rows = [results.find_first(at(task, method.name, point, seed)) for seed in SWEEP_SEEDS]
        found = [row for row in rows if row is not None]
        if len(found) < len(SWEEP_SEEDS):
            return None
        loss = sum(row["final_loss"] for row in found)
        rank = (geometric_mean(steps(row) for row in found), loss if loss == loss else float("inf"))
        ranked.append((rank, point))
    return min(ranked, key=lambda entry: entry[0])[1]


def chosen_rows(results: Results, task: str, method: Method, seeds: int) -> list[Row]:
    """The runs that judge a method on a task: at its defaults, or at the best point of its sweep."""
    point = best_point(results, task, method) if method.swept else None
    if method.swept and point is None:
        return []
    return results.of(at(task, method.name, point, seed) for seed in range(seeds))


def _next_of_sweep(results: Results, task: str, method: Method, seed: int) -> Run | None:
    """The next run of a sweep, cut off where it has lost: to the base alone, or to another point by far."""
    runs = [at(task, method.name, point, seed) for point in inner_first(method.points)]
    alone = results.find(Run(task, BASE.name, 1.0, seed))
    allowed = TASKS[task].budget if alone is None else steps(alone)
    for run in runs:
        known = results.find_first(run)
        if known is None:
            return with_scales(results, replace(run, budget=allowed))
        allowed = min(allowed, CUT_OFF * steps(known))
    return None


def with_scales(results: Results, run: Run) -> Run:
    """Give a run that replays GapAware's factors those of the same task and seed."""
    if not METHODS[run.method].replays:
        return run
    ours = results.find(Run(run.task, GAPAWARE.name, 1.0, run.seed))
    return replace(run, scales=tuple(ours["scales"]) if ours else ())


def pairs(tasks: Sequence[str], seed: int) -> list[Run]:
    """GapAware and its base alone on each task."""
    return [Run(task, method, 1.0, seed) for task in tasks for method in ("base", "gapaware")]


def judging_seeds(results: Results, task: str, seeds: int) -> list[int]:
    """Those for a task without a plateau: more of them where GapAware is not the base to the bit."""
    first = range(seeds)
    if seeds < ENOUGH_SEEDS:
        return list(first)
    for seed in first:
        alone, ours = map(results.find, pairs([task], seed))
        if alone and ours and alone["final_loss"] != ours["final_loss"]:
            return sorted({*first, *MORE_SEEDS})
    return list(first)


def stages(
    results: Results, tasks: Sequence[str], methods: Sequence[str], seeds: int
) -> Iterator[tuple[str, list[Run]]]:
    """Named lists of runs, each made when the ones before are done; runs that are there are left out."""
    wanted = [name for name in TASKS if name in tasks]
    plateaus = [name for name in wanted if name in PLATEAU_NAMES]
    # a rival is cut off by the base's steps, or replays GapAware's factors, and is compared with both
    rivals = [rival for rival in RIVALS if rival.name in methods]
    first = (BASE.name, GAPAWARE.name) if rivals else methods
    for seed in range(seeds):
        runs = [run for run in pairs(wanted, seed) if run.method in first]
        yield f"pairs, seed {seed}", results.missing(runs)
    more = [
        run
        for task in wanted
        if task in OTHER_NAMES
        for seed in judging_seeds(results, task, seeds)
        for run in pairs([task], seed)
        if run.method in first
    ]
    yield "pairs, more seeds", results.missing(more)
    if NO_LOSS.name in methods:
        runs = [Run(task, NO_LOSS.name, 1.0, seed) for task in wanted for seed in range(seeds)]
        yield "without the loss", results.missing(runs)
    if BASE.name in methods:
        yield from _sweep(results, BASE, plateaus, seeds)
    yield (
        "robustness",
        results.missing(
            Run(task, method, factor, seed)
            for seed in range(seeds)
            for task, factors in ROBUSTNESS.items()
            for factor in factors
            for method in ("base", "gapaware")
            if task in wanted and method in methods
        ),
    )
    for rival in rivals:
        yield from _sweep(results, rival, plateaus, seeds)


def _sweep(
    results: Results, method: Method, plateaus: Sequence[str], seeds: int
) -> Iterator[tuple[str, list[Run]]]:
    """The sweep of a method on each task, then the runs at its best."""
    here = [name for name in plateaus if applies(method, TASKS[name].base)]
    for seed in SWEEP_SEEDS:
        # one run of each task at a time, since the next one's budget follows from it
        for _ in method.points:
            runs = [_next_of_sweep(results, task, method, seed) for task in here]
            yield f"{method.name}, sweep", [run for run in runs if run is not None]
    best = {task: best_point(results, task, method) for task in here}
    runs = [
        with_scales(results, at(task, method.name, best[task], seed))
        for task in here
        for seed in range(seeds)
    ]
    yield f"{method.name}, at its best", results.missing(runs)
