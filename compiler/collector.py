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
    for name, entry in list(linecache.cache.items()):
        if len(entry) > 1 and entry[1] is not None:  # torch.export reads every file that it goes through; graphs are in none
            linecache.cache.pop(name, None)
    gc.collect()
    trim()


@contextmanager
def without_collection() -> Iterator[None]:
    """No automatic collection inside (also as a decorator).

    Graphs are many small objects that all stay: the collector would go through them again and again, and find nothing. That took
    a tenth of the time of planning. What cycles there are, a full collection finds afterwards.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            _age()
            gc.enable()


def _age() -> None:
    """Count all that was made so far as old, which it is: else the next collection of what is young goes through all of it, half a
    second for the graphs of a hundred layers. What the process itself holds frozen stays so."""
    if not gc.get_freeze_count():
        gc.freeze()
        gc.unfreeze()
