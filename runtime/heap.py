"""What the C library keeps of freed memory, given back to the system (glibc; elsewhere nothing is done).

glibc 2.36 cannot put an aligned block where one of the same size was freed, unless a neighbour is free too, and torch asks for
aligned blocks alone. What lives on in between, such as the records that torch.distributed keeps of its last 2,000 collectives,
pins a hole of the size of an activation each: under tensor parallelism a process grew by 20 MB a step.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

SLACK = 32 * 2**20
"""Bytes by which the heap may grow before its holes are given back. That costs some milliseconds, and new pages for what is used
again."""


class _MallInfo2(ctypes.Structure):
    """glibc's struct mallinfo2 (malloc.h)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    )


@cache
def _library() -> tuple[Callable[[int], Any], Callable[[], Any] | None] | None:
    """malloc_trim and, from glibc 2.33 on, mallinfo2."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    trim = getattr(library, "malloc_trim", None)  # musl has none
    info = getattr(library, "mallinfo2", None)
    if info is not None:
        info.restype = _MallInfo2
    return None if trim is None else (trim, info)


def trim() -> None:
    """Give back every page of the heap that holds nothing."""
    library = _library()
    if library is not None:
        library[0](0)


class HeapWatch:
    """Trims the heap when it has grown by `SLACK` beyond what it was when trimmed last, or when the watch began."""

    def __init__(self) -> None:
        self._settled = self._size()

    def _size(self) -> int:
        """Bytes of all heaps, used or free; 0 where it cannot be known."""
        library = _library()
        return library[1]().arena if library is not None and library[1] is not None else 0

    def check(self) -> None:
        size = self._size()
        if size > self._settled + SLACK:
            trim()
            self._settled = size
