"""Python's cyclic garbage collector, held off while graphs are made."""

from __future__ import annotations

import gc
import linecache
from collections.abc import Iterator
from contextlib import contextmanager

from ..runtime.heap import trim


def give_back() -> None:
    """Collect what planning left, and return it to the system: graphs refer to each other in cycles, are as large as small models,
    and leave the heap full of holes that training's tensors do not fit."""
    for name in [name for name, entry in linecache.cache.items() if len(entry) == 1 or entry[1] is not None]:
        del linecache.cache[name]  # torch.export reads the sources of all that it goes through; those of graphs are in no file
    gc.collect()
    trim()


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
