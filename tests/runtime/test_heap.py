"""A heap that grows is trimmed, and no sooner than it has grown."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from shardwright.runtime import heap


def test_trims_when_the_heap_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    size, trims = [100 * heap.SLACK], []
    library = (lambda pad: trims.append(size[0]), lambda: SimpleNamespace(arena=size[0]))
    monkeypatch.setattr(heap, "_library", lambda: library)
    watch = heap.HeapWatch()
    for grown in (heap.SLACK, 1, 0, -heap.SLACK, heap.SLACK + 1, heap.SLACK):
        size[0] += grown
        watch.check()
    assert trims == [101 * heap.SLACK + 1, 102 * heap.SLACK + 2]


@pytest.mark.parametrize("library", [None, (lambda pad: None, None)])
def test_does_nothing_where_the_library_cannot(monkeypatch: pytest.MonkeyPatch, library: object) -> None:
    monkeypatch.setattr(heap, "_library", lambda: library)
    heap.HeapWatch().check()
    heap.trim()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_knows_the_library_of_this_machine() -> None:
    found = heap._library()
    if found is not None and found[1] is not None:
        assert found[1]().arena > 0
