"""What the plateau benchmark has to show, whether it does, and why where it does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.methods import NO_LOSS
from benchmarks.report import ALONE, ORACLE, comparisons, groups, norms, others, ranges
from benchmarks.runs import Results
from benchmarks.statistics import Comparison, diverged, loss_change, summarize

FEWER_THAN_BASE, FEWER_THAN_BEST, P = 10.0, 1 / 0.9, 0.01
LOSS, RANGE, NORM = 0.005, 0.2, 0.02
BUMPS = "random-bumps"

# What is known about a bar that is missed; the log has the runs behind each.
REASONS = {
    ALONE: "staircase, committee: noise hides the drift and what a larger factor does; the first steps",
    "SGD": "noise hides the drift on two tasks, and on others the factor stays low after a spike",
    "MuonAdamW": "on addition with an MLP the steps before a window is full decide the run",
    ORACLE: "it is large from the first step on; ours has to see several updates first",
    "reduce-on-plateau": f"it starts from the {ORACLE}, which a user would have to search for",
    "averaged": f"it is the {ORACLE}, evaluated at an average",
    "schedule-free": "it is ahead where the factor comes late: SGD, Muon, character LMs",
    "prodigy": "it finds a large learning rate within ten steps; it misses 24 of 195 runs, ours 3",
    BUMPS: "they have our factors without having to find them; on these tasks it hardly matters when",
    "no plateau": "early leaps while the loss falls well, which a few noisy losses do not tell",
    "norm": "larger steps on the way down from the plateau end further away",
}


@dataclass(frozen=True)
class Bar:
    """One thing that the benchmark has to show.

    Attributes:
        question: what it is.
        answer: what the runs say.
        holds: whether they show it.
        reason: why not, as far as that is known.
    """

    question: str
    answer: str
    holds: bool
    reason: str = ""

    def __str__(self) -> str:
        line = f"{'holds' if self.holds else 'FAILS':6} {self.question}: {self.answer}"
        return line if self.holds or not self.reason else f"{line} ({self.reason})"


def bars(
    results: Results, tasks: Sequence[str], methods: Sequence[str], seeds: int
) -> Iterator[Bar]:
    """Every bar that there are runs for."""
    found = comparisons(results, tasks, methods, seeds)
    bases = {name: members for name, members in groups().items() if name[0].isupper()}
    for name, members in {"all": None, "held out": groups()["held out"], **bases}.items():
        yield from _against(found, ALONE, FEWER_THAN_BASE, name, members)
        yield from _against(found, ORACLE, FEWER_THAN_BEST, name, members)
    for rival, each in found.items():
        if rival not in (ALONE, ORACLE, NO_LOSS.name):
            yield _fewer_steps(rival, each)
    if BUMPS in found:
        behind = [c.task for c in found[BUMPS] if c.ratio <= 1]
        yield Bar(
            f"fewer steps than {BUMPS} on every task",
            ", ".join(f"not on {task}" for task in behind) or f"on all {len(found[BUMPS])}",
            not behind,
            REASONS[BUMPS],
        )
    yield from _without_a_plateau(results, tasks, seeds)
    for task, alone, ours in ranges(results, tasks, seeds):
        yield Bar(
            f"{task}: final loss varies <= {RANGE:g} times as much from lr / 100 to lr",
            f"{ours / alone:.2f}",
            ours <= RANGE * alone,
        )
    for task, alone, ours, _ in norms(results, tasks, seeds):
        change = ours / alone - 1
        yield Bar(
            f"{task}: squared norm within {NORM:.0%}",
            f"{change:+.2%}",
            abs(change) <= NORM,
            REASONS["norm"],
        )


def _against(
    found: dict[str, list[Comparison]],
    rival: str,
    wanted: float,
    name: str,
    members: Iterable[str] | None,
) -> Iterator[Bar]:
    """How many times fewer steps than the base alone, or than its best learning rate."""
    chosen = {
        key: [c for c in each if members is None or c.task in set(members)]
        for key, each in found.items()
    }
    summary = summarize(chosen.get(rival, []))
    if summary is None:
        return
    reason = REASONS.get(name, REASONS[rival])
    best, alone = summarize(chosen.get(ORACLE, [])), summarize(chosen.get(ALONE, []))
    if rival == ALONE and best and alone and alone.ratio / best.ratio < wanted:
        reason = f"{ORACLE}, known beforehand: {alone.ratio / best.ratio:.1f}; {reason}"
    yield Bar(
        f"{rival} takes >= {wanted:.4g} times as many steps, {name}",
        f"{summary.ratio:.3f}",
        summary.ratio >= wanted,
        reason,
    )


def _fewer_steps(rival: str, each: Sequence[Comparison]) -> Bar:
    summary = summarize(each)
    assert summary is not None
    return Bar(
        f"fewer steps than {rival}, p < {P:g}",
        f"{summary.ratio:.2f}, p = {summary.p:.1g}, on {summary.faster} of {summary.tasks}",
        summary.ratio > 1 and summary.p < P,
        REASONS.get(rival, ""),
    )


def _without_a_plateau(results: Results, tasks: Sequence[str], seeds: int) -> Iterator[Bar]:
    found = {name: rows for name, rows in others(results, tasks, seeds) if rows}
    if not found:
        return
    changes = {name: loss_change(rows)[0] for name, rows in found.items()}
    worst = max(changes, key=lambda name: changes[name])
    yield Bar(
        f"no plateau: final loss <= {LOSS:.1%} above the base's on every task",
        f"{changes[worst]:+.2%} on {worst}",
        changes[worst] <= LOSS,
        REASONS["no plateau"],
    )
    mean = fmean(changes.values())
    reason = REASONS["no plateau"]
    yield Bar("no plateau: not worse in the mean", f"{mean:+.2%}", mean <= 0, reason)
    lost = sum(diverged(ours) and not diverged(alone) for r in found.values() for alone, ours in r)
    yield Bar("no plateau: no run diverges that the base's does not", f"{lost}", lost == 0)
