"""Keeps memory that passes have given back with the process, where the C library would return it to the system at once.

glibc returns what is free at the end of its heap beyond 64 MB or less. The next pass then waits for the same pages, each of
which the system clears first: a fifth to a third of the time of a prepared EfficientNet-B0 on four images.

That is a setting of the whole process. So no more is kept than passes of the prepared models that are there need, and once
there are none, free memory goes back to the system as it would without them.
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
import weakref
from typing import Any

# Free bytes at the end of the heap that stay with the process at most.
MOST_FREE = 2**31 - 1
# Larger blocks are the system's in any case. It is also the most that glibc takes.
LARGEST_BLOCK = 32 * 2**20
# What glibc keeps by itself once it has met a block of that size.
_USUAL = 2 * LARGEST_BLOCK
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
_needed: dict[int, int] = {}  # bytes, by the object that asks for them
_changing = threading.RLock()  # a finalizer may come at any moment, also in this module


class FreedMemory:
    """Freed memory that stays with the process as long as this object lives.

    Where the user has told glibc something by environment variables, or where there is none, nothing happens.

    Args:
        number: bytes that are needed again. Of several such objects the one with the most counts.
    """

    def __init__(self, number: int = MOST_FREE) -> None:
        self.is_kept = _glibc() is not None
        if self.is_kept:
            with _changing:
                weakref.finalize(self, _forget, id(self)).atexit = False
                _needed[id(self)] = min(max(number, _USUAL), MOST_FREE)
                self.is_kept = _tell()


@functools.cache
def keep_freed_memory() -> FreedMemory:
    """Keep as much as there may be in a process of this package's own, as long as it lives."""
    return FreedMemory()


def _forget(key: int) -> None:
    library = _glibc()
    with _changing:
        if _needed.pop(key, None) is not None and library is not None:
            _tell()
            if not _needed:
                library.malloc_trim(0)


def _tell() -> bool:
    library = _glibc()
    assert library is not None
    kept = library.mallopt(_TRIM_THRESHOLD, max(_needed.values(), default=_USUAL))
    return bool(library.mallopt(_MMAP_THRESHOLD, LARGEST_BLOCK)) and bool(kept)


@functools.cache
def _glibc() -> Any:
    """Return the C library, None where it is not glibc or the user has told it what to keep."""
    chosen = any(name in os.environ for name in _VARIABLES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(OSError, AttributeError):  # of another C library
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  which others do not have
        return library
    return None
