"""Ranks whose programs would not meet find it out before they run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from harness import emit_all
from programs import case, plan, shares

from shardwright.compiler.agreement import same_collectives
from shardwright.passes.check_schedules import collectives_of
from shardwright.runtime.errors import MismatchError
from shardwright.runtime.faults import CommunicatorControl
from shardwright.runtime.lockstep import World, run_ranks
from shardwright.runtime.program import RankProgram


def programs(model: str = "mlp", **options: int) -> list[RankProgram]:
    found, wanted = case(model), plan(**options)
    return emit_all(found, wanted, shares(found, wanted))


def agree(given: list[RankProgram]) -> None:
    def body(rank: int, world: World) -> None:
        same_collectives(CommunicatorControl(world.communicator(given[rank].mesh, rank)), given[rank])

    run_ranks(len(given), body)


@pytest.mark.parametrize("options", [{"dp_shard": 2, "zero": 3, "tp": 2}, {"dp_replicate": 4}, {"pp": 2, "tp": 2}], ids=str)
def test_programs_of_one_plan_meet(options: dict[str, int]) -> None:
    agree(programs(**options))


def test_collectives_in_another_order_are_refused_on_every_rank() -> None:
    """As one rank's own rewrites might have it: two gathers of one axis swapped."""
    given = programs("llama", dp_shard=2, zero=3, tp=2)
    graph = given[3].graphs["forward"].graph.graph
    first, second = [n for n in graph.nodes if "all_gather" in str(n.target) and "dp_shard" in map(str, n.args)][:2]
    assert not any(n.op == "call_function" for n in second.all_input_nodes), "a parameter alone"
    first.prepend(second)
    assert collectives_of(given[3])["dp_shard"] != collectives_of(given[1])["dp_shard"]
    with pytest.raises(MismatchError, match=r"would not meet in their collectives over 'dp_shard':\n  rank 1: .*\n  rank 3: "):
        agree(given)


def test_a_collective_too_few() -> None:
    given = programs(dp_replicate=4)
    given[2] = replace(given[2], schedule=tuple(i for i in given[2].schedule if i.kind != "all_reduce"))
    with pytest.raises(MismatchError, match=r"rank 0: .*all_reduce.*\n  rank 2: nothing more"):
        agree(given)
