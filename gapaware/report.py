"""The report on one or several logs: their summaries and one figure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gapaware.figure import write_figure
from gapaware.history import Record, read_log
from gapaware.summary import describe_settings, statistics, summarize

__all__ = ["statistics", "summarize", "write_figure", "write_report"]

Run = tuple[Path, Record, list[Record]]


def write_report(
    paths: Sequence[str | os.PathLike[str]], figure: str | os.PathLike[str] | None = None
) -> str:
    """Read logs, write their figure if a path is given, and return their summaries.

    Args:
        paths: logs written through `log_to`; several are compared side by side in the figure.
        figure: path of the figure, its ending is the format (.png, .svg, .pdf); None for none.

    Returns:
        The summaries, one under the other.

    Raises:
        TypeError: `paths` is one path.
        OSError: a log cannot be read, or the figure cannot be written.
        ValueError: there are no paths, a file is not a gapaware log or has no records, or the figure's
            ending is no format.
        ImportError: matplotlib, which only the figure needs, is not installed.
    """
    runs = read_runs(paths)
    if figure is not None:
        compare(runs, figure)
    return summaries(runs)


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """The runs of several logs, as (path, header, records); errors as in `write_report`."""
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"paths={str(paths)!r}: pass a list of paths, such as [{str(paths)!r}]")
    if not paths:
        raise ValueError("paths=[]: no logs; pass files written through log_to=")
    runs = [(Path(path), *read_log(path)) for path in paths]
    for path, _, records in runs:
        if not records:
            raise ValueError(f"{path}: no records: its run has not reached its first snapshot")
    return runs


def summaries(runs: Sequence[Run]) -> str:
    """One run's summary, or several with their paths as headings."""
    texts = [summarize(header, records) for _, header, records in runs]
    if len(runs) == 1:
        return texts[0]
    return "\n\n".join(f"{run[0]}\n{text}" for run, text in zip(runs, texts, strict=True))


def compare(runs: Sequence[Run], figure: str | os.PathLike[str]) -> Path:
    """Write one figure of these runs, side by side; errors as in `write_report`."""
    return write_figure(
        [records for *_, records in runs],
        figure,
        names=titles([path for path, *_ in runs]),
        subtitles=[describe_settings(header) for _, header, _ in runs],
    )


def titles(paths: Sequence[Path]) -> list[str]:
    """The names of the files, with as many folders as it takes to tell them apart.

    Example:
        >>> titles([Path("runs/a/log.jsonl"), Path("runs/b/log.jsonl")])
        ['a/log', 'b/log']
    """
    # a name may have bytes that are no text
    names = [
        os.fsencode(path.absolute().with_name(path.stem)).decode("utf-8", "replace")
        for path in paths
    ]
    parts = [Path(name).parts for name in names]
    named = (
        ["/".join(part[-depth:]) for part in parts] for depth in range(1, max(map(len, parts)))
    )
    return next(
        (shown for shown in named if len(set(shown)) == len(shown)), [part[-1] for part in parts]
    )


def default_figure_path(paths: Sequence[str | os.PathLike[str]]) -> Path:
    """Beside the first log: run.jsonl gives run.png, several logs run-compared.png.

    Example:
        >>> default_figure_path(["out/run.jsonl"]).name
        'run.png'
    """
    first = Path(paths[0])
    return first.with_name(f"{first.stem}{'-compared' if len(paths) > 1 else ''}.png")
