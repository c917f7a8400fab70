"""Run a function on the threads that torch works with.

After each operation they spin for a few milliseconds in wait of the next one, so other threads would have
to share their cores with them.
"""

import ctypes
import os
from functools import lru_cache
from threading import Thread
from typing import Any

import torch


def on_threads(entry: Any, argument: int, *, threads: int, kept: object) -> None:
    """Call a function on several threads at once, and wait for all of them.

    Args:
        entry: a C function, as `ctypes` has it, of one address; a Python function would hold all up.
        argument: address for each call.
        threads: how many calls; perhaps fewer, so the function has to find out what is left to do.
        kept: what is at addresses that the function has, so that no exception here can free it.
    """
    threads = min(threads, torch.get_num_threads())
    parallel = _parallel()
    if threads == 1:
        entry(argument)
    elif parallel is not None:
        parallel(ctypes.cast(entry, ctypes.c_void_p), argument, threads, 0)
    else:
        work = [Thread(target=_call, args=(entry, argument, kept)) for _ in range(threads - 1)]
        for thread in work:
            thread.start()
        entry(argument)
        for thread in work:
            thread.join()


def _call(entry: Any, argument: int, kept: object) -> None:
    entry(argument)


@lru_cache
def _parallel() -> Any:
    """What the compiler makes of `#pragma omp parallel`, of GNU's OpenMP if torch has loaded that."""
    try:
        library = ctypes.CDLL("libgomp.so.1", os.RTLD_NOW | os.RTLD_NOLOAD)
        parallel = library.GOMP_parallel
    except (OSError, AttributeError):  # another system, or another OpenMP
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel
