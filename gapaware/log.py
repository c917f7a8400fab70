"""A run's log: one JSON line per record, behind a header line."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from importlib import metadata
from io import FileIO
from pathlib import Path
from typing import IO, Any

from gapaware.caution import caution

SCHEMA = 1
Record = dict[str, Any]

_HEADER_START = b'{"gapaware"'
_LONGEST_HEADER = 1 << 20


class LogFile:
    """JSON lines on disk; a failure turns it off with one warning and never raises."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # the file is opened later, perhaps after a chdir
        self.path = Path(os.path.abspath(os.path.expanduser(path)))
        self._stream: FileIO | None = None
        self._resume_after: float | None = None
        self._failed = False

    def write(self, record: Record, header: Record) -> None:
        """Add one line; the header goes in front of the first line of a new file."""
        if self._failed:
            return
        try:
            if self._stream is not None and os.fstat(self._stream.fileno()).st_nlink == 0:
                self.close()  # somebody has deleted it: what follows goes into a new one
            stream = self._stream or self._open(header)
            _write_line(stream, record)
        except (OSError, ValueError) as error:
            self._failed = True
            self.close()
            caution(
                f"log_to={str(self.path)!r} cannot be written ({error}); training and "
                "optimizer.history go on without the file. Pass a path that is writable, on a "
                "disk with free space, and not taken by another kind of file",
                RuntimeWarning,
            )

    def resume(self, after: float) -> None:
        """Go on from a checkpoint at step `after`: the next write cuts what lies past it."""
        self.close()
        self._resume_after = after

    def close(self) -> None:
        """Close the file; the next write opens it again where it ended."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            self._resume_after = math.inf  # what has been written up to here stays
            try:
                stream.close()
            except OSError:
                self._failed = True

    def __del__(self) -> None:
        if getattr(self, "_stream", None) is not None:
            self.close()

    def _open(self, header: Record) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unended = False
        if self.path.is_file():  # a device or a pipe is written to as it is
            with self.path.open("rb") as old:
                found = _read_header(old, self.path)
            # one of another gapaware is left whole
            ours = found is not None and found.get("schema") == SCHEMA
            if found is None:
                os.truncate(self.path, 0)
            elif ours and self._resume_after is not None and found.get("run") == header["run"]:
                unended = _cut(self.path, self._resume_after)
                header = {}
            else:
                self.path.rename(_free_name(self.path))
        # unbuffered: one write call is one whole line, and a crash loses none that was written
        self._stream = stream = FileIO(self.path, "ab")
        if unended:
            stream.write(b"\n")
        if header:
            _write_line(stream, header)
        return stream


def read_log(path: str | os.PathLike[str]) -> tuple[Record, list[Record]]:
    """Read a log back: its header and its records; a half-written last line is left out.

    Args:
        path: a file written through `log_to`.

    Returns:
        The header line and the records, oldest first; what was NaN or infinite is None.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a gapaware log, or is one of a newer gapaware.

    Warns:
        RuntimeWarning: lines in the middle are damaged; they are left out.

    Example:
        >>> import os, tempfile
        >>> from gapaware.history import History
        >>> path = os.path.join(tempfile.mkdtemp(), "run.jsonl")
        >>> History(log_to=path, header={"mode": "auto"}).append({"step": 5, "scale": 2.0})
        >>> header, records = read_log(path)
        >>> header["settings"], records
        ({'mode': 'auto'}, [{'step': 5, 'scale': 2.0}])
    """
    path = Path(path)
    records, damaged = [], []
    with path.open("rb") as stream:
        header = _read_header(stream, path)
        if header is None:
            raise ValueError(f"{path}: empty: its run has not reached its first snapshot")
        if header.get("schema") != SCHEMA:
            raise ValueError(
                f"{path}: schema {header.get('schema')} of gapaware {header['gapaware']}, this gapaware "
                f"reads schema {SCHEMA}; read it with the gapaware that wrote it, or a newer one"
            )
        for number, raw in enumerate(stream, start=2):
            record = _parse(raw)
            if record is not None and "step" in record:
                records.append(record)
            elif raw.endswith(b"\n") and raw.strip():
                damaged.append(number)
    if damaged:
        caution(
            f"{path}: {len(damaged)} damaged line(s) left out, the first is line {damaged[0]}",
            RuntimeWarning,
        )
    return header, records


def package_version() -> str:
    """The installed version of gapaware, "unknown" for a source tree that is not installed."""
    try:
        return metadata.version("gapaware")
    except metadata.PackageNotFoundError:
        return "unknown"


def step_of(record: Mapping[str, Any]) -> float:
    """The record's step, minus infinity for one without."""
    step = record.get("step")
    return step if isinstance(step, int | float) else -math.inf


def _finite(value: Any) -> Any:
    """The same plain value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def _write_line(stream: FileIO, record: Record) -> None:
    text = json.dumps(_finite(record), allow_nan=False, ensure_ascii=False)
    line = text.encode("utf-8", "replace") + b"\n"
    if stream.write(line) != len(line):
        raise OSError(errno.ENOSPC, "only a part of the line could be written")


def _parse(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, or nested a thousand deep
        return None
    return value if isinstance(value, dict) else None


def _read_header(stream: IO[bytes], path: Path) -> Record | None:
    """The header, or None for a file that ends before its header does."""
    line = stream.readline(_LONGEST_HEADER)
    header = _parse(line)
    if header is None or "gapaware" not in header:
        begun = line[: len(_HEADER_START)] == _HEADER_START[: len(line)]
        if begun and not line.endswith(b"\n"):
            return None
        raise ValueError(f"{path}: not a gapaware log; pass a file written through log_to=")
    return header


def _cut(path: Path, after: float) -> bool:
    """Cut off all records past step `after`, and a half-written last line.

    Returns True if the last line that stays lacks its line end.

    Cut in place rather than rewritten: one atomic call, which works on a full disk as well, and
    keeps links and permissions.
    """
    keep, unended = 0, False
    with path.open("rb") as stream:
        for raw in stream:
            record, ended = _parse(raw), raw.endswith(b"\n")
            if (record is None and not ended) or step_of(record or {}) > after:
                break
            keep, unended = keep + len(raw), not ended
    os.truncate(path, keep)
    return unended


def _free_name(path: Path) -> Path:
    number = 1
    while (free := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return free
