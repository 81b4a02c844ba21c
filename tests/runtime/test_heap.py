"""A heap that grows is trimmed, and no sooner than it has grown."""

from __future__ import annotations

import sys

import pytest

from shardwright.runtime import heap


def test_trims_when_the_process_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    size, trims = [100 * heap.SLACK], []
    monkeypatch.setattr(heap, "resident", lambda: size[0])
    monkeypatch.setattr(heap, "_trim", lambda: lambda pad: trims.append(size[0]))
    watch = heap.HeapWatch()
    watch.check()
    for grown in (heap.SLACK, 1, -10 * heap.SLACK, -heap.SLACK, heap.SLACK, 1):
        size[0] += grown
        watch.check()
    assert trims == [101 * heap.SLACK + 1, 91 * heap.SLACK + 2], "the second counts from the first check after a trim"


def test_does_nothing_where_the_library_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_trim", lambda: None)
    heap.trim()
    monkeypatch.setattr(heap, "resident", lambda: 0)
    watch = heap.HeapWatch()
    watch.check()
    watch.check()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux")
def test_knows_what_the_process_holds() -> None:
    before = heap.resident()
    held = b"x" * (64 << 20)
    assert heap.resident() - before > len(held) // 2 > 0
