"""A few families of benchmarks/model_sweep.py, end to end: the sweep goes on working, and so do they."""

from __future__ import annotations

import pytest

from benchmarks._families import FAMILIES
from benchmarks.model_sweep import notes_on, sweep

NAMES = ("mamba", "bloom", "llava", "fnet")
"""A recurrence; a custom autograd function; assertions on data; complex numbers."""


@pytest.mark.parametrize("name", NAMES)
def test_family(name: str) -> None:
    finding = sweep(next(f for f in FAMILIES if f.name == name), quick=True)
    assert finding.captured == finding.planned == finding.equal == "", notes_on(finding)
    assert not finding.replicated_ops, notes_on(finding)
