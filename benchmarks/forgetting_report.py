"""The tables and the verdicts of the forgetting benchmark, from its rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import pareto
from benchmarks.forgetting_runs import VIEWS, Case, Row, Runs
from benchmarks.pareto import AT, OLD, OLD_ACCURACY, SHARES, TEST
from recipes.table import table

NEEDS = {"ewc": "ewc (OLD data)"}
OURS = "gapaware-rehearsed, then wise-ft"
RIVAL = "pseudorehearsal, then wise-ft"  # with the same old answers held
# least reductions against the best lr of the base's sweep, by share of the gain
GOALS = {0.95: 0.40, 0.9: 0.50, 0.8: 0.65}
GOAL_DEFAULT = 0.80  # at 90 %, against the default lr
LR_FACTORS = (0.1, 1.0, 10.0)
MOST_CHANGE = 0.20  # of forgetting at 90 % between these learning rates


def tables(rows: Sequence[Row]) -> str:
    """A table for each task and base, one of means, one over learning rates."""
    runs = Runs(rows)
    parts = [f"### {task}, {base}\n\n{case_table(runs, (task, base))}" for task, base in runs.cases]
    parts += ["### All tasks, geometric means\n\n" + means_table(runs)]
    parts += ["### Forgetting at 90 % by factor on the learning rate\n\n" + lr_table(runs)]
    return "\n\n".join(parts) + "\n"


def figures(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Forgetting for every task, base, method, share of the gain and seed, None where not reached."""
    runs = Runs(rows)
    return [
        {
            "task": case[0],
            "base": case[1],
            "method": view,
            "share": share,
            "forgotten": {
                seed: place and place[OLD] - runs.scale(case, seed).old
                for seed, place in runs.places(case, view, share).items()
            },
        }
        for case in runs.cases
        for view in VIEWS
        if runs.seeds(case, view)
        for share in SHARES
    ]


def case_table(runs: Runs, case: Case) -> str:
    """One task and base: means over seeds of the lower envelope of every sweep."""
    body = []
    for view in VIEWS:
        seeds = runs.seeds(case, view)
        if not seeds:
            continue
        at_90 = runs.places(case, view, 0.9)
        accuracy = pareto.mean(
            place and runs.scale(case, seed).old_accuracy - place[OLD_ACCURACY]
            for seed, place in at_90.items()
        )
        mine = [row for row in runs.rows if (row["task"], row["base"]) == case]
        mine = [row for row in mine if row["method"] == VIEWS[view][0]]
        steps = [place and place[AT] for place in at_90.values()]
        if VIEWS[view][1] != "trajectory":
            steps = [row["curves"]["trajectory"][-1][0] for row in mine]
        area = pareto.mean(
            pareto.area(runs.curves(case, view, seed), runs.scale(case, seed)) for seed in seeds
        )
        cells = [mean_or_count(runs.forgotten(case, view, s).values()) for s in SHARES]
        body.append(
            [
                NEEDS.get(view, view),
                *cells,
                percent(accuracy),
                number(pareto.mean(place and place[TEST] for place in at_90.values())),
                percent(runs.reduction([case], view, "base", 0.9)),
                percent(runs.reduction([case], view, "base", 0.9, 1.0)),
                number(area),
                number(pareto.mean(steps), 0),
                f"{max(row['extra_bytes'] for row in mine) / 2**20:.2f}",
                probability(pareto.p_less(runs.ratios([case], view, "base", 0.9))),
                probability(pareto.p_less(runs.ratios([case], view, "wise-ft", 0.9))),
                str(len(seeds)),
            ]
        )
    shares = [f"old loss + at {share:.0%}" for share in SHARES]
    header = [
        "method",
        *shares,
        "old acc. − at 90 %",
        "new test loss",
        "less than best lr",
        "than default lr",
    ]
    return table([*header, "area", "steps", "MiB", "p < base", "p < wise-ft", "seeds"], body)


def means_table(runs: Runs) -> str:
    """Reductions over all tasks that a method was run on; "-" where it missed a target there."""
    body = []
    for view in VIEWS:
        cases = [case for case in runs.cases if runs.seeds(case, view)]
        if not cases:
            continue
        body.append(
            [
                NEEDS.get(view, view),
                *(percent(runs.reduction(cases, view, "base", share)) for share in SHARES),
                percent(runs.reduction(cases, view, "base", 0.9, 1.0)),
                percent(runs.reduction(cases, view, "wise-ft", 0.9)),
                probability(pareto.p_less(runs.ratios(cases, view, "base", 0.9))),
                probability(pareto.p_less(runs.ratios(cases, view, "wise-ft", 0.9))),
                f"{len(cases)} of {len(runs.cases)}",
            ]
        )
    shares = [f"less than best lr at {share:.0%}" for share in SHARES]
    rest = ["than default lr at 90 %", "than wise-ft at 90 %", "p < base", "p < wise-ft", "tasks"]
    return table(["method", *shares, *rest], body)


