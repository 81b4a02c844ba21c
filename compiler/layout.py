"""Decide what a plan leaves open and later shapes must keep: where each parameter lives."""

from __future__ import annotations

from dataclasses import replace

from ..passes.graph_tools import Values
from ..passes.ops import use_communicator
from ..passes.types import Type
from .collector import without_collection
from .emit import Problem, coordinates_of, lower
from .plan import Plan
from .stages import stages_of_parameters


@without_collection()
def with_layout(problem: Problem, plan: Plan) -> Plan:
    """The plan with `layout` (tp) and `stage_of` (pp) filled in. Rank 0's coordinates stand for all."""
    if plan.mesh.size("pp") > 1 and not plan.stage_of:
        plan = replace(plan, stage_of=stages_of_parameters(problem.graph, plan.stages))
    if plan.mesh.size("tp") > 1 and not plan.layout:
        communicator = coordinates_of(plan, 0)
        with use_communicator(communicator):
            lowered = lower(problem, plan, communicator.indices, Values())
        found: dict[str, Type] = {}
        for key, type_ in lowered.placements["tp"].placeholders.items():
            if key.startswith("param."):
                found[key.removeprefix("param.")] = type_
        plan = replace(plan, layout=found)
    return plan
