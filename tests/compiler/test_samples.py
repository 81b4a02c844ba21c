"""Cuts of samples: where micro-batches have fewer than a tensor axis has ranks, plans count on none."""

from __future__ import annotations

import pytest
import torch
import zoo
from programs import FAR, NEAR, machine

from shardwright import Strategy, Topology, emit, plan
from shardwright.compiler.memory import program_memory
from shardwright.compiler.traffic import received

ROWS, LENGTH = 8, 64


@pytest.mark.parametrize("topology", [NEAR, FAR, machine(1e9)], ids=["near", "far", "slow"])
@pytest.mark.parametrize("microbatches", [1, 4, 8])
def test_what_is_predicted_is_emitted(topology: Topology, microbatches: int) -> None:
    """8 samples over 4 ranks, in micro-batches of 8, which can be cut, and of 2 and of 1, which cannot."""
    with torch.device("meta"):
        model = zoo.HandGPT(width=128, heads=8, layers=3, vocabulary=512, length=LENGTH)
    tokens = torch.empty(ROWS, LENGTH, dtype=torch.int64, device="meta")
    strategy = Strategy(tp=4, layouts="any", microbatches=microbatches)
    planned = plan(model, topology, example_inputs={"tokens": tokens, "targets": tokens}, strategy=strategy, batch="global")
    found, program = planned.plan.predicted, emit(planned, 0)
    assert found is not None
    assert found.traffic == pytest.approx(received(program), rel=1e-3)
    assert found.peak_bytes == pytest.approx(program_memory(program).peak, rel=0.05)
