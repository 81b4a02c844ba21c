"""What the C library keeps of freed memory, given back to the system (glibc; elsewhere nothing is done).

glibc 2.36 cannot put an aligned block where one of the same size was freed, unless a neighbour is free too, and torch asks for
aligned blocks alone. What lives on in between, such as the records that torch.distributed keeps of its last 2,000 collectives,
pins a hole of the size of an activation each: under tensor parallelism a process grew by 20 MB a step.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

PAGE = mmap.PAGESIZE
SLACK = 32 * 2**20
"""Bytes by which the process may grow before the heap's holes are given back. That costs some milliseconds, and new pages for what
is used again."""


@cache
def _trim() -> Callable[[int], Any] | None:
    """malloc_trim; musl has none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim() -> None:
    """Give back every page of the heap that holds nothing."""
    found = _trim()
    if found is not None:
        found(0)


def resident() -> int:
    """Pages of this process in memory, in bytes; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0


class HeapWatch:
    """Trims the heap when the process has grown by `SLACK` beyond the least it was at a check since it was trimmed.

    Asked once a step, so that what a step allocates and frees does not count as growth.
    """

    def __init__(self) -> None:
        self._settled: int | None = None

    def check(self) -> None:
        size = resident()
        if self._settled is None:
            self._settled = size
        elif size > self._settled + SLACK:
            trim()
            self._settled = None
        else:
            self._settled = min(self._settled, size)
