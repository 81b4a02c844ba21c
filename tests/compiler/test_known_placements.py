"""What ranks share of their placements changes nothing in their programs."""

from __future__ import annotations

from typing import Any

import pytest
from harness import problem_of
from programs import FAR, case, plan

from shardwright.compiler import emit as emission
from shardwright.compiler.emit import emit, emit_all
from shardwright.compiler.layout import with_layout
from shardwright.passes.types import balanced_sizes
from shardwright.runtime.emit_python import program_text

PLANS: dict[str, dict[str, Any]] = {
    "uneven samples and heads": {"dp_shard": 2, "tp": 3, "microbatches": 2},
    "any layouts": {"dp_shard": 2, "tp": 2, "zero": 3, "byte_price": 0.0, "topology": FAR},
    "stages": {"pp": 2, "tp": 2, "sequence_parallel": True, "microbatches": 2},
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("model", ["gpt", "mlp"])
def test_programs_are_as_if_each_rank_was_placed_by_itself(model: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, wanted = case(model), plan(**PLANS[name])
    problem = problem_of(made, balanced_sizes(made.batch, wanted.data_size))
    wanted = with_layout(problem, wanted)
    alone = [emit(problem, wanted, rank) for rank in range(wanted.mesh.world_size)]
    placed = 0
    place = emission.place

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal placed
        placed += 1
        return place(*args, **options)

    monkeypatch.setattr(emission, "place", counted)
    together = emit_all(problem, wanted)
    assert [*map(program_text, together)] == [*map(program_text, alone)]
    axes = len(wanted.mesh.axes) - ("pp" in wanted.mesh.axes) + (wanted.microbatches > 1)
    assert placed < axes * wanted.mesh.world_size
