"""The novels of Jane Austen, out of the R package `janeaustenr`.

Debian has it as `r-cran-janeaustenr`. R itself is not needed: unpack the package (`dpkg -x`) and point
`R_LIBS_SITE` at its `usr/lib/R/site-library`. `pip install rdata` reads its format.
"""

from __future__ import annotations

import functools
import gzip
import os
import zlib
from pathlib import Path
from typing import Any

LIBRARIES = ("/usr/lib/R/site-library", "/usr/local/lib/R/site-library")
# in the order of publication: the last tenth, which is held out, is of a novel of its own
NOVELS = (
    "sensesensibility",
    "prideprejudice",
    "mansfieldpark",
    "emma",
    "northangerabbey",
    "persuasion",
)


@functools.cache
def novels() -> str:
    """The six novels, four million characters, a line of the books on each line."""
    index, values = database(), database().with_suffix(".rdb").read_bytes()
    places = read(gzip.decompress(index.read_bytes()))["variables"]
    lines: list[str] = []
    for name in NOVELS:
        place, size = places[name]
        # four bytes of length come before what zlib made
        lines.extend(read(zlib.decompress(values[place + 4 : place + size])))
    return "\n".join(lines)


def database() -> Path:
    """The index of the package's data.

    Raises:
        FileNotFoundError: the package is not installed; the message says how to get it.
    """
    folders = [*os.environ.get("R_LIBS_SITE", "").split(os.pathsep), *LIBRARIES]
    for folder in filter(None, folders):
        if (path := Path(folder) / "janeaustenr" / "data" / "Rdata.rdx").exists():
            return path
    raise FileNotFoundError(
        f"no novels of Jane Austen in {folders}: apt install r-cran-janeaustenr, or unpack that package "
        "and set R_LIBS_SITE to its usr/lib/R/site-library"
    )


def read(serialized: bytes) -> Any:
    """What R serialized."""
    try:
        import rdata
    except ImportError as error:
        raise ModuleNotFoundError("to read what R wrote: pip install rdata") from error
    return rdata.conversion.convert(rdata.parser.parse_data(serialized, extension=".rds"))
