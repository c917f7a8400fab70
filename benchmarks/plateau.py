"""Does GapAware leave plateaus faster than every rival, and leave everything else alone?

    python -m benchmarks.plateau --quick           # four tasks, base alone: about 12 minutes
    python -m benchmarks.plateau                   # everything: many hours on one core
    python -m benchmarks.plateau --from-results    # tables and figure of the committed runs

Every run trains a task from `benchmarks/tasks` from scratch; methods with the same seed see the same data,
initialization and batches. Each finished run is a line in runs/plateau.jsonl, so the command can be killed
at any time and goes on where it was. `benchmarks/plan.py` says in which order.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import quick
from benchmarks.arguments import add_results
from benchmarks.curves import draw_curves
from benchmarks.figure import draw
from benchmarks.methods import GAPAWARE, NO_LOSS
from benchmarks.plan import stages
from benchmarks.plateau_bars import bars
from benchmarks.report import figures, markdown
from benchmarks.runs import METHODS, Results, run_all
from benchmarks.suite import TASKS

KEPT_RUNS = Path("runs/plateau.jsonl")
COMMITTED_RUNS = Path(__file__).parent / "results" / "plateau.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or what is asked of it, and print its tables."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--quick" in arguments:
        arguments.remove("--quick")
        return quick.main(arguments)
    parser = argparse.ArgumentParser(prog="benchmarks.plateau", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="the small version; has its own --help"
    )
    parser.add_argument("--task", choices=TASKS, action="append", help="only these tasks")
    parser.add_argument("--method", choices=METHODS, action="append", help="only these methods")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 ... N-1 (default 5)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument(
        "--json", type=Path, help="also write the figures in the tables to this file"
    )
    parser.add_argument("--figure", type=Path, help="also draw the steps to target into this file")
    parser.add_argument(
        "--curves", type=Path, help="also draw how runs of three held-out tasks went into this file"
    )
    add_results(
        parser,
        KEPT_RUNS,
        COMMITTED_RUNS,
        fresh="after a change to GapAware: forget its runs, and those that replay its factors",
    )
    options = parser.parse_args(arguments)
    results = Results(options.from_results or options.results)
    if options.fresh:
        for method in METHODS.values():
            if method in (GAPAWARE, NO_LOSS) or method.replays:
                results.forget(method.name)
    tasks, methods = options.task or list(TASKS), options.method or list(METHODS)
    missing = 0
    for stage, runs in stages(results, tasks, methods, options.seeds):
        if options.from_results:
            missing += len(runs)
        else:
            run_all(runs, results, options.jobs, stage)
    if missing:
        print(f"{results.path} lacks at least {missing} runs of the plan; what it has:\n")
    print(markdown(results, tasks, methods, options.seeds), end="\n\n")
    judged = list(bars(results, tasks, methods, options.seeds))
    print(*judged, sep="\n")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        described = figures(results, tasks, methods, options.seeds)
        described["bars"] = [asdict(bar) for bar in judged]
        options.json.write_text(json.dumps(described, indent=1) + "\n")
    if options.figure:
        draw(results, tasks, methods, options.seeds, options.figure)
    if options.curves:
        draw_curves(results, tasks, options.seeds, options.curves)
    return 0


if __name__ == "__main__":
    sys.exit(main())