def lr_table(runs: Runs) -> str:
    """For what sweeps the learning rate: forgetting of each alone, and how far apart these are.

    The last column is most less least over `LR_FACTORS`, as a share of what the base's best forgets: where
    next to nothing is forgotten a ratio of the two says nothing.
    """
    factors = sorted({row["lr_factor"] for row in runs.rows if row["method"] == "base"})
    body = []
    for case in runs.cases:
        for view in ("base", "wise-ft", "finch", RIVAL, "gapaware-retain", OURS):
            if runs.seeds(case, view):
                cells = [
                    mean_or_count(runs.forgotten(case, view, 0.9, f).values()) for f in factors
                ]
                body.append([*case, view, *cells, percent(lr_spread(runs, case, view))])
    return table(
        ["task", "base", "method", *(f"x{factor:.2g}" for factor in factors), "apart"], body
    )


def judge(rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """The bars for ours: what is asked, what came out, whether it holds; none without runs."""
    runs = Runs(rows)
    cases = [case for case in runs.cases if runs.seeds(case, OURS)]
    if not cases:
        return []
    judged = []
    for share, goal in GOALS.items():
        got = runs.reduction(cases, OURS, "base", share)
        question = f"forgets >= {goal:.0%} less than the best lr, at {share:.0%} of the gain"
        judged.append((question, percent(got), got is not None and got >= goal))
    got = runs.reduction(cases, OURS, "base", 0.9, 1.0)
    question = f"forgets >= {GOAL_DEFAULT:.0%} less than the default lr at 90 %"
    judged.append((question, percent(got), got is not None and got >= GOAL_DEFAULT))
    worst = [runs.reduction([case], OURS, "base", 0.9) for case in cases]
    least = None if None in worst else min(value for value in worst if value is not None)
    judged.append(("less on every task at 90 %", percent(least), least is not None and least > 0))
    for rival in ("wise-ft", "l2-sp"):
        p = pareto.p_less(runs.ratios(cases, OURS, rival, 0.9))
        judged.append((f"below {rival} at 90 %, p < 0.05", probability(p), bool(p and p < 0.05)))
    change = max((lr_change(runs, case) for case in cases), default=math.inf)
    question = f"changes < {MOST_CHANGE:.0%} between lr x0.1 and x10, at 90 %"
    answer = percent(change) if math.isfinite(change) else "a learning rate misses the target"
    return [*judged, (question, answer, change < MOST_CHANGE)]


def lr_change(runs: Runs, case: Case) -> float:
    """Largest over smallest mean forgetting of ours over learning rates, less one; inf if one misses."""
    kept = over_lrs(runs, case, OURS)
    return max(kept) / max(min(kept), 1e-9) - 1 if kept else math.inf


def lr_spread(runs: Runs, case: Case, view: str) -> float | None:
    """Largest less smallest mean forgetting over learning rates, as a share of the base's at its best."""
    kept, usual = (
        over_lrs(runs, case, view),
        pareto.mean(runs.forgotten(case, "base", 0.9).values()),
    )
    return (max(kept) - min(kept)) / usual if kept and usual else None


def over_lrs(runs: Runs, case: Case, view: str) -> list[float]:
    """Mean forgetting at 90 % at each of `LR_FACTORS`; none where a seed misses that at one of them."""
    means = [pareto.mean(runs.forgotten(case, view, 0.9, lr).values()) for lr in LR_FACTORS]
    kept = [value for value in means if value is not None]
    return kept if len(kept) == len(means) else []


def mean_or_count(values: Iterable[float | None]) -> str:
    """The mean over seeds, or how many of them reached the target where not all did."""
    kept = list(values)
    reached = sum(value is not None for value in kept)
    return number(pareto.mean(kept)) if reached in (0, len(kept)) else f"({reached}/{len(kept)})"


def number(value: float | None, digits: int = 3) -> str:
    """Fixed point, "-" for nothing."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share, "-" for nothing."""
    return "-" if value is None else f"{value:.0%}"


def probability(value: float | None) -> str:
    """Two digits, "-" for nothing."""
    return "-" if value is None else f"{value:.2g}"
