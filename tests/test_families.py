"""A few families of benchmarks/model_sweep.py, end to end: the sweep goes on working, and so do they."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks._families import FAMILIES
from benchmarks.model_sweep import notes_on, sweep

NAMES = ("mamba", "bloom", "llava", "fnet")
"""A recurrence; a custom autograd function; assertions on data; complex numbers."""


@pytest.mark.parametrize("name", NAMES)
def test_family(name: str) -> None:
    family = next(f for f in FAMILIES if f.name == name)
    if name == "mamba":  # each of its layers is a loop over tokens, a thousand nodes long
        family = replace(family, sizes={**family.sizes, "num_hidden_layers": 1})
    finding = sweep(family, quick=True)
    assert finding.captured == finding.planned == finding.equal == "", notes_on(finding)
    assert not finding.replicated_ops, notes_on(finding)
