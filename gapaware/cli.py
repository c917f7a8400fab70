"""The command line: `gapaware report run.jsonl`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from gapaware.log import package_version
from gapaware.report import compare, default_figure_path, read_runs, summaries
from gapaware.summary import statistics

_TROUBLE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name; None for those of the process.

    Returns:
        The exit code: 0, or 2 where a log could not be read or a figure not be written.

    Raises:
        SystemExit: the arguments are wrong (code 2), or --help or --version was asked for (0).
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Unicode shows "?" and goes on
            stream.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings(record=True) as noticed:
            # of others, such as a font's, nobody can do anything
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", RuntimeWarning)
            try:
                _report(arguments)
                sys.stdout.flush()
            finally:
                for warning in noticed:
                    print(f"gapaware: {warning.message}", file=sys.stderr)
    except BrokenPipeError:
        # whoever reads, such as `head`, has enough; what is left to flush at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # what no optimizer writes: a log that somebody edited
    except (ArithmeticError, AttributeError, TypeError) as error:
        logs = ", ".join(map(str, arguments.logs))
        print(
            f"gapaware: {logs}: not a gapaware log, a value is of another kind ({error}); pass a file "
            "written through log_to=",
            file=sys.stderr,
        )
        return _TROUBLE
    except (OSError, ValueError, ImportError) as error:
        print(f"gapaware: {error}", file=sys.stderr)
        if isinstance(error, ImportError):
            print("gapaware: or leave the figure out: --no-figure", file=sys.stderr)
        return _TROUBLE
    return 0


def _report(arguments: argparse.Namespace) -> None:
    runs = read_runs(arguments.logs)
    figure = arguments.figure
    if arguments.json:
        found = [{"log": str(path), **statistics(header, log)} for path, header, log in runs]
        print(json.dumps(found, indent=2))
    else:
        print(summaries(runs))
        if figure is None and not arguments.no_figure:
            figure = default_figure_path(arguments.logs)
    if figure is not None:
        compare(runs, figure)
        print(f"figure      {figure}", file=sys.stderr if arguments.json else sys.stdout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gapaware", description="What the spectrum of a run's updates did, and what was done."
    )
    parser.add_argument("--version", action="version", version=f"gapaware {package_version()}")
    commands = parser.add_subparsers(required=True, metavar="command")
    report = commands.add_parser(
        "report",
        help="summarize the logs of runs and draw their figure",
        description="Print a summary of logs written with GapAware(..., log_to='run.jsonl'), "
        "and draw their figure; several logs are drawn side by side.",
    )
    report.add_argument("logs", nargs="+", type=Path, metavar="run.jsonl")
    choice = report.add_mutually_exclusive_group()
    choice.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help="where the figure goes, as .png, .svg or .pdf (default: run.png beside run.jsonl)",
    )
    choice.add_argument("--no-figure", action="store_true", help="print the summary only")
    report.add_argument(
        "--json",
        action="store_true",
        help="print the summary's numbers as JSON, and draw a figure only with --figure",
    )
    return parser
