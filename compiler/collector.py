"""Python's cyclic garbage collector, held off while graphs are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """No automatic collection inside (also as a decorator).

    Graphs are many small objects that all stay: the collector would go through them again and again, and find nothing. That took
    a tenth of the time of planning. What cycles there are, are found afterwards.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
