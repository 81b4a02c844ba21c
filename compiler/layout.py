"""Decide what a plan leaves open and later shapes must keep: where each parameter lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..passes.graph_tools import op_calls
from .collector import without_collection
from .emit import Problem, lower_for
from .place import Placement
from .plan import Plan
from .stages import StageCuts
from .stream import stream


def with_places(plan: Plan, placement: Placement | None, cuts: Callable[[], StageCuts]) -> Plan:
    """The plan with `layout`, as a placement over tp has it, and `stage_of`, by the `cuts` of its graph, where it has none."""
    if plan.stages > 1 and not plan.stage_of:
        plan = replace(plan, stage_of=cuts().parameters(plan.stages))
    if placement is None or plan.layout:
        return plan
    types = placement.placeholders.items()
    return replace(plan, layout={key.removeprefix("param."): type_ for key, type_ in types if key.startswith("param.")})


@without_collection()
def with_layout(problem: Problem, plan: Plan) -> Plan:
    """Of a plan that was not searched for (`choose` fills its own in). Rank 0's coordinates stand for all."""
    placement = None
    if plan.mesh.size("tp") > 1 and not plan.layout:
        placement = lower_for(problem, plan).placements["tp"]
    gm = problem.graph
    return with_places(plan, placement, lambda: StageCuts(gm, stream(op_calls(gm))))
