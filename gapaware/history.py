"""The bounded record of what was seen and decided: always in memory, as JSON lines on request."""

from __future__ import annotations

import json
import math
import os
import pickle
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from gapaware.log import SCHEMA, LogFile, Record, package_version, read_log, step_of

__all__ = ["History", "Record", "column", "read_log"]

_MISSING = object()


class History(Sequence[Record]):
    """The newest `limit` records of a run, oldest first; a read-only sequence of plain dicts.

    Each look at a record makes a new dict, so that nobody can change what was written down.

    With `log_to`, every record is also written to that file, one JSON line each, behind a header
    line `{"gapaware": version, "schema": 1, "run": id, "settings": header}`. NaN and infinity are
    `null` in the file. The file is opened at the first record. What happens to a file that is
    already there:

    - A run that goes on from its own checkpoint (`load_state_dict`, or an unpickled history)
      continues it: a half-written last line and all records past the checkpoint are cut off,
      so that no step is in it twice.
    - Any other run leaves it whole under the first free name of run.1.jsonl, run.2.jsonl, ...
      and starts a new run.jsonl.
    - A file that is not a gapaware log is never touched.

    A log that cannot be written (no space, no permission, ...) never stops a training run: one
    `RuntimeWarning` says so, logging to the file ends, and the records in memory go on.

    A pickled history takes its log along; a deep copy does not log, since two writers would
    interleave their steps in one file.

    Args:
        limit: how many records to keep in memory, >= 1. The file has no limit.
        log_to: path of the JSON lines file, or None for memory only. Missing folders are made.
        header: the run's settings, for the header line.

    Raises:
        ValueError: `limit` is not a whole number >= 1.
        TypeError: `log_to` is not a path.

    Example:
        >>> history = History(limit=2)
        >>> for step in (5, 10, 15):
        ...     history.append({"step": step, "scale": 1.5, "spectrum": {"gap_ratio": 2.0}})
        >>> len(history), history[-1]["step"], history.column("spectrum.gap_ratio")
        (2, 15, [2.0, 2.0])
    """

    def __init__(
        self,
        limit: int = 1000,
        log_to: str | os.PathLike[str] | None = None,
        header: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(f"limit={limit!r}: pass a whole number of records to keep, >= 1")
        if log_to is not None and not isinstance(log_to, str | os.PathLike):
            raise TypeError(f"log_to={log_to!r}: pass the path of a file, or None for no log")
        # pickled, since as objects they take three times the memory: 2.7 MB for a thousand
        self._records: deque[bytes] = deque(maxlen=limit)
        self._settings: Record = _plain(header or {})
        self._run = secrets.token_hex(8)
        self._log = None if log_to is None else LogFile(log_to)

    @property
    def limit(self) -> int:
        """How many records are kept in memory."""
        assert self._records.maxlen is not None
        return self._records.maxlen

    @property
    def log_to(self) -> str | None:
        """Absolute path of the log, or None."""
        return None if self._log is None else str(self._log.path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record, as plain Python values; records come in the order of their `step`."""
        plain: Record = _plain(record)
        self._records.append(pickle.dumps(plain))
        if self._log is not None:
            self._log.write(plain, self._header())

    def fresh(self) -> History:
        """An empty history of another run, with the same limit and log."""
        return History(self.limit, self.log_to, self._settings)

    def column(self, name: str) -> list[Any]:
        """One value per record; see the module's `column`."""
        return column(self, name)

    def close(self) -> None:
        """Close the log; a later `append` opens it again where it ended."""
        if self._log is not None:
            self._log.close()

    def state_dict(self) -> dict[str, str]:
        """The records and the run's id, to be saved in a checkpoint.

        The records are one JSON text: `torch.distributed.checkpoint` stores every leaf of a
        nested state on its own and needs the same keys in a fresh run as in the saved one.
        """
        return {"records": json.dumps(list(self)), "run": self._run}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the records (the newest `limit`) and the run's id, and continue its log.

        Raises:
            ValueError: the state was not made by `History.state_dict`.
        """
        try:
            records = [_plain(record) for record in json.loads(state_dict.get("records", "[]"))]
            if not all(isinstance(record, dict) for record in records):
                raise ValueError("its records are not dicts")
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"the history's state cannot be read ({error}); load one made by state_dict(), or "
                "leave the history out of the checkpoint to start it empty"
            ) from error
        self._records = deque(map(pickle.dumps, records), maxlen=self.limit)
        self._run = str(state_dict.get("run", self._run))
        if self._log is not None:
            self._log.resume(after=max(map(step_of, records), default=-math.inf))

    def _header(self) -> Record:
        version = package_version()
        return {"gapaware": version, "schema": SCHEMA, "run": self._run, "settings": self._settings}

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [pickle.loads(record) for record in list(self._records)[index]]
        if not -len(self) <= index < len(self):
            raise IndexError(
                f"history[{index}]: there are {len(self)} records, one for each snapshot looked at; "
                "the first comes some steps after training begins"
            )
        record: Record = pickle.loads(self._records[index])
        return record

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return map(pickle.loads, self._records)

    def __repr__(self) -> str:
        steps = f", steps {step_of(self[0]):g}-{step_of(self[-1]):g}" if self._records else ""
        return f"History({len(self)} of at most {self.limit} records{steps}, log_to={self.log_to})"

    def __getstate__(self) -> dict[str, Any]:
        settings = {"limit": self.limit, "log_to": self.log_to, "header": self._settings}
        return {"settings": settings, "state": self.state_dict()}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self.__init__(**pickled["settings"])  # type: ignore[misc]
        self.load_state_dict(pickled["state"])

    def __deepcopy__(self, memo: dict[int, Any]) -> History:
        copied = History(self.limit, None, self._settings)
        copied.load_state_dict(self.state_dict())
        return copied


def column(records: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    """One value per record, None where a record has none; a dot goes into a nested dict.

    Raises:
        KeyError: there are records, and none of them has that name.

    Example:
        >>> column([{"step": 5, "spectrum": {"gap": 0.5}}, {"step": 6, "spectrum": None}],
        ...        "spectrum.gap")
        [0.5, None]
    """
    records = list(records)
    values = [_lookup(record, name.split(".")) for record in records]
    if records and all(value is _MISSING for value in values):
        names = sorted({key for record in records for key in record})
        raise KeyError(f"no record has {name!r}; there are {', '.join(names)}")
    return [None if value is _MISSING else value for value in values]


def _lookup(record: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if record is None:
            return None
        if not isinstance(record, Mapping) or key not in record:
            return _MISSING
        record = record[key]
    return record


def _plain(value: Any) -> Any:
    """A copy out of plain Python values, which `torch.load(weights_only=True)` accepts."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # tensors and arrays; a scalar one gives a number
        try:
            listed = value.tolist()
        except (RuntimeError, TypeError, ValueError):  # a meta tensor has no values
            return repr(value)
        return repr(value) if isinstance(listed, complex) else _plain(listed)
    return repr(value)
