"""Options that benchmarks with kept runs share."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_results(
    parser: argparse.ArgumentParser, kept: Path, committed: Path, *, fresh: str | None = None
) -> None:
    """Add where runs are kept, and what is done with those that are there.

    Args:
        parser: of the benchmark; gets `results`, `from_results` and, where asked for, `fresh`.
        kept: file of runs on this machine.
        committed: those that come with the project.
        fresh: help of the option that forgets runs; None for a benchmark that forgets none.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_results(parser, Path("runs/a.jsonl"), Path("results/a.jsonl"))
        >>> parser.parse_args(["--from-results"]).from_results.name
        'a.jsonl'
    """
    parser.add_argument(
        "--results",
        type=Path,
        default=kept,
        help=f"file of finished runs, read and added to (default {kept})",
    )
    source = parser.add_mutually_exclusive_group()
    if fresh is not None:
        source.add_argument("--fresh", action="store_true", help=fresh)
    source.add_argument(
        "--from-results",
        type=_existing,
        nargs="?",
        const=committed,
        metavar="FILE",
        help="train nothing, judge the runs in FILE (default: those committed in benchmarks/results)",
    )


def _existing(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise argparse.ArgumentTypeError(
            f"{name} is not a file; leave the name out for the committed runs"
        )
    return path
